/* SPDX-License-Identifier: MIT */
/*
 * dirty.h: has a page been written since the last pass? One interface, whatever answers it: here the digest,
 * as kernel KSM's checksum does; where the kernel tracks writes, that.
 */
#ifndef KSM_DIRTY_H
#define KSM_DIRTY_H

#include "region.h"

enum ksm_dirty {
	KSM_DIRTY_NEW,       /* not looked at before */
	KSM_DIRTY_WRITTEN,   /* changed since the last pass */
	KSM_DIRTY_UNWRITTEN, /* cold: the same for a whole pass */
};

/* What the page's digest, just computed, says about it. Merge lock held. */
enum ksm_dirty ksm_dirty_query(const struct ksm_region *region, ksm_pageno page, uint64_t digest);

#endif
