/* SPDX-License-Identifier: MIT */
/*
 * DOC: Sockets
 *
 * Unix sockets that carry descriptors between peers: SOCK_SEQPACKET, so that a message is whole or absent
 * and descriptors belong to one message. Names are relative to the rendezvous directory; they are reached
 * through /proc/thread-self/fd/N/name (the scanner has a table of its own), which also lifts the limit of 108
 * bytes on a path.
 */
#include "os.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int address_of(int dirfd, const char *name, struct sockaddr_un *out)
{
	memset(out, 0, sizeof(*out));
	out->sun_family = AF_UNIX;
	if (dirfd < 0) /* abstract: the first byte is zero, the rest of the room belongs to the name */
		return snprintf(out->sun_path + 1, sizeof(out->sun_path) - 1, "%s", name) > 0 ? 0 : -EINVAL;
	int n = snprintf(out->sun_path, sizeof(out->sun_path), "/proc/thread-self/fd/%d/%s", dirfd, name);
	return n > 0 && (size_t)n < sizeof(out->sun_path) ? 0 : -ENAMETOOLONG;
}

static int socket_new(void)
{
	KSM_FAULT(SOCKET);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	return fd < 0 ? -errno : fd;
}

static int hear(int fd)
{
	KSM_FAULT(LISTEN);
	return listen(fd, 64) ? -errno : 0;
}

int ksm_os_listen(int dirfd, const char *name)
{
	KSM_FAULT(BIND);
	struct sockaddr_un address;
	int r = address_of(dirfd, name, &address);
	int fd = r ? r : socket_new();
	if (fd < 0)
		return fd;
	r = bind(fd, (struct sockaddr *)&address, sizeof(address)) ? -errno : hear(fd);
	if (!r)
		return fd;
	close(fd);
	return r;
}

int ksm_os_connect(int dirfd, const char *name)
{
	KSM_FAULT(CONNECT);
	struct sockaddr_un address;
	int r = address_of(dirfd, name, &address);
	int fd = r ? r : socket_new();
	if (fd < 0)
		return fd;
	do
		r = connect(fd, (struct sockaddr *)&address, sizeof(address));
	while (r && errno == EINTR);
	if (r) {
		r = -errno;
		close(fd);
		return r;
	}
	return fd;
}

int ksm_os_accept(int fd)
{
	KSM_FAULT(ACCEPT);
	int r = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	return r < 0 ? -errno : r;
}

int ksm_os_send(int fd, const void *message, size_t nbytes, const int *fds, size_t nfds)
{
	KSM_FAULT(SEND);
	if (nfds > KSM_OS_FDS_MAX)
		return -EINVAL;
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int) * KSM_OS_FDS_MAX)];
	} control = {0};
	struct iovec iov = {.iov_base = (void *)message, .iov_len = nbytes};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	if (nfds) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * nfds);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * nfds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * nfds);
	}
	ssize_t n;
	do
		n = sendmsg(fd, &msg, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

int ksm_os_receive(int fd, void *message, size_t room, int *fds, size_t *nfds)
{
	size_t space = *nfds;
	*nfds = 0;
	KSM_FAULT(RECEIVE);
	if (space > KSM_OS_FDS_MAX)
		return -EINVAL;
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int) * KSM_OS_FDS_MAX)];
	} control = {0};
	struct iovec iov = {.iov_base = message, .iov_len = room};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control.bytes,
			     .msg_controllen = sizeof(control.bytes)};
	ssize_t n;
	do
		n = recvmsg(fd, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		const int *got = (const int *)CMSG_DATA(c);
		for (size_t i = 0; i < count; i++) {
			if (*nfds < space)
				fds[(*nfds)++] = got[i];
			else
				close(got[i]); /* more than was agreed on */
		}
	}
	if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		for (size_t i = 0; i < *nfds; i++)
			close(fds[i]);
		*nfds = 0;
		return -EMSGSIZE;
	}
	return (int)n;
}

int ksm_os_peer_uid(int fd, uid_t *uid, pid_t *pid)
{
	KSM_FAULT(PEER_USER);
	struct ucred credentials;
	socklen_t size = sizeof(credentials);
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size))
		return -errno;
	*uid = credentials.uid;
	*pid = credentials.pid;
	return 0;
}
