/* SPDX-License-Identifier: MIT */
/*
 * DOC: Cold pages
 *
 * Only pages that were not written for a whole pass are worth a merge: others would break at once. The rule is
 * kernel KSM's: the digest is what it was in the last pass. It costs reading every private page in every pass.
 *
 * Called by the scanner under the merge lock.
 */
#include "dirty.h"

enum ksm_dirty ksm_dirty_query(const struct ksm_region *region, ksm_pageno page, uint64_t digest)
{
	switch (ksm_region_state(region, page)) {
	case KSM_PAGE_SEEN:
	case KSM_PAGE_CANDIDATE:
	case KSM_PAGE_REFUSED:
		return ksm_region_digest(region, page) == digest ? KSM_DIRTY_UNWRITTEN : KSM_DIRTY_WRITTEN;
	default:
		return KSM_DIRTY_NEW;
	}
}
