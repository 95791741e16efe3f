/* SPDX-License-Identifier: MIT */
/*
 * DOC: Frozen pages, and pages held for writing
 *
 * A frozen page is read-only: no thread and no system call can change it, so it is compared and mapped to a frame
 * without any window. Whoever stores into it all the same, through an older view, thaws that one page in the SIGSEGV
 * handler: a private page becomes writable, a merged one is copied first.
 *
 *                    freeze                      merge
 *    OPEN ────────────────────▶ READONLY ─────────────────▶ MERGED       (guard bytes, all with FROZEN beside)
 *     ▲  ▲    thaw, or a store      │                          │
 *     │  └──────────────────────────┘      a store: copied     │
 *     └────────────────────────────────────────────────────────┘
 *
 * The other way round, memory that a system call is about to write is made private and left alone until the call is
 * over: a system call that meets a read-only page fails with EFAULT, because the kernel asks no handler.
 *
 * FREEZE-1. A page's guard is BUSY while its protection and its guard do not agree; a store meanwhile waits.
 * FREEZE-2. A guard says MERGED only of a page that is known to be unbroken: seen in the pagemap after it became
 *           read-only. Where that cannot be seen, the page is copied to anonymous memory first.
 *
 * Everything here runs under the merge lock, with every signal blocked; freezing in the scanner's thread.
 */
#include "freeze.h"

#include "cow.h"
#include "os.h"

#include <errno.h>

#define KSM_POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, Linux 5.14 */

static uint8_t claim(struct ksm_guard *guard, ksm_pageno page)
{
	uint8_t was;
	while (!ksm_guard_claim_sigsafe(guard, page, &was))
		ksm_os_yield(); /* a handler holds it, for a few system calls */
	return was;
}

static bool is_unbroken(const struct ksm_region *region, ksm_pageno page)
{
	uint16_t kind;
	int fd = region->peer->fds.pagemap;
	if (ksm_region_state(region, page) != KSM_PAGE_MERGED || fd < 0)
		return false;
	(void)*(volatile const char *)ksm_region_page(region, page); /* present, and not swapped out */
	return !ksm_os_pagemap(fd, ksm_region_page(region, page), 1, &kind) && (kind & KSM_PAGE_FILE);
}

/* A claimed page that became read-only and shall not be after all. What cannot be undone is left to the next store. */
static void protect_again(struct ksm_region *region, ksm_pageno page, uint8_t was)
{
	bool framed = KSM_GUARD_STATE(was) == KSM_GUARD_WRITABLE;
	int r = ksm_os_protect(ksm_region_page(region, page), KSM_PAGE_SIZE, true);
	ksm_guard_set(region->guard, page, 1, !r ? was : framed ? KSM_GUARD_MERGED : KSM_GUARD_READONLY);
}

/* A page whose mapping refers to a frame. */
static int freeze_framed(struct ksm_region *region, ksm_pageno page)
{
	struct ksm_guard *guard = region->guard;
	char *at = ksm_region_page(region, page);
	uint8_t was = claim(guard, page);
	if (KSM_GUARD_STATE(was) == KSM_GUARD_MERGED) {
		ksm_guard_set(guard, page, 1, KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
		return 0;
	}
	if (KSM_GUARD_STATE(was) == KSM_GUARD_READONLY) {
		ksm_guard_set(guard, page, 1, was);
		return 0;
	}
	if (KSM_GUARD_STATE(was) == KSM_GUARD_OPEN) /* copied by the handler: anonymous memory */
		ksm_region_forget(region, page, 1);
	int r = ksm_os_protect(at, KSM_PAGE_SIZE, false);
	if (!r && KSM_GUARD_STATE(was) == KSM_GUARD_WRITABLE) {
		if (is_unbroken(region, page)) { /* FREEZE-2 */
			ksm_guard_set(guard, page, 1, KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
			return 0;
		}
		r = ksm_cow_copy_sigsafe(at, 1, false, !region->registered);
		if (!r)
			ksm_region_forget(region, page, 1);
	}
	if (r)
		protect_again(region, page, was);
	else
		ksm_guard_set(guard, page, 1, KSM_GUARD_READONLY | KSM_GUARD_FROZEN);
	return r;
}

/* Pages [page, page + n) of private memory, none of them protected. */
static int freeze_private(struct ksm_region *region, ksm_pageno page, size_t n)
{
	uint8_t byte = KSM_GUARD_READONLY | KSM_GUARD_FROZEN;
	ksm_guard_set(region->guard, page, n, KSM_GUARD_BUSY | KSM_GUARD_FROZEN);
	int r = ksm_os_protect(ksm_region_page(region, page), n * KSM_PAGE_SIZE, false);
	if (r && !ksm_os_protect(ksm_region_page(region, page), n * KSM_PAGE_SIZE, true))
		byte = KSM_GUARD_OPEN; /* else the next store opens what is read-only of it */
	ksm_guard_set(region->guard, page, n, byte);
	return r;
}

static bool is_plain(const struct ksm_region *region, ksm_pageno page)
{
	return ksm_region_frame(region, page) == KSM_NO_FRAME && ksm_region_guard_of(region, page) == KSM_GUARD_OPEN;
}

int ksm_freeze(struct ksm_region *region, ksm_pageno first, size_t count)
{
	for (const struct ksm_hold *hold = region->holds; hold; hold = hold->next)
		if (hold->first < first + count && first < hold->first + hold->count)
			return -EBUSY;
	int r = ksm_region_guard(region);
	if (r)
		return r;
	region->frozen = true;
	for (ksm_pageno page = first; page < first + count && !r;) {
		size_t n = 0;
		while (page + n < first + count && is_plain(region, page + n))
			n++;
		r = n ? freeze_private(region, page, n) : freeze_framed(region, page);
		page += n ? n : 1;
	}
	if (r)
		ksm_thaw(region, first, count);
	return r;
}

/* Claim pages from `page` that say exactly `byte`; a store may be quicker. Returns how many. */
static size_t claim_run(struct ksm_region *region, ksm_pageno page, ksm_pageno end, uint8_t byte)
{
	size_t n = 0;
	while (page + n < end && ksm_guard_claim_from_sigsafe(region->guard, page + n, byte))
		n++;
	return n;
}

/* Make a claimed run writable, all or nothing: on error it is read-only, every page of it. */
static int open_run(struct ksm_region *region, ksm_pageno page, size_t n)
{
	char *at = ksm_region_page(region, page);
	int r = n ? ksm_os_protect(at, n * KSM_PAGE_SIZE, true) : 0;
	for (int attempt = 0; r && ksm_os_protect(at, n * KSM_PAGE_SIZE, false); attempt++) {
		ksm_ensure(attempt < 10000); /* the way back needs no memory that was not there */
		ksm_os_yield();
	}
	return r;
}

int ksm_thaw(struct ksm_region *region, ksm_pageno first, size_t count)
{
	int error = 0;
	if (!region->guard)
		return 0;
	for (ksm_pageno page = first, end = first + count; page < end;) {
		uint8_t byte = ksm_guard_get(region->guard, page);
		bool merged = KSM_GUARD_STATE(byte) == KSM_GUARD_MERGED;
		if (KSM_GUARD_STATE(byte) == KSM_GUARD_BUSY) {
			ksm_os_yield();
			continue;
		}
		if (!(byte & KSM_GUARD_FROZEN)) {
			page++;
			continue;
		}
		size_t n = claim_run(region, page, end, byte);
		uint8_t then = merged ? region->sigsegv ? KSM_GUARD_MERGED : KSM_GUARD_WRITABLE : KSM_GUARD_OPEN;
		int r = then == KSM_GUARD_MERGED ? 0 : open_run(region, page, n);
		ksm_guard_set(region->guard, page, n, r ? byte : then);
		error = r ? r : error;
		page += n;
	}
	return error;
}

/* ---- for those who replace pages -------------------------------------------------------------------------- */

void ksm_own_pages(struct ksm_region *region, ksm_pageno page, size_t count)
{
	for (ksm_pageno i = page; i < page + count;) {
		uint8_t byte = ksm_guard_get(region->guard, i);
		enum ksm_guard_state state = KSM_GUARD_STATE(byte);
		bool read_only = state == KSM_GUARD_MERGED || state == KSM_GUARD_READONLY;
		if (state == KSM_GUARD_BUSY || (read_only && !ksm_guard_claim_from_sigsafe(region->guard, i, byte)))
			ksm_os_yield();
		else
			i++;
	}
}

void ksm_disown_pages(struct ksm_region *region, ksm_pageno page, size_t count)
{
	for (ksm_pageno i = page; i < page + count; i++) {
		bool framed = ksm_region_frame(region, i) != KSM_NO_FRAME;
		if (KSM_GUARD_STATE(ksm_guard_get(region->guard, i)) == KSM_GUARD_BUSY)
			ksm_guard_set(region->guard, i, 1, framed ? KSM_GUARD_MERGED : KSM_GUARD_READONLY);
	}
}

/* ---- for system calls -------------------------------------------------------------------------------------- */

/* Writing is asked for, and nothing is written. */
static int break_by_kernel(char *at, size_t pages)
{
	int r = ksm_os_advise(at, pages * KSM_PAGE_SIZE, KSM_POPULATE_WRITE);
	if (r != -EINVAL)
		return r;
	for (size_t i = 0; i < pages; i++) /* before Linux 5.14 */
		__atomic_fetch_or(at + i * KSM_PAGE_SIZE, 0, __ATOMIC_RELAXED);
	return 0;
}

/* Pages from `page` that are read-only. Returns how many were made private, or an error. */
static int make_private_run(struct ksm_region *region, ksm_pageno page, ksm_pageno end)
{
	uint8_t byte = ksm_guard_get(region->guard, page);
	bool merged = KSM_GUARD_STATE(byte) == KSM_GUARD_MERGED;
	if (!merged && KSM_GUARD_STATE(byte) != KSM_GUARD_READONLY) {
		ksm_os_yield(); /* somebody's store was quicker, or is at it */
		return 0;
	}
	size_t n = claim_run(region, page, KSM_MIN(end, page + 512), byte);
	int r = 0;
	if (n)
		r = merged ? ksm_cow_copy_sigsafe(ksm_region_page(region, page), n, true, !region->registered)
			   : open_run(region, page, n);
	if (!r && merged)
		ksm_region_forget(region, page, n);
	ksm_guard_set(region->guard, page, n, r ? byte : KSM_GUARD_OPEN);
	return r ? r : (int)n;
}

int ksm_make_private(struct ksm_region *region, ksm_pageno first, size_t count)
{
	for (ksm_pageno page = first, end = first + count; page < end;) {
		size_t n = 0; /* read-only for nobody: what may be left to do, the kernel does */
		while (page + n < end && (ksm_region_guard_of(region, page + n) == KSM_GUARD_OPEN ||
					  ksm_region_guard_of(region, page + n) == KSM_GUARD_WRITABLE))
			n++;
		int r = n ? break_by_kernel(ksm_region_page(region, page), n) : make_private_run(region, page, end);
		if (r < 0)
			return r;
		page += n ? n : (size_t)r;
	}
	return 0;
}

size_t ksm_frozen_count(const struct ksm_region *region)
{
	size_t count = 0;
	for (ksm_pageno page = 0; region->frozen && page < region->used; page++)
		count += (ksm_guard_get(region->guard, page) & KSM_GUARD_FROZEN) != 0;
	return count;
}
