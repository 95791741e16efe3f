/* SPDX-License-Identifier: MIT */
/*
 * restore.h: the way back: from frames to private anonymous memory.
 */
#ifndef KSM_RESTORE_H
#define KSM_RESTORE_H

#include "barrier.h"
#include "park.h"
#include "region.h"

struct ksm_restore_counts {
	uint64_t restored; /* pages on private anonymous memory again */
	uint64_t broken;   /* pages left: private by a write, in a mapping that still refers to their frame */
};

/* What to do about pages that a write has made private already. */
enum ksm_restore_broken {
	KSM_RESTORE_PARKED, /* give them anonymous memory if all threads can be parked, else leave them */
	KSM_RESTORE_ALWAYS, /* the caller vouches that no direct I/O is in flight to them */
};

/*
 * Make all merged pages of [first, first + count) private again, contents unchanged, while the program goes on.
 * Merge lock held; the scanner's thread only. On error some are still merged, and valid.
 */
int ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		size_t count, enum ksm_restore_broken broken, struct ksm_restore_counts *counts);

/* Must this region's broken pages have been held for a while before they are replaced? Then others are left alone. */
bool ksm_must_rest(const struct ksm_region *region, const struct ksm_barrier *barrier);
/*
 * Give the broken pages i of [first, first + count) that `worn` names anonymous memory, all threads parked. buffer: room
 * for `count` pages. *given counts them. Merge lock held; the scanner's thread only. Errors as ksm_park_begin().
 */
int ksm_give_back(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		  size_t count, const bool *worn, char *buffer, uint64_t *given);

#endif
