/* SPDX-License-Identifier: MIT */
/*
 * The ways in which bytes come into a page: stores, and system calls that write into the caller's memory.
 */
#include "soak.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define PATIENCE_S 30 /* a datagram that does not come in this time was swallowed */

const char *const soak_way_names[SOAK_WAYS] = {
	[SOAK_STORE] = "store", [SOAK_PIPE] = "pipe",     [SOAK_TCP] = "tcp",
	[SOAK_UDP] = "udp",     [SOAK_UNIX] = "unix",     [SOAK_READV] = "readv",
	[SOAK_PREAD] = "pread", [SOAK_DIRECT] = "direct", [SOAK_EVENTFD] = "eventfd",
};

unsigned char soak_patterns[SOAK_STATES][SOAK_SECTOR];

void soak_patterns_init(void)
{
	uint64_t one = 1; /* what an eventfd gives */
	for (size_t i = 0; i < SOAK_SECTOR; i++)
		soak_patterns[1][i] = (unsigned char)(1 + i * 7 % 251);
	memcpy(soak_patterns[1], &one, sizeof(one));
}

int soak_file(const char *directory, int *direct)
{
	char path[4096], *buffer = NULL;
	if (snprintf(path, sizeof(path), "%s/soak-XXXXXX", directory) >= (int)sizeof(path))
		soak_die(directory, ENAMETOOLONG);
	int fd = mkstemp(path);
	if (fd < 0)
		soak_die(directory, errno);
	if (write(fd, soak_patterns, sizeof(soak_patterns)) != sizeof(soak_patterns) || fsync(fd))
		soak_die("write", errno);
	*direct = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	unlink(path);
	if (posix_memalign((void **)&buffer, 4096, 4096))
		soak_die("posix_memalign", ENOMEM);
	if (*direct >= 0 && pread(*direct, buffer, SOAK_SECTOR, SOAK_SECTOR) != SOAK_SECTOR) {
		close(*direct); /* larger sectors than ours */
		*direct = -1;
	}
	free(buffer);
	return fd;
}

static void open_inet(int type, int *in, int *out)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t nbytes = sizeof(at);
	int first = socket(AF_INET, type, 0), second = socket(AF_INET, type, 0);
	if (first < 0 || second < 0 || bind(first, (struct sockaddr *)&at, nbytes) ||
	    getsockname(first, (struct sockaddr *)&at, &nbytes))
		soak_die("socket", errno);
	if (type == SOCK_STREAM && listen(first, 1))
		soak_die("listen", errno);
	if (connect(second, (struct sockaddr *)&at, nbytes))
		soak_die("connect", errno);
	*out = second;
	*in = first;
	if (type == SOCK_STREAM) {
		*in = accept(first, NULL, NULL);
		if (*in < 0)
			soak_die("accept", errno);
		close(first);
	}
}

void soak_ways_open(struct soak_ways *ways, const struct soak_options *options)
{
	int pair[2];
	struct timeval patience = {.tv_sec = PATIENCE_S};
	memset(ways, -1, sizeof(*ways));
	for (enum soak_way way = SOAK_PIPE; way <= SOAK_READV; way++) {
		if (way != SOAK_PIPE && way != SOAK_READV)
			continue;
		if (pipe(pair))
			soak_die("pipe", errno);
		ways->in[way] = pair[0];
		ways->out[way] = pair[1];
	}
	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, pair))
		soak_die("socketpair", errno);
	ways->in[SOAK_UNIX] = pair[0];
	ways->out[SOAK_UNIX] = pair[1];
	open_inet(SOCK_STREAM, &ways->in[SOAK_TCP], &ways->out[SOAK_TCP]);
	open_inet(SOCK_DGRAM, &ways->in[SOAK_UDP], &ways->out[SOAK_UDP]);
	for (enum soak_way way = SOAK_TCP; way <= SOAK_UNIX; way++)
		if (setsockopt(ways->in[way], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
			soak_die("setsockopt", errno);
	ways->in[SOAK_EVENTFD] = ways->out[SOAK_EVENTFD] = eventfd(0, 0);
	if (ways->in[SOAK_EVENTFD] < 0)
		soak_die("eventfd", errno);
	ways->in[SOAK_PREAD] = dup(options->file);
	ways->in[SOAK_DIRECT] = options->direct < 0 ? -1 : dup(options->direct);
}

void soak_ways_close(struct soak_ways *ways)
{
	for (enum soak_way way = 0; way < SOAK_WAYS; way++) {
		if (ways->in[way] >= 0)
			close(ways->in[way]);
		if (ways->out[way] >= 0 && ways->out[way] != ways->in[way])
			close(ways->out[way]);
	}
}

static ssize_t receive(const struct soak_ways *ways, enum soak_way way, char *to, size_t nbytes, unsigned state)
{
	int in = ways->in[way];
	struct iovec halves[2] = {{to, nbytes / 2}, {to + nbytes / 2, nbytes / 2}};
	switch (way) {
	case SOAK_TCP:
		return recv(in, to, nbytes, MSG_WAITALL);
	case SOAK_UDP:
	case SOAK_UNIX:
		return recv(in, to, nbytes, 0);
	case SOAK_READV:
		return readv(in, halves, 2);
	case SOAK_PREAD:
	case SOAK_DIRECT:
		return pread(in, to, nbytes, (off_t)state * SOAK_SECTOR);
	default:
		return read(in, to, nbytes);
	}
}

enum soak_way soak_write(const struct soak_ways *ways, enum soak_way way, char *to, size_t nbytes, unsigned state)
{
	if ((way == SOAK_EVENTFD && (state == 0 || nbytes != SOAK_WORD)) ||
	    (way == SOAK_DIRECT && (ways->in[way] < 0 || nbytes != SOAK_SECTOR)))
		way = SOAK_PIPE;
	if (way == SOAK_STORE) {
		memcpy(to, soak_patterns[state], nbytes);
		return way;
	}
	if (ways->out[way] >= 0 && write(ways->out[way], soak_patterns[state], nbytes) != (ssize_t)nbytes)
		soak_die(soak_way_names[way], errno);
	ssize_t got;
	do {
		got = receive(ways, way, to, nbytes, state);
	} while (got < 0 && errno == EINTR);
	if (got != (ssize_t)nbytes)
		soak_die(soak_way_names[way], got < 0 ? errno : EIO);
	return way;
}
