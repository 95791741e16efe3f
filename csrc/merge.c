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
 *
 * Runs under the merge lock, in the scanner's thread, a stretch at a time.
 */
#include "merge.h"

#include "atomic.h"
#include "dirty.h"
#include "error.h"
#include "os.h"
#include "page.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define KSM_POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, Linux 5.14 */

int ksm_merger_init(struct ksm_merger *merger, struct ksm_peer *peer, struct ksm_index *index,
		    struct ksm_barrier *barrier)
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
	merger->buffer = buffer;
	ksm_merger_set_budget(merger);
	return 0;
}

void ksm_merger_set_budget(struct ksm_merger *merger)
{
	uint64_t most = ksm_os_max_map_count();
	uint64_t all = ksm_os_count_maps(), ours = (uint64_t)KSM_MAX(merger->peer->vmas_used, 0);
	uint64_t others = all > ours ? all - ours : 0, reserve = most / 8; /* for what the program may still map */
	uint64_t left = most > others + reserve ? most - others - reserve : 0;
	merger->vma_budget = KSM_MIN(most / 3, left);
	ksm_count_set(merger->peer->self, KSM_VMA_BUDGET, merger->vma_budget);
}

void ksm_merger_fini(struct ksm_merger *merger)
{
	if (merger->buffer)
		munmap(merger->buffer, KSM_STRETCH * KSM_PAGE_SIZE);
	merger->buffer = NULL;
}

void ksm_merger_rest(struct ksm_merger *merger)
{
	ksm_os_advise(merger->buffer, KSM_STRETCH * KSM_PAGE_SIZE, MADV_DONTNEED);
}

static char *copy_at(const struct ksm_merger *m, size_t i)
{
	return m->buffer + i * KSM_PAGE_SIZE;
}

/* ---- look -------------------------------------------------------------------------------------------- */

/* A page that is, or was, mapped to a frame or dropped. Returns whether there is a private page to look at. */
static bool look_at_merged(struct ksm_merger *m, size_t i, enum ksm_page_state state)
{
	ksm_pageno page = m->first + i;
	uint16_t kind = m->kinds[i];
	bool private = (kind & KSM_PAGE_SWAPPED) || ((kind & KSM_PAGE_PRESENT) && !(kind & KSM_PAGE_FILE));
	if (state == KSM_PAGE_MERGED && private) {
		ksm_region_move(m->region, page, KSM_PAGE_BROKEN, ksm_region_frame(m->region, page));
		ksm_count(m->peer->self, KSM_COW_BREAKS, 1);
	}
	if (state == KSM_PAGE_DROPPED && private && !(kind & KSM_PAGE_SHARED)) {
		ksm_region_move(m->region, page, KSM_PAGE_UNKNOWN, 0);
		return true;
	}
	return false;
}

void ksm_merge_see_breaks(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count)
{
	merger->region = region;
	merger->first = first;
	merger->count = count;
	if (ksm_os_pagemap(merger->peer->fds.pagemap, ksm_merger_page(merger, 0), count, merger->kinds))
		return;
	for (size_t i = 0; i < count; i++)
		if (ksm_region_state(region, first + i) == KSM_PAGE_MERGED)
			look_at_merged(merger, i, KSM_PAGE_MERGED);
}

static void look_at_private(struct ksm_merger *m, size_t i)
{
	ksm_pageno page = m->first + i;
	uint16_t kind = m->kinds[i];
	enum ksm_page_state state = ksm_region_state(m->region, page);
	if (!(kind & KSM_PAGE_PRESENT) || (kind & (KSM_PAGE_FILE | KSM_PAGE_SHARED))) {
		if (state != KSM_PAGE_UNKNOWN)
			ksm_region_unknow(m->region, page);
		m->counts->skipped += (kind & (KSM_PAGE_SWAPPED | KSM_PAGE_FILE | KSM_PAGE_SHARED)) != 0;
		return;
	}
	uint64_t digest = ksm_page_digest(ksm_merger_page(m, i));
	enum ksm_dirty dirty = ksm_dirty_query(m->region, page, digest);
	m->counts->scanned++;
	m->digests[i] = digest;
	if (dirty != KSM_DIRTY_UNWRITTEN) {
		m->counts->written += dirty == KSM_DIRTY_WRITTEN;
		if (state != KSM_PAGE_UNKNOWN)
			ksm_region_unknow(m->region, page);
		ksm_region_move(m->region, page, KSM_PAGE_SEEN, digest);
		if (!m->force)
			return;
	} else if (state == KSM_PAGE_REFUSED && !m->force) {
		m->counts->skipped++;
		return;
	}
	m->verdicts[i] = ksm_page_is_zero(ksm_merger_page(m, i)) ? KSM_MERGE_DROP : KSM_MERGE_LOOK;
}

static bool look(struct ksm_merger *m)
{
	bool any = false;
	int r = ksm_os_pagemap(m->peer->fds.pagemap, ksm_merger_page(m, 0), m->count, m->kinds);
	if (r) {
		ksm_merger_why_not(m, r);
		return false;
	}
	for (size_t i = 0; i < m->count; i++) {
		enum ksm_page_state state = ksm_region_state(m->region, m->first + i);
		bool framed = state == KSM_PAGE_MERGED || state == KSM_PAGE_BROKEN || state == KSM_PAGE_DROPPED;
		if (!framed || look_at_merged(m, i, state))
			look_at_private(m, i);
		any |= m->verdicts[i] != KSM_MERGE_LEAVE;
	}
	return any;
}

/* ---- fetch -------------------------------------------------------------------------------------------- */

/* Give the target of page i back: it will not be mapped. */
static void let_go(struct ksm_merger *m, size_t i)
{
	if (m->promoted[i]) {
		ksm_frame_abandon(m->peer, m->targets[i]);
		ksm_candidate_unclaim(m->index, m->peer, m->digests[i], ksm_merger_page(m, i));
	} else {
		ksm_frame_put(m->peer, m->targets[i], 1);
	}
	m->promoted[i] = false;
	m->verdicts[i] = KSM_MERGE_LEAVE;
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
	m->counts->promoted++;
	ksm_count(m->peer->self, KSM_PROMOTIONS, 1);
}

static void write_run(struct ksm_merger *m, size_t i, size_t n)
{
	int r = ksm_frame_write(m->peer, m->targets[i], n, copy_at(m, i));
	for (size_t j = i; j < i + n; j++) {
		if (r)
			let_go(m, j);
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
	int r = ksm_frame_read(m->peer, m->targets[i], n, copy_at(m, i));
	if (r)
		ksm_count(m->peer->self, KSM_FAILURES, 1);
	for (size_t j = i; j < i + n; j++)
		if (r || !ksm_page_equal(ksm_merger_page(m, j), copy_at(m, j)))
			let_go(m, j);
}

static void fetch(struct ksm_merger *m)
{
	bool written[KSM_STRETCH];
	for (size_t i = 0; i < m->count; i++) {
		if (m->verdicts[i] != KSM_MERGE_MAP || !m->promoted[i])
			continue;
		memcpy(copy_at(m, i), ksm_merger_page(m, i), KSM_PAGE_SIZE);
		if (ksm_page_digest(copy_at(m, i)) != m->digests[i])
			let_go(m, i); /* changed meanwhile */
	}
	memcpy(written, m->promoted, sizeof(written));
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		n = run_at(m, i);
		if (n && m->promoted[i])
			write_run(m, i, n);
	}
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		n = run_at(m, i);
		for (size_t j = 0; j < n; j++)
			if (written[i + j] != written[i])
				n = j; /* the buffer holds what was just written */
		if (n && !written[i])
			read_run(m, i, n);
	}
}

/* ---- the budget of mappings ------------------------------------------------------------------------------ */

/* The shortest run worth a mapping, the more of the budget is used. */
static size_t least_run(const struct ksm_merger *m, uint64_t used)
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
		if (costs && (n < least_run(m, used) || used + (after - before) > m->vma_budget)) {
			for (size_t j = i; j < i + n; j++)
				let_go(m, j);
			ksm_merger_why_not(m, KSM_EBUDGET);
		} else if (costs) {
			used += after - before;
		}
	}
}

/* ---- window --------------------------------------------------------------------------------------------- */

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

/* Inside the window: MERGE-1. Pages [i, i + n) of the stretch are pages [0, n) of the window. */
static void decide(struct ksm_merger *m, size_t i, size_t n)
{
	const char *view = m->barrier->view;
	bool equal[KSM_STRETCH];
	for (size_t j = 0; j < n; j++)
		equal[j] = m->verdicts[i + j] == KSM_MERGE_DROP
				   ? ksm_page_is_zero(view + j * KSM_PAGE_SIZE)
				   : ksm_page_equal(view + j * KSM_PAGE_SIZE, copy_at(m, i + j));
	for (size_t j = 0, run; j < n; j += run) {
		run = 1;
		if (!equal[j])
			continue;
		if (m->verdicts[i + j] == KSM_MERGE_DROP) {
			ksm_window_drop(m->barrier, j, 1);
			continue;
		}
		while (j + run < n && equal[j + run] && m->verdicts[i + j + run] == KSM_MERGE_MAP &&
		       m->targets[i + j + run] == m->targets[i + j] + run)
			run++;
		if (ksm_window_map(m->barrier, j, run, m->peer->fds.store,
				   (uint64_t)m->targets[i + j] << KSM_PAGE_SHIFT))
			ksm_count(m->peer->self, KSM_FAILURES, 1);
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
		} else {
			if (m->verdicts[i + j] == KSM_MERGE_MAP)
				let_go(m, i + j);
			m->verdicts[i + j] = KSM_MERGE_LEAVE;
			ksm_region_unknow(m->region, m->first + i + j);
			ksm_count(m->peer->self, KSM_PUT_BACKS, 1);
		}
	}
}

/* The kernel would not open the window at page i. */
static void refused(struct ksm_merger *m, size_t i, size_t n, int error)
{
	bool refuses = error == -EBUSY || (error == -EINVAL && n == 1); /* pinned, shared by fork, locked */
	size_t affected = refuses ? 1 : n;
	for (size_t j = i; j < i + affected; j++) {
		if (m->verdicts[j] == KSM_MERGE_MAP)
			let_go(m, j);
		m->verdicts[j] = KSM_MERGE_LEAVE;
		ksm_region_unknow(m->region, m->first + j);
		if (refuses) {
			ksm_region_move(m->region, m->first + j, KSM_PAGE_SEEN, m->digests[j]);
			ksm_region_move(m->region, m->first + j, KSM_PAGE_REFUSED, m->digests[j]);
		}
	}
	m->counts->skipped += affected;
	if (!refuses) {
		ksm_merger_why_not(m, error);
		ksm_count(m->peer->self, KSM_FAILURES, 1);
	}
}

/*
 * A page that was shared by a fork whose other side is gone is ours alone, but the kernel knows only after the next
 * write. Asking for write access writes nothing and tells it. Pinned pages stay refused.
 */
static int open_window(struct ksm_merger *m, size_t i, size_t *n)
{
	char *at = ksm_merger_page(m, i);
	int r = ksm_window_open(m->barrier, at, *n);
	if (r == -EBUSY && !ksm_os_advise(at, *n * KSM_PAGE_SIZE, KSM_POPULATE_WRITE))
		r = ksm_window_open(m->barrier, at, *n);
	while (r == -EINVAL && *n > 1) { /* two mappings: pages move within one */
		*n = (*n + 1) / 2;
		r = ksm_window_open(m->barrier, at, *n);
	}
	return r;
}

static void windows(struct ksm_merger *m)
{
	uint8_t fates[KSM_STRETCH];
	for (size_t i = 0; i < m->count;) {
		size_t n = 0;
		while (i + n < m->count &&
		       (m->verdicts[i + n] == KSM_MERGE_MAP || m->verdicts[i + n] == KSM_MERGE_DROP))
			n++;
		if (n == 0) {
			i++;
			continue;
		}
		int r = open_window(m, i, &n);
		if (r) {
			refused(m, i, n, r);
			i += r == -EBUSY ? 1 : n;
			continue;
		}
		n = m->barrier->pages;
		decide(m, i, n);
		memcpy(fates, m->barrier->fate, n);
		unsigned failures = ksm_window_close(m->barrier);
		if (failures)
			ksm_count(m->peer->self, KSM_FAILURES, failures);
		settle_fates(m, i, n, fates);
		i += n;
	}
}

void ksm_merge_stretch(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		       struct ksm_merge_counts *counts)
{
	ksm_assert(count <= KSM_STRETCH && first + count <= region->room);
	merger->region = region;
	merger->first = first;
	merger->count = count;
	merger->force = force;
	merger->counts = counts;
	memset(merger->promoted, 0, sizeof(merger->promoted));
	memset(merger->verdicts, KSM_MERGE_LEAVE, sizeof(merger->verdicts));
	uint64_t skipped = counts->skipped;
	if (look(merger) && merger->barrier->ops) {
		ksm_merge_find(merger);
		keep_budget(merger);
		fetch(merger);
		windows(merger);
	}
	ksm_count(merger->peer->self, KSM_PAGES_SKIPPED, (int64_t)(counts->skipped - skipped));
}
