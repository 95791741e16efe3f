/* SPDX-License-Identifier: MIT */
/*
 * region.h: a range of addresses whose pages may be merged, and what is known of each page. All under the merge
 * lock of the region's peer, except where a line says otherwise.
 */
#ifndef KSM_REGION_H
#define KSM_REGION_H

#include "guard.h"
#include "index.h"

/* What is known of a page; its word's payload in brackets. */
enum ksm_page_state {
	KSM_PAGE_UNKNOWN = 0,   /* nothing */
	KSM_PAGE_SEEN = 1,      /* private [digest when last looked at] */
	KSM_PAGE_CANDIDATE = 2, /* private, and said so to the others [digest] */
	KSM_PAGE_REFUSED = 3,   /* private, and the kernel would not let it go: pinned, or shared by fork [digest] */
	KSM_PAGE_MERGED = 4,    /* mapped to a frame, not written since, as far as we know [frame] */
	KSM_PAGE_BROKEN = 5,  /* was merged, then written: private, but its mapping still refers to the frame [frame] */
	KSM_PAGE_DROPPED = 6, /* was all zeros and was given back: reads as zeros */
	KSM_PAGE_STATES
};

/* Pages that somebody is about to write by system calls: left alone meanwhile. */
struct ksm_hold {
	struct ksm_hold *next;
	ksm_pageno first;
	size_t count;
};

/* Why the next pass has to look at a stretch of KSM_TODO_PAGES pages; bits. None: nothing has happened to it. */
#define KSM_TODO_PAGES 64
enum ksm_todo {
	KSM_TODO_LOOK = 1, /* something was written, or is not known yet */
	KSM_TODO_ASK = 2,  /* the index may say more about its pages than it did, or the kernel let them go */
	/* Nothing for a pass to do: */
	KSM_TODO_OURS = 4,  /* some of it is registered with the tracker's descriptor, and so with no other */
	KSM_TODO_FRESH = 8, /* some of it is fresh memory that is not watched yet: DIRTY-7 */
};

/* How far the writes to a piece of KSM_PIECE_PAGES pages are known; see dirty.c. */
#define KSM_PIECE_PAGES 4096
enum ksm_watch {
	KSM_WATCH_NONE = 0, /* they are not: what a page's digest says decides */
	KSM_WATCH_KNOWN,    /* since the last time, but what was written is not protected again */
	KSM_WATCH_ARMED,    /* and what is written from now on will be */
};

/* What is noted of a piece beside its pages' words: together, so that little memory is touched. */
struct ksm_piece {
	uint64_t clean[KSM_PIECE_PAGES / 64]; /* a bit a page: not written since its word's digest was taken */
	uint8_t todo[KSM_PIECE_PAGES / KSM_TODO_PAGES]; /* a byte a stretch: enum ksm_todo */
	uint8_t watch;                                  /* enum ksm_watch */
	uint32_t since; /* pages that were written since they were protected the last time */
	uint32_t hot;   /* … and before that */
};

struct ksm_region {
	struct ksm_peer *peer;
	struct ksm_index *index;
	struct ksm_tracker *tracker; /* who knows what is written (dirty.c); NULL: nobody */
	struct ksm_region *next;     /* in the scanner's list */
	char *base;
	size_t room;              /* pages, fixed */
	size_t used;              /* pages [0, used) may have been handed out; atomic, only grows */
	uint64_t *words;          /* one a page */
	struct ksm_piece *pieces; /* notes */
	ksm_frameno home;         /* the frame page 0 would like, or KSM_NO_FRAME: see ksm_region_home() */
	bool background;          /* merged by the scanner when nobody asks */
	bool excluded;            /* unmerged by name: left alone until scanned by name */
	bool registered;          /* somebody else's memory */
	bool sigsegv;             /* merged pages are read-only, our handler copies them */
	struct ksm_guard *guard;  /* NULL: no page of it was ever made read-only */
	uint64_t breaks_counted;  /* of guard->breaks */
	uint32_t budget_round;    /* in which its breaks were granted mappings */
	bool frozen;              /* some page was frozen, ever */
	bool gone;                /* registered, and the program has unmapped some of it: merged no more (survey.c) */
	uint64_t strayed;         /* references that are kept for mappings that are somewhere else, or nowhere */
	struct ksm_hold *holds;
	uint32_t fresh;                   /* stretches noted as KSM_TODO_FRESH; atomic */
	uint64_t states[KSM_PAGE_STATES]; /* pages in each state, UNKNOWN not counted */
};

/* Takes no memory of the range itself; allocates the words. */
int ksm_region_init(struct ksm_region *region, struct ksm_peer *peer, struct ksm_index *index, void *base, size_t pages,
		    ksm_frameno home);
void ksm_region_fini(struct ksm_region *region);

static inline struct ksm_piece *ksm_region_piece(const struct ksm_region *region, ksm_pageno page)
{
	return &region->pieces[page / KSM_PIECE_PAGES];
}

/* What is to be done about the stretch that a page is in: enum ksm_todo. */
static inline uint8_t *ksm_region_todo(const struct ksm_region *region, ksm_pageno page)
{
	return &ksm_region_piece(region, page)->todo[page % KSM_PIECE_PAGES / KSM_TODO_PAGES];
}

/* Bytes of the notes on [0, pages). */
static inline size_t ksm_region_notes_bytes(size_t pages)
{
	return (pages + KSM_PIECE_PAGES - 1) / KSM_PIECE_PAGES * sizeof(struct ksm_piece);
}

static inline char *ksm_region_page(const struct ksm_region *region, ksm_pageno page)
{
	return region->base + (page << KSM_PAGE_SHIFT);
}

enum ksm_page_state ksm_region_state(const struct ksm_region *region, ksm_pageno page);
/* The digest of SEEN, CANDIDATE, REFUSED. */
uint64_t ksm_region_digest(const struct ksm_region *region, ksm_pageno page);
/* The frame of MERGED and BROKEN; KSM_NO_FRAME in other states and outside the region. */
ksm_frameno ksm_region_frame(const struct ksm_region *region, ksm_pageno page);

bool ksm_region_edge_is_legal(enum ksm_page_state from, enum ksm_page_state to);
/* Is the digest in a page's word that of its bytes now, as far as is known? */
bool ksm_region_is_clean(const struct ksm_region *region, ksm_pageno page);
void ksm_region_set_clean(struct ksm_region *region, ksm_pageno page, bool clean);
/* The next pass looks at these pages. */
void ksm_region_note(struct ksm_region *region, ksm_pageno page, size_t count, enum ksm_todo why);

/* Move a page to another state. Counts; frames' references are the caller's. An illegal edge panics. */
void ksm_region_move(struct ksm_region *region, ksm_pageno page, enum ksm_page_state to, uint64_t payload);

/* Have a guard: 0 or an error. Merge lock held. */
int ksm_region_guard(struct ksm_region *region);
/* Before its memory is unmapped: have none any more. Merge lock held, or nobody else knows the region. */
void ksm_region_unguard(struct ksm_region *region);
/* What its guard says of a page; WRITABLE where there is no guard. */
uint8_t ksm_region_guard_of(const struct ksm_region *region, ksm_pageno page);
/* Count the breaks our handler has made since. Merge lock held. */
void ksm_region_count_breaks(struct ksm_region *region);
/* Is the page being prepared for writing by system calls? */
bool ksm_region_is_held(const struct ksm_region *region, ksm_pageno page);

/* Is any of these pages mapped to a frame? */
bool ksm_region_is_framed(const struct ksm_region *region, ksm_pageno page, size_t count);

/*
 * How many memory mappings begin inside [page, page + count], seen from what is known: neighbours that are
 * anonymous, or on consecutive frames, share one.
 */
size_t ksm_region_boundaries(const struct ksm_region *region, ksm_pageno page, size_t count);
/* The same if `count` pages from `page` were mapped to consecutive frames from `frame`, or anonymous: KSM_NO_FRAME. */
size_t ksm_region_boundaries_if(const struct ksm_region *region, ksm_pageno page, size_t count, ksm_frameno frame);

/* The frame a page would like, so that equal layouts give one run: after its neighbours', else by position. */
ksm_frameno ksm_region_home(const struct ksm_region *region, ksm_pageno page);

/* The page's content is not what it was: back to UNKNOWN, and no candidate any more. For private states. */
void ksm_region_unknow(struct ksm_region *region, ksm_pageno page);
/* The pages' memory was replaced by fresh anonymous memory: everything about them is forgotten, frames are put. */
void ksm_region_forget(struct ksm_region *region, ksm_pageno page, size_t count);

#endif
