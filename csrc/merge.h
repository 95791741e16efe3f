/* SPDX-License-Identifier: MIT */
/*
 * merge.h: look at a stretch of pages, find their twins, put them onto frames.
 */
#ifndef KSM_MERGE_H
#define KSM_MERGE_H

#include "barrier.h"
#include "headroom.h"
#include "park.h"
#include "region.h"

#define KSM_STRETCH KSM_WINDOW_PAGES /* pages looked at together */
#define KSM_STRETCH_TIGHT 8          /* … near the limit of a control group */

/* What happened to a page in the stretch at hand. */
enum ksm_merge_verdict {
	KSM_MERGE_LEAVE = 0,
	KSM_MERGE_LOOK, /* cold: look for a twin */
	KSM_MERGE_MAP,  /* has a frame, taken and at hand in the buffer */
	KSM_MERGE_DROP, /* all zeros */
};

struct ksm_merge_counts {
	uint64_t scanned, merged, dropped, promoted, written, skipped, given_back;
	int32_t why_not; /* code of the last thing that kept a page from merging, or 0 */
};

#define KSM_WORN_RUNS 128

/* Broken pages that are to be given anonymous memory. */
struct ksm_worn_run {
	const struct ksm_region *region; /* maybe gone: not to be looked into before it has been found in the list */
	char *at;
	ksm_pageno first;
	size_t count;
	bool held;
};

#define KSM_TWIN_HINTS 512

/* A page that we have said is a candidate: merge_twin.c. */
struct ksm_twin_hint {
	uint64_t digest;
	const char *page; /* NULL: none */
};

/* The scanner's work place: one a peer. */
struct ksm_merger {
	struct ksm_peer *peer;
	struct ksm_index *index;
	struct ksm_barrier *barrier;
	struct ksm_barrier frozen; /* for pages that are frozen; made when there are some */
	struct ksm_park *park;     /* NULL: none, so broken pages stay where they are */
	uint64_t passes;           /* of the background, so far */
	bool again;                /* in this pass pages that were refused are tried once more */
	int handled;               /* 0: a store into a read-only page is answered; of the stretch at hand */
	uint64_t vma_budget;
	uint32_t budget_round;                   /* raised when the budget is set anew */
	int64_t grants_left;                     /* of it, for breaks by our handler */
	char *buffer;                            /* KSM_STRETCH pages: copies of the frames to be compared with */
	struct ksm_worn_run runs[KSM_WORN_RUNS]; /* found in this pass, where they have to rest first: scan_rest.c */
	size_t run_count;
	int64_t runs_cost;                   /* mappings, if all are given back */
	struct ksm_headroom headroom, tight; /* for whole stretches, and for short ones */
	struct ksm_twin_hint hints[KSM_TWIN_HINTS];
	ptrdiff_t twin_distance; /* from a page to its twin, the last time */
	/* the stretch at hand */
	struct ksm_region *region;
	ksm_pageno first;
	size_t count;
	bool force;
	bool twins; /* only what is at hand is looked at */
	struct ksm_merge_counts *counts;
	uint16_t kinds[KSM_STRETCH];
	uint64_t digests[KSM_STRETCH];
	ksm_frameno targets[KSM_STRETCH];
	bool promoted[KSM_STRETCH];
	bool at_hand[KSM_STRETCH];     /* page i of the buffer holds … */
	ksm_frameno kept[KSM_STRETCH]; /* … the bytes of this frame */
	uint8_t verdicts[KSM_STRETCH];
	bool is_frozen[KSM_STRETCH];                       /* when it was looked at: a store may thaw it at any time */
	bool worn[KSM_STRETCH];                            /* broken for a while: to be given anonymous memory again */
	uint64_t mirror[KSM_PAGE_SIZE / sizeof(uint64_t)]; /* of one page of registered memory */
};

static inline char *ksm_merger_page(const struct ksm_merger *merger, size_t i)
{
	return ksm_region_page(merger->region, merger->first + i);
}

static inline void ksm_merger_why_not(struct ksm_merger *merger, int code)
{
	merger->counts->why_not = code;
}

/* What was to be done about page i could not be done now: the next pass tries again. */
static inline void ksm_merger_come_back(const struct ksm_merger *merger, size_t i)
{
	ksm_region_note(merger->region, merger->first + i, 1, KSM_TODO_LOOK);
}

/* What opens a window on page i of the stretch. */
static inline const struct ksm_barrier *ksm_merger_barrier(const struct ksm_merger *merger, size_t i)
{
	return merger->is_frozen[i] ? &merger->frozen : merger->barrier;
}

/* Where the bytes of the frame for page i are at hand. */
static inline char *ksm_merger_copy(const struct ksm_merger *merger, size_t i)
{
	return merger->buffer + i * KSM_PAGE_SIZE;
}

/* How many pages may be looked at together now: KSM_STRETCH, KSM_STRETCH_TIGHT, or 0: there is no room (MERGE-8). */
size_t ksm_merger_stretch(struct ksm_merger *merger);
/* Bytes that must stay free beside what is about to be used: others, and our own bookkeeping, use memory meanwhile. */
uint64_t ksm_merger_spare(const struct ksm_merger *merger);

/* Its bytes now, for reading: in place or, of registered memory, in a mirror that is good until the next call; NULL if they
 * cannot be read. */
const char *ksm_merger_bytes(struct ksm_merger *merger, size_t i);
/* What the kernel says of the stretch's pages now, into kinds. */
int ksm_merger_see_kinds(struct ksm_merger *merger);
/* Could page i be merged now? 0, or the code of what is against it. */
int ksm_merger_ready(const struct ksm_merger *merger, size_t i);

/* A step of ksm_merge_stretch(): which pages to merge, LOOK or DROP; which are worn. false: none to merge. */
bool ksm_merge_look(struct ksm_merger *merger);
/* A step of ksm_merge_stretch(), the last one: what the next pass has to come back for (PAGE-5). */
void ksm_merge_note_rest(struct ksm_merger *merger);
/* A step of ksm_merge_stretch(): targets for the pages marked LOOK; they become MAP or LEAVE. */
void ksm_merge_find(struct ksm_merger *merger);

/* Note [first, first + count) among the worn runs. false: there is no room. */
bool ksm_merger_note_worn(struct ksm_merger *merger, const struct ksm_region *region, ksm_pageno first, size_t count);
/* Give the target of page i back: it will not be mapped. */
void ksm_merge_let_go(struct ksm_merger *merger, size_t i);
/* A step of ksm_merge_stretch(): the pages that are MAP or DROP, in windows. */
void ksm_merge_windows(struct ksm_merger *merger);

int ksm_merger_init(struct ksm_merger *merger, struct ksm_peer *peer, struct ksm_index *index,
		    struct ksm_barrier *barrier, struct ksm_park *park);
/* The shortest run worth a mapping, the more of the budget is used. */
size_t ksm_merger_least_run(const struct ksm_merger *merger, uint64_t used);
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

/* The same for pages whose frames' bytes may be at hand already: at_hand and kept say which. */
void ksm_merge_at_hand(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		       struct ksm_merge_counts *counts);

/* After a stretch: where pages of our own are for whose sake some of it was promoted: [*first, *first + *count) of one of these
 * regions. NULL: nowhere. */
struct ksm_region *ksm_merge_find_twins(struct ksm_merger *merger, struct ksm_region *regions, ksm_pageno *first,
					size_t *count);
/* Merge these, under the same hold of the merge lock as the stretch. */
void ksm_merge_twins(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		     struct ksm_merge_counts *counts);
/* Page i of the stretch has become a candidate: remember where it is, perhaps. */
void ksm_twin_note(struct ksm_merger *merger, size_t i);

#endif
