/* SPDX-License-Identifier: MIT */
/*
 * DOC: Restoring
 *
 * A page whose mapping refers to a frame becomes anonymous again under a running program, in one of three ways:
 *
 *    guarded   our handler's word keeps stores away: the page's guard is claimed, its bytes are copied to fresh memory,
 *              and mremap moves that over it in one step
 *    held      the barrier keeps stores away without moving pages (write protection): the same, for pages that nobody
 *              wrote; their bytes come from their frames
 *    parked    every thread is held: the bytes go to a buffer, anonymous memory takes the mapping's place, the bytes come
 *              back. The new mapping joins its neighbours. Where the barrier can hold as well it does, against other
 *              processes' process_vm_writev; then the copy is made elsewhere and moved over the pages
 *
 * A page broken by a write is anonymous already, inside a file's mapping that still refers to the frame. A direct
 * transfer may be in flight to it, which write protection does not stop; so only the third way takes it, under whose
 * conditions no such transfer exists, or a caller who vouches that there is none.
 *
 * RESTORE-1. A page's reference is put after its mapping is gone, never before.
 * RESTORE-2. Guarded and held: until mremap succeeds the old mapping is complete. Parked: nobody runs who could see the
 *            page half-way, and if the old mapping is gone and no new one can be had the process ends with a message.
 */
#include "restore.h"

#include "cow.h"
#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define MOST 512 /* pages at a time */
#define PARKED_MOST 64
#define WRITERS_END_NS 20000

static bool is_framed(const struct ksm_region *region, ksm_pageno page)
{
	return ksm_region_frame(region, page) != KSM_NO_FRAME;
}

static bool is_broken(uint16_t kind)
{
	return (kind & KSM_PAGE_SWAPPED) || ((kind & KSM_PAGE_PRESENT) && !(kind & KSM_PAGE_FILE));
}

/* ---- parked ------------------------------------------------------------------------------------------------ */

/*
 * All threads are parked. On error the pages are as they were. held: also against other processes, which must not find a
 * fresh page before it has its bytes; so the copy is made elsewhere and moved there, though it will not join its neighbours.
 */
static int replace_parked(struct ksm_region *region, ksm_pageno page, size_t n, bool held, char *buffer)
{
	char *at = ksm_region_page(region, page);
	size_t nbytes = n * KSM_PAGE_SIZE;
	if (held)
		return ksm_cow_copy_sigsafe(at, n, true, !region->registered);
	memcpy(buffer, at, nbytes);
	int r = ksm_os_map_anon(at, nbytes, true, false, NULL);
	if (r && ksm_os_is_mapped(at, nbytes))
		return r;
	for (int attempt = 0; r && attempt < 1000; attempt++) { /* RESTORE-2; out of memory may pass */
		ksm_os_sleep_ns(100000);
		r = ksm_os_map_anon(at, nbytes, true, false, NULL);
	}
	if (r)
		ksm_panic(__FILE__, __LINE__, "anonymous memory could not take the place of a mapping");
	if (!region->registered)
		ksm_os_advise(at, nbytes, MADV_NOHUGEPAGE); /* as its neighbours: they can join */
	memcpy(at, buffer, nbytes);
	return 0;
}

/* Pages from `page` that `worn` names, relative to first. */
static size_t worn_run(const bool *worn, size_t i, size_t count)
{
	size_t n = 0;
	while (i + n < count && worn[i + n])
		n++;
	return n;
}

/*
 * While all are parked, hold the runs as well, if the barrier can: another process's process_vm_writev waits then, too.
 * One that began before is given the time to end its copying, a microsecond's work. (Not the other way round: a thread
 * of ours in a system call that waits for a held page does not park.)
 */
static void hold_runs(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno first, size_t count,
		      const bool *worn, bool *held)
{
	if (!barrier->ops || !barrier->ops->hold || barrier->ops == &ksm_barrier_stop)
		return;
	for (size_t i = 0, n; i < count; i += n ? n : 1) {
		n = worn_run(worn, i, count);
		held[i] = n && !barrier->ops->hold(barrier, ksm_region_page(region, first + i), n);
	}
	for (uint64_t until = ksm_os_now_ns() + WRITERS_END_NS; ksm_os_now_ns() < until;)
		;
}

static void release_runs(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno first, size_t count,
			 const bool *worn, const bool *held)
{
	for (size_t i = 0, n; i < count; i += n ? n : 1) {
		n = worn_run(worn, i, count);
		if (held[i] && barrier->ops->release(barrier, ksm_region_page(region, first + i), n))
			ksm_count(region->peer->self, KSM_FAILURES, 1);
	}
}

/* The pages have anonymous memory: RESTORE-1. */
static void forget_runs(struct ksm_region *region, ksm_pageno first, size_t count, const bool *done, uint64_t *given)
{
	for (size_t i = 0, n; i < count; i += n ? n : 1) {
		n = worn_run(done, i, count);
		if (!n)
			continue;
		ksm_region_forget(region, first + i, n);
		if (region->guard)
			ksm_guard_set(region->guard, first + i, n, KSM_GUARD_OPEN);
		*given += n;
	}
}

int ksm_give_back(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		  size_t count, const bool *worn, char *buffer, uint64_t *given)
{
	bool done[KSM_WINDOW_PAGES] = {false}, held[KSM_WINDOW_PAGES] = {false};
	ksm_ensure(count <= KSM_WINDOW_PAGES);
	int r = ksm_park_ready(park);
	if (!r)
		r = ksm_park_begin(park);
	if (r)
		return r;
	hold_runs(region, barrier, first, count, worn, held);
	for (size_t i = 0, n; i < count && !r; i += n ? n : 1) {
		n = worn_run(worn, i, count);
		if (n)
			r = replace_parked(region, first + i, n, held[i], buffer);
		memset(done + i, !r, n);
	}
	release_runs(region, barrier, first, count, worn, held);
	ksm_park_end(park);
	forget_runs(region, first, count, done, given);
	return r;
}

static int restore_parked(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park,
			  ksm_pageno page, size_t n, struct ksm_restore_counts *counts)
{
	bool all[PARKED_MOST];
	void *buffer;
	int r = ksm_os_map_table(PARKED_MOST * KSM_PAGE_SIZE, &buffer);
	if (r)
		return r;
	memset(all, true, sizeof(all));
	for (size_t i = 0; i < n && !r; i += PARKED_MOST) {
		uint64_t rest = ksm_park_rest_ns(park);
		if (rest)
			ksm_os_sleep_ns(rest);
		r = ksm_give_back(region, barrier, park, page + i, KSM_MIN(n - i, (size_t)PARKED_MOST), all, buffer,
				  &counts->restored);
	}
	ksm_os_unmap(buffer, PARKED_MOST * KSM_PAGE_SIZE);
	return r;
}

/* ---- guarded ----------------------------------------------------------------------------------------------- */

/* Does such a guard keep stores away, or can it be made to? WRITABLE pages: only where system calls get EFAULT anyhow. */
static bool is_guarded(const struct ksm_region *region, const struct ksm_barrier *barrier, enum ksm_guard_state state)
{
	return region->guard &&
	       (state == KSM_GUARD_MERGED || (state == KSM_GUARD_WRITABLE && barrier->ops == &ksm_barrier_segv));
}

/* Claimed pages that were WRITABLE, some of them read-only now. What stays read-only is opened by the next store. */
static void unprotect(struct ksm_region *region, ksm_pageno page, size_t n)
{
	for (ksm_pageno i = page; i < page + n; i++) {
		int r = ksm_os_protect(ksm_region_page(region, i), KSM_PAGE_SIZE, true);
		ksm_guard_set(region->guard, i, 1, r ? KSM_GUARD_MERGED : KSM_GUARD_WRITABLE);
	}
}

/* Replace [page, page + n), all claimed, all having said the same. */
static int replace_claimed(struct ksm_region *region, ksm_pageno page, size_t n, uint8_t was)
{
	char *at = ksm_region_page(region, page);
	bool frozen = was & KSM_GUARD_FROZEN, writable = KSM_GUARD_STATE(was) == KSM_GUARD_WRITABLE;
	int r = writable ? ksm_os_protect(at, n * KSM_PAGE_SIZE, false) : 0;
	if (!r)
		r = ksm_cow_copy_sigsafe(at, n, !frozen, !region->registered);
	uint8_t then = frozen ? KSM_GUARD_READONLY | KSM_GUARD_FROZEN : KSM_GUARD_OPEN;
	if (r && writable) {
		unprotect(region, page, n);
		return r;
	}
	if (r)
		then = was;
	else
		ksm_region_forget(region, page, n); /* RESTORE-1 */
	ksm_guard_set(region->guard, page, n, then);
	return r;
}

static int restore_guarded(struct ksm_region *region, const struct ksm_barrier *barrier, ksm_pageno page, size_t n,
			   struct ksm_restore_counts *counts)
{
	int r = 0;
	for (size_t i = 0, run; i < n && !r; i += run) {
		uint8_t byte = ksm_region_guard_of(region, page + i);
		run = 0;
		while (i + run < n && is_guarded(region, barrier, KSM_GUARD_STATE(byte)) &&
		       ksm_guard_claim_from_sigsafe(region->guard, page + i + run, byte))
			run++;
		if (!run)
			break; /* a store was quicker, it may be writable by now: the caller looks again */
		r = replace_claimed(region, page + i, run, byte);
		counts->restored += r ? 0 : run;
	}
	return r;
}

/* ---- held -------------------------------------------------------------------------------------------------- */

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
static int replace_held(struct ksm_region *region, ksm_pageno page, size_t n, const uint16_t *kinds)
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
	if (region->guard)
		ksm_guard_set(region->guard, page, n, KSM_GUARD_OPEN);
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

/* [page, page + n) all merged or broken, n ≤ MOST. broken_too: else such pages are left. */
static int restore_held(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno page, size_t n,
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
		if (broken && !broken_too)
			continue;
		while (i + run < n && (broken_too || !is_broken(kinds[i + run])))
			run++;
		r = replace_held(region, page + i, run, kinds + i);
		counts->restored += r ? 0 : run;
	}
	int released = barrier->ops->release(barrier, at, n);
	if (released)
		ksm_count(region->peer->self, KSM_FAILURES, 1);
	return r;
}

/* ---- the ways in their order --------------------------------------------------------------------------------- */

/* Pages from `page`, the first of which is known, that refer to frames, all guarded or none, all held or none. */
static size_t run_at(const struct ksm_region *region, const struct ksm_barrier *barrier, ksm_pageno page,
		     ksm_pageno end, bool guarded)
{
	bool held = ksm_region_is_held(region, page);
	size_t n = 1;
	for (; n < MOST && page + n < end && is_framed(region, page + n); n++) {
		enum ksm_guard_state state = KSM_GUARD_STATE(ksm_region_guard_of(region, page + n));
		if (is_guarded(region, barrier, state) != guarded || ksm_region_is_held(region, page + n) != held ||
		    (!guarded && state != KSM_GUARD_WRITABLE))
			break;
	}
	return n;
}

/* WRITABLE pages only: no handler touches those. */
static int restore_run(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno page,
		       size_t n, enum ksm_restore_broken broken, struct ksm_restore_counts *counts)
{
	bool holds = barrier->ops && barrier->ops->hold && region->peer->fds.pagemap >= 0;
	bool own = holds && barrier->ops != &ksm_barrier_stop; /* that one would park as well */
	int r = own ? restore_held(region, barrier, page, n, false, counts) : 0;
	for (size_t i = 0, run; i < n && !r; i += run ? run : 1) {
		for (run = 0; i + run < n && is_framed(region, page + i + run);)
			run++;
		if (!run)
			continue;
		int parked = park ? restore_parked(region, barrier, park, page + i, run, counts) : -ENOSYS;
		if (!parked)
			continue;
		if (own && broken == KSM_RESTORE_ALWAYS)
			r = restore_held(region, barrier, page + i, run, true, counts);
		else if (!own)
			r = parked;
	}
	for (size_t i = 0; i < n; i++)
		counts->broken += ksm_region_state(region, page + i) == KSM_PAGE_BROKEN;
	return r;
}

int ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		size_t count, enum ksm_restore_broken broken, struct ksm_restore_counts *counts)
{
	int r = 0;
	for (ksm_pageno page = first, end = first + count; page < end && !r;) {
		/* Read once: a store may change it at any time, but from WRITABLE or OPEN. */
		enum ksm_guard_state state = KSM_GUARD_STATE(ksm_region_guard_of(region, page));
		if (!is_framed(region, page)) {
			page++;
		} else if (state == KSM_GUARD_BUSY) {
			ksm_os_yield(); /* a handler is copying it */
		} else if (state == KSM_GUARD_OPEN) {
			ksm_region_forget(region, page++, 1); /* copied by the handler */
		} else if (broken == KSM_RESTORE_PARKED && ksm_region_is_held(region, page)) {
			counts->broken++; /* private, and about to be written by a system call */
			page++;
		} else if (is_guarded(region, barrier, state)) { /* what was done is looked at again, and passed over */
			r = restore_guarded(region, barrier, page, run_at(region, barrier, page, end, true), counts);
		} else {
			size_t n = run_at(region, barrier, page, end, false);
			r = restore_run(region, barrier, park, page, n, broken, counts);
			page += n;
		}
	}
	return r;
}
