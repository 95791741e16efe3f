/* SPDX-License-Identifier: MIT */
/*
 * DOC: Regions and pages
 *
 * This file owns the page words: eight bytes a page, outside the pages, saying what is known of it.
 *
 *     63   60 59                                  0
 *    ┌───────┬─────────────────────────────────────┐
 *    │ state │ digest, or frame                    │
 *    └───────┴─────────────────────────────────────┘
 *
 *                        ┌──────────── content changed ───────────┐
 *                        ▼                                        │
 *    UNKNOWN ────▶ SEEN [digest] ────▶ CANDIDATE [digest] ────────┤
 *       ▲             │   └──────────▶ REFUSED [digest] ──────────┘
 *       │             ▼ (also from CANDIDATE and REFUSED)
 *       ├──────── MERGED [frame] ────▶ BROKEN [frame]
 *       └──────── DROPPED (zeros)           │
 *       └───────────────────────────────────┘ freed, or made anonymous again
 *
 * A word that is behind the truth is harmless in one direction only, and the code keeps to it:
 *
 * PAGE-1. MERGED and BROKEN hold one reference to their frame, from before the page is mapped until after its mapping
 *         is gone. The kernel breaks a page without telling us; MERGED may mean broken, BROKEN never means merged.
 *         Where a guard says MERGED it is certain: nobody has written the page.
 * PAGE-2. Only ksm_region_move() changes a word, along the edges of one table.
 * PAGE-3. Words change under the merge lock. After fork the child's copy is as good as the parent's: its seat holds a
 *         copy of the parent's bits.
 * PAGE-4. states[] says how many words are in each state.
 * PAGE-5. Beside the words, notes say where the next pass has to look. A stretch without one has no page that is unknown
 *         and there, seen but not ripe, or broken: whoever brings a page there leaves a note.
 * PAGE-6. A clean bit may be set only beside a digest; it goes with it.
 */
#include "region.h"

#include "atomic.h"
#include "os.h"
#include "page.h"

#include <string.h>
#include <sys/mman.h>

#define STATE_SHIFT 60
#define PAYLOAD_MASK ((1ull << STATE_SHIFT) - 1)
_Static_assert(KSM_DIGEST_BITS <= STATE_SHIFT, "a digest does not fit beside the state");

int ksm_region_init(struct ksm_region *region, struct ksm_peer *peer, struct ksm_index *index, void *base, size_t pages,
		    ksm_frameno home)
{
	void *words, *notes;
	memset(region, 0, sizeof(*region));
	int r = ksm_os_map_table(ksm_page_round_up(pages * sizeof(uint64_t)), &words);
	if (r)
		return r;
	r = ksm_os_map_table(ksm_page_round_up(ksm_region_notes_bytes(pages)), &notes);
	if (r) {
		ksm_os_unmap(words, ksm_page_round_up(pages * sizeof(uint64_t)));
		return r;
	}
	region->pieces = notes;
	region->peer = peer;
	region->index = index;
	region->base = base;
	region->room = pages;
	region->words = words;
	region->home = home;
	region->background = true;
	return 0;
}

void ksm_region_fini(struct ksm_region *region)
{
	ksm_region_unguard(region);
	if (region->words)
		ksm_os_unmap(region->words, ksm_page_round_up(region->room * sizeof(uint64_t)));
	if (region->pieces)
		ksm_os_unmap(region->pieces, ksm_page_round_up(ksm_region_notes_bytes(region->room)));
	region->words = NULL;
	region->pieces = NULL;
}

enum ksm_page_state ksm_region_state(const struct ksm_region *region, ksm_pageno page)
{
	ksm_ensure(page < region->room);
	return (enum ksm_page_state)(region->words[page] >> STATE_SHIFT);
}

uint64_t ksm_region_digest(const struct ksm_region *region, ksm_pageno page)
{
	return region->words[page] & PAYLOAD_MASK;
}

ksm_frameno ksm_region_frame(const struct ksm_region *region, ksm_pageno page)
{
	if (page >= region->room)
		return KSM_NO_FRAME;
	enum ksm_page_state state = ksm_region_state(region, page);
	if (state != KSM_PAGE_MERGED && state != KSM_PAGE_BROKEN)
		return KSM_NO_FRAME;
	return (ksm_frameno)(region->words[page] & PAYLOAD_MASK);
}

/* ---- notes ------------------------------------------------------------------------------------------ */

bool ksm_region_is_clean(const struct ksm_region *region, ksm_pageno page)
{
	return ksm_region_piece(region, page)->clean[page % KSM_PIECE_PAGES / 64] >> (page % 64) & 1;
}

void ksm_region_set_clean(struct ksm_region *region, ksm_pageno page, bool clean)
{
	uint64_t bit = 1ull << (page % 64), *bits = &ksm_region_piece(region, page)->clean[page % KSM_PIECE_PAGES / 64];
	if (clean)
		*bits |= bit;
	else if (*bits & bit) /* memory that holds nothing but zeros is not touched */
		*bits &= ~bit;
}

void ksm_region_note(struct ksm_region *region, ksm_pageno page, size_t count, enum ksm_todo why)
{
	ksm_pageno end = page + count;
	for (ksm_pageno at = page - page % KSM_TODO_PAGES; count && at < end; at += KSM_TODO_PAGES)
		*ksm_region_todo(region, at) |= (uint8_t)why;
}

static bool has_digest(enum ksm_page_state state)
{
	return state == KSM_PAGE_SEEN || state == KSM_PAGE_CANDIDATE || state == KSM_PAGE_REFUSED;
}

/* ---- states ----------------------------------------------------------------------------------------- */

bool ksm_region_is_framed(const struct ksm_region *region, ksm_pageno page, size_t count)
{
	_Static_assert(KSM_PAGE_BROKEN == (KSM_PAGE_MERGED | 1) && KSM_PAGE_STATES <= 8, "the states with a frame");
	uint64_t mask = (uint64_t)(KSM_PAGE_MERGED | 2) << STATE_SHIFT, mine = (uint64_t)KSM_PAGE_MERGED << STATE_SHIFT;
	bool any = false;
	ksm_ensure(page < region->room && count <= region->room - page);
	if (!region->states[KSM_PAGE_MERGED] && !region->states[KSM_PAGE_BROKEN])
		return false;
	for (ksm_pageno i = page; i < page + count; i++)
		any |= (region->words[i] & mask) == mine;
	return any;
}

#define TO(state) (1u << KSM_PAGE_##state)
static const unsigned edges[KSM_PAGE_STATES] = {
	[KSM_PAGE_UNKNOWN] = TO(SEEN) | TO(UNKNOWN),
	[KSM_PAGE_SEEN] = TO(SEEN) | TO(CANDIDATE) | TO(REFUSED) | TO(MERGED) | TO(DROPPED) | TO(UNKNOWN),
	[KSM_PAGE_CANDIDATE] = TO(SEEN) | TO(CANDIDATE) | TO(REFUSED) | TO(MERGED) | TO(DROPPED) | TO(UNKNOWN),
	[KSM_PAGE_REFUSED] = TO(SEEN) | TO(CANDIDATE) | TO(REFUSED) | TO(MERGED) | TO(DROPPED) | TO(UNKNOWN),
	[KSM_PAGE_MERGED] = TO(BROKEN) | TO(UNKNOWN),
	[KSM_PAGE_BROKEN] = TO(UNKNOWN),
	[KSM_PAGE_DROPPED] = TO(UNKNOWN),
};
#undef TO

bool ksm_region_edge_is_legal(enum ksm_page_state from, enum ksm_page_state to)
{
	return from < KSM_PAGE_STATES && to < KSM_PAGE_STATES && (edges[from] >> to & 1);
}

/* PAGE-1: a page comes to a frame, stays with it and leaves it while a reference is held. */
static bool refers_rightly(const struct ksm_region *region, ksm_pageno page, enum ksm_page_state from,
			   enum ksm_page_state to, uint64_t payload)
{
	const struct ksm_peer *peer = region->peer;
	if (to == KSM_PAGE_MERGED)
		return payload < peer->layout.frames && peer->counts[payload] > 0;
	if (from != KSM_PAGE_MERGED && from != KSM_PAGE_BROKEN)
		return true;
	uint64_t frame = region->words[page] & PAYLOAD_MASK;
	return frame < peer->layout.frames && peer->counts[frame] > 0 && (to != KSM_PAGE_BROKEN || payload == frame);
}

void ksm_region_move(struct ksm_region *region, ksm_pageno page, enum ksm_page_state to, uint64_t payload)
{
	enum ksm_page_state from = ksm_region_state(region, page);
	struct ksm_slot *self = region->peer->self;
	ksm_ensure(ksm_region_edge_is_legal(from, to)); /* PAGE-2 */
	ksm_ensure(refers_rightly(region, page, from, to, payload));
	region->words[page] = (uint64_t)to << STATE_SHIFT | (payload & PAYLOAD_MASK);
	if (!has_digest(to))
		ksm_region_set_clean(region, page, false); /* PAGE-6 */
	if (to == KSM_PAGE_UNKNOWN || to == KSM_PAGE_SEEN || to == KSM_PAGE_BROKEN)
		ksm_region_note(region, page, 1, KSM_TODO_LOOK); /* PAGE-5 */
	else if (has_digest(to))
		ksm_region_note(region, page, 1, KSM_TODO_ASK);
	if (from == to)
		return;
	if (from != KSM_PAGE_UNKNOWN) {
		ksm_ensure(region->states[from] > 0); /* PAGE-4 */
		region->states[from]--;
	}
	if (to != KSM_PAGE_UNKNOWN)
		region->states[to]++;
	int merged = (to == KSM_PAGE_MERGED) - (from == KSM_PAGE_MERGED);
	int broken = (to == KSM_PAGE_BROKEN) - (from == KSM_PAGE_BROKEN);
	int dropped = (to == KSM_PAGE_DROPPED) - (from == KSM_PAGE_DROPPED);
	if (merged)
		ksm_count(self, KSM_PAGES_MERGED, merged);
	if (broken)
		ksm_count(self, KSM_PAGES_BROKEN, broken);
	if (dropped)
		ksm_count(self, KSM_PAGES_ZERO, dropped);
}

/* ---- guards ----------------------------------------------------------------------------------------- */

int ksm_region_guard(struct ksm_region *region)
{
	if (region->guard)
		return 0;
	struct ksm_guard *guard;
	int r = ksm_guard_create(region->base, region->room, &guard);
	if (r)
		return r;
	for (ksm_pageno page = 0; page < ksm_load_acquire(&region->used); page++) /* merged before it had one */
		if (ksm_region_frame(region, page) != KSM_NO_FRAME)
			ksm_guard_set(guard, page, 1, KSM_GUARD_WRITABLE);
	region->guard = guard;
	return 0;
}

void ksm_region_unguard(struct ksm_region *region)
{
	if (!region->guard)
		return;
	ksm_region_count_breaks(region);
	ksm_guard_destroy(region->guard);
	region->guard = NULL;
}

uint8_t ksm_region_guard_of(const struct ksm_region *region, ksm_pageno page)
{
	return region->guard ? ksm_guard_get(region->guard, page) : (uint8_t)KSM_GUARD_WRITABLE;
}

void ksm_region_count_breaks(struct ksm_region *region)
{
	if (!region->guard)
		return;
	uint64_t breaks = ksm_load_relaxed(&region->guard->breaks);
	ksm_count(region->peer->self, KSM_COW_BREAKS, (int64_t)(breaks - region->breaks_counted));
	region->breaks_counted = breaks;
}

bool ksm_region_is_held(const struct ksm_region *region, ksm_pageno page)
{
	for (const struct ksm_hold *hold = region->holds; hold; hold = hold->next)
		if (page >= hold->first && page - hold->first < hold->count)
			return true;
	return false;
}

/* ---- mappings --------------------------------------------------------------------------------------- */

static bool is_boundary(ksm_frameno left, ksm_frameno right)
{
	if (left == KSM_NO_FRAME || right == KSM_NO_FRAME)
		return left != right;
	return right != left + 1;
}

size_t ksm_region_boundaries(const struct ksm_region *region, ksm_pageno page, size_t count)
{
	size_t boundaries = 0;
	for (ksm_pageno i = page ? page : 1; i <= page + count && i < region->room; i++)
		boundaries += is_boundary(ksm_region_frame(region, i - 1), ksm_region_frame(region, i));
	return boundaries;
}

size_t ksm_region_boundaries_if(const struct ksm_region *region, ksm_pageno page, size_t count, ksm_frameno frame)
{
	size_t boundaries = 0;
	if (page)
		boundaries += is_boundary(ksm_region_frame(region, page - 1), frame);
	ksm_frameno last = frame == KSM_NO_FRAME ? frame : frame + (ksm_frameno)count - 1;
	if (page + count < region->room)
		boundaries += is_boundary(last, ksm_region_frame(region, page + count));
	return boundaries;
}

ksm_frameno ksm_region_home(const struct ksm_region *region, ksm_pageno page)
{
	ksm_frameno left = page ? ksm_region_frame(region, page - 1) : KSM_NO_FRAME;
	if (left != KSM_NO_FRAME)
		return left + 1;
	ksm_frameno right = ksm_region_frame(region, page + 1);
	if (right != KSM_NO_FRAME && right > 0)
		return right - 1;
	if (region->home == KSM_NO_FRAME)
		return KSM_NO_FRAME;
	return (ksm_frameno)((region->home + page) % region->peer->layout.frames);
}

void ksm_region_unknow(struct ksm_region *region, ksm_pageno page)
{
	if (ksm_region_state(region, page) == KSM_PAGE_CANDIDATE)
		ksm_candidate_remove(region->index, region->peer, ksm_region_digest(region, page),
				     ksm_region_page(region, page));
	ksm_region_move(region, page, KSM_PAGE_UNKNOWN, 0);
}

static bool is_unknown(const struct ksm_region *region, ksm_pageno page, size_t count)
{
	uint64_t any = 0;
	for (ksm_pageno i = page; i < page + count; i++)
		any |= region->words[i];
	return !any;
}

void ksm_region_forget(struct ksm_region *region, ksm_pageno page, size_t count)
{
	if (is_unknown(region, page, count))
		return;
	size_t before = ksm_region_boundaries(region, page, count);
	for (ksm_pageno i = page; i < page + count; i++) {
		ksm_frameno frame = ksm_region_frame(region, i);
		if (ksm_region_state(region, i) == KSM_PAGE_UNKNOWN)
			continue;
		ksm_region_unknow(region, i);
		if (frame != KSM_NO_FRAME)
			ksm_frame_put(region->peer, frame, 1);
	}
	size_t after = ksm_region_boundaries(region, page, count);
	ksm_peer_count_vmas(region->peer, (int64_t)after - (int64_t)before);
}
