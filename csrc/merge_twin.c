/* SPDX-License-Identifier: MIT */
/*
 * DOC: Our own twins
 *
 * A page is promoted because another page has said that it holds the same. If that one is this process's own, it need not
 * wait for the next pass: the bytes of the frame are at hand, so its stretch is looked at right afterwards, and nothing is
 * read from the store.
 *
 *    stretch          promote, write, map            frames f … f + 63, whose bytes the buffer holds
 *    our own twins    look, take f … f + 63, map     compared with the buffer
 *
 * A candidate's word says nothing of where its page is, so some of those that this process has said are remembered: one
 * for each remainder of the digest, and which one is left to chance. Data that are there twice lie in the same order mostly; so
 * one page that is found again tells where its neighbours are.
 *
 * TWIN-1. What is remembered is a hint. The region is looked up by the address, and the page's word must say that it is a
 *         candidate with that digest; everything else is a stretch as any other, and its windows compare (MERGE-1).
 * TWIN-2. The bytes at hand are those of a frame as long as the frame is ours: each is taken once more until the twins are
 *         done, for the page that it was written for may be broken, and counted as such, meanwhile.
 *
 * Called by the scanner's thread, under the same hold of the merge lock as the stretch before.
 */
#include "merge.h"

#include "atomic.h"

#define FORGET_EVERY 64 /* words said with the same remainder: then the newer one stays, whatever the digest */

void ksm_twin_note(struct ksm_merger *m, size_t i)
{
	uint64_t digest = m->digests[i];
	struct ksm_twin_hint *hint = &m->hints[digest % KSM_TWIN_HINTS];
	if (!hint->page || digest >= hint->digest || digest / KSM_TWIN_HINTS % FORGET_EVERY == 0)
		*hint = (struct ksm_twin_hint){digest, ksm_merger_page(m, i)};
}

static struct ksm_region *region_of(struct ksm_region *regions, const char *page)
{
	while (regions && (page < regions->base || page >= ksm_region_page(regions, regions->room)))
		regions = regions->next;
	return regions;
}

static bool is_candidate(const struct ksm_region *region, ksm_pageno page, uint64_t digest)
{
	return ksm_region_state(region, page) == KSM_PAGE_CANDIDATE && ksm_region_digest(region, page) == digest;
}

/* Was page i of the stretch merged, onto a frame whose bytes are at hand? */
static bool is_kept(const struct ksm_merger *m, size_t i)
{
	return m->at_hand[i] && ksm_region_state(m->region, m->first + i) == KSM_PAGE_MERGED &&
	       ksm_region_frame(m->region, m->first + i) == m->kept[i];
}

/* Where our own twin of page i is, or NULL: as far from its page as the last one, or as remembered. */
static const char *twin_of(struct ksm_merger *m, struct ksm_region *regions, size_t i)
{
	const struct ksm_twin_hint *hint = &m->hints[m->digests[i] % KSM_TWIN_HINTS];
	const char *places[] = {(const char *)((uintptr_t)ksm_merger_page(m, i) + (uintptr_t)m->twin_distance),
				hint->digest == m->digests[i] ? hint->page : NULL};
	for (size_t n = 0; n < KSM_COUNT(places); n++) {
		const struct ksm_region *region = places[n] ? region_of(regions, places[n]) : NULL;
		if (region &&
		    is_candidate(region, (ksm_pageno)(places[n] - region->base) >> KSM_PAGE_SHIFT, m->digests[i]))
			return places[n];
	}
	return NULL;
}

struct ksm_region *ksm_merge_find_twins(struct ksm_merger *m, struct ksm_region *regions, ksm_pageno *first,
					size_t *count)
{
	const char *twin = NULL;
	size_t i = 0;
	for (; !twin && i < m->count; i++)
		twin = is_kept(m, i) ? twin_of(m, regions, i) : NULL;
	if (!twin)
		return NULL;
	i--;
	m->twin_distance = twin - ksm_merger_page(m, i);
	struct ksm_region *region = region_of(regions, twin);
	ksm_pageno page = (ksm_pageno)(twin - region->base) >> KSM_PAGE_SHIFT;
	size_t used = ksm_load_acquire(&region->used);
	if (page < i || page >= used)
		return NULL;
	*first = page - i;
	*count = KSM_MIN(m->count, used - *first);
	bool overlaps = region == m->region && *first < m->first + m->count && m->first < *first + *count;
	return overlaps ? NULL : region;
}

void ksm_merge_twins(struct ksm_merger *m, struct ksm_region *region, ksm_pageno first, size_t count, bool force,
		     struct ksm_merge_counts *counts)
{
	ksm_frameno taken[KSM_STRETCH];
	size_t n = 0;
	for (size_t i = 0; i < count; i++) { /* TWIN-2 */
		m->at_hand[i] = is_kept(m, i) && is_candidate(region, first + i, m->digests[i]) &&
				ksm_frame_take(m->peer, m->kept[i], 0, 0);
		if (m->at_hand[i])
			taken[n++] = m->kept[i];
	}
	m->twins = true; /* the others were looked at in this pass, or will be: twice is not two passes */
	ksm_merge_at_hand(m, region, first, count, force, counts);
	m->twins = false;
	while (n)
		ksm_frame_put(m->peer, taken[--n], 1);
}
