/* SPDX-License-Identifier: MIT */
/*
 * DOC: Steps
 *
 * A pass goes through a region in steps. At the beginning of a piece the notes are brought up to date (dirty.c), which costs
 * as much as looking at a few pages; then each step either passes over all that has nothing to do, up to the end of the
 * piece, or looks at one stretch.
 *
 *    piece   ┌─update─┬────────┬────────┬────────┬ … ┬────────┐
 *            │ todo:  │   –    │  look  │   –    │   │   –    │
 *            └────────┴────────┴────────┴────────┴ … ┴────────┘
 *    steps            ├──over──┼─stretch┼──────over───────────┤
 *
 * STEP-1. The merge lock is held for one step, so it is short: one update, or one stretch and what it corresponds to elsewhere.
 * STEP-2. A stretch is passed over only if its notes say so (PAGE-5), and they were brought up to date in this pass.
 *
 * Called by the scanner's thread under the merge lock.
 */
#include "scan.h"

#include "atomic.h"
#include "error.h"

/* Has a pass something to do about the stretch that begins here? */
static bool is_todo(const struct ksm_region *region, ksm_pageno page, bool ask)
{
	return page % KSM_TODO_PAGES || region->pieces[page / KSM_PIECE_PAGES].watch == KSM_WATCH_NONE ||
	       *ksm_region_todo(region, page) & (ask ? KSM_TODO_LOOK | KSM_TODO_ASK : KSM_TODO_LOOK);
}

/* Pages from here to the next that a pass has to look at, or to the end of the piece. */
static size_t idle_at(const struct ksm_region *region, ksm_pageno page, size_t used, bool ask)
{
	ksm_pageno end = KSM_MIN(used, (page / KSM_PIECE_PAGES + 1) * KSM_PIECE_PAGES), at = page;
	while (at < end && !is_todo(region, at, ask))
		at += KSM_TODO_PAGES;
	return KSM_MIN(at, end) - page;
}

static size_t merge_twins(struct ksm_scanner *scanner, bool force, struct ksm_merge_counts *counts)
{
	ksm_pageno first;
	size_t count;
	struct ksm_region *region = ksm_merge_find_twins(&scanner->merger, scanner->regions, &first, &count);
	if (!region || !ksm_scan_takes_part(scanner, region) || ksm_merger_stretch(&scanner->merger) < count)
		return 0;
	ksm_merge_twins(&scanner->merger, region, first, count, force, counts);
	return count;
}

#define UPDATE_PAGES 32 /* looking at so many pages takes as long as an update */

struct ksm_scan_step ksm_scan_step(struct ksm_scanner *scanner, struct ksm_region *region, ksm_pageno page, bool force,
				   bool ask, struct ksm_merge_counts *counts)
{
	size_t used = ksm_load_acquire(&region->used);
	struct ksm_scan_step step = {0};
	if (page >= used)
		return step;
	if (page % KSM_PIECE_PAGES == 0) {
		ksm_dirty_update(region, page, force);
		step.looked = UPDATE_PAGES;
	}
	step.pages = idle_at(region, page, used, ask);
	if (step.pages)
		return step;
	size_t most = ksm_merger_stretch(&scanner->merger);
	uint64_t before = counts->scanned;
	/* never beyond the next that notes are kept of: then every piece is entered at its beginning (STEP-2) */
	step.pages = KSM_MIN(most ? most : KSM_STRETCH, KSM_TODO_PAGES - page % KSM_TODO_PAGES);
	step.pages = KSM_MIN(step.pages, used - page);
	step.looked += step.pages;
	if (most) {
		ksm_merge_stretch(&scanner->merger, region, page, step.pages, force, counts);
		step.looked += merge_twins(scanner, force, counts);
	} else { /* MERGE-8 */
		ksm_merge_see_breaks(&scanner->merger, region, page, step.pages);
		ksm_region_note(region, page, step.pages, KSM_TODO_LOOK);
		counts->why_not = KSM_EHEADROOM;
		ksm_count(scanner->peer->self, KSM_WITHHELD, 1);
	}
	ksm_count(scanner->peer->self, KSM_PAGES_SCANNED, (int64_t)(counts->scanned - before));
	return step;
}
