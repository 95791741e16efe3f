/* SPDX-License-Identifier: MIT */
/*
 * DOC: Merging
 *
 * A stretch of pages is handled in steps, each over the whole stretch, so that calls are few and runs stay whole:
 *
 *    look      what kind of page is it, was it written, is it cold          (no window)
 *    find      continue the run on the left, else ask the index, else promote: another peer has such a page
 *    fetch     bytes of the frames to compare with: pread; or, promoting: copy the page, pwrite, publish
 *    window    open ▸ compare byte for byte ▸ map or drop ▸ close           (the only place that merges)
 *
 * MERGE-1. Only a comparison of all bytes inside a window merges. Everything before it proposes.
 * MERGE-2. A frame is taken before it is read and put again if its page is not mapped to it after all.
 * MERGE-3. Frames are written before the window opens; inside it there is no allocation and no lock, only
 *          compare and map.
 * MERGE-4. The number of memory mappings that merging costs stays within a budget (a third of what the kernel allows
 *          the process); the more of it is used, the longer a run must be to be worth one.
 * MERGE-5. A failing call leaves the page as it was: put back, private, and counted.
 * MERGE-6. A page that becomes read-only has its guard say so before the window closes: from then on a store faults.
 * MERGE-7. A broken page whose mapping still refers to its frame is given anonymous memory again while all threads are
 *          parked, and only then: a direct transfer may be under way to it, which nothing else keeps out.
 * MERGE-8. Nothing is merged where the kernel might have to kill somebody for it. A stretch takes memory before it gives
 *          any back: frames, and the buffer; both must fit into what the control groups allow, with room to spare
 *          (headroom.c). Near the limit stretches are short, so that little is taken at a time and soon more is free; at
 *          the limit nothing is looked at.
 *
 * Runs under the merge lock, in the scanner's thread, a stretch at a time.
 */
#include "merge.h"

#include "atomic.h"
#include "error.h"
#include "handler.h"
#include "os.h"
#include "page.h"
#include "restore.h"
#include "survey.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

int ksm_merger_init(struct ksm_merger *merger, struct ksm_peer *peer, struct ksm_index *index,
		    struct ksm_barrier *barrier, struct ksm_park *park)
{
	void *buffer;
	memset(merger, 0, sizeof(*merger));
	int r = ksm_os_map_table(KSM_STRETCH * KSM_PAGE_SIZE, &buffer);
	if (r)
		return r;
	ksm_os_advise(buffer, KSM_STRETCH * KSM_PAGE_SIZE, MADV_DONTFORK);
	merger->peer = peer;
	merger->index = index;
	merger->barrier = barrier;
	merger->frozen = (struct ksm_barrier){.uffd = -1, .error = -ENOSYS};
	merger->park = park;
	merger->buffer = buffer;
	peer->own[KSM_OWN_BUFFER] = (struct ksm_range){buffer, KSM_STRETCH * KSM_PAGE_SIZE};
	ksm_headroom_init(&merger->headroom, NULL, NULL);
	ksm_headroom_init(&merger->tight, NULL, NULL);
	ksm_merger_set_budget(merger);
	return 0;
}

void ksm_merger_set_budget(struct ksm_merger *merger)
{
	uint64_t most = ksm_os_max_map_count();
	uint64_t all = ksm_os_count_maps(), ours = (uint64_t)KSM_MAX(ksm_load_relaxed(&merger->peer->vmas_used), 0);
	uint64_t others = all > ours ? all - ours : 0, reserve = most / 8; /* for what the program may still map */
	uint64_t left = most > others + reserve ? most - others - reserve : 0;
	merger->vma_budget = KSM_MIN(most / 3, left);
	merger->budget_round++; /* what breaks have cost since is counted by now */
	merger->grants_left = KSM_MAX((int64_t)merger->vma_budget - (int64_t)ours, 0);
	ksm_count_set(merger->peer->self, KSM_VMA_BUDGET, merger->vma_budget);
}

void ksm_merger_fini(struct ksm_merger *merger)
{
	ksm_barrier_destroy(&merger->frozen);
	if (merger->buffer)
		ksm_os_unmap(merger->buffer, KSM_STRETCH * KSM_PAGE_SIZE);
	merger->buffer = NULL;
}

void ksm_merger_rest(struct ksm_merger *merger)
{
	ksm_os_advise(merger->buffer, KSM_STRETCH * KSM_PAGE_SIZE, MADV_DONTNEED);
}

/* ---- fetch -------------------------------------------------------------------------------------------- */

/* Give the target of page i back: it will not be mapped. */
void ksm_merge_let_go(struct ksm_merger *m, size_t i)
{
	if (m->promoted[i]) {
		ksm_frame_abandon(m->peer, m->targets[i]);
		ksm_candidate_unclaim(m->index, m->peer, m->digests[i], ksm_merger_page(m, i));
	} else {
		ksm_frame_put(m->peer, m->targets[i], 1);
	}
	m->promoted[i] = false;
	m->verdicts[i] = KSM_MERGE_LEAVE;
	ksm_merger_come_back(m, i);
}

/* Pages [i, i + n) that all are to be mapped, to consecutive frames, all promoted or none. */
static size_t run_at(const struct ksm_merger *m, size_t i)
{
	size_t n = 0;
	while (i + n < m->count && m->verdicts[i + n] == KSM_MERGE_MAP && m->promoted[i + n] == m->promoted[i] &&
	       m->targets[i + n] == m->targets[i] + n)
		n++;
	return n;
}

static void publish(struct ksm_merger *m, size_t i)
{
	uint32_t generation = ksm_frame_publish(m->peer, m->targets[i], m->digests[i]);
	ksm_index_insert(m->index, m->peer, m->digests[i], m->targets[i], generation);
	ksm_candidate_unclaim(m->index, m->peer, m->digests[i], ksm_merger_page(m, i));
	m->promoted[i] = false; /* from here on a frame like any other */
	m->at_hand[i] = true;
	m->kept[i] = m->targets[i];
	m->counts->promoted++;
	ksm_count(m->peer->self, KSM_PROMOTIONS, 1);
}

static void write_run(struct ksm_merger *m, size_t i, size_t n)
{
	int r = ksm_frame_write(m->peer, m->targets[i], n, ksm_merger_copy(m, i));
	for (size_t j = i; j < i + n; j++) {
		if (r)
			ksm_merge_let_go(m, j);
		else
			publish(m, j);
	}
	if (r) {
		ksm_merger_why_not(m, r);
		ksm_count(m->peer->self, KSM_FAILURES, 1);
	}
}

static void read_run(struct ksm_merger *m, size_t i, size_t n)
{
	int r = ksm_frame_read(m->peer, m->targets[i], n, ksm_merger_copy(m, i));
	memset(m->at_hand + i, false, n);
	if (r)
		ksm_count(m->peer->self, KSM_FAILURES, 1);
	for (size_t j = i; j < i + n; j++) {
		const char *bytes = r ? NULL : ksm_merger_bytes(m, j);
		if (bytes && ksm_page_equal(bytes, ksm_merger_copy(m, j)))
			continue;
		if (bytes)
			ksm_region_set_clean(m->region, m->first + j, false); /* it is not what its word says */
		ksm_merge_let_go(m, j);
	}
}

/* FRAME-1, where the peer epoch was scribbled over: before frames are written, the living are listed again. */
static void check_newcomers(struct ksm_merger *m)
{
	if (!memchr(m->promoted, true, m->count) || ksm_peer_nobody_came(m->peer))
		return;
	for (size_t i = 0; i < m->count; i++)
		if (m->verdicts[i] == KSM_MERGE_MAP && m->promoted[i])
			ksm_merge_let_go(m, i);
	m->peer->living_known = false;
	ksm_merger_why_not(m, -EAGAIN);
}

static bool is_at_hand(const struct ksm_merger *m, size_t i)
{
	return m->at_hand[i] && m->kept[i] == m->targets[i];
}

static void fetch(struct ksm_merger *m)
{
	for (size_t i = 0; i < m->count; i++) {
		if (m->verdicts[i] != KSM_MERGE_MAP || !m->promoted[i])
			continue;
		m->at_hand[i] = false;
		int r = ksm_survey_read(m->region, m->first + i, ksm_merger_copy(m, i));
		if (!r && ksm_page_digest(ksm_merger_copy(m, i)) == m->digests[i])
			continue;
		ksm_region_set_clean(m->region, m->first + i, false); /* changed meanwhile */
		ksm_merge_let_go(m, i);
	}
	check_newcomers(m);
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		n = run_at(m, i);
		if (n && m->promoted[i])
			write_run(m, i, n);
	}
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		n = run_at(m, i);
		for (size_t j = 0; j < n; j++)
			if (is_at_hand(m, i + j) != is_at_hand(m, i))
				n = j;
		if (n && !is_at_hand(m, i))
			read_run(m, i, n);
	}
}

/* ---- headroom --------------------------------------------------------------------------------------------- */

uint64_t ksm_merger_spare(const struct ksm_merger *m)
{
	return (m->peer->living_count + 4) * KSM_STRETCH * KSM_PAGE_SIZE; /* a stretch of each peer's, and some more */
}

/* Is there room for a stretch of so many pages, of each peer's, and some more? */
static bool has_room(const struct ksm_merger *m, struct ksm_headroom *headroom, size_t pages)
{
	uint64_t nbytes = 2 * pages * KSM_PAGE_SIZE; /* frames, and their copies in the buffer */
	return !ksm_headroom_check(headroom, nbytes, (m->peer->living_count + 4) * nbytes);
}

size_t ksm_merger_stretch(struct ksm_merger *m)
{
	if (has_room(m, &m->headroom, KSM_STRETCH))
		return KSM_STRETCH;
	return has_room(m, &m->tight, KSM_STRETCH_TIGHT) ? KSM_STRETCH_TIGHT : 0;
}

/* ---- the budget of mappings ------------------------------------------------------------------------------ */

size_t ksm_merger_least_run(const struct ksm_merger *m, uint64_t used)
{
	if (used < m->vma_budget / 2)
		return 1;
	if (used < m->vma_budget / 4 * 3)
		return 4;
	return used < m->vma_budget / 8 * 7 ? 16 : KSM_STRETCH;
}

static void keep_budget(struct ksm_merger *m)
{
	uint64_t used = (uint64_t)KSM_MAX(m->peer->vmas_used, 0);
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		n = run_at(m, i);
		if (!n)
			continue;
		size_t before = ksm_region_boundaries(m->region, m->first + i, n);
		size_t after = ksm_region_boundaries_if(m->region, m->first + i, n, m->targets[i]);
		bool costs = after > before;
		if (costs && (n < ksm_merger_least_run(m, used) || used + (after - before) > m->vma_budget)) {
			for (size_t j = i; j < i + n; j++)
				ksm_merge_let_go(m, j);
			ksm_merger_why_not(m, KSM_EBUDGET);
		} else if (costs) {
			used += after - before;
		}
	}
}

/* ---- broken pages ------------------------------------------------------------------------------------------- */

/* What changes in mappings if [i, i + n) became anonymous. */
static int64_t cost_of(const struct ksm_merger *m, size_t i, size_t n)
{
	return (int64_t)ksm_region_boundaries_if(m->region, m->first + i, n, KSM_NO_FRAME) -
	       (int64_t)ksm_region_boundaries(m->region, m->first + i, n);
}

static bool can_go(const struct ksm_merger *m, size_t i)
{
	return ksm_region_frame(m->region, m->first + i) != KSM_NO_FRAME &&
	       KSM_GUARD_STATE(ksm_region_guard_of(m->region, m->first + i)) == KSM_GUARD_WRITABLE &&
	       !ksm_region_is_held(m->region, m->first + i) && !(m->kinds[i] & KSM_PAGE_SWAPPED);
}

/*
 * Worn pages [i, i + n) would cost mappings that the budget has not got. Where at least half of all that lies around
 * them is worn, the whole neighbourhood goes: that costs none. Returns how far this has been decided.
 */
static size_t give_neighbourhood(struct ksm_merger *m, size_t i, size_t n)
{
	size_t low = i, end = i + n, worn = 0;
	while (low > 0 && can_go(m, low - 1))
		low--;
	while (end < m->count && can_go(m, end))
		end++;
	for (size_t j = low; j < end; j++)
		worn += m->worn[j];
	bool all = 2 * worn >= end - low && cost_of(m, low, end - low) <= 0;
	memset(m->worn + (all ? low : i), all, all ? end - low : n);
	return all ? end : i + n;
}

bool ksm_merger_note_worn(struct ksm_merger *m, const struct ksm_region *region, ksm_pageno first, size_t count)
{
	struct ksm_worn_run *last = m->run_count ? &m->runs[m->run_count - 1] : NULL;
	if (last && last->region == region && last->first + last->count == first) {
		last->count += count;
		return true;
	}
	if (m->run_count == KSM_WORN_RUNS)
		return false; /* the next pass finds them again */
	m->runs[m->run_count++] = (struct ksm_worn_run){region, ksm_region_page(region, first), first, count, false};
	return true;
}

static void note_all_worn(struct ksm_merger *m)
{
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		for (n = 0; i + n < m->count && m->worn[i + n];)
			n++;
		if (n && !ksm_merger_note_worn(m, m->region, m->first + i, n))
			return;
	}
}

static void give_back(struct ksm_merger *m)
{
	uint64_t used = (uint64_t)KSM_MAX(m->peer->vmas_used + m->runs_cost, 0), before = used, given = 0;
	bool any = false;
	for (size_t i = 0; i < m->count;) {
		size_t n = 0;
		while (i + n < m->count && m->worn[i + n])
			n++;
		if (!n) {
			i++;
			continue;
		}
		int64_t cost = cost_of(m, i, n);
		if (cost > 0 && (n < ksm_merger_least_run(m, used) || used + (uint64_t)cost > m->vma_budget)) {
			i = give_neighbourhood(m, i, n);
		} else {
			used += (uint64_t)KSM_MAX(cost, 0);
			i += n;
		}
	}
	for (size_t i = 0; i < m->count; i++)
		any |= m->worn[i];
	if (!any)
		return;
	if (ksm_must_rest(m->region, m->barrier)) {
		note_all_worn(m);
		m->runs_cost += (int64_t)(used - before);
		return;
	}
	memset(m->at_hand, false, sizeof(m->at_hand));
	int r = ksm_give_back(m->region, m->barrier, m->park, m->first, m->count, m->worn, m->buffer, &given);
	if (r)
		ksm_merger_why_not(m, r);
	m->counts->given_back += given;
	ksm_count(m->peer->self, KSM_GIVE_BACKS, (int64_t)given);
}

/* ---- a stretch ----------------------------------------------------------------------------------------------- */

int ksm_merger_ready(const struct ksm_merger *m, size_t i)
{
	const struct ksm_barrier *window = ksm_merger_barrier(m, i);
	if (!window->ops)
		return window->error ? window->error : -ENOSYS;
	if (m->handled && (m->region->sigsegv || window->ops->kind == KSM_BARRIER_SEGV))
		return m->handled;
	return window->ops->kind == KSM_BARRIER_STOP ? ksm_park_ready(window->park) : 0;
}

/* What the SIGSEGV handler has to say, and to know, of this region. */
static void prepare_handling(struct ksm_merger *m)
{
	struct ksm_region *region = m->region;
	bool segv = m->barrier->ops && m->barrier->ops->kind == KSM_BARRIER_SEGV;
	m->handled = 0;
	if (!region->sigsegv && !region->frozen && !segv)
		return;
	if (region->frozen && !m->frozen.ops) {
		ksm_barrier_create(&m->frozen, KSM_BARRIER_SEGV, NULL, -1);
		m->frozen.frozen_only = true;
	}
	m->handled = ksm_handler_check();
	ksm_count_set(m->peer->self, KSM_SUSPENSIONS, ksm_handler_suspensions());
	if (!m->handled)
		m->handled = ksm_region_guard(region);
	if (region->guard && region->budget_round != m->budget_round) {
		region->budget_round = m->budget_round;
		m->grants_left /= 2; /* half of what is left to each */
		ksm_store_relaxed(&region->guard->vmas_left, m->grants_left);
	}
}

/* Of stretches that are looked at in whole. */
static void clear_notes(struct ksm_merger *m)
{
	size_t used = ksm_load_acquire(&m->region->used);
	for (size_t i = 0; i + KSM_TODO_PAGES <= m->count || m->first + m->count >= used; i += KSM_TODO_PAGES) {
		if (i >= m->count || (m->first + i) % KSM_TODO_PAGES)
			break;
		*ksm_region_todo(m->region, m->first + i) &= KSM_TODO_OURS | KSM_TODO_FRESH;
	}
}

void ksm_merge_stretch(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		       struct ksm_merge_counts *counts)
{
	memset(merger->at_hand, false, sizeof(merger->at_hand));
	ksm_merge_at_hand(merger, region, first, count, force, counts);
}

void ksm_merge_at_hand(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		       struct ksm_merge_counts *counts)
{
	ksm_ensure(count <= KSM_STRETCH && first < region->room && count <= region->room - first);
	merger->region = region;
	merger->first = first;
	merger->count = count;
	merger->force = force;
	merger->counts = counts;
	memset(merger->promoted, 0, sizeof(merger->promoted));
	memset(merger->verdicts, KSM_MERGE_LEAVE, sizeof(merger->verdicts));
	memset(merger->worn, 0, sizeof(merger->worn));
	uint64_t skipped = counts->skipped;
	if (!merger->twins)
		clear_notes(merger);
	prepare_handling(merger);
	if (ksm_merge_look(merger)) {
		ksm_merge_find(merger);
		keep_budget(merger);
		fetch(merger);
		ksm_merge_windows(merger);
	}
	ksm_ensure(!merger->barrier->pages && !merger->frozen.pages); /* BARRIER-4 */
	if (merger->park)
		give_back(merger);
	ksm_merge_note_rest(merger);
	ksm_count(merger->peer->self, KSM_PAGES_SKIPPED, (int64_t)(counts->skipped - skipped));
}
