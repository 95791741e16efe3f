/* SPDX-License-Identifier: MIT */
/*
 * DOC: Read-only and writable at the program's wish
 *
 * The arena's side of freeze.c: which pages an address means, and the list of memory that is being held writable.
 *
 * ACCESS-1. A hold stands in its region's list from before its pages are made private until it is ended: the scanner,
 *           which looks under the same lock, merges none of them meanwhile.
 * ACCESS-2. Lock order: memory, then merge lock; nothing is allocated under the merge lock.
 * ACCESS-3. While a thread of the program may have claimed pages its signals are blocked: a signal handler of the program
 *           that stored into such a page would wait for its own thread.
 */
#include "arena.h"

#include "freeze.h"
#include "handler.h"
#include "os.h"

#include <errno.h>
#include <stdlib.h>

struct range {
	struct ksm_region *region; /* NULL: nothing to do, it is never merged */
	ksm_pageno first;
	size_t count;
};

/* inwards: whole pages inside the bytes; else every page they touch. */
static int range_of(struct ksm_arena *arena, const void *address, size_t nbytes, bool inwards, struct range *out)
{
	bool mergeable = false;
	*out = (struct range){NULL, 0, 0};
	if (!nbytes)
		return 0;
	pthread_mutex_lock(&arena->domain->memory);
	struct ksm_area *area = ksm_arena_area_of(arena, address, nbytes, &mergeable);
	pthread_mutex_unlock(&arena->domain->memory);
	if (!area)
		return -EINVAL;
	if (!mergeable)
		return 0;
	size_t from = (size_t)((const char *)address - area->base), to = from + nbytes;
	out->first = inwards ? ksm_pages_of(from) : from >> KSM_PAGE_SHIFT;
	size_t end = inwards ? to >> KSM_PAGE_SHIFT : ksm_pages_of(to);
	out->count = end > out->first ? end - out->first : 0;
	out->region = &area->region;
	return 0;
}

/* In the scanner's thread: whether a page is broken can be seen there. */
static int freeze(struct ksm_member *member, void *context)
{
	const struct range *range = context;
	ksm_merge_lock(&member->peer);
	int r = ksm_freeze(range->region, range->first, range->count);
	ksm_merge_unlock(&member->peer);
	return r;
}

/* ACCESS-3. Returns the mask that was. */
static uint64_t lock_and_mask(struct ksm_peer *peer)
{
	ksm_merge_lock(peer); /* first: a thread that waits for it can be held, by the scanner that has it */
	return ksm_os_mask_sigsafe(UINT64_MAX);
}

static void unmask_and_unlock(struct ksm_peer *peer, uint64_t mask)
{
	ksm_os_mask_sigsafe(mask);
	ksm_merge_unlock(peer);
}

int ksm_arena_freeze(struct ksm_arena *arena, void *address, size_t nbytes, size_t *pages)
{
	struct range range;
	int r = range_of(arena, address, nbytes, true, &range);
	if (!r && range.count)
		r = ksm_handler_install();
	if (!r && range.count)
		r = ksm_handler_check();
	if (pages)
		*pages = r ? 0 : range.count;
	if (r || !range.count)
		return r;
	r = ksm_worker_call(&arena->domain->worker, freeze, &range);
	ksm_worker_nudge(&arena->domain->worker);
	return r;
}

int ksm_arena_thaw(struct ksm_arena *arena, void *address, size_t nbytes)
{
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	struct range range;
	int r = range_of(arena, address, nbytes, true, &range);
	if (r || !range.count)
		return r;
	uint64_t mask = lock_and_mask(peer);
	r = ksm_thaw(range.region, range.first, range.count);
	unmask_and_unlock(peer, mask);
	return r;
}

/* Take the hold of exactly this range out of the list. Merge lock held. */
static struct ksm_hold *unlist(const struct range *range)
{
	struct ksm_hold **at = &range->region->holds;
	while (*at && ((*at)->first != range->first || (*at)->count != range->count))
		at = &(*at)->next;
	struct ksm_hold *hold = *at;
	if (hold)
		*at = hold->next;
	return hold;
}

int ksm_arena_writable_begin(struct ksm_arena *arena, void *address, size_t nbytes)
{
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	struct range range;
	int r = range_of(arena, address, nbytes, false, &range);
	if (r || !range.count)
		return r;
	struct ksm_hold *hold = ksm_os_allocate(sizeof(*hold));
	if (!hold)
		return -ENOMEM;
	uint64_t mask = lock_and_mask(peer);
	*hold = (struct ksm_hold){range.region->holds, range.first, range.count};
	range.region->holds = hold; /* ACCESS-1 */
	r = ksm_make_private(range.region, range.first, range.count);
	if (r)
		hold = unlist(&range);
	unmask_and_unlock(peer, mask);
	if (r)
		free(hold);
	return r;
}

int ksm_arena_writable_end(struct ksm_arena *arena, void *address, size_t nbytes)
{
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	struct range range;
	int r = range_of(arena, address, nbytes, false, &range);
	if (r || !range.count)
		return r;
	ksm_merge_lock(peer);
	struct ksm_hold *hold = unlist(&range);
	ksm_region_note(range.region, range.first, range.count, KSM_TODO_LOOK);
	ksm_merge_unlock(peer);
	free(hold);
	return hold ? 0 : -EINVAL;
}
