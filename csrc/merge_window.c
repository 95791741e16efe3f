/* SPDX-License-Identifier: MIT */
/*
 * DOC: Merging in a window
 *
 * The step "window" of a merge: open ▸ compare byte for byte ▸ map or drop ▸ close, and then the page words follow what
 * has become of each page. Two kinds of windows meet here: the process's barrier for ordinary pages, and for frozen ones,
 * which nobody can write anyhow, the one that needs nothing but their guards.
 *
 * MERGE-1 and MERGE-6 (see merge.c) are kept here.
 */
#include "merge.h"

#include "dirty.h"
#include "error.h"
#include "os.h"
#include "page.h"
#include "survey.h"

#include <errno.h>
#include <string.h>

#define GAP_MOST 2
#define KSM_POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, Linux 5.14 */

static void became_merged(struct ksm_merger *m, size_t i, size_t n)
{
	ksm_pageno page = m->first + i;
	size_t before = ksm_region_boundaries(m->region, page, n);
	for (size_t j = i; j < i + n; j++) {
		if (ksm_region_state(m->region, m->first + j) == KSM_PAGE_CANDIDATE)
			ksm_candidate_remove(m->index, m->peer, ksm_region_digest(m->region, m->first + j),
					     ksm_merger_page(m, j));
		ksm_region_move(m->region, m->first + j, KSM_PAGE_MERGED, m->targets[j]);
		m->verdicts[j] = KSM_MERGE_LEAVE;
	}
	size_t after = ksm_region_boundaries(m->region, page, n);
	ksm_peer_count_vmas(m->peer, (int64_t)after - (int64_t)before);
	ksm_count(m->peer->self, KSM_MERGES, (int64_t)n);
	m->counts->merged += n;
}

static void became_dropped(struct ksm_merger *m, size_t i)
{
	if (ksm_region_state(m->region, m->first + i) == KSM_PAGE_CANDIDATE)
		ksm_region_unknow(m->region, m->first + i);
	if (ksm_region_state(m->region, m->first + i) == KSM_PAGE_UNKNOWN)
		ksm_region_move(m->region, m->first + i, KSM_PAGE_SEEN, m->digests[i]);
	ksm_region_move(m->region, m->first + i, KSM_PAGE_DROPPED, 0);
	m->verdicts[i] = KSM_MERGE_LEAVE;
	ksm_count(m->peer->self, KSM_ZERO_MERGES, 1);
	m->counts->dropped++;
}

/*
 * Map [j, j + run) of the window, pages [i + j, …) of the stretch. A mapping that is read-only is open to stores at once,
 * while the window still keeps others out: so its guard says BUSY before, and MERGED after (MERGE-6). "segv" does so itself.
 */
static void map_run(struct ksm_merger *m, struct ksm_barrier *window, size_t i, size_t j, size_t run)
{
	bool writable = !m->is_frozen[i + j] && !m->region->sigsegv;
	struct ksm_guard *guard = window->ops->kind == KSM_BARRIER_SEGV ? NULL : m->region->guard;
	ksm_pageno page = m->first + i + j;
	uint64_t offset = (uint64_t)m->targets[i + j] << KSM_PAGE_SHIFT;
	uint8_t was[KSM_STRETCH];
	for (size_t k = 0; k < run; k++) /* MERGE-2: of a frame that nobody refers to the bytes are gone tomorrow */
		ksm_ensure(m->targets[i + j + k] < m->peer->layout.frames && m->peer->counts[m->targets[i + j + k]]);
	for (size_t k = 0; guard && k < run; k++)
		was[k] = ksm_guard_get(guard, page + k);
	if (guard && !writable)
		ksm_guard_set(guard, page, run, KSM_GUARD_BUSY);
	int r = ksm_window_map(window, j, run, m->peer->fds.store, offset, writable);
	for (size_t k = 0; guard && k < run; k++)
		ksm_guard_set(guard, page + k, 1, r ? was[k] : writable ? KSM_GUARD_WRITABLE : KSM_GUARD_MERGED);
	if (r)
		ksm_count(m->peer->self, KSM_FAILURES, 1);
}

static bool is_wanted(const struct ksm_merger *m, size_t i)
{
	return m->verdicts[i] == KSM_MERGE_MAP || m->verdicts[i] == KSM_MERGE_DROP;
}

static bool is_in_place(const struct ksm_barrier *window)
{
	return window->view == window->at;
}

/* Inside the window: what page j of it holds, or NULL. */
static const char *seen_in_window(struct ksm_merger *m, struct ksm_barrier *window, size_t i, size_t j,
				  const uint8_t *found)
{
	if (found[j] == KSM_SURVEY_GONE)
		ksm_window_give_up(window, j);
	if (found[j] != KSM_SURVEY_OURS)
		return NULL;
	return is_in_place(window) ? ksm_merger_bytes(m, i + j) : window->view + j * KSM_PAGE_SIZE;
}

/* Inside the window: MERGE-1. Pages [i, i + n) of the stretch are pages [0, n) of the window. */
static void decide(struct ksm_merger *m, struct ksm_barrier *window, size_t i, size_t n)
{
	uint8_t found[KSM_STRETCH];
	bool equal[KSM_STRETCH];
	ksm_survey(m->region, m->first + i, n, found);
	for (size_t j = 0; j < n; j++) {
		const char *page = seen_in_window(m, window, i, j, found);
		equal[j] = page && is_wanted(m, i + j) &&
			   (m->verdicts[i + j] == KSM_MERGE_DROP ? ksm_page_is_zero(page)
								 : ksm_page_equal(page, ksm_merger_copy(m, i + j)));
	}
	for (size_t j = 0, run; j < n; j += run) {
		run = 1;
		if (!equal[j])
			continue;
		if (m->verdicts[i + j] == KSM_MERGE_DROP) {
			while (j + run < n && equal[j + run] && m->verdicts[i + j + run] == KSM_MERGE_DROP)
				run++;
			if (ksm_window_drop(window, j, run))
				ksm_count(m->peer->self, KSM_FAILURES, 1);
			continue;
		}
		while (j + run < n && equal[j + run] && m->verdicts[i + j + run] == KSM_MERGE_MAP &&
		       m->targets[i + j + run] == m->targets[i + j] + run)
			run++;
		map_run(m, window, i, j, run);
	}
}

static void settle_fates(struct ksm_merger *m, size_t i, size_t n, const uint8_t *fates)
{
	for (size_t j = 0, run; j < n; j += run) {
		run = 1;
		if (fates[j] == KSM_WINDOW_MAPPED) {
			while (j + run < n && fates[j + run] == KSM_WINDOW_MAPPED)
				run++;
			became_merged(m, i + j, run);
		} else if (fates[j] == KSM_WINDOW_DROPPED) {
			became_dropped(m, i + j);
		} else if (is_wanted(m, i + j)) {
			if (m->verdicts[i + j] == KSM_MERGE_MAP)
				ksm_merge_let_go(m, i + j);
			m->verdicts[i + j] = KSM_MERGE_LEAVE;
			ksm_region_unknow(m->region, m->first + i + j);
			ksm_count(m->peer->self, KSM_PUT_BACKS, 1);
		}
	}
}

/* The kernel would not open the window at page i. */
static void refused(struct ksm_merger *m, size_t i, size_t n, int error)
{
	bool all = error <= KSM_EUNSUPPORTED; /* one of our own codes: not about these pages */
	bool thawed = error == -EAGAIN;       /* by a store, since we looked */
	bool refuses = error == -EBUSY || (error == -EINVAL && n == 1); /* pinned, shared by fork, locked */
	size_t affected = refuses || thawed ? 1 : n;
	for (size_t j = i; j < i + affected; j++) {
		if (!is_wanted(m, j))
			continue;
		m->counts->skipped++;
		if (m->verdicts[j] == KSM_MERGE_MAP)
			ksm_merge_let_go(m, j);
		m->verdicts[j] = KSM_MERGE_LEAVE;
		ksm_merger_come_back(m, j);
		if (all)
			continue;
		ksm_region_unknow(m->region, m->first + j);
		if (refuses) {
			ksm_region_move(m->region, m->first + j, KSM_PAGE_SEEN, m->digests[j]);
			ksm_region_move(m->region, m->first + j, KSM_PAGE_REFUSED, m->digests[j]);
		}
	}
	if (!refuses && !thawed)
		ksm_merger_why_not(m, error);
	if (!refuses && !thawed && !all)
		ksm_count(m->peer->self, KSM_FAILURES, 1);
}

/*
 * Registered memory is looked at before anything is done to it; where a window covers what it does not touch, inside.
 * Locked pages are left alone, for a new mapping would not be locked as the old one was. The kernel does not move them:
 * there it says EINVAL by itself.
 */
static int try_window(struct ksm_merger *m, struct ksm_barrier *window, size_t i, size_t n)
{
	if (window->ops && !window->ops->in_place && !ksm_survey_is_ours(m->region, m->first + i, n))
		return KSM_EMEMORY;
	if (window->ops && window->ops->kind != KSM_BARRIER_MOVE &&
	    ksm_survey_is_locked(ksm_merger_page(m, i), n * KSM_PAGE_SIZE))
		return -EINVAL;
	if (window->ops && window->ops->kind == KSM_BARRIER_MOVE) { /* DIRTY-4 */
		int r = ksm_dirty_let_go(m->region, m->first + i, n);
		if (r)
			return r;
	}
	return ksm_window_open(window, ksm_merger_page(m, i), n);
}

/*
 * A page that was shared by a fork whose other side is gone is ours alone, but the kernel knows only after the next
 * write. Asking for write access writes nothing and tells it. Pinned pages stay refused.
 */
static int open_window(struct ksm_merger *m, struct ksm_barrier *window, size_t i, size_t *n)
{
	char *at = ksm_merger_page(m, i);
	window->foreign = m->region->registered;
	int r = try_window(m, window, i, *n);
	if (r == -EBUSY && window->ops->kind == KSM_BARRIER_MOVE &&
	    !ksm_os_advise(at, *n * KSM_PAGE_SIZE, KSM_POPULATE_WRITE))
		r = try_window(m, window, i, *n);
	while (r == -EINVAL && *n > 1) { /* two mappings: pages move within one; or some of it is locked */
		*n = (*n + 1) / 2;
		r = try_window(m, window, i, *n);
	}
	return r;
}

/*
 * May a window be opened over a page that only lies between two wanted ones? It comes back as it was; the next pass reads it
 * again, for what was known of its writes is lost (DIRTY-4). That costs less than a window more, if gaps are short. Only a
 * cold page, though, which nobody is writing now: under "move" its writer would wait, and under "segv" a system call that
 * writes there would fail.
 */
static bool may_lie_between(const struct ksm_merger *m, const struct ksm_barrier *window, size_t i)
{
	uint16_t kind = m->kinds[i];
	if (window->ops->in_place)
		return true;
	return window->ops->kind == KSM_BARRIER_MOVE &&
	       ksm_region_state(m->region, m->first + i) == KSM_PAGE_CANDIDATE && (kind & KSM_PAGE_PRESENT) &&
	       !(kind & (KSM_PAGE_FILE | KSM_PAGE_SHARED)) && !m->region->registered &&
	       !ksm_region_is_held(m->region, m->first + i);
}

/* Pages from i that one window can cover: all wanted, but for gaps of at most GAP_MOST; in place, of any length. */
static size_t window_at(const struct ksm_merger *m, const struct ksm_barrier *window, size_t i)
{
	size_t n = 0;
	for (size_t j = i; j < m->count && ksm_merger_barrier(m, j) == window; j++) {
		if (is_wanted(m, j))
			n = j + 1 - i;
		else if (!may_lie_between(m, window, j) || (!window->ops->in_place && j - i >= n + GAP_MOST))
			break;
	}
	return n;
}

/* What was there when the stretch was looked at may have been swapped out since; from there the kernel does not always move
 * pages safely (before Linux 6.16). Those that are to be merged go no further, the others lie in no window. */
static void see_again(struct ksm_merger *m)
{
	if (!m->barrier->ops || m->barrier->ops->kind != KSM_BARRIER_MOVE || ksm_merger_see_kinds(m))
		return;
	for (size_t i = 0; i < m->count; i++) {
		if (!is_wanted(m, i) || !(m->kinds[i] & KSM_PAGE_SWAPPED))
			continue;
		if (m->verdicts[i] == KSM_MERGE_MAP)
			ksm_merge_let_go(m, i);
		m->verdicts[i] = KSM_MERGE_LEAVE;
		ksm_merger_come_back(m, i);
	}
}

void ksm_merge_windows(struct ksm_merger *m)
{
	uint8_t fates[KSM_STRETCH];
	see_again(m);
	for (size_t i = 0; i < m->count;) {
		struct ksm_barrier *window = m->is_frozen[i] ? &m->frozen : m->barrier;
		size_t n = is_wanted(m, i) ? window_at(m, window, i) : 0;
		if (n == 0) {
			i++;
			continue;
		}
		size_t wanted = n;
		int r = open_window(m, window, i, &n);
		if (r) {
			ksm_dirty_take_back(m->region, m->first + i, wanted);
			refused(m, i, n, r);
			i += r == -EBUSY || r == -EAGAIN ? 1 : n;
			continue;
		}
		n = window->pages;
		decide(m, window, i, n);
		memcpy(fates, window->fate, n);
		unsigned failures = ksm_window_close(window);
		if (failures)
			ksm_count(m->peer->self, KSM_FAILURES, failures);
		settle_fates(m, i, n, fates);
		ksm_dirty_take_back(m->region, m->first + i, wanted);
		i += n;
	}
}
