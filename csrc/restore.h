/* SPDX-License-Identifier: MIT */
/*
 * restore.h: the way back: from frames to private anonymous memory.
 */
#ifndef KSM_RESTORE_H
#define KSM_RESTORE_H

#include "barrier.h"
#include "region.h"

struct ksm_restore_counts {
	uint64_t restored; /* pages on private anonymous memory again */
	uint64_t broken;   /* pages left: private by a write, in a mapping that still refers to their frame */
};

/*
 * Make all merged pages of [first, first + count) private again, contents unchanged, while the program goes on.
 * broken_too: also the pages that a write has made private already; then the caller vouches that no direct I/O is in
 * flight to them. Merge lock held; the scanner's thread only. On error some are still merged, and valid.
 */
int ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, ksm_pageno first, size_t count, bool broken_too,
		struct ksm_restore_counts *counts);

#endif
