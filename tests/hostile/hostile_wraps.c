/* SPDX-License-Identifier: MIT */
/*
 * Between the core and its surveys. --blind: they see nothing, as before there were any; a control.
 *
 * Under "move" a mapping that takes another's place in the microsecond between the last look and the deed is lost
 * (FOLLOW-3). Here that gap is closed by a lock that acts take as well, so that everything else can be shown to lose
 * nothing. "segv" looks less closely: --alternate lets acts happen between stretches only.
 */
#include "hostile.h"

#include "barrier.h"
#include "merge.h"
#include "restore.h"
#include "survey.h"

#include <string.h>

bool hostile_blind, hostile_alternate;
static pthread_mutex_t gap = PTHREAD_MUTEX_INITIALIZER, stretch = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local bool in_gap;

void hostile_replace_begin(void)
{
	pthread_mutex_lock(&gap);
}

void hostile_replace_end(void)
{
	pthread_mutex_unlock(&gap);
}

void hostile_act_begin(void)
{
	if (hostile_alternate)
		pthread_mutex_lock(&stretch);
}

void hostile_act_end(void)
{
	if (hostile_alternate)
		pthread_mutex_unlock(&stretch);
}

/* ---- the scanner's thread ------------------------------------------------------------------------------------------ */

static void leave_gap(void)
{
	if (in_gap)
		pthread_mutex_unlock(&gap);
	in_gap = false;
}

bool __real_ksm_follow_is_there(struct ksm_barrier *barrier, char *at, size_t pages);
bool __wrap_ksm_follow_is_there(struct ksm_barrier *barrier, char *at, size_t pages)
{
	if (hostile_blind)
		return true;
	if (!in_gap) {
		pthread_mutex_lock(&gap);
		in_gap = true;
	}
	bool there = __real_ksm_follow_is_there(barrier, at, pages);
	if (!there)
		leave_gap();
	return there;
}

int __real_ksm_os_map_frames(void *at, size_t nbytes, int store, uint64_t offset, bool writable);
int __wrap_ksm_os_map_frames(void *at, size_t nbytes, int store, uint64_t offset, bool writable)
{
	int r = __real_ksm_os_map_frames(at, nbytes, store, offset, writable);
	leave_gap();
	return r;
}

int __real_ksm_os_remap(void *from, void *to, size_t nbytes);
int __wrap_ksm_os_remap(void *from, void *to, size_t nbytes)
{
	int r = __real_ksm_os_remap(from, to, nbytes);
	leave_gap();
	return r;
}

void __real_ksm_survey(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found);
void __wrap_ksm_survey(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found)
{
	leave_gap(); /* a remap that was not made after all */
	if (hostile_blind)
		memset(found, KSM_SURVEY_OURS, count);
	else
		__real_ksm_survey(region, first, count, found);
}

void __real_ksm_survey_roughly(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found);
void __wrap_ksm_survey_roughly(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found)
{
	if (hostile_blind)
		memset(found, KSM_SURVEY_OURS, count);
	else
		__real_ksm_survey_roughly(region, first, count, found);
}

bool __real_ksm_survey_is_ours(const struct ksm_region *region, ksm_pageno first, size_t count);
bool __wrap_ksm_survey_is_ours(const struct ksm_region *region, ksm_pageno first, size_t count)
{
	return hostile_blind || __real_ksm_survey_is_ours(region, first, count);
}

void __real_ksm_merge_stretch(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count,
			      bool force, struct ksm_merge_counts *counts);
void __wrap_ksm_merge_stretch(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count,
			      bool force, struct ksm_merge_counts *counts)
{
	if (hostile_alternate)
		pthread_mutex_lock(&stretch);
	__real_ksm_merge_stretch(merger, region, first, count, force, counts);
	if (hostile_alternate)
		pthread_mutex_unlock(&stretch);
}

int __real_ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		       size_t count, enum ksm_restore_broken broken, struct ksm_restore_counts *counts);
int __wrap_ksm_restore(struct ksm_region *region, struct ksm_barrier *barrier, struct ksm_park *park, ksm_pageno first,
		       size_t count, enum ksm_restore_broken broken, struct ksm_restore_counts *counts)
{
	if (hostile_alternate)
		pthread_mutex_lock(&stretch);
	int r = __real_ksm_restore(region, barrier, park, first, count, broken, counts);
	leave_gap();
	if (hostile_alternate)
		pthread_mutex_unlock(&stretch);
	return r;
}
