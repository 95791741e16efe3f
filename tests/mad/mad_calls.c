/* SPDX-License-Identifier: MIT */
/*
 * Sockets: what one may hear there, from a caller and from somebody who was asked.
 */
#include "mad.h"

#include "member.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define IDLE 48
#define FDS_MOST 250 /* the kernel takes 253 */
#define FLOOD_NS 30000000ull

/* ---- descriptors nobody wants ------------------------------------------------------------------------------- */

static int sized_memfd(uint64_t nbytes, int seals)
{
	int fd = ksm_os_memfd("ksmalloc store");
	if (fd >= 0 && (ftruncate(fd, (off_t)nbytes) || (seals && fcntl(fd, F_ADD_SEALS, seals))))
		return close(fd), -1;
	return fd;
}

static int a_fifo(struct mad_state *mad)
{
	int directory = mad->member->peer.fds.directory;
	mkfifoat(directory, "fifo", 0600);
	int fd = openat(directory, "fifo", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	unlinkat(directory, "fifo", 0);
	return fd;
}

static int odd_descriptor(struct mad_state *mad)
{
	const struct ksm_layout *layout = &mad->member->peer.layout;
	static const char *const paths[] = {"/",         "/proc/self/mem", "/proc/self/status", "/dev/null",
					    "/dev/zero", "/dev/full",      "/dev/urandom",      "/etc/passwd"};
	uint64_t control = layout->total, store = layout->frames * MAD_PAGE;
	int pair[2];
	switch (mad_below(&mad->random, 10)) {
	case 0:
		if (pipe2(pair, O_CLOEXEC))
			return -1;
		close(pair[1]);
		return pair[0];
	case 1:
		return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	case 2:
		return epoll_create1(EPOLL_CLOEXEC);
	case 3:
		return a_fifo(mad);
	case 4:
		return sized_memfd(mad_below(&mad->random, 2) ? control : store, 0);
	case 5:
		return sized_memfd(ksm_bitmap_bytes(layout->frames), F_SEAL_SHRINK | F_SEAL_GROW);
	case 6:
		return sized_memfd(control, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	default:
		return open(paths[mad_below(&mad->random, 8)], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	}
}

static void send_with(int fd, const void *message, size_t nbytes, const int *fds, size_t nfds)
{
	static union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int) * FDS_MOST)];
	} control;
	struct iovec iov = {.iov_base = (void *)(uintptr_t)message, .iov_len = nbytes};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	if (nfds) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * nfds);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		*c = (struct cmsghdr){
			.cmsg_len = CMSG_LEN(sizeof(int) * nfds), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(c), fds, sizeof(int) * nfds);
	}
	if (sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		return; /* they hung up, or their ears are full */
}

static struct ksm_message message_for(struct mad_state *mad, uint32_t kind)
{
	struct ksm_message message = {.magic = KSM_MAGIC,
				      .kind = kind,
				      .slot = (uint32_t)mad_random(&mad->random),
				      .layout = ksm_layout_hash()};
	memcpy(message.id, mad->member->peer.seat.bitmap->id, sizeof(message.id));
	if (mad_below(&mad->random, 2))
		message.slot = (uint32_t)mad_below(&mad->random, MAD_HONEST + 4);
	if (mad_below(&mad->random, 8) == 0)
		message.layout++;
	return message;
}

/* ---- calling ------------------------------------------------------------------------------------------------ */

/* A peer's socket, or what a peer listens on for its own threads only: the kernel lists the names. */
static int call_somebody(struct mad_state *mad)
{
	char name[120], line[256];
	if (mad_below(&mad->random, 4)) {
		snprintf(name, sizeof(name), "peer-%u", (unsigned)mad_below(&mad->random, MAD_HONEST + 2));
		return ksm_os_connect(mad->member->peer.fds.directory, name);
	}
	FILE *list = fopen("/proc/net/unix", "re");
	int fd = -ENOENT;
	for (unsigned skip = (unsigned)mad_below(&mad->random, 8); list && fgets(line, sizeof(line), list);) {
		const char *at = strstr(line, "@ksmalloc-");
		if (!at || sscanf(at + 1, "%100s", name) != 1)
			continue;
		if (fd >= 0)
			close(fd);
		fd = ksm_os_connect(-1, name);
		if (skip-- == 0)
			break;
	}
	if (list)
		fclose(list);
	return fd;
}

static void flood(struct mad_state *mad)
{
	uint64_t until = mad_now_ns() + FLOOD_NS;
	struct ksm_message wake = message_for(mad, KSM_MESSAGE_WAKE);
	while (mad_now_ns() < until) {
		int fd = call_somebody(mad);
		if (fd >= 0 && mad_below(&mad->random, 2))
			send_with(fd, &wake, sizeof(wake), NULL, 0);
		ksm_os_close(fd);
		mad_add(&mad->totals->ways[MAD_CALLS], 1);
	}
}

void mad_call(struct mad_state *mad)
{
	static int idle[IDLE], next;
	unsigned char garbage[2 * MAD_PAGE];
	int fds[FDS_MOST], fd;
	size_t nfds = 0;
	uint64_t what = mad_below(&mad->random, 8);
	if (what == 0) {
		flood(mad);
		return;
	}
	fd = call_somebody(mad);
	if (fd < 0)
		return;
	for (size_t i = 0; i < sizeof(garbage); i++)
		garbage[i] = (unsigned char)mad_random(&mad->random);
	struct ksm_message message = message_for(mad, (uint32_t)mad_below(&mad->random, 7));
	if (what == 1) { /* somebody who says nothing */
		if (idle[next % IDLE] > 0)
			close(idle[next % IDLE]);
		idle[next++ % IDLE] = fd;
		mad_add(&mad->totals->ways[MAD_CALLS], 1);
		return;
	}
	if (what == 2 || what == 3) {
		size_t most = what == 2 ? FDS_MOST : 4;
		int one = odd_descriptor(mad);
		while (one >= 0 && nfds < most)
			fds[nfds++] = one;
	}
	for (uint64_t n = 1 + mad_below(&mad->random, 4); n > 0; n--) {
		if (mad_below(&mad->random, 2))
			send_with(fd, garbage, mad_below(&mad->random, sizeof(garbage)), fds, nfds);
		else
			send_with(fd, &message, what == 4 ? mad_below(&mad->random, sizeof(message)) : sizeof(message),
				  fds, nfds);
	}
	if (nfds)
		close(fds[0]);
	close(fd);
	mad_add(&mad->totals->ways[MAD_CALLS], 1);
}

/* ---- answering ---------------------------------------------------------------------------------------------- */

void mad_answer(struct mad_state *mad)
{
	struct ksm_peer *peer = &mad->member->peer;
	int client = ksm_os_accept(mad->member->exchange.listener), fds[4];
	size_t nfds = 0;
	if (client < 0)
		return;
	struct ksm_message request, reply = message_for(mad, KSM_MESSAGE_ANSWER);
	size_t none = 0;
	for (unsigned tries = 0; tries < 20 && ksm_os_receive(client, &request, sizeof(request), NULL, &none) < 0;
	     tries++)
		ksm_os_sleep_ns(100000);
	int unsealed = sized_memfd(peer->layout.frames * MAD_PAGE, 0);
	switch (mad_below(&mad->random, 8)) {
	case 0:
		break; /* the promise of descriptors, and none */
	case 1:
		reply.status = (int32_t)mad_random(&mad->random);
		break;
	case 2: /* a store that will shrink */
		fds[nfds++] = peer->fds.control;
		fds[nfds++] = unsealed;
		break;
	case 3:
		fds[nfds++] = peer->fds.control;
		fds[nfds++] = peer->fds.control;
		break;
	case 4: /* somebody's bitmap, but whose? */
		fds[nfds++] = peer->others[mad_below(&mad->random, MAD_HONEST)].fd;
		break;
	case 5:
		reply.kind++;
		break;
	default:
		for (uint64_t n = 1 + mad_below(&mad->random, 3); n > 0; n--)
			fds[nfds++] = odd_descriptor(mad);
	}
	for (size_t i = 0; i < nfds; i++)
		if (fds[i] <= 0)
			nfds = 0;
	if (mad_below(&mad->random, 8))
		send_with(client, &reply, mad_below(&mad->random, 8) ? sizeof(reply) : 5, fds, nfds);
	close(client);
	for (size_t i = 0; i < nfds; i++) {
		bool ours = fds[i] == peer->fds.control || fds[i] == unsealed;
		for (ksm_slotno slot = 0; slot < KSM_PEERS_MAX; slot++)
			ours |= fds[i] == peer->others[slot].fd && peer->others[slot].bitmap;
		if (!ours)
			close(fds[i]);
	}
	if (unsealed >= 0) {
		ksm_os_sleep_ns(5000000);
		if (ftruncate(unsealed, 0))
			mad_die("ftruncate", errno);
		close(unsealed);
	}
	mad_add(&mad->totals->ways[MAD_ANSWERS], 1);
}
