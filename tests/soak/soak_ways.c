/* SPDX-License-Identifier: MIT */
/*
 * The ways in which bytes come into a page: stores, and system calls that write into the caller's memory.
 */
#include "soak.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define PATIENCE_S 30 /* a datagram that does not come in this time was swallowed */

const char *const soak_way_names[SOAK_WAYS] = {
	[SOAK_STORE] = "store", [SOAK_PIPE] = "pipe",   [SOAK_TCP] = "tcp",          [SOAK_UDP] = "udp",
	[SOAK_UNIX] = "unix",   [SOAK_READV] = "readv", [SOAK_PREAD] = "pread",      [SOAK_DIRECT] = "direct",
	[SOAK_VM] = "vm",       [SOAK_RING] = "uring",  [SOAK_FIXED] = "registered", [SOAK_EVENTFD] = "eventfd",
};

unsigned char soak_patterns[SOAK_STATES][SOAK_SECTOR];

void soak_patterns_init(void)
{
	uint64_t one = 1; /* what an eventfd gives */
	for (size_t i = 0; i < SOAK_SECTOR; i++)
		soak_patterns[1][i] = (unsigned char)(1 + i * 7 % 251);
	memcpy(soak_patterns[1], &one, sizeof(one));
}

off_t soak_offset(unsigned states)
{
	return (off_t)states * SOAK_PIECES * SOAK_SECTOR;
}

int soak_file(const char *directory, int *direct)
{
	char path[4096], *buffer = NULL;
	if (snprintf(path, sizeof(path), "%s/soak-XXXXXX", directory) >= (int)sizeof(path))
		soak_die(directory, ENAMETOOLONG);
	int fd = mkstemp(path);
	if (fd < 0)
		soak_die(directory, errno);
	for (unsigned states = 0; states < 1 << SOAK_PIECES; states++)
		for (unsigned i = 0; i < SOAK_PIECES; i++)
			if (write(fd, soak_patterns[states >> i & 1], SOAK_SECTOR) != SOAK_SECTOR)
				soak_die("write", errno);
	if (fsync(fd))
		soak_die("fsync", errno);
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

static void open_pipe(struct soak_ways *ways, enum soak_way way)
{
	int pair[2];
	if (pipe(pair))
		soak_die("pipe", errno);
	ways->in[way] = pair[0];
	ways->out[way] = pair[1];
}

void soak_ways_open(struct soak_ways *ways, const struct soak_options *options, int hand)
{
	int pair[2];
	struct timeval patience = {.tv_sec = PATIENCE_S};
	memset(ways, -1, sizeof(*ways));
	ways->hand = options->has[SOAK_VM] ? hand : -1;
	open_pipe(ways, SOAK_PIPE);
	open_pipe(ways, SOAK_READV);
	open_pipe(ways, SOAK_RING);
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
	soak_ring_close(&ways->ring);
	for (enum soak_way way = 0; way < SOAK_WAYS; way++) {
		if (ways->in[way] >= 0)
			close(ways->in[way]);
		if (ways->out[way] >= 0 && ways->out[way] != ways->in[way])
			close(ways->out[way]);
	}
}

/* ---- writing --------------------------------------------------------------------------------------------- */

static size_t size_of(const struct soak_write *write)
{
	return write->count * write->nbytes;
}

/* All bytes of a write, one behind the other. */
static void flatten(const struct soak_write *write, unsigned char *bytes)
{
	for (unsigned i = 0; i < write->count; i++)
		memcpy(bytes + i * write->nbytes, soak_patterns[soak_new_state(write, i)], write->nbytes);
}

static off_t offset_of(const struct soak_write *write)
{
	unsigned states = 0;
	for (unsigned i = 0; i < write->count; i++)
		states |= soak_new_state(write, i) << i;
	return soak_offset(states);
}

/* Where the bytes are to go; one piece in two halves. Returns how many there are. */
static int targets(const struct soak_write *write, struct iovec *to)
{
	size_t half = write->nbytes / 2;
	for (unsigned i = 0; i < write->count; i++)
		to[i] = (struct iovec){write->pieces[i].at, write->nbytes};
	if (write->count > 1)
		return (int)write->count;
	to[0].iov_len = half;
	to[1] = (struct iovec){write->pieces[0].at + half, write->nbytes - half};
	return 2;
}

static void send_bytes(const struct soak_ways *ways, enum soak_way way, const struct soak_write *what)
{
	unsigned char bytes[SOAK_PIECES * SOAK_SECTOR];
	flatten(what, bytes);
	if (write(ways->out[way], bytes, size_of(what)) != (ssize_t)size_of(what))
		soak_die(soak_way_names[way], errno);
}

/* In turn: from the page cache at once; from the same by a thread of the kernel's; from a pipe that is still empty. */
static ssize_t receive_by_ring(struct soak_ways *ways, const struct soak_write *write, enum soak_way *source)
{
	bool fixed = write->way == SOAK_FIXED;
	uint32_t kind = ways->turn++ % (fixed ? 4 : 3);
	int file = ways->in[SOAK_PREAD];
	*source = kind == 2 ? SOAK_RING : SOAK_PREAD;
	if (kind == 2) {
		soak_ring_submit(&ways->ring, ways->in[SOAK_RING], write->pieces[0].at, write->nbytes, -1, fixed,
				 false);
		send_bytes(ways, SOAK_RING, write);
		return soak_ring_wait(&ways->ring);
	}
	if (kind == 3 && ways->in[SOAK_DIRECT] >= 0 && write->nbytes == SOAK_SECTOR)
		file = ways->in[SOAK_DIRECT];
	soak_ring_submit(&ways->ring, file, write->pieces[0].at, write->nbytes, offset_of(write), fixed, kind == 1);
	return soak_ring_wait(&ways->ring);
}

static ssize_t receive_once(const struct soak_ways *ways, const struct soak_write *write)
{
	int in = ways->in[write->way];
	struct iovec to[SOAK_PIECES];
	int count = targets(write, to);
	struct msghdr message = {.msg_iov = to, .msg_iovlen = (size_t)count};
	switch (write->way) {
	case SOAK_TCP:
		return recvmsg(in, &message, MSG_WAITALL);
	case SOAK_UDP:
	case SOAK_UNIX:
		return write->count > 1 ? recvmsg(in, &message, 0) : recv(in, write->pieces[0].at, write->nbytes, 0);
	case SOAK_READV:
		return readv(in, to, count);
	case SOAK_PREAD:
	case SOAK_DIRECT:
		if (write->count > 1)
			return preadv(in, to, count, offset_of(write));
		return pread(in, write->pieces[0].at, write->nbytes, offset_of(write));
	default:
		return read(in, write->pieces[0].at, write->nbytes);
	}
}

static ssize_t receive(const struct soak_ways *ways, const struct soak_write *write)
{
	ssize_t got;
	if (ways->out[write->way] >= 0)
		send_bytes(ways, write->way, write);
	do {
		got = receive_once(ways, write);
	} while (got < 0 && errno == EINTR);
	return got < 0 ? -errno : got;
}

/* ---- after a call that was refused ------------------------------------------------------------------------- */

/* Read what it left in a pipe or stream: exactly what it did not deliver. A refused message is gone, or still there. */
static void drain(const struct soak_ways *ways, enum soak_way source, const struct soak_write *write, ssize_t got)
{
	unsigned char bytes[SOAK_PIECES * SOAK_SECTOR], bounce[SOAK_PIECES * SOAK_SECTOR];
	size_t from = got > 0 ? (size_t)got : 0, rest = size_of(write) - from;
	bool stream = source == SOAK_PIPE || source == SOAK_READV || source == SOAK_TCP || source == SOAK_RING;
	struct pollfd one = {.fd = ways->in[source], .events = POLLIN};
	int ready;
	if (ways->out[source] < 0)
		return;
	do {
		ready = poll(&one, 1, stream ? PATIENCE_S * 1000 : 0);
	} while (ready < 0 && errno == EINTR);
	if (ready == 0) {
		if (stream)
			soak_complain(true, "%s: a refused call has swallowed %zu bytes", soak_way_names[source], rest);
		return;
	}
	flatten(write, bytes);
	ssize_t left = read(one.fd, bounce, sizeof(bounce));
	if (left != (ssize_t)rest || memcmp(bounce, bytes + from, rest))
		soak_complain(true, "%s: a refused call that wrote %zd bytes left %zd others", soak_way_names[source],
			      got, left);
}

/* ---- all of them ------------------------------------------------------------------------------------------- */

static enum soak_way possible(const struct soak_ways *ways, const struct soak_write *write)
{
	switch (write->way) {
	case SOAK_EVENTFD:
		return !soak_new_state(write, 0) || write->nbytes != SOAK_WORD ? SOAK_PIPE : write->way;
	case SOAK_DIRECT:
		return ways->in[write->way] < 0 || write->nbytes != SOAK_SECTOR ? SOAK_PREAD : write->way;
	case SOAK_VM:
		return ways->hand < 0 ? SOAK_READV : write->way;
	case SOAK_RING:
	case SOAK_FIXED:
		return ways->ring.fd < 0 ? SOAK_PIPE : write->way;
	default:
		return write->way;
	}
}

ssize_t soak_do(struct soak_ways *ways, struct soak_write *write)
{
	ssize_t got = (ssize_t)size_of(write);
	write->way = possible(ways, write);
	enum soak_way source = write->way; /* where it left the rest */
	if (write->way == SOAK_STORE)
		memcpy(write->pieces[0].at, soak_patterns[soak_new_state(write, 0)], write->nbytes);
	else if (write->way == SOAK_VM)
		got = soak_hand_write(ways->hand, write);
	else if (write->way == SOAK_RING || write->way == SOAK_FIXED)
		got = receive_by_ring(ways, write, &source);
	else
		got = receive(ways, write);
	if (got == (ssize_t)size_of(write))
		return got;
	if (got < 0 && got != -EFAULT)
		soak_die(soak_way_names[write->way], (int)-got);
	drain(ways, source, write, got);
	return got;
}
