/* SPDX-License-Identifier: MIT */
/*
 * DOC: Resting
 *
 * Before broken pages get anonymous memory again, under a barrier that can hold pages, they rest: for a while they are
 * held (write protected), and the program goes on. Who writes to one of them, thread or system call or another process's
 * process_vm_writev, waits until the scanner has let that page go, which it does at once; such a page is not replaced.
 *
 *      note (in the pass)   ▸   hold   ▸   attend for 100 ms   ▸   park, replace what is still held   ▸   release
 *
 * What this is for: process_vm_writev looks a page up, and copies into it afterwards, in the other process's own time. A
 * call that began before the page was held is not kept away by that, and no program can see it. It copies a page
 * in a microsecond; so it is over after a rest, unless its process got no processor for as long as that in the very middle.
 *
 * REST-1. Only a page that has been held since the rest began is replaced: letting go clears the mark in the page table
 *         that RESTORE-3 looks at, and nobody sets it but who begins a rest.
 * REST-2. While anything is held the scanner never waits for the merge lock without attending: its holder may be
 *         waiting for a held page.
 * REST-3. Every way out of a rest releases everything. If that fails the barrier's descriptor is closed, and the
 *         kernel does.
 * REST-4. Regions may go while their pages rest. What is noted of them is an address, to be released like all others,
 *         and a pointer that is compared with the list before it is followed.
 *
 * A process that dies takes its write protection with it. fork: the scanner has ended a rest before it ends.
 */
#include "scan.h"

#include "atomic.h"
#include "error.h"
#include "os.h"
#include "survey.h"

#include <errno.h>
#include <string.h>

#define SLICE_NS 2000000u /* between two looks at what else is wanted */
#define LOCK_SLICE_NS 50000u
#define RESTORE_PAGES 512 /* under one hold of the merge lock */
#define RESTORE_PATIENCE_NS 3000000000u
#define RESTORE_PAUSE_NS 100000000u

/* REST-2 */
void ksm_scan_lock(struct ksm_scanner *scanner)
{
	if (!scanner->resting) {
		ksm_merge_lock(scanner->peer);
		return;
	}
	while (!ksm_merge_try_lock(scanner->peer))
		if (scanner->barrier.ops->attend(&scanner->barrier, LOCK_SLICE_NS))
			ksm_os_sleep_ns(LOCK_SLICE_NS);
}

/* Let go who wants to write, for a while. Non-zero: the rest is to end. */
static int attend(struct ksm_scanner *scanner, uint64_t ns, const struct ksm_scan_between *between)
{
	uint64_t now = ksm_os_now_ns(), until = now + ns;
	while (now < until) {
		int r = scanner->barrier.ops->attend(&scanner->barrier, KSM_MIN(until - now, (uint64_t)SLICE_NS));
		if (r) {
			ksm_count(scanner->peer->self, KSM_FAILURES, 1);
			return r;
		}
		if (between && between->resting && between->resting(between->context))
			return 1;
		now = ksm_os_now_ns();
	}
	return 0;
}

void ksm_scan_pause(struct ksm_scanner *scanner)
{
	uint64_t ns = ksm_park_rest_ns(&scanner->park);
	if (ns && scanner->resting)
		attend(scanner, ns, NULL);
	else if (ns)
		ksm_os_sleep_ns(ns);
}

/* The region of a run, if it is still there. Merge lock held. */
static struct ksm_region *listed(const struct ksm_scanner *scanner, const struct ksm_worn_run *run)
{
	struct ksm_region *region = scanner->regions;
	while (region && region != run->region)
		region = region->next;
	return region && ksm_region_page(region, run->first) == run->at && run->first + run->count <= region->room
		       ? region
		       : NULL;
}

static size_t hold_all(struct ksm_scanner *scanner)
{
	struct ksm_merger *merger = &scanner->merger;
	struct ksm_barrier *barrier = &scanner->barrier;
	size_t held = 0;
	for (size_t i = 0; i < merger->run_count; i++) {
		struct ksm_worn_run *run = &merger->runs[i];
		const struct ksm_region *region = listed(scanner, run);
		barrier->foreign = region && region->registered;
		run->held = region && ksm_survey_is_ours(region, run->first, run->count) &&
			    !barrier->ops->hold(barrier, run->at, run->count);
		held += run->held;
	}
	return held;
}

/* 0: pages have rested, until ksm_scan_rest_end(). -EAGAIN: something else is wanted; -EBUSY: nothing can be held. */
static int begin(struct ksm_scanner *scanner, const struct ksm_scan_between *between)
{
	ksm_merge_lock(scanner->peer);
	scanner->resting = true;
	int r = hold_all(scanner) ? 0 : -EBUSY;
	ksm_merge_unlock(scanner->peer);
	if (!r && attend(scanner, scanner->rest_ns, between))
		r = -EAGAIN;
	if (r)
		ksm_scan_rest_end(scanner);
	return r;
}

void ksm_scan_rest_end(struct ksm_scanner *scanner)
{
	struct ksm_merger *merger = &scanner->merger;
	struct ksm_barrier *barrier = &scanner->barrier;
	if (!scanner->resting)
		return;
	ksm_scan_lock(scanner);
	for (size_t i = 0; i < merger->run_count; i++) {
		struct ksm_worn_run *run = &merger->runs[i];
		barrier->foreign = true; /* it may be anything by now: REST-4 */
		if (run->held && barrier->ops->release(barrier, run->at, run->count) && listed(scanner, run))
			ksm_count(scanner->peer->self, KSM_FAILURES, 1);
	}
	ksm_merge_unlock(scanner->peer);
	ksm_scan_forget_worn(scanner);
	scanner->resting = false;
}

void ksm_scan_forget_worn(struct ksm_scanner *scanner)
{
	scanner->merger.run_count = 0;
	scanner->merger.runs_cost = 0;
}

/* One run has rested. Errors of ksm_give_back(); -EAGAIN: something else is wanted. KSM_EHEADROOM: copies are made first. */
static int replace(struct ksm_scanner *scanner, const struct ksm_worn_run *run, const struct ksm_scan_between *between,
		   uint64_t *given)
{
	bool all[KSM_WINDOW_PAGES];
	int r = 0;
	memset(all, true, sizeof(all));
	for (size_t i = 0, n; i < run->count && !r; i += n) {
		n = KSM_MIN(run->count - i, ksm_merger_stretch(&scanner->merger));
		if (!n)
			return KSM_EHEADROOM;
		if (attend(scanner, ksm_park_rest_ns(&scanner->park), between))
			return -EAGAIN;
		ksm_scan_lock(scanner);
		struct ksm_region *region = listed(scanner, run);
		if (region)
			r = ksm_give_back(region, &scanner->barrier, &scanner->park, run->first + i, n, all, NULL,
					  given);
		ksm_merge_unlock(scanner->peer);
	}
	return r;
}

void ksm_scan_give_back(struct ksm_scanner *scanner, const struct ksm_scan_between *between,
			struct ksm_merge_counts *counts)
{
	struct ksm_merger *merger = &scanner->merger;
	uint64_t given = 0;
	int r;
	if (!merger->run_count)
		return;
	if (!scanner->park.ready || ksm_park_ready(&scanner->park)) {
		counts->why_not = scanner->park.ready ? scanner->park.why : counts->why_not;
		ksm_scan_forget_worn(scanner);
		return;
	}
	r = begin(scanner, between);
	for (size_t i = 0; i < merger->run_count && !r; i++)
		if (merger->runs[i].held)
			r = replace(scanner, &merger->runs[i], between, &given);
	if (r)
		counts->why_not = r;
	ksm_scan_rest_end(scanner);
	counts->given_back += given;
	ksm_count(scanner->peer->self, KSM_GIVE_BACKS, (int64_t)given);
}

/* See and note the broken pages of a region. false: there is no room for all. Merge lock held. */
static bool note_broken(struct ksm_merger *merger, struct ksm_region *region)
{
	size_t used = ksm_load_acquire(&region->used);
	for (ksm_pageno page = 0; page < used; page += KSM_STRETCH)
		ksm_merge_see_breaks(merger, region, page, KSM_MIN(used - page, (size_t)KSM_STRETCH));
	for (ksm_pageno page = 0, n; page < used; page += n) {
		for (n = 0; page + n < used && ksm_region_state(region, page + n) == KSM_PAGE_BROKEN;)
			n++;
		if (n && !ksm_merger_note_worn(merger, region, page, n))
			return false;
		n += !n;
	}
	return true;
}

bool ksm_scan_rest(struct ksm_scanner *scanner, const struct ksm_region *only, const struct ksm_scan_between *between)
{
	bool all = true;
	if (scanner->resting)
		return true;
	ksm_scan_forget_worn(scanner);
	ksm_merge_lock(scanner->peer);
	for (struct ksm_region *region = scanner->regions; region && all; region = region->next)
		if ((!only || region == only) && ksm_must_rest(region, &scanner->barrier))
			all = note_broken(&scanner->merger, region);
	ksm_merge_unlock(scanner->peer);
	if (scanner->merger.run_count && scanner->park.ready)
		begin(scanner, between);
	return all;
}

/* ---- restoring -------------------------------------------------------------------------------------------- */

/* Private copies of [page, page + n) are about to be made: is there memory for them? Merge lock held. */
static int may_restore(struct ksm_scanner *scanner, const struct ksm_region *region, ksm_pageno page, size_t n)
{
	size_t copies = 0;
	for (size_t i = 0; i < n; i++)
		copies += ksm_region_state(region, page + i) == KSM_PAGE_MERGED;
	return copies ? ksm_headroom_check(&scanner->merger.headroom, copies * KSM_PAGE_SIZE,
					   ksm_merger_spare(&scanner->merger))
		      : 0;
}

static int restore_round(struct ksm_scanner *scanner, struct ksm_region *region, enum ksm_restore_broken broken,
			 const struct ksm_scan_between *between, struct ksm_restore_counts *counts)
{
	struct ksm_park *park = scanner->park.ready ? &scanner->park : NULL;
	uint64_t patient_until = ksm_os_now_ns() + RESTORE_PATIENCE_NS;
	size_t used = ksm_load_acquire(&region->used);
	int r = 0;
	for (ksm_pageno page = 0; page < used && !r;) {
		size_t n = KSM_MIN(used - page, (size_t)RESTORE_PAGES);
		ksm_scan_lock(scanner);
		r = may_restore(scanner, region, page, n);
		if (!r)
			r = ksm_restore(region, &scanner->barrier, park, page, n, broken, counts);
		ksm_merge_unlock(scanner->peer);
		uint64_t now = ksm_os_now_ns();
		if (r == KSM_EUNSTOPPABLE && now < patient_until) { /* somebody waits for this: try again */
			uint64_t at = scanner->park.retry_at_ns;
			ksm_scan_rest_end(scanner);
			ksm_os_sleep_ns(at > now ? KSM_MIN(at - now, RESTORE_PAUSE_NS) : 0);
			ksm_scan_rest(scanner, region, between);
			r = 0;
		} else {
			page += n;
		}
		ksm_scan_pause(scanner);
		ksm_scan_call(between);
	}
	return r;
}

int ksm_scan_restore(struct ksm_scanner *scanner, struct ksm_region *region, enum ksm_restore_broken broken,
		     const struct ksm_scan_between *between, struct ksm_restore_counts *counts)
{
	uint64_t left = counts->broken, before;
	int r;
	bool all;
	do {
		before = counts->restored;
		counts->broken = left;
		all = ksm_scan_rest(scanner, region, between);
		r = restore_round(scanner, region, broken, between, counts);
		ksm_scan_rest_end(scanner);
	} while (!r && (!all || counts->broken > left) && counts->restored > before);
	return r;
}
