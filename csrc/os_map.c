/* SPDX-License-Identifier: MIT */
/*
 * DOC: The program's mappings
 *
 * What is mapped at an address, as the kernel says it: by PROCMAP_QUERY (Linux 6.11), which answers for one mapping in half
 * a microsecond, else by reading /proc/self/maps from its beginning. And bytes of our own process read by the kernel: where
 * nothing is mapped, or nobody may read, that is an error and not a signal.
 *
 * No allocation, no stdio: callable while other threads are held.
 */
#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef PROCMAP_QUERY
struct procmap_query {
	uint64_t size, query_flags, query_addr;
	uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
	uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
#define PROCMAP_QUERY_COVERING_OR_NEXT_VMA 0x10
#endif

/* PROCMAP_QUERY's bits are ours. -ENOTTY: the kernel is too old. */
static int query(int fd, uintptr_t at, struct ksm_os_mapping *out)
{
	KSM_FAULT(MAP_QUERY);
	struct procmap_query q = {
		.size = sizeof(q), .query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA, .query_addr = at};
	if (ioctl(fd, PROCMAP_QUERY, &q))
		return -errno;
	*out = (struct ksm_os_mapping){
		.from = q.vma_start,
		.to = q.vma_end,
		.offset = q.vma_offset,
		.inode = q.inode,
		.major = q.dev_major,
		.minor = q.dev_minor,
		.access = (unsigned)q.vma_flags & (KSM_MAPPING_READ | KSM_MAPPING_WRITE | KSM_MAPPING_EXECUTE),
		.shared = q.vma_flags & KSM_MAPPING_SHARED,
	};
	return 0;
}

/* ---- /proc/self/maps ------------------------------------------------------------------------------------------ */

struct reader {
	int fd;
	uint64_t offset;
	size_t have, next;
	char text[2048];
};

/* -1: the end, or an error. */
static int next_byte(struct reader *reader)
{
	if (reader->next == reader->have) {
		ssize_t n = pread(reader->fd, reader->text, sizeof(reader->text), (off_t)reader->offset);
		if (n <= 0)
			return -1;
		reader->offset += (uint64_t)n;
		reader->have = (size_t)n;
		reader->next = 0;
	}
	return (unsigned char)reader->text[reader->next++];
}

/* Returns what came after it. */
static int read_number(struct reader *reader, unsigned base, uint64_t *out)
{
	int c;
	*out = 0;
	for (;;) {
		c = next_byte(reader);
		unsigned digit = c >= '0' && c <= '9'   ? (unsigned)c - '0'
				 : c >= 'a' && c <= 'f' ? (unsigned)c - 'a' + 10
							: base;
		if (digit >= base)
			return c;
		*out = *out * base + digit;
	}
}

/* One line: "from-to mode offset major:minor inode path". false: there is none. */
static bool read_line(struct reader *reader, struct ksm_os_mapping *out)
{
	uint64_t from, to, major, minor;
	memset(out, 0, sizeof(*out));
	if (read_number(reader, 16, &from) != '-' || read_number(reader, 16, &to) != ' ')
		return false;
	out->from = (uintptr_t)from;
	out->to = (uintptr_t)to;
	out->access |= next_byte(reader) == 'r' ? KSM_MAPPING_READ : 0;
	out->access |= next_byte(reader) == 'w' ? KSM_MAPPING_WRITE : 0;
	out->access |= next_byte(reader) == 'x' ? KSM_MAPPING_EXECUTE : 0;
	out->shared = next_byte(reader) == 's';
	next_byte(reader);
	read_number(reader, 16, &out->offset);
	read_number(reader, 16, &major);
	read_number(reader, 16, &minor);
	out->major = (uint32_t)major;
	out->minor = (uint32_t)minor;
	int c = read_number(reader, 10, &out->inode);
	while (c >= 0 && c != '\n')
		c = next_byte(reader);
	return true;
}

static int read_all(int fd, uintptr_t from, uintptr_t to, ksm_os_each_mapping each, void *context)
{
	struct reader reader = {.fd = fd};
	struct ksm_os_mapping mapping;
	while (read_line(&reader, &mapping) && mapping.from < to)
		if (mapping.to > from)
			each(&mapping, context);
	return reader.offset ? 0 : -EIO;
}

int ksm_os_mappings(int fd, const void *at, size_t nbytes, ksm_os_each_mapping each, void *context)
{
	uintptr_t from = (uintptr_t)at, to = from + nbytes;
	struct ksm_os_mapping mapping;
	for (int r; from < to; from = mapping.to) {
		r = query(fd, from, &mapping);
		if (r == -ENOTTY) {
			r = read_all(fd, from, to, each, context);
			return r ? r : 1;
		}
		if (r == -ENOENT)
			return 0;
		if (r)
			return r;
		if (mapping.from >= to)
			return 0;
		each(&mapping, context);
	}
	return 0;
}

int ksm_os_read_own(const void *from, void *to, size_t nbytes)
{
	KSM_FAULT(READ_OWN);
	struct iovec local = {to, nbytes}, remote = {(void *)(uintptr_t)from, nbytes};
	ssize_t n = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
	if (n < 0)
		return -errno;
	return (size_t)n == nbytes ? 0 : -EFAULT;
}
