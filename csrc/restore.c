/* SPDX-License-Identifier: MIT */
/*
 * DOC: Restoring
 *
 * A merged page that nobody wrote holds its frame's bytes. To make it anonymous again under a running program:
 *
 *    1. hold the mapping: stores into it wait (the barrier's write protection; the pages stay where they are)
 *    2. which pages are still unbroken? They cannot change any more, and nothing can be pinned for writing in them:
 *       pinning for writing breaks a page first
 *    3. fresh anonymous memory elsewhere gets the frames' bytes
 *    4. mremap moves it over the pages, in one step: at no instant is anything else to be seen there
 *    5. let go: whoever waited finds the new page
 *
 * A page broken by a write is anonymous already, inside a file's mapping. It is left there, reference and all: a
 * direct transfer may be in flight to it, which step 1 does not stop. Only a caller who vouches that there is none
 * (unregistering memory) has it copied too.
 *
 * RESTORE-1. A page's reference is put after its mapping is gone, never before.
 * RESTORE-2. Between 1 and 5 nothing is half-way: until mremap succeeds the old mapping is complete.
 */
#include "restore.h"

#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define MOST 512 /* pages at a time */

static bool is_framed(const struct ksm_region *region, ksm_pageno page)
{
	return ksm_region_frame(region, page) != KSM_NO_FRAME;
}

static bool is_broken(uint16_t kind)
{
	return (kind & KSM_PAGE_SWAPPED) || ((kind & KSM_PAGE_PRESENT) && !(kind & KSM_PAGE_FILE));
}

/* The bytes of [page, page + n) into fresh, from frames where unbroken, else from the held page itself. */
static int fill(struct ksm_region *region, ksm_pageno page, size_t n, const uint16_t *kinds, char *fresh)
{
	for (size_t i = 0, run; i < n; i += run) {
		run = 1;
		if (is_broken(kinds[i])) {
			memcpy(fresh + i * KSM_PAGE_SIZE, ksm_region_page(region, page + i), KSM_PAGE_SIZE);
			continue;
		}
		ksm_frameno frame = ksm_region_frame(region, page + i);
		while (i + run < n && !is_broken(kinds[i + run]) &&
		       ksm_region_frame(region, page + i + run) == frame + run)
			run++;
		int r = ksm_frame_read(region->peer, frame, run, fresh + i * KSM_PAGE_SIZE);
		if (r)
			return r;
	}
	return 0;
}

/* Replace [page, page + n), all held. */
static int replace(struct ksm_region *region, ksm_pageno page, size_t n, const uint16_t *kinds)
{
	void *fresh;
	int r = ksm_os_map_anon(NULL, n * KSM_PAGE_SIZE, false, false, &fresh);
	if (r)
		return r;
	if (!region->registered)
		ksm_os_advise(fresh, n * KSM_PAGE_SIZE, MADV_NOHUGEPAGE); /* as its neighbours: they can join */
	r = fill(region, page, n, kinds, fresh);
	if (!r)
		r = ksm_os_remap(fresh, ksm_region_page(region, page), n * KSM_PAGE_SIZE);
	if (r) {
		munmap(fresh, n * KSM_PAGE_SIZE);
		return r;
	}
	ksm_region_forget(region, page, n); /* RESTORE-1 */
	return 0;
}

/*
 * The kinds of held pages. Protecting a page that was never faulted in leaves a marker that pagemap cannot tell from a
 * swapped one; reading such a page brings it in, and then it says what it is.
 */
static int kinds_of_held(const struct ksm_region *region, ksm_pageno page, size_t n, uint16_t *kinds)
{
	int fd = region->peer->fds.pagemap;
	bool again = false;
	int r = ksm_os_pagemap(fd, ksm_region_page(region, page), n, kinds);
	for (size_t i = 0; i < n && !r; i++) {
		if (kinds[i] & KSM_PAGE_PRESENT)
			continue;
		(void)*(volatile const char *)ksm_region_page(region, page + i);
		again = true;
	}
	return r || !again ? r : ksm_os_pagemap(fd, ksm_region_page(region, page), n, kinds);
}

/* [page, page + n) all merged or broken, n ≤ MOST. */
static int restore_run(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno page, size_t n,
		       bool broken_too, struct ksm_restore_counts *counts)
{
	uint16_t kinds[MOST];
	char *at = ksm_region_page(region, page);
	int r = barrier->ops->hold(barrier, at, n);
	if (r)
		return r;
	r = kinds_of_held(region, page, n, kinds);
	for (size_t i = 0, run; i < n && !r; i += run) {
		run = 1;
		bool broken = is_broken(kinds[i]);
		if (broken && ksm_region_state(region, page + i) == KSM_PAGE_MERGED) {
			ksm_region_move(region, page + i, KSM_PAGE_BROKEN, ksm_region_frame(region, page + i));
			ksm_count(region->peer->self, KSM_COW_BREAKS, 1);
		}
		if (broken && !broken_too) {
			counts->broken++;
			continue;
		}
		while (i + run < n && (broken_too || !is_broken(kinds[i + run])))
			run++;
		r = replace(region, page + i, run, kinds + i);
		counts->restored += r ? 0 : run;
	}
	int released = barrier->ops->release(barrier, at, n);
	if (released)
		ksm_count(region->peer->self, KSM_FAILURES, 1);
	return r;
}

int ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno first, size_t count, bool broken_too,
		struct ksm_restore_counts *counts)
{
	for (ksm_pageno page = first; page < first + count;) {
		size_t n = 0;
		while (page + n < first + count && n < MOST && is_framed(region, page + n))
			n++;
		if (!n) {
			page++;
			continue;
		}
		if (!barrier->ops || !barrier->ops->hold)
			return -ENOSYS;
		int r = restore_run(region, barrier, page, n, broken_too, counts);
		if (r)
			return r;
		page += n;
	}
	return 0;
}
