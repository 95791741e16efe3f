/* SPDX-License-Identifier: MIT */
/*
 * One request at a time through an io_uring, made of the bare system calls.
 */
#include "soak.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define ENTRIES 4

static void *map_part(int fd, size_t nbytes, off_t offset)
{
	void *at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
	if (at == MAP_FAILED)
		soak_die("mmap of a ring", errno);
	madvise(at, nbytes, MADV_DONTFORK); /* a child must not look as if it had one */
	return at;
}

bool soak_ring_open(struct soak_ring *ring)
{
	struct io_uring_params p = {0};
	int fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
	if (fd < 0 && (errno == ENOSYS || errno == EPERM || errno == EACCES))
		return false;
	if (fd < 0)
		soak_die("io_uring_setup", errno);
	if (!(p.features & IORING_FEAT_SINGLE_MMAP)) {
		close(fd);
		return false;
	}
	size_t sq = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
	size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	ring->fd = fd;
	ring->nbytes = sq > cq ? sq : cq;
	ring->nbytes_entries = p.sq_entries * sizeof(struct io_uring_sqe);
	ring->rings = map_part(fd, ring->nbytes, IORING_OFF_SQ_RING);
	ring->entries = map_part(fd, ring->nbytes_entries, IORING_OFF_SQES);
	ring->sq_tail = (uint32_t *)(ring->rings + p.sq_off.tail);
	ring->sq_mask = (uint32_t *)(ring->rings + p.sq_off.ring_mask);
	ring->sq_array = (uint32_t *)(ring->rings + p.sq_off.array);
	ring->cq_head = (uint32_t *)(ring->rings + p.cq_off.head);
	ring->cq_tail = (uint32_t *)(ring->rings + p.cq_off.tail);
	ring->cq_mask = (uint32_t *)(ring->rings + p.cq_off.ring_mask);
	ring->completions = (struct io_uring_cqe *)(ring->rings + p.cq_off.cqes);
	return true;
}

void soak_ring_close(struct soak_ring *ring)
{
	if (ring->fd < 0)
		return;
	munmap(ring->entries, ring->nbytes_entries);
	munmap(ring->rings, ring->nbytes);
	close(ring->fd);
	ring->fd = -1;
}

int soak_ring_register(struct soak_ring *ring, void *at, size_t nbytes)
{
	struct iovec buffer = {at, nbytes};
	if (syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS, &buffer, 1))
		return -errno;
	return 0;
}

void soak_ring_unregister(struct soak_ring *ring)
{
	if (syscall(SYS_io_uring_register, ring->fd, IORING_UNREGISTER_BUFFERS, NULL, 0))
		soak_die("unregistering a buffer", errno);
}

static void enter(const struct soak_ring *ring, unsigned submit, unsigned wait)
{
	long done;
	do {
		done = syscall(SYS_io_uring_enter, ring->fd, submit, wait, wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
	} while (done < 0 && (errno == EINTR || errno == EAGAIN || errno == EBUSY));
	if (done < 0)
		soak_die("io_uring_enter", errno);
}

void soak_ring_submit(struct soak_ring *ring, int fd, void *to, size_t nbytes, int64_t offset, bool fixed, bool async)
{
	uint32_t tail = *ring->sq_tail, i = tail & *ring->sq_mask;
	struct io_uring_sqe *entry = &ring->entries[i];
	memset(entry, 0, sizeof(*entry));
	entry->opcode = fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
	entry->flags = async ? IOSQE_ASYNC : 0;
	entry->fd = fd;
	entry->addr = (uintptr_t)to;
	entry->len = (uint32_t)nbytes;
	entry->off = (uint64_t)offset;
	ring->sq_array[i] = i;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
	enter(ring, 1, 0);
}

ssize_t soak_ring_wait(struct soak_ring *ring)
{
	uint32_t head = *ring->cq_head;
	while (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
		enter(ring, 0, 1);
	ssize_t result = ring->completions[head & *ring->cq_mask].res;
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return result;
}
