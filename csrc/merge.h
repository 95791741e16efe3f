/* SPDX-License-Identifier: MIT */
/*
 * merge.h: look at a stretch of pages, find their twins, put them onto frames.
 */
#ifndef KSM_MERGE_H
#define KSM_MERGE_H

#include "barrier.h"
#include "region.h"

#define KSM_STRETCH KSM_WINDOW_PAGES /* pages looked at together */

/* What happened to a page in the stretch at hand. */
enum ksm_merge_verdict {
	KSM_MERGE_LEAVE = 0,
	KSM_MERGE_LOOK, /* cold: look for a twin */
	KSM_MERGE_MAP,  /* has a frame, taken and at hand in the buffer */
	KSM_MERGE_DROP, /* all zeros */
};

struct ksm_merge_counts {
	uint64_t scanned, merged, dropped, promoted, unshared, written, skipped;
	int32_t why_not; /* code of the last thing that kept a page from merging, or 0 */
};

/* The scanner's work place: one a peer. */
struct ksm_merger {
	struct ksm_peer *peer;
	struct ksm_index *index;
	struct ksm_barrier *barrier;
	uint64_t vma_budget;
	char *buffer; /* KSM_STRETCH pages: copies of the frames to be compared with */
	/* the stretch at hand */
	struct ksm_region *region;
	ksm_pageno first;
	size_t count;
	bool force;
	struct ksm_merge_counts *counts;
	uint16_t kinds[KSM_STRETCH];
	uint64_t digests[KSM_STRETCH];
	ksm_frameno targets[KSM_STRETCH];
	bool promoted[KSM_STRETCH];
	uint8_t verdicts[KSM_STRETCH];
};

static inline char *ksm_merger_page(const struct ksm_merger *merger, size_t i)
{
	return ksm_region_page(merger->region, merger->first + i);
}

static inline void ksm_merger_why_not(struct ksm_merger *merger, int code)
{
	merger->counts->why_not = code;
}

/* A step of ksm_merge_stretch(): targets for the pages marked LOOK; they become MAP or LEAVE. */
void ksm_merge_find(struct ksm_merger *merger);

int ksm_merger_init(struct ksm_merger *merger, struct ksm_peer *peer, struct ksm_index *index,
		    struct ksm_barrier *barrier);
/* How many mappings merging may cost, by what the program itself has mapped now. */
void ksm_merger_set_budget(struct ksm_merger *merger);
void ksm_merger_fini(struct ksm_merger *merger);
/* Give the buffer's memory back until it is needed again. */
void ksm_merger_rest(struct ksm_merger *merger);

/* Only see which merged pages of a stretch have been broken by a write since, and count them. Merge lock held. */
void ksm_merge_see_breaks(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count);

/*
 * Look at `count` pages from `first` (at most KSM_STRETCH), merge what can be merged. force: cold or not. Merge lock
 * held; the scanner's thread only. Adds to *counts. Nothing that fails in here is lost or fatal.
 */
void ksm_merge_stretch(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		       struct ksm_merge_counts *counts);

#endif
