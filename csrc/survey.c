/* SPDX-License-Identifier: MIT */
/*
 * DOC: Surveys
 *
 * An arena's addresses are ours. Registered memory belongs to the program, which must not unmap, remap or protect it
 * meanwhile, and does all the same: by a mistake, in a library that knows nothing of us. Then something else may lie at
 * the address: a file, memory shared with others, another thread's stack, our own tables. So before anything is done to a
 * page of registered memory its mapping is looked at:
 *
 *    ours      private, readable and writable: anonymous memory; or, if its word names a frame, that frame
 *    changed   the same with another protection. It is left alone until it has the old one again
 *    gone      anything else, and nothing
 *
 * Under "stop" this is exact, for everybody is held between the look and the deed. Under "move" the kernel checks what it
 * takes out, and the descriptor is asked right before a frame is mapped whether the range is still registered; only if a
 * thread unmaps it and another mapping takes its place in the microsecond between the two is that other one hit.
 * "segv" looks as late as it can.
 *
 * SURVEY-1. Registered memory is read by a system call, outside of windows and inside: what cannot be read is an error.
 * SURVEY-2. The reference of a page whose mapping is gone is never put: mremap may have taken the mapping elsewhere. Its
 *           bytes stay what they are until the process ends; so does its membership. And nothing of a region of which
 *           something is gone is merged again.
 * SURVEY-3. What the scanner itself uses while a window is open (its stack, its tables) is nobody's registered memory,
 *           whatever the addresses say: else it would wait for itself.
 *
 * Where /proc is missing nothing can be told; then registered memory is believed to be what it was. The lists are kept by
 * the kernel, so a peer that dies in the middle leaves nothing here.
 */
#include "survey.h"

#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define DEAR_SHARE 20 /* of the time between two dear looks */
#define COLD 20       /* MADV_COLD, Linux 5.4: refused where memory is locked, and harmless elsewhere */
#define PLAIN (KSM_MAPPING_READ | KSM_MAPPING_WRITE)

struct view {
	const struct ksm_region *region;
	ksm_pageno first;
	size_t count;
	uint8_t *found;
	struct stat store;
};

static bool is_of_store(const struct view *view, const struct ksm_os_mapping *mapping)
{
	return mapping->inode == view->store.st_ino && mapping->major == major(view->store.st_dev) &&
	       mapping->minor == minor(view->store.st_dev);
}

static enum ksm_survey see_page(const struct view *view, const struct ksm_os_mapping *mapping, ksm_pageno page)
{
	const struct ksm_region *region = view->region;
	ksm_frameno frame = ksm_region_frame(region, page);
	enum ksm_guard_state guard = KSM_GUARD_STATE(ksm_region_guard_of(region, page));
	uintptr_t at = (uintptr_t)ksm_region_page(region, page);
	bool framed = frame != KSM_NO_FRAME;
	if (mapping->shared)
		return KSM_SURVEY_GONE;
	if (!mapping->inode) {
		bool private = !framed || guard == KSM_GUARD_OPEN; /* OPEN: our handler has copied it */
		bool ours = mapping->access == KSM_MAPPING_READ && guard == KSM_GUARD_BUSY; /* in a window of "segv" */
		if (!private)
			return KSM_SURVEY_GONE;
		return mapping->access == PLAIN || ours ? KSM_SURVEY_OURS : KSM_SURVEY_CHANGED;
	}
	if (!is_of_store(view, mapping))
		return KSM_SURVEY_GONE;
	if (!framed)
		return KSM_SURVEY_CHANGED;
	if (mapping->offset + (at - mapping->from) != (uint64_t)frame << KSM_PAGE_SHIFT)
		return KSM_SURVEY_GONE;
	bool readonly = mapping->access == KSM_MAPPING_READ && guard != KSM_GUARD_WRITABLE;
	return mapping->access == PLAIN || readonly ? KSM_SURVEY_OURS : KSM_SURVEY_CHANGED;
}

static void see_mapping(const struct ksm_os_mapping *mapping, void *context)
{
	const struct view *view = context;
	uintptr_t base = (uintptr_t)ksm_region_page(view->region, view->first);
	uintptr_t from = KSM_MAX(mapping->from, base);
	uintptr_t to = KSM_MIN(mapping->to, base + (view->count << KSM_PAGE_SHIFT));
	for (uintptr_t at = from; at < to; at += KSM_PAGE_SIZE) {
		size_t i = (at - base) >> KSM_PAGE_SHIFT;
		view->found[i] = (uint8_t)see_page(view, mapping, view->first + i);
	}
}

/* SURVEY-3 */
static void leave_out(const struct view *view, const void *own, size_t nbytes)
{
	uintptr_t base = (uintptr_t)ksm_region_page(view->region, view->first), from = (uintptr_t)own,
		  to = from + nbytes;
	for (size_t i = 0; i < view->count; i++) {
		uintptr_t at = base + (i << KSM_PAGE_SHIFT);
		if (at < to && from < at + KSM_PAGE_SIZE)
			view->found[i] = KSM_SURVEY_GONE;
	}
}

static int look(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found)
{
	const struct ksm_peer *peer = region->peer;
	struct view view = {.region = region, .first = first, .count = count, .found = found};
	memset(found, KSM_SURVEY_GONE, count);
	int r = peer->fds.maps < 0 ? -EBADF : ksm_os_stat(peer->fds.store, &view.store);
	if (!r)
		r = ksm_os_mappings(peer->fds.maps, ksm_region_page(region, first), count << KSM_PAGE_SHIFT,
				    see_mapping, &view);
	if (r < 0) {
		/* without /proc nothing can be told; else it can be, another time */
		memset(found, peer->fds.maps < 0 ? KSM_SURVEY_OURS : KSM_SURVEY_CHANGED, count);
		return r;
	}
	for (size_t i = 0; i < KSM_COUNT(peer->own); i++)
		leave_out(&view, peer->own[i].at, peer->own[i].nbytes);
	leave_out(&view, peer->counts, ksm_peer_counts_bytes(peer));
	leave_out(&view, region, sizeof(*region));
	leave_out(&view, region->words, region->room * sizeof(uint64_t));
	if (region->guard)
		leave_out(&view, region->guard->bytes, region->guard->room);
	leave_out(&view, region->pieces, ksm_region_notes_bytes(region->room));
	return r;
}

void ksm_survey(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found)
{
	ksm_assert(count <= KSM_SURVEY_MOST);
	if (region->registered)
		look(region, first, count, found);
	else
		memset(found, KSM_SURVEY_OURS, count);
}

void ksm_survey_roughly(const struct ksm_region *region, ksm_pageno first, size_t count, uint8_t *found)
{
	struct ksm_peer *peer = region->peer;
	uint64_t now = region->registered ? ksm_os_now_ns() : 0;
	memset(found, KSM_SURVEY_OURS, count);
	if (!region->registered || now < peer->survey_at_ns)
		return;
	if (look(region, first, count, found) == 1) {
		uint64_t then = ksm_os_now_ns();
		peer->survey_at_ns = then + DEAR_SHARE * (then - now);
	}
}

bool ksm_survey_give_up(struct ksm_region *region, ksm_pageno first, size_t count, const uint8_t *found)
{
	bool any = false;
	for (size_t i = 0; i < count; i++) {
		ksm_pageno page = first + i;
		if (found[i] != KSM_SURVEY_GONE)
			continue;
		any = true;
		if (ksm_region_frame(region, page) == KSM_NO_FRAME)
			continue;
		size_t before = ksm_region_boundaries(region, page, 1);
		ksm_region_unknow(region, page); /* and its reference is kept: SURVEY-2 */
		region->strayed++;
		if (region->guard)
			ksm_guard_set(region->guard, page, 1, KSM_GUARD_OPEN);
		ksm_peer_count_vmas(region->peer, (int64_t)ksm_region_boundaries(region, page, 1) - (int64_t)before);
	}
	region->gone |= any;
	return any;
}

bool ksm_survey_is_ours(const struct ksm_region *region, ksm_pageno first, size_t count)
{
	uint8_t found[KSM_SURVEY_MOST];
	for (size_t i = 0, n; region->registered && i < count; i += n) {
		n = KSM_MIN(count - i, (size_t)KSM_SURVEY_MOST);
		look(region, first + i, n, found);
		for (size_t j = 0; j < n; j++)
			if (found[j] != KSM_SURVEY_OURS)
				return false;
	}
	return true;
}

int ksm_survey_read(const struct ksm_region *region, ksm_pageno page, void *to)
{
	const char *at = ksm_region_page(region, page);
	int r = region->registered ? ksm_os_read_own(at, to, KSM_PAGE_SIZE) : -ENOSYS;
	if (r != -ENOSYS && r != -EPERM)
		return r;
	memcpy(to, at, KSM_PAGE_SIZE); /* or a filter forbids the call: then as everybody else */
	return 0;
}

bool ksm_survey_is_locked(char *at, size_t nbytes)
{
	return ksm_os_advise(at, nbytes, COLD) == -EINVAL;
}
