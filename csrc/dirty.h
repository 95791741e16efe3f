/* SPDX-License-Identifier: MIT */
/*
 * dirty.h: which pages has the program written since the last pass? What is found out is noted in the regions (clean bits,
 * todo, pieces); where it cannot be found out, digests that stay the same say it, as kernel KSM's checksums do.
 */
#ifndef KSM_DIRTY_H
#define KSM_DIRTY_H

#include "os.h"
#include "region.h"

#define KSM_TRACKER_RANGES 256

/* The scanner's: one a peer. */
struct ksm_tracker {
	struct ksm_peer *peer;
	int uffd;  /* -1: none */
	int error; /* then: why */
	uint64_t debt_ns, debt_at_ns;
	bool solvent; /* there was no debt when the pass began */
	struct ksm_os_range ranges[KSM_TRACKER_RANGES];
};

enum ksm_dirty {
	KSM_DIRTY_UNKNOWN,
	KSM_DIRTY_NEW,       /* not looked at before */
	KSM_DIRTY_WRITTEN,   /* changed since the last pass */
	KSM_DIRTY_UNWRITTEN, /* cold: the same for a whole pass */
};

/* 0, or why writes are not tracked: -EPERM, -ENOSYS (not allowed here), -EINVAL, -ENOTTY (before Linux 6.9), -EBADF (no
 * pagemap). Everything below works all the same. The scanner's thread, as all of this. */
int ksm_tracker_init(struct ksm_tracker *tracker, struct ksm_peer *peer);
/* The descriptor goes, and with it what it tracked: the regions' notes mean nothing until the next ksm_dirty_forget(). */
void ksm_tracker_fini(struct ksm_tracker *tracker);

/* What was known of a region's writes is not any more. Merge lock held, as for all below. */
void ksm_dirty_forget(struct ksm_region *region);

/* A pass of the background begins. */
void ksm_dirty_begin(struct ksm_tracker *tracker);
/* Bring the notes of one piece up to date; `page` is in it. force: whatever it costs the program. */
void ksm_dirty_update(struct ksm_region *region, ksm_pageno page, bool force);

/* May a page's digest be taken now? Not of one that is written again and again, or it would be for nothing. */
bool ksm_dirty_is_due(const struct ksm_region *region, ksm_pageno page);
/* It was taken, and is in the page's word. */
void ksm_dirty_digested(struct ksm_region *region, ksm_pageno page);
/* What the page's digest, just computed, says about it. */
enum ksm_dirty ksm_dirty_query(const struct ksm_region *region, ksm_pageno page, uint64_t digest);

/* The pages are to be registered with another descriptor for a while: what was known of their writes is not known any more. 0 or
 * an error: they are to be taken back, as afterwards. */
int ksm_dirty_let_go(struct ksm_region *region, ksm_pageno page, size_t count);
/* That is over, and some may be mapped to frames now. */
void ksm_dirty_take_back(struct ksm_region *region, ksm_pageno page, size_t count);
/* There is fresh anonymous memory at these pages. Before it is touched: or its mapping joins its neighbours never more. */
void ksm_dirty_watch(struct ksm_region *region, ksm_pageno page, size_t count);
/* There is fresh memory here, but the descriptor is not at hand: the scanner's thread watches it, when it comes by or is asked
 * to. Any thread, as for the next two. */
void ksm_dirty_note_fresh(struct ksm_region *region, ksm_pageno page, size_t count);
/* Some of these pages may be such memory. */
bool ksm_dirty_is_fresh(const struct ksm_region *region, ksm_pageno page, size_t count);
/* It is too late for these. */
void ksm_dirty_forget_fresh(struct ksm_region *region, ksm_pageno page, size_t count);
/* Watch what was noted so of these, and of the stretches they are in. */
void ksm_dirty_watch_fresh(struct ksm_region *region, ksm_pageno page, size_t count);
/* The region goes, and its memory stays: it is nobody's business any more who writes there. */
void ksm_dirty_release(struct ksm_region *region);

#endif
