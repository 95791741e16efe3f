/* SPDX-License-Identifier: MIT */
/*
 * DOC: userfaultfd and pagemap
 *
 * The calls behind the windows. Debian 12's headers end at Linux 6.1, so what came later (UFFDIO_MOVE in
 * 6.8, PAGEMAP_SCAN in 6.7) is declared here. A kernel without them answers EINVAL or ENOTTY, which caps.c
 * turns into a reason for people.
 */
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#define KSM_UFFD_FEATURE_WP (1ull << 0)
#define KSM_UFFD_FEATURE_WP_UNPOPULATED (1ull << 13)
#define KSM_UFFD_FEATURE_WP_ASYNC (1ull << 15)
#define USER_MODE_ONLY 1 /* UFFD_USER_MODE_ONLY, Linux 5.11 */
#ifndef UFFDIO_MOVE
struct uffdio_move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
#ifndef PAGEMAP_SCAN
struct page_region {
	uint64_t start, end, categories;
};
struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif

/* Say which features it is to have. Closed if it cannot. */
static int with_features(int uffd, uint64_t features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	if (!ioctl(uffd, UFFDIO_API, &api))
		return uffd;
	int error = -errno;
	close(uffd);
	return error;
}

static int open_descriptor(int flags)
{
	int error = -EPERM, uffd = -1;
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device >= 0) {
		uffd = ioctl(device, USERFAULTFD_IOC_NEW, flags | O_CLOEXEC | O_NONBLOCK);
		error = uffd < 0 ? -errno : 0;
		close(device);
	}
	if (uffd < 0) {
		uffd = (int)syscall(SYS_userfaultfd, flags | O_CLOEXEC | O_NONBLOCK);
		error = uffd < 0 ? -errno : 0;
	}
	return uffd < 0 ? error : uffd;
}

int ksm_os_uffd_open(uint64_t features)
{
	KSM_FAULT(UFFD_OPEN);
	int uffd = open_descriptor(0);
	return uffd < 0 ? uffd : with_features(uffd, features);
}

int ksm_os_uffd_open_watch(void)
{
	KSM_FAULT(UFFD_OPEN);
	/* Faults are resolved by the kernel, its own as well, so the descriptor need not be one that could hold them up. */
	int uffd = open_descriptor(USER_MODE_ONLY);
	return uffd < 0 ? uffd
			: with_features(uffd, KSM_UFFD_FEATURE_WP | KSM_UFFD_FEATURE_WP_UNPOPULATED |
						      KSM_UFFD_FEATURE_WP_ASYNC);
}

int ksm_os_uffd_try_device(void)
{
	KSM_FAULT(UFFD_TRY);
	int fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

int ksm_os_uffd_try_call(bool of_user)
{
	KSM_FAULT(UFFD_TRY);
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | (of_user ? USER_MODE_ONLY : 0));
	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

int ksm_os_uffd_register(int uffd, void *at, size_t nbytes, unsigned modes)
{
	KSM_FAULT(UFFD_REGISTER);
	struct uffdio_register request = {.range = {(uintptr_t)at, nbytes}, .mode = modes};
	return ioctl(uffd, UFFDIO_REGISTER, &request) ? -errno : 0;
}

int ksm_os_uffd_unregister(int uffd, void *at, size_t nbytes)
{
	KSM_FAULT(UFFD_UNREGISTER);
	struct uffdio_range range = {(uintptr_t)at, nbytes};
	return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

int64_t ksm_os_uffd_move(int uffd, void *to, void *from, size_t nbytes)
{
	KSM_FAULT(UFFD_MOVE);
	struct uffdio_move request = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = nbytes};
	if (!ioctl(uffd, UFFDIO_MOVE, &request))
		return (int64_t)nbytes;
	int error = -errno;
	return request.move > 0 ? request.move : error;
}

int64_t ksm_os_uffd_copy(int uffd, void *to, const void *from, size_t nbytes)
{
	KSM_FAULT(UFFD_COPY);
	struct uffdio_copy request = {
		.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = nbytes, .mode = UFFDIO_COPY_MODE_DONTWAKE};
	if (!ioctl(uffd, UFFDIO_COPY, &request))
		return (int64_t)nbytes;
	int error = -errno;
	return request.copy > 0 ? request.copy : error;
}

/* A copy that fails for want of a source has looked at the destination before: so EFAULT means that it is there. */
int ksm_os_uffd_has(int uffd, void *at, const void *unreadable, size_t nbytes)
{
	if (KSM_FAULTED(UFFD_HAS))
		return -ENOMEM; /* not EAGAIN, which ends when somebody has read what there is to be read */
	struct uffdio_copy request = {
		.dst = (uintptr_t)at, .src = (uintptr_t)unreadable, .len = nbytes, .mode = UFFDIO_COPY_MODE_DONTWAKE};
	if (!ioctl(uffd, UFFDIO_COPY, &request))
		return -EEXIST;
	return errno == EFAULT ? 0 : -errno;
}

int ksm_os_uffd_wake(int uffd, void *at, size_t nbytes)
{
	KSM_FAULT(UFFD_WAKE);
	struct uffdio_range range = {(uintptr_t)at, nbytes};
	return ioctl(uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}

int ksm_os_uffd_protect(int uffd, void *at, size_t nbytes, bool on)
{
	KSM_FAULT(UFFD_PROTECT);
	struct uffdio_writeprotect request = {.range = {(uintptr_t)at, nbytes},
					      .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP
							 : UFFDIO_WRITEPROTECT_MODE_DONTWAKE};
	return ioctl(uffd, UFFDIO_WRITEPROTECT, &request) ? -errno : 0;
}

int ksm_os_uffd_read(int uffd, uint64_t timeout_ns, struct ksm_os_uffd_event *event)
{
	KSM_FAULT(UFFD_READ);
	struct pollfd poll = {.fd = uffd, .events = POLLIN};
	struct uffd_msg message;
	int r = timeout_ns ? ksm_os_poll(&poll, 1, timeout_ns) : 1;
	if (r <= 0)
		return r;
	ssize_t n = read(uffd, &message, sizeof(message));
	if (n < 0)
		return errno == EAGAIN ? KSM_OS_UFFD_NOTHING : -errno; /* it was woken, or killed */
	if (n != (ssize_t)sizeof(message))
		return -EPROTO;
	if (message.event == UFFD_EVENT_PAGEFAULT) {
		event->at = (void *)(uintptr_t)message.arg.pagefault.address;
		return KSM_OS_UFFD_SLEEPER;
	}
	if (message.event != UFFD_EVENT_REMAP)
		return -EPROTO;
	event->at = (void *)(uintptr_t)message.arg.remap.from;
	event->to = (void *)(uintptr_t)message.arg.remap.to;
	event->nbytes = message.arg.remap.len;
	return KSM_OS_UFFD_MOVED;
}

#define PAGEMAP_MOST 512

int ksm_os_pagemap(int fd, const void *at, size_t npages, uint16_t *kinds)
{
	KSM_FAULT(PAGEMAP_SCAN);
	uint64_t entries[PAGEMAP_MOST];
	if (npages > PAGEMAP_MOST)
		return -EINVAL;
	off_t offset = (off_t)((uintptr_t)at >> KSM_PAGE_SHIFT) * (off_t)sizeof(uint64_t);
	ssize_t n = pread(fd, entries, npages * sizeof(uint64_t), offset);
	if (n < 0)
		return -errno;
	if ((size_t)n != npages * sizeof(uint64_t))
		return -ENODATA;
	/* Bits of Documentation/admin-guide/mm/pagemap.rst. They do not tell the page of zeros from any other. */
	for (size_t i = 0; i < npages; i++) {
		uint64_t entry = entries[i];
		bool present = entry >> 63 & 1, file = entry >> 61 & 1;
		kinds[i] = (uint16_t)((present ? KSM_PAGE_PRESENT : 0) | (file ? KSM_PAGE_FILE : 0) |
				      (entry >> 62 & 1 ? KSM_PAGE_SWAPPED : 0) | (entry >> 57 & 1 ? KSM_PAGE_HELD : 0) |
				      (present && !file && !(entry >> 56 & 1) ? KSM_PAGE_SHARED : 0));
	}
	return 0;
}

#define SCAN_PROTECT 1u /* PM_SCAN_WP_MATCHING */

int ksm_os_page_ranges(int fd, const char **at, const char *to, const struct ksm_os_query *query,
		       struct ksm_os_range *ranges, size_t room)
{
	KSM_FAULT(PAGE_RANGES);
	struct pm_scan_arg request = {
		.size = sizeof(request),
		.flags = query->protect ? SCAN_PROTECT : 0,
		.start = (uintptr_t)*at,
		.end = (uintptr_t)to,
		.vec = (uintptr_t)ranges,
		.vec_len = room,
		.category_inverted = query->none,
		.category_mask = query->all | query->none,
		.category_anyof_mask = query->any,
		.return_mask = query->all | query->none | query->any | KSM_PAGE_PRESENT,
	};
	int n = ioctl(fd, PAGEMAP_SCAN, &request);
	if (n < 0)
		return -errno;
	*at = (const char *)(uintptr_t)request.walk_end;
	return n;
}

int ksm_os_resident(const void *at, size_t npages, uint16_t *kinds)
{
	KSM_FAULT(RESIDENT);
	unsigned char bytes[PAGEMAP_MOST];
	if (npages > PAGEMAP_MOST)
		return -EINVAL;
	if (mincore((void *)(uintptr_t)at, npages << KSM_PAGE_SHIFT, bytes))
		return -errno;
	for (size_t i = 0; i < npages; i++)
		kinds[i] = bytes[i] & 1 ? KSM_PAGE_PRESENT : 0;
	return 0;
}

bool ksm_os_is_mapped(const void *at, size_t nbytes)
{
	/* It needs no memory, as mincore(2) does, and does nothing but look. */
	return !msync((void *)(uintptr_t)at, nbytes, MS_ASYNC) || errno != ENOMEM;
}
