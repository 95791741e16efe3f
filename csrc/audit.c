/* SPDX-License-Identifier: MIT */
/*
 * DOC: Auditing
 *
 * This file owns nothing. It recounts what other files keep count of, and says in words where they disagree. Only memory
 * that this process alone writes is looked at, and the kernel's list of its mappings: whatever peers do, a process
 * that is in order passes. What all peers share is looked at by valid.c.
 *
 * AUDIT-1. states[] of a region is the number of its words in each state (PAGE-4).
 * AUDIT-2. counts[f] is the number of pages whose words name frame f. Of regions that the program has unmapped parts of
 *          some more are counted, as many as have strayed (SURVEY-2).
 * AUDIT-3. Our bit f is set exactly where counts[f] is not zero (REFS-1).
 * AUDIT-4. A page of an arena that the kernel has mapped to frame f has a word that names f (PAGE-1).
 * AUDIT-5. Where a guard says MERGED, so does the page's word (PAGE-1).
 * AUDIT-6. vmas_used is the number of boundaries between pages that do not continue one another.
 *
 * Called by the scanner's thread, between passes. Handlers of other threads may be copying pages meanwhile: they change
 * no words. Allocates; uses stdio; takes no lock.
 */
#include "audit.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/sysmacros.h>

struct audit {
	const struct ksm_peer *peer;
	const struct ksm_region *regions;
	uint16_t *found; /* references to each frame, recounted */
	uint64_t strayed;
	int64_t boundaries;
	char *why;
	size_t room;
};

KSM_PRINTF(2, 3) static int wrong(struct audit *audit, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(audit->why, audit->room, format, arguments);
	va_end(arguments);
	return KSM_ECORRUPT;
}

/* ---- words ----------------------------------------------------------------------------------------------------- */

static int check_page(struct audit *audit, const struct ksm_region *region, ksm_pageno page)
{
	enum ksm_page_state state = ksm_region_state(region, page);
	ksm_frameno frame = ksm_region_frame(region, page);
	if (state >= KSM_PAGE_STATES)
		return wrong(audit, "PAGE-2: page %zu is in state %d", page, (int)state);
	if (region->guard && KSM_GUARD_STATE(ksm_region_guard_of(region, page)) == KSM_GUARD_MERGED &&
	    state != KSM_PAGE_MERGED)
		return wrong(audit, "AUDIT-5: the guard of page %zu says MERGED, its word %d", page, (int)state);
	if (frame == KSM_NO_FRAME)
		return 0;
	if (frame >= audit->peer->layout.frames)
		return wrong(audit, "AUDIT-2: page %zu names frame %u, which does not exist", page, (unsigned)frame);
	audit->found[frame]++;
	return 0;
}

static int check_region(struct audit *audit, const struct ksm_region *region)
{
	uint64_t states[KSM_PAGE_STATES] = {0};
	size_t used = KSM_MIN(ksm_load_acquire(&region->used), region->room);
	int r = 0;
	for (ksm_pageno page = 0; page < used && !r; page++) {
		r = check_page(audit, region, page);
		if (!r)
			states[ksm_region_state(region, page)]++;
	}
	for (int state = 1; state < KSM_PAGE_STATES && !r; state++)
		if (states[state] != region->states[state])
			r = wrong(audit, "AUDIT-1: %llu pages are in state %d, and %llu are counted",
				  (unsigned long long)states[state], state, (unsigned long long)region->states[state]);
	audit->strayed += region->strayed;
	audit->boundaries += (int64_t)ksm_region_boundaries(region, 0, used);
	return r;
}

/* ---- counts and bits --------------------------------------------------------------------------------------------- */

static int check_frames(struct audit *audit)
{
	const struct ksm_peer *peer = audit->peer;
	uint64_t high = KSM_MIN(ksm_load_relaxed(&peer->seat.bitmap->high), peer->layout.frames), more = 0;
	for (uint64_t frame = 0; frame < high; frame++) {
		unsigned counted = peer->counts[frame], found = audit->found[frame];
		bool bit = ksm_bit_test(peer, (ksm_frameno)frame);
		if (bit != (counted != 0))
			return wrong(audit, "AUDIT-3: bit %llu is %d, and %u pages are counted",
				     (unsigned long long)frame, bit, counted);
		if (found > counted)
			return wrong(audit, "AUDIT-2: %u pages name frame %llu, and %u are counted", found,
				     (unsigned long long)frame, counted);
		more += counted - found;
	}
	if (more != audit->strayed)
		return wrong(audit, "AUDIT-2: %llu references are counted that no page has, and %llu have strayed",
			     (unsigned long long)more, (unsigned long long)audit->strayed);
	if (peer->vmas_used != audit->boundaries)
		return wrong(audit, "AUDIT-6: %lld mappings are counted, and there should be %lld",
			     (long long)peer->vmas_used, (long long)audit->boundaries);
	return 0;
}

/* ---- mappings ------------------------------------------------------------------------------------------------------ */

static int check_mapping(struct audit *audit, uintptr_t from, uintptr_t to, uint64_t offset)
{
	for (const struct ksm_region *region = audit->regions; region; region = region->next) {
		uintptr_t base = (uintptr_t)region->base, end = base + (region->room << KSM_PAGE_SHIFT);
		for (uintptr_t at = KSM_MAX(from, base); at < KSM_MIN(to, end) && !region->registered;
		     at += KSM_PAGE_SIZE) {
			ksm_pageno page = (at - base) >> KSM_PAGE_SHIFT;
			uint64_t frame = (offset + (at - from)) >> KSM_PAGE_SHIFT;
			if (ksm_region_frame(region, page) != frame)
				return wrong(audit,
					     "AUDIT-4: page %zu is mapped to frame %llu, and its word says %d %u", page,
					     (unsigned long long)frame, (int)ksm_region_state(region, page),
					     (unsigned)ksm_region_frame(region, page));
		}
	}
	return 0;
}

static int check_mappings(struct audit *audit)
{
	struct stat store;
	char line[512];
	int r = 0;
	FILE *maps = fopen("/proc/self/maps", "re");
	if (!maps)
		return 0;
	while (!fstat(audit->peer->fds.store, &store) && !r && fgets(line, sizeof(line), maps)) {
		unsigned long from, to, offset, inode;
		unsigned high, low;
		if (sscanf(line, "%lx-%lx %*3cp %lx %x:%x %lu", &from, &to, &offset, &high, &low, &inode) == 6 &&
		    inode == store.st_ino && makedev(high, low) == store.st_dev)
			r = check_mapping(audit, from, to, offset);
	}
	fclose(maps);
	return r;
}

/* ---- the whole ------------------------------------------------------------------------------------------------------ */

int ksm_books_are_valid(const struct ksm_peer *peer, const struct ksm_region *regions, char *why, size_t room)
{
	struct audit audit = {.peer = peer, .regions = regions, .why = why, .room = room};
	int r = 0;
	audit.found = calloc(peer->layout.frames, sizeof(*audit.found));
	for (const struct ksm_region *region = regions; region && !r && audit.found; region = region->next)
		r = check_region(&audit, region);
	if (!r && audit.found)
		r = check_frames(&audit);
	if (!r && audit.found)
		r = check_mappings(&audit);
	free(audit.found);
	return r;
}

void ksm_audit(const struct ksm_peer *peer, const struct ksm_region *regions)
{
#if KSM_ASSERT_LEVEL >= 3
	char why[200];
	if (ksm_books_are_valid(peer, regions, why, sizeof(why)))
		ksm_panic(__FILE__, __LINE__, why);
#else
	(void)peer;
	(void)regions;
#endif
}
