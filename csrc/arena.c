/* SPDX-License-Identifier: MIT */
/*
 * DOC: Arenas
 *
 * An arena reserves areas of addresses and hands out blocks: pages of their own from a page up, objects of a slab
 * below. Blocks carry no header; all books lie outside the pages (span.c, slab.c, region.c), and the lowest free
 * address is taken first, so that programs with equal histories have equal pages at equal places. The frames follow the
 * places: an area's pages would like the frames with their own numbers, which makes one memory mapping of many pages.
 *
 * ARENA-1. A block that is handed out is zero. Memory that comes back is replaced by fresh anonymous memory
 *          (dropping a merged page's contents would bring back the frame's, not zeros).
 * ARENA-2. An arena lives until its creator and its last block have let go of it.
 * ARENA-3. Books change under the domain's memory lock, pages under the merge lock; where both are held, the memory lock
 *          was taken first.
 * ARENA-4. What is given back was handed out: whole pages of its area, no more than are out, counted once. That is seen
 *          before anything is done to them.
 */
#include "arena.h"

#include "atomic.h"
#include "dirty.h"
#include "error.h"
#include "freeze.h"
#include "handler.h"
#include "os.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- pages of areas ------------------------------------------------------------------------------------------------------ */

/* `pages` pages of some area. Memory lock held. */
static int take_pages(struct ksm_arena *arena, struct ksm_half *half, size_t pages, struct ksm_area **out, char **at)
{
	ksm_pageno page = 0;
	int r = -ENOMEM;
	struct ksm_area *area;
	for (area = half->areas; area; area = area->next) {
		r = ksm_span_alloc(&area->spans, pages, &page);
		if (!r)
			break;
	}
	if (!area) {
		r = ksm_area_create(arena, half, pages, &area);
		if (!r)
			r = ksm_span_alloc(&area->spans, pages, &page);
	}
	if (!r && (r = ksm_area_commit(area, page + pages)))
		ksm_span_free(&area->spans, page, pages);
	if (r)
		return r;
	if (page + pages > ksm_load_relaxed(&area->region.used))
		ksm_store_release(&area->region.used, page + pages);
	arena->pages += pages;
	*out = area;
	*at = area->base + (page << KSM_PAGE_SHIFT);
	return 0;
}

/* Their memory is fresh again: ARENA-1. Merge lock taken here. */
static void renew_pages(struct ksm_arena *arena, struct ksm_half *half, struct ksm_area *area, char *at, size_t pages)
{
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	struct ksm_region *region = &area->region;
	ksm_pageno page = (size_t)(at - area->base) >> KSM_PAGE_SHIFT;
	size_t nbytes = pages << KSM_PAGE_SHIFT;
	if (!half->mergeable) {
		if (ksm_os_advise(at, nbytes, MADV_DONTNEED))
			memset(at, 0, nbytes);
		return;
	}
	ksm_merge_lock(peer);
	uint64_t mask = region->guard ? ksm_os_mask_sigsafe(UINT64_MAX) : 0; /* see arena_access.c, ACCESS-3 */
	bool framed = ksm_region_is_framed(region, page, pages);
	for (size_t i = 0; i < pages && !framed && region->guard; i++)
		framed = ksm_guard_get(region->guard, page + i) != KSM_GUARD_OPEN;
	if (framed && region->guard)
		ksm_own_pages(region, page, pages);
	bool fresh =
		framed ? !ksm_os_map_anon(at, nbytes, true, false, NULL) : !ksm_os_advise(at, nbytes, MADV_DONTNEED);
	if (framed && fresh)
		ksm_os_advise(at, nbytes, MADV_NOHUGEPAGE);
	if (fresh) {
		ksm_region_forget(region, page, pages);
		if (framed)
			ksm_dirty_note_fresh(region, page, pages);
		if (framed && region->guard)
			ksm_guard_set(region->guard, page, pages, KSM_GUARD_OPEN);
	} else { /* the mappings stay, and with them the references; their contents may be anything that reads as zero */
		if (framed && region->guard)
			ksm_disown_pages(region, page, pages);
		if (region->guard)
			ksm_os_mask_sigsafe(mask); /* where it is read-only it faults */
		memset(at, 0, nbytes);
		ksm_count(peer->self, KSM_FAILURES, 1);
	}
	if (region->guard)
		ksm_os_mask_sigsafe(mask);
	ksm_merge_unlock(peer);
}

static void give_pages(struct ksm_arena *arena, struct ksm_half *half, struct ksm_area *area, char *at, size_t pages)
{
	size_t offset = (size_t)(at - area->base), used = ksm_load_relaxed(&area->region.used);
	ksm_ensure(offset % KSM_PAGE_SIZE == 0 && offset >> KSM_PAGE_SHIFT < used); /* ARENA-4 */
	ksm_ensure(pages <= used - (offset >> KSM_PAGE_SHIFT));
	pthread_mutex_lock(&arena->domain->memory);
	ksm_ensure(pages <= arena->pages);
	arena->pages -= pages;
	pthread_mutex_unlock(&arena->domain->memory);
	renew_pages(arena, half, area, at, pages);
	pthread_mutex_lock(&arena->domain->memory);
	ksm_span_free(&area->spans, offset >> KSM_PAGE_SHIFT, pages);
	pthread_mutex_unlock(&arena->domain->memory);
}

struct ksm_area *ksm_arena_area_of(struct ksm_arena *arena, const void *at, size_t nbytes, bool *mergeable)
{
	for (size_t i = 0; i < KSM_COUNT(arena->halves); i++)
		for (struct ksm_area *area = arena->halves[i].areas; area; area = area->next) {
			size_t offset = (size_t)((const char *)at - area->base);
			size_t used = ksm_load_relaxed(&area->region.used) << KSM_PAGE_SHIFT;
			*mergeable = arena->halves[i].mergeable;
			if ((const char *)at >= area->base && offset < used && nbytes <= used - offset)
				return area;
		}
	return NULL;
}

/* ---- life ------------------------------------------------------------------------------------------------------ */

int ksm_arena_create(struct ksm_domain *domain, unsigned flags, struct ksm_arena **out)
{
	if (flags & ~(KSM_ARENA_NO_SCAN | KSM_ARENA_SIGSEGV))
		return -EINVAL;
	int r = flags & KSM_ARENA_SIGSEGV ? ksm_handler_install() : 0;
	if (r)
		return r;
	struct ksm_arena *arena = ksm_os_allocate(sizeof(*arena));
	if (!arena)
		return -ENOMEM;
	arena->domain = domain;
	arena->references = 1;
	arena->background = !(flags & KSM_ARENA_NO_SCAN);
	arena->sigsegv = flags & KSM_ARENA_SIGSEGV;
	arena->halves[0].mergeable = true;
	ksm_domain_get(domain);
	*out = arena;
	return 0;
}

void ksm_arena_close(struct ksm_arena *arena)
{
	pthread_mutex_lock(&arena->domain->memory);
	arena->closed = true;
	pthread_mutex_unlock(&arena->domain->memory);
}

static void arena_destroy(struct ksm_arena *arena)
{
	struct ksm_domain *domain = arena->domain;
	struct ksm_peer *peer = ksm_domain_peer(domain);
	for (size_t i = 0; i < KSM_COUNT(arena->halves); i++) {
		struct ksm_half *half = &arena->halves[i];
		for (struct ksm_area *area = half->areas, *next; area; area = next) {
			next = area->next;
			if (half->mergeable) {
				ksm_merge_lock(peer);
				ksm_scanner_remove(ksm_domain_scanner(domain), &area->region);
				ksm_region_unguard(&area->region);
				ksm_os_unmap(area->base, area->room << KSM_PAGE_SHIFT);
				area->base = NULL;
				ksm_region_forget(&area->region, 0, area->region.used);
				ksm_merge_unlock(peer);
			}
			ksm_area_destroy(area);
		}
	}
	free(arena);
	ksm_domain_detach(domain);
}

static void arena_put(struct ksm_arena *arena)
{
	pthread_mutex_lock(&arena->domain->memory);
	ksm_ensure(arena->references > 0); /* ARENA-2 */
	bool last = --arena->references == 0;
	pthread_mutex_unlock(&arena->domain->memory);
	if (last)
		arena_destroy(arena);
}

void ksm_arena_release(struct ksm_arena *arena)
{
	ksm_arena_close(arena);
	arena_put(arena);
}

/* ---- blocks ---------------------------------------------------------------------------------------------------- */

/* Memory lock held. */
static int alloc_small(struct ksm_arena *arena, struct ksm_half *half, size_t nbytes, struct ksm_block *out)
{
	unsigned class = ksm_slab_class(nbytes);
	struct ksm_slab *slab;
	struct ksm_area *area;
	char *base;
	out->address = ksm_slab_alloc(&half->slabs, class, &slab);
	if (!out->address) {
		int r = take_pages(arena, half, ksm_slab_pages(class), &area, &base);
		if (r)
			return r;
		if (!ksm_slab_add(&half->slabs, class, base, area)) {
			ksm_span_free(&area->spans, (size_t)(base - area->base) >> KSM_PAGE_SHIFT,
				      ksm_slab_pages(class));
			arena->pages -= ksm_slab_pages(class);
			return -ENOMEM;
		}
		out->address = ksm_slab_alloc(&half->slabs, class, &slab);
	}
	out->owner = slab;
	return 0;
}

static int alloc_large(struct ksm_arena *arena, struct ksm_half *half, size_t nbytes, struct ksm_block *out)
{
	struct ksm_area *area;
	char *at;
	int r = take_pages(arena, half, ksm_pages_of(nbytes), &area, &at);
	if (r)
		return r;
	out->address = at;
	out->owner = area;
	return 0;
}

#define WATCH_PATIENCE_NS 1000000u

struct fresh_pages {
	struct ksm_region *region;
	ksm_pageno page;
	size_t count;
};

static int watch_fresh(struct ksm_member *member, void *context)
{
	const struct fresh_pages *fresh = context;
	ksm_scan_lock(&member->scanner);
	ksm_dirty_watch_fresh(fresh->region, fresh->page, fresh->count);
	ksm_merge_unlock(&member->peer);
	return 0;
}

/* DIRTY-7, before the first touch. A scanner that has other things to do is not waited for: then they cost a mapping. */
static void watch_pages(struct ksm_arena *arena, const struct ksm_block *block)
{
	const struct ksm_slab *slab = block->owner;
	struct ksm_area *area = block->nbytes <= KSM_SLAB_MOST ? slab->owner : block->owner;
	size_t offset = (size_t)((char *)block->address - area->base);
	struct fresh_pages fresh = {.region = &area->region,
				    .page = offset >> KSM_PAGE_SHIFT,
				    .count = ksm_pages_of(offset % KSM_PAGE_SIZE + block->nbytes)};
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	if (!ksm_load_relaxed(&fresh.region->fresh))
		return;
	ksm_merge_lock(peer);
	bool any = ksm_dirty_is_fresh(fresh.region, fresh.page, fresh.count);
	ksm_merge_unlock(peer);
	if (!any || ksm_worker_call_soon(&arena->domain->worker, watch_fresh, &fresh, WATCH_PATIENCE_NS) != -EAGAIN)
		return;
	ksm_merge_lock(peer);
	ksm_dirty_forget_fresh(fresh.region, fresh.page, fresh.count);
	ksm_merge_unlock(peer);
}

int ksm_arena_alloc(struct ksm_arena *arena, size_t nbytes, unsigned flags, struct ksm_block *out)
{
	struct ksm_half *half = &arena->halves[flags & KSM_ALLOC_UNMERGEABLE ? 1 : 0];
	memset(out, 0, sizeof(*out));
	if (nbytes == 0 || (flags & ~KSM_ALLOC_UNMERGEABLE))
		return -EINVAL;
	if (nbytes > SIZE_MAX / 4)
		return -ENOMEM;
	bool small = nbytes <= KSM_SLAB_MOST;
	pthread_mutex_lock(&arena->domain->memory);
	int r = arena->closed ? KSM_ECLOSED
		: small       ? alloc_small(arena, half, nbytes, out)
			      : alloc_large(arena, half, nbytes, out);
	if (!r) {
		out->nbytes = nbytes;
		arena->references++;
		arena->blocks++;
		arena->bytes += nbytes;
	}
	pthread_mutex_unlock(&arena->domain->memory);
	if (r)
		return r;
	watch_pages(arena, out);
	if (small)
		memset(out->address, 0, nbytes); /* an object may have been used before; pages are fresh */
	ksm_worker_nudge(&arena->domain->worker);
	return 0;
}

int ksm_arena_free(struct ksm_arena *arena, struct ksm_block *block)
{
	if (!block->owner)
		return -EINVAL;
	struct ksm_half *half = &arena->halves[0];
	if (block->nbytes <= KSM_SLAB_MOST) {
		struct ksm_slab *slab = block->owner;
		struct ksm_area *area = slab->owner;
		half = &arena->halves[area->region.words ? 0 : 1];
		pthread_mutex_lock(&arena->domain->memory);
		bool empty = ksm_slab_free(&half->slabs, slab, block->address);
		pthread_mutex_unlock(&arena->domain->memory);
		if (empty) {
			give_pages(arena, half, area, slab->base, slab->pages);
			free(slab);
		}
	} else {
		struct ksm_area *area = block->owner;
		half = &arena->halves[area->region.words ? 0 : 1];
		give_pages(arena, half, area, block->address, ksm_pages_of(block->nbytes));
	}
	pthread_mutex_lock(&arena->domain->memory);
	ksm_ensure(arena->blocks > 0 && arena->bytes >= block->nbytes); /* ARENA-4 */
	arena->blocks--;
	arena->bytes -= block->nbytes;
	pthread_mutex_unlock(&arena->domain->memory);
	memset(block, 0, sizeof(*block));
	arena_put(arena);
	return 0;
}

/* ---- merging by name ---------------------------------------------------------------------------------------------- */

static void exclude(struct ksm_arena *arena, bool excluded)
{
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	pthread_mutex_lock(&arena->domain->memory);
	ksm_merge_lock(peer);
	arena->excluded = excluded;
	for (struct ksm_area *area = arena->halves[0].areas; area; area = area->next)
		area->region.excluded = excluded;
	ksm_merge_unlock(peer);
	pthread_mutex_unlock(&arena->domain->memory);
}

int ksm_arena_scan(struct ksm_arena *arena, struct ksm_report *out)
{
	memset(out, 0, sizeof(*out));
	exclude(arena, false);
	for (struct ksm_area *area = arena->halves[0].areas; area; area = area->next) {
		struct ksm_report one = {0};
		int r = ksm_domain_scan_region(arena->domain, &area->region, &one);
		if (r)
			return r;
		out->pages_scanned += one.pages_scanned;
		out->pages_merged += one.pages_merged;
		out->zero_pages += one.zero_pages;
		out->frames_written += one.frames_written;
		out->passes += one.passes;
		out->seconds += one.seconds;
		out->why_not = one.why_not;
	}
	return 0;
}

int ksm_arena_unmerge(struct ksm_arena *arena, uint64_t *unmerged, uint64_t *broken)
{
	struct ksm_restore_counts counts = {0};
	int r = 0;
	exclude(arena, true);
	for (struct ksm_area *area = arena->halves[0].areas; area && !r; area = area->next)
		r = ksm_domain_restore_region(arena->domain, &area->region, KSM_RESTORE_PARKED, &counts);
	if (unmerged)
		*unmerged = counts.restored;
	if (broken)
		*broken = counts.broken;
	return r;
}

int ksm_arena_stats(struct ksm_arena *arena, struct ksm_arena_stats *out)
{
	struct ksm_peer *peer = ksm_domain_peer(arena->domain);
	memset(out, 0, sizeof(*out));
	for (struct ksm_area *area = arena->halves[0].areas; area; area = area->next)
		ksm_domain_see_breaks(arena->domain, &area->region); /* without a scanner: as of the last pass */
	pthread_mutex_lock(&arena->domain->memory);
	out->blocks = arena->blocks;
	out->allocated_bytes = arena->bytes;
	out->pages = arena->pages;
	out->scan = arena->background;
	out->sigsegv = arena->sigsegv;
	ksm_merge_lock(peer);
	for (struct ksm_area *area = arena->halves[0].areas; area; area = area->next) {
		out->pages_merged += area->region.states[KSM_PAGE_MERGED];
		out->pages_broken += area->region.states[KSM_PAGE_BROKEN];
		out->pages_zero += area->region.states[KSM_PAGE_DROPPED];
		out->pages_frozen += ksm_frozen_count(&area->region);
		out->cow_breaks += area->region.guard ? ksm_load_relaxed(&area->region.guard->breaks) : 0;
	}
	ksm_merge_unlock(peer);
	pthread_mutex_unlock(&arena->domain->memory);
	return 0;
}
