/* SPDX-License-Identifier: MIT */
/*
 * survey.h: is registered memory still mapped as we believe?
 */
#ifndef KSM_SURVEY_H
#define KSM_SURVEY_H

#include "region.h"

#define KSM_SURVEY_MOST 512 /* pages at a time */

enum ksm_survey {
	KSM_SURVEY_GONE = 0, /* it is not: unmapped, or something else's */
	KSM_SURVEY_CHANGED,  /* it is, but with another protection, or as what nobody can tell */
	KSM_SURVEY_OURS, /* private, readable, writable: anonymous memory, or the frame that the page's word names */
};

/* One enum ksm_survey for each of [first, first + count). Without a region of somebody else's: all OURS, for nothing. Merge
 * lock held, the scanner's thread; also while others are held. */
void ksm_survey(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found);

/* Are all of them OURS? */
bool ksm_survey_is_ours(const struct ksm_region *region, ksm_pageno first, size_t count);
/* The same before a stretch is looked at, where being a little late does no harm: seldom if it is dear. */
void ksm_survey_roughly(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found);

/* What is GONE is not ours to touch any more, and the region merges nothing from now on: SURVEY-2. Returns whether anything
 * is. Merge lock held. */
bool ksm_survey_give_up(struct ksm_region *region, ksm_pageno first, size_t count, const uint8_t *found);

/* The bytes of a page, from wherever it may be read without faulting. 0 or an error. */
int ksm_survey_read(const struct ksm_region *region, ksm_pageno page, void *to);

/* Is any of it locked into memory? That would be lost with the mapping. */
bool ksm_survey_is_locked(char *at, size_t nbytes);

#endif
