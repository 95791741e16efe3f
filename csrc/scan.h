/* SPDX-License-Identifier: MIT */
/*
 * scan.h: passes over all regions of a peer, in batches, and the sweeps between them.
 */
#ifndef KSM_SCAN_H
#define KSM_SCAN_H

#include "dirty.h"
#include "exchange.h"
#include "merge.h"
#include "restore.h"
#include "sweep.h"

/* Which regions take part. */
enum ksm_scan_who {
	KSM_SCAN_BACKGROUND, /* those that merge by themselves */
	KSM_SCAN_ALL,        /* all but those that were unmerged by name */
};

struct ksm_scanner {
	struct ksm_peer *peer;
	struct ksm_index *index;
	struct ksm_exchange *exchange;
	struct ksm_park park;
	struct ksm_barrier barrier;
	struct ksm_tracker tracker;
	struct ksm_merger merger;
	struct ksm_region *regions; /* by address; merge lock */
	/* the background pass */
	struct ksm_region *cursor; /* merge lock: who removes a region moves it on */
	ksm_pageno cursor_page;
	const struct ksm_region *only; /* what is being done is about this region, or NULL: */
	enum ksm_scan_who who;         /* … about these */
	uint64_t worn_lost;            /* times that a pass has lost what it had noted to be given back */
	uint64_t pass_began_ns;
	uint64_t looked;              /* what the last batch cost, in pages looked at */
	uint64_t pass_changes;        /* ksm_control.changes when it began */
	uint64_t asked_changes;       /* … when the last pass began that asked the index about every page */
	bool ask;                     /* this one does */
	struct ksm_merge_counts pass; /* so far */
	uint64_t private_pages_seen;  /* in the last complete pass */
	bool resting;                 /* pages are held, see scan_rest.c */
	uint64_t rest_ns;             /* for so long */
};

/* From now on windows are opened with this barrier; the one before is destroyed, and what is in the struct is taken over.
 * The scanner's thread; if there was one before: merge lock held. */
void ksm_scanner_use(struct ksm_scanner *scanner, const struct ksm_barrier *barrier);

/* Could anything merge at all? Not if there is no barrier and nothing is frozen. */
bool ksm_scanner_has_work(struct ksm_scanner *scanner);

/* Count what our handler has broken since, in all regions. */
void ksm_scanner_count_breaks(struct ksm_scanner *scanner);

int ksm_scanner_init(struct ksm_scanner *scanner, struct ksm_peer *peer, struct ksm_index *index,
		     struct ksm_exchange *exchange);
void ksm_scanner_fini(struct ksm_scanner *scanner);
/* Begin to track writes, if that can be done here; nothing is known of them so far. The scanner's thread. */
void ksm_scan_track(struct ksm_scanner *scanner);

/* Regions come and go under the merge lock, from any thread. */
void ksm_scanner_add(struct ksm_scanner *scanner, struct ksm_region *region);
void ksm_scanner_remove(struct ksm_scanner *scanner, struct ksm_region *region);
/* Does any region overlap [at, at + nbytes)? Merge lock held. */
bool ksm_scanner_overlaps(const struct ksm_scanner *scanner, const void *at, size_t nbytes);

/*
 * All below: the scanner's thread, merge lock not held. `between` is called after every stretch (NULL: never); a
 * non-zero return ends the work early.
 */
struct ksm_scan_between {
	int (*call)(void *context);
	void *context;
	int (*resting)(
		void *context); /* the same while pages rest: nothing of the scanner's may be used. NULL: not called */
};

static inline int ksm_scan_call(const struct ksm_scan_between *between)
{
	return between && between->call ? between->call(between->context) : 0;
}

/* Go on with the background pass for up to `pages` pages or `merges` merges. true: the pass is complete, its counts are
 * in scanner->pass and a new one begins next time. */
bool ksm_scan_batch(struct ksm_scanner *scanner, uint64_t pages, uint64_t merges,
		    const struct ksm_scan_between *between);
/* One whole pass over `only` (NULL: all of `who`), cold or not. */
int ksm_scan_pass(struct ksm_scanner *scanner, struct ksm_region *only, enum ksm_scan_who who,
		  const struct ksm_scan_between *between, struct ksm_merge_counts *counts);
/* Is this region one of those that what is being done is about? Merge lock held. */
bool ksm_scan_takes_part(const struct ksm_scanner *scanner, const struct ksm_region *region);
/* Passes until one of them merges nothing; at least two. */
int ksm_scan_exhaust(struct ksm_scanner *scanner, struct ksm_region *only, const struct ksm_scan_between *between,
		     struct ksm_merge_counts *counts, uint64_t *passes);

/* Threads could not be held the last time: look now and then whether they can by now, though nothing is to be merged. */
void ksm_scan_try_park(struct ksm_scanner *scanner);

struct ksm_scan_step {
	size_t pages;  /* so many further; 0: that was the region's end */
	size_t looked; /* what it cost, in pages looked at */
};

/* One step of a pass, at a page of a region. force: cold or not; ask: the index, about pages of which nothing new is known.
 * Merge lock held. */
struct ksm_scan_step ksm_scan_step(struct ksm_scanner *scanner, struct ksm_region *region, ksm_pageno page, bool force,
				   bool ask, struct ksm_merge_counts *counts);

/* Make sure every living peer's bitmap is at hand, asking for what is missing. 0 or -EAGAIN. */
int ksm_scan_know_peers(struct ksm_scanner *scanner);
/* Sweep the marked chunks (all: every chunk). Returns frames freed, or -EAGAIN: some chunks stay marked. */
int64_t ksm_scan_sweep(struct ksm_scanner *scanner, bool all, const struct ksm_scan_between *between);

/* Bring what is known of a region's merged pages up to date. */
void ksm_scan_see_breaks(struct ksm_scanner *scanner, struct ksm_region *region,
			 const struct ksm_scan_between *between);
/* Make a region private again (see restore.h), taking the merge lock a piece at a time. */
int ksm_scan_restore(struct ksm_scanner *scanner, struct ksm_region *region, enum ksm_restore_broken broken,
		     const struct ksm_scan_between *between, struct ksm_restore_counts *counts);

/* The merge lock, for the scanner's thread, pages resting or not. */
void ksm_scan_lock(struct ksm_scanner *scanner);
/* Sleep as long as threads must not be parked again. */
void ksm_scan_pause(struct ksm_scanner *scanner);
/* Let the worn pages that a pass has noted rest, and give them back. */
void ksm_scan_give_back(struct ksm_scanner *scanner, const struct ksm_scan_between *between,
			struct ksm_merge_counts *counts);
/*
 * Let the broken pages of `only` (NULL: all regions) rest, where they must before ksm_restore() takes them. Until
 * ksm_scan_rest_end() the merge lock is taken by ksm_scan_lock(). false: there are more than can rest at once.
 */
bool ksm_scan_rest(struct ksm_scanner *scanner, const struct ksm_region *only, const struct ksm_scan_between *between);
void ksm_scan_rest_end(struct ksm_scanner *scanner);
void ksm_scan_forget_worn(struct ksm_scanner *scanner);

/* Bytes of private memory the scanner and the regions use for bookkeeping, bitmap included. */
uint64_t ksm_scan_metadata(struct ksm_scanner *scanner);

#endif
