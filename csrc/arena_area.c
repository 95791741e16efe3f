/* SPDX-License-Identifier: MIT */
/*
 * DOC: Areas
 *
 * Addresses that an arena has reserved, of one half of it: some gibibytes of them, readable and writable up to where
 * blocks have been, and never the place of memory that is registered. An area of the mergeable half is a region.
 *
 * AREA-1. No page is known twice: addresses that overlap a region's are given back to the kernel, and others are taken.
 * AREA-2. An area is in its half's list, and its region in the scanner's, only when it is complete; it leaves the scanner's
 *         before it is destroyed.
 *
 * Under the memory lock; takes the merge lock inside it. A fork copies areas as they are; who dies leaves nothing.
 */
#include "arena.h"

#include "os.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#define AREA_PAGES ((size_t)16 << (30 - KSM_PAGE_SHIFT)) /* 16 GiB of addresses */
#define AREA_LEAST ((size_t)16 << (20 - KSM_PAGE_SHIFT))
#define AREA_SHARE 64 /* of limited addresses (RLIMIT_AS) an area takes at most one part in so many */
#define COMMIT_PAGES ((size_t)8 << (20 - KSM_PAGE_SHIFT))

static bool overlaps(struct ksm_domain *domain, const char *at, size_t pages)
{
	ksm_merge_lock(ksm_domain_peer(domain));
	bool yes = ksm_scanner_overlaps(ksm_domain_scanner(domain), at, pages << KSM_PAGE_SHIFT);
	ksm_merge_unlock(ksm_domain_peer(domain));
	return yes;
}

static int reserve(struct ksm_domain *domain, size_t least, char **base, size_t *pages)
{
	void *at, *taken;
	int r = -ENOMEM;
	uint64_t share = (ksm_os_address_limit() / AREA_SHARE) >> KSM_PAGE_SHIFT;
	size_t most = KSM_MAX(KSM_MIN(AREA_PAGES, (size_t)share), AREA_LEAST);
	for (size_t n = KSM_MAX(most, least); r && n >= least && n >= AREA_LEAST; n /= 2) {
		*pages = n;
		r = ksm_os_map_anon(NULL, n << KSM_PAGE_SHIFT, false, true, &at);
		if (r || !overlaps(domain, at, n))
			continue;
		taken = at; /* registered memory that the program has unmapped: its pages would be known twice */
		r = ksm_os_map_anon(NULL, n << KSM_PAGE_SHIFT, false, true, &at);
		ksm_os_unmap(taken, n << KSM_PAGE_SHIFT);
	}
	*base = r ? NULL : at;
	return r;
}

void ksm_area_destroy(struct ksm_area *area)
{
	if (area->base)
		ksm_os_unmap(area->base, area->room << KSM_PAGE_SHIFT);
	ksm_spans_fini(&area->spans);
	for (struct ksm_hold *hold = area->region.holds, *next; hold; hold = next) { /* of threads a fork left behind */
		next = hold->next;
		free(hold);
	}
	ksm_region_fini(&area->region);
	free(area);
}

int ksm_area_create(struct ksm_arena *arena, struct ksm_half *half, size_t least, struct ksm_area **out)
{
	struct ksm_domain *domain = arena->domain;
	struct ksm_peer *peer = ksm_domain_peer(domain);
	struct ksm_area *area = ksm_os_allocate(sizeof(*area));
	if (!area)
		return -ENOMEM;
	int r = reserve(domain, least, &area->base, &area->room);
	if (!r)
		r = ksm_spans_init(&area->spans, area->room);
	if (!r && half->mergeable) {
		/* Each area begins somewhere else in the store, the first at its beginning. */
		uint64_t step = peer->layout.frames / 8;
		ksm_frameno home = (ksm_frameno)((uint64_t)domain->arenas_made++ * step % peer->layout.frames);
		r = ksm_region_init(&area->region, peer, &domain->worker.member.index, area->base, area->room, home);
	}
	if (r) {
		ksm_area_destroy(area);
		return r;
	}
	ksm_os_advise(area->base, area->room << KSM_PAGE_SHIFT, MADV_NOHUGEPAGE);
	if (half->mergeable) {
		area->region.background = arena->background;
		area->region.sigsegv = arena->sigsegv;
		area->region.excluded = arena->excluded;
		ksm_merge_lock(peer);
		ksm_scanner_add(ksm_domain_scanner(domain), &area->region);
		ksm_merge_unlock(peer);
	}
	struct ksm_area **at = &half->areas;
	while (*at)
		at = &(*at)->next;
	*at = area;
	*out = area;
	return 0;
}

int ksm_area_commit(struct ksm_area *area, size_t pages)
{
	if (pages <= area->committed)
		return 0;
	size_t target = KSM_MIN((pages + COMMIT_PAGES - 1) / COMMIT_PAGES * COMMIT_PAGES, area->room);
	size_t nbytes = (target - area->committed) << KSM_PAGE_SHIFT;
	int r = ksm_os_protect(area->base + (area->committed << KSM_PAGE_SHIFT), nbytes, true);
	if (!r)
		area->committed = target;
	return r;
}
