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
 *              back. The new mapping joins its neighbours
 *
 * A page broken by a write is anonymous already, inside a file's mapping that still refers to the frame. A direct
 * transfer may be in flight to it, which write protection does not stop; so only the third way takes it, under whose
 * conditions no such transfer exists, or a caller who vouches that there is none.
 *
 * Threads of other processes are not parked. Where the barrier can hold pages, process_vm_writev is kept away: the
 * pages have been held for a while ("rested", scan_rest.c) so that no such call is in the middle of its copying, and
 * are held until the copy, made elsewhere, has been moved over them.
 *
 * RESTORE-1. A page's reference is put after its mapping is gone, never before.
 * RESTORE-2. Guarded and held: until mremap succeeds the old mapping is complete. Parked: nobody runs who could see the
 *            page half-way, and if the old mapping is gone and no new one can be had the process ends with a message.
 * RESTORE-3. A page that could be held and is not has been written since, or is about to be: it is not replaced.
 * RESTORE-4. Registered memory is surveyed first. What is gone keeps its reference (SURVEY-2); if some of it has
 *            another protection nothing is replaced there, for the new mapping would not have it: KSM_EMEMORY.
 */
#include "restore.h"

#include "cow.h"
#include "dirty.h"
#include "error.h"
#include "os.h"
#include "survey.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define MOST 512 /* pages at a time */
#define PARKED_MOST 64

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
	ksm_dirty_watch(region, page, n);
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

/* RESTORE-3: of the pages that `worn` names, those that can go. 1: some can; 0: none; or an error. */
static int choose_rested(const struct ksm_region *region, ksm_pageno first, size_t count, const bool *worn,
			 bool *chosen)
{
	uint16_t kinds[KSM_WINDOW_PAGES];
	bool any = false;
	int r = ksm_os_pagemap(region->peer->fds.pagemap, ksm_region_page(region, first), count, kinds);
	if (r)
		return r;
	for (size_t i = 0; i < count; i++) {
		ksm_pageno page = first + i;
		chosen[i] = worn[i] && (kinds[i] & KSM_PAGE_HELD) && (kinds[i] & KSM_PAGE_PRESENT) &&
			    is_framed(region, page) && !ksm_region_is_held(region, page) &&
			    KSM_GUARD_STATE(ksm_region_guard_of(region, page)) == KSM_GUARD_WRITABLE;
		any |= chosen[i];
	}
	return any;
}

/* Everybody is parked. Nobody looks into what is not ours any more. */
static void choose_ours(const struct ksm_region *region, ksm_pageno first, size_t count, bool *chosen)
{
	uint8_t found[KSM_WINDOW_PAGES];
	ksm_survey(region, first, count, found);
	for (size_t i = 0; i < count; i++)
		chosen[i] &= found[i] == KSM_SURVEY_OURS;
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

bool ksm_must_rest(const struct ksm_region *region, const struct ksm_barrier *barrier)
{
	return barrier->ops && barrier->ops->attend && region->peer->fds.pagemap >= 0;
}

int ksm_give_back(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		  size_t count, const bool *worn, char *buffer, uint64_t *given)
{
	bool done[KSM_WINDOW_PAGES] = {false}, chosen[KSM_WINDOW_PAGES];
	bool rested = ksm_must_rest(region, barrier);
	int any = 1;
	ksm_ensure(count <= KSM_WINDOW_PAGES);
	memcpy(chosen, worn, count * sizeof(*worn));
	if (rested)
		any = choose_rested(region, first, count, worn, chosen);
	int r = any > 0 ? ksm_park_ready(park) : any;
	if (any > 0 && !r)
		r = ksm_park_begin(park);
	if (any <= 0 || r)
		return r;
	if (rested) /* some may have been let go meanwhile */
		r = KSM_MIN(choose_rested(region, first, count, worn, chosen), 0);
	choose_ours(region, first, count, chosen);
	for (size_t i = 0, n; i < count && !r; i += n ? n : 1) {
		n = worn_run(chosen, i, count);
		if (n)
			r = replace_parked(region, first + i, n, rested, buffer);
		memset(done + i, !r, n);
	}
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
	int r = ksm_survey_is_ours(region, page, n) ? 0 : KSM_EMEMORY;
	if (r) {
		ksm_guard_set(region->guard, page, n, was);
		return r;
	}
	r = writable ? ksm_os_protect(at, n * KSM_PAGE_SIZE, false) : 0;
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
			int r = ksm_survey_read(region, page + i, fresh + i * KSM_PAGE_SIZE);
			if (r)
				return r;
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
static int replace_held(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno page, size_t n,
			const uint16_t *kinds)
{
	void *fresh;
	int r = ksm_os_map_anon(NULL, n * KSM_PAGE_SIZE, false, false, &fresh);
	if (r)
		return r;
	if (!region->registered)
		ksm_os_advise(fresh, n * KSM_PAGE_SIZE, MADV_NOHUGEPAGE); /* as its neighbours: they can join */
	r = ksm_survey_is_ours(region, page, n) ? fill(region, page, n, kinds, fresh) : KSM_EMEMORY;
	if (!r && region->registered && barrier->ops->holds &&
	    !barrier->ops->holds(barrier, ksm_region_page(region, page), n))
		r = KSM_EMEMORY;
	if (!r)
		r = ksm_os_remap(fresh, ksm_region_page(region, page), n * KSM_PAGE_SIZE);
	if (r) {
		ksm_os_unmap(fresh, n * KSM_PAGE_SIZE);
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
	char byte;
	int r = ksm_os_pagemap(fd, ksm_region_page(region, page), n, kinds);
	for (size_t i = 0; i < n && !r; i++) {
		if (kinds[i] & KSM_PAGE_PRESENT)
			continue;
		if (!region->registered || ksm_os_read_own(ksm_region_page(region, page + i), &byte, 1) == -ENOSYS)
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
		r = replace_held(region, barrier, page + i, run, kinds + i);
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

static size_t framed_run(const struct ksm_region *region, ksm_pageno page, size_t most)
{
	size_t n = 0;
	while (n < most && is_framed(region, page + n))
		n++;
	return n;
}

/* WRITABLE pages only: no handler touches those. */
static int restore_run(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno page,
		       size_t n, enum ksm_restore_broken broken, struct ksm_restore_counts *counts)
{
	bool holds = barrier->ops && barrier->ops->hold && region->peer->fds.pagemap >= 0;
	bool own = holds && barrier->ops != &ksm_barrier_stop; /* that one would park as well */
	int r = 0;
	for (size_t i = 0, run; i < n && !r; i += run ? run : 1) {
		run = framed_run(region, page + i, n - i);
		int parked = run && park ? restore_parked(region, barrier, park, page + i, run, counts) : -ENOSYS;
		r = run && !own ? parked : 0;
	}
	for (size_t i = 0, run; own && i < n && !r; i += run ? run : 1) { /* after: releasing ends the others' rest */
		run = framed_run(region, page + i, n - i);
		if (run)
			r = restore_held(region, barrier, page + i, run, broken == KSM_RESTORE_ALWAYS, counts);
	}
	for (size_t i = 0; i < n; i++)
		counts->broken += ksm_region_state(region, page + i) == KSM_PAGE_BROKEN;
	return r;
}

/* RESTORE-4 */
static int survey(struct ksm_region *region, ksm_pageno first, size_t count)
{
	uint8_t found[KSM_SURVEY_MOST];
	int r = 0;
	for (size_t i = 0, n; region->registered && i < count; i += n) {
		n = KSM_MIN(count - i, (size_t)KSM_SURVEY_MOST);
		ksm_survey(region, first + i, n, found);
		ksm_survey_give_up(region, first + i, n, found);
		for (size_t j = 0; j < n; j++)
			if (found[j] == KSM_SURVEY_CHANGED && is_framed(region, first + i + j))
				r = KSM_EMEMORY;
	}
	return r;
}

int ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		size_t count, enum ksm_restore_broken broken, struct ksm_restore_counts *counts)
{
	int r = survey(region, first, count);
	barrier->foreign = region->registered;
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
