/* SPDX-License-Identifier: MIT */
/* Page words: which edges are legal (PAGE-2), what counts change, and where mappings begin. */
#include "members.h"

/* Written down again, so that a change to the table in the core is one on purpose. */
static bool is_legal(enum ksm_page_state from, enum ksm_page_state to)
{
	switch (from) {
	case KSM_PAGE_UNKNOWN:
		return to == KSM_PAGE_SEEN || to == KSM_PAGE_UNKNOWN;
	case KSM_PAGE_SEEN:
	case KSM_PAGE_CANDIDATE:
	case KSM_PAGE_REFUSED:
		return to != KSM_PAGE_BROKEN;
	case KSM_PAGE_MERGED:
		return to == KSM_PAGE_BROKEN || to == KSM_PAGE_UNKNOWN;
	default:
		return to == KSM_PAGE_UNKNOWN;
	}
}

/* As if references were held: a page comes to a frame and leaves it only then (PAGE-1). */
static void refer_to(struct ksm_member *member, ksm_frameno first, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		ksm_bit_set(&member->peer, first + (ksm_frameno)i);
		member->peer.counts[first + i] = 1;
	}
}

/* One page brought to a state by a legal way. */
static void bring_to(struct ksm_region *region, enum ksm_page_state state)
{
	ksm_region_move(region, 0, KSM_PAGE_UNKNOWN, 0);
	if (state == KSM_PAGE_UNKNOWN)
		return;
	ksm_region_move(region, 0, KSM_PAGE_SEEN, 11);
	if (state == KSM_PAGE_BROKEN)
		ksm_region_move(region, 0, KSM_PAGE_MERGED, 7);
	if (state != KSM_PAGE_SEEN)
		ksm_region_move(region, 0, state, state == KSM_PAGE_MERGED || state == KSM_PAGE_BROKEN ? 7 : 11);
}

TEST(every_pair_of_states)
{
	struct ksm_member *a = members_join("d");
	struct ksm_region *region = members_region(a, kit_map(2), 2);
	refer_to(a, 5, 3);
	for (unsigned from = 0; from < KSM_PAGE_STATES; from++) {
		for (unsigned to = 0; to < KSM_PAGE_STATES; to++) {
			bool legal = is_legal((enum ksm_page_state)from, (enum ksm_page_state)to);
			CHECK_EQ(ksm_region_edge_is_legal((enum ksm_page_state)from, (enum ksm_page_state)to), legal);
			bring_to(region, (enum ksm_page_state)from);
			CHECK_EQ(ksm_region_state(region, 0), from);
			if (legal) {
				ksm_region_move(region, 0, (enum ksm_page_state)to, to == KSM_PAGE_BROKEN ? 7 : 5);
				CHECK_EQ(ksm_region_state(region, 0), to);
				uint64_t all = 0;
				for (unsigned state = 1; state < KSM_PAGE_STATES; state++) {
					CHECK_EQ(region->states[state], state == to);
					all += region->states[state];
				}
				CHECK_EQ(all, to != KSM_PAGE_UNKNOWN);
				CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), to == KSM_PAGE_MERGED);
				CHECK_EQ(members_counter(a, KSM_PAGES_BROKEN), to == KSM_PAGE_BROKEN);
				CHECK_EQ(members_counter(a, KSM_PAGES_ZERO), to == KSM_PAGE_DROPPED);
				continue;
			}
			KIT_PANICS("ksm_region_edge_is_legal(from, to)",
				   ksm_region_move(region, 0, (enum ksm_page_state)to, 5));
		}
	}
	CHECK(!ksm_region_edge_is_legal(KSM_PAGE_STATES, KSM_PAGE_UNKNOWN));
	CHECK(!ksm_region_edge_is_legal(KSM_PAGE_UNKNOWN, KSM_PAGE_STATES));
	bring_to(region, KSM_PAGE_UNKNOWN);
	members_leave(a);
}

TEST(words_hold_digests_and_frames)
{
	struct ksm_member *a = members_join("d");
	struct ksm_region *region = members_region(a, kit_map(2), 2);
	uint64_t digest = (1ull << KSM_DIGEST_BITS) - 1;
	refer_to(a, 4321, 1);
	ksm_region_move(region, 1, KSM_PAGE_SEEN, digest);
	CHECK_EQ(ksm_region_digest(region, 1), digest);
	CHECK_EQ(ksm_region_state(region, 1), KSM_PAGE_SEEN);
	CHECK_EQ(ksm_region_frame(region, 1), KSM_NO_FRAME);
	ksm_region_move(region, 1, KSM_PAGE_MERGED, 4321);
	CHECK_EQ(ksm_region_frame(region, 1), 4321);
	CHECK_EQ(ksm_region_frame(region, 0), KSM_NO_FRAME);
	CHECK_EQ(ksm_region_frame(region, 2), KSM_NO_FRAME); /* outside */
	CHECK_EQ(ksm_region_state(region, 0), KSM_PAGE_UNKNOWN);
	members_leave(a);
}

/* ---- mappings against a count page by page ---------------------------------------------------------------------------------- */

#define PAGES 24

static void set_frame(struct ksm_region *region, ksm_pageno page, ksm_frameno frame)
{
	ksm_region_move(region, page, KSM_PAGE_UNKNOWN, 0);
	if (frame == KSM_NO_FRAME)
		return;
	ksm_region_move(region, page, KSM_PAGE_SEEN, 0);
	ksm_region_move(region, page, KSM_PAGE_MERGED, frame);
}

/* How many places in [page, page + count] begin a mapping that the page before does not continue. */
static size_t count_boundaries(const ksm_frameno *frames, ksm_pageno page, size_t count)
{
	size_t n = 0;
	for (ksm_pageno at = page; at <= page + count; at++) {
		if (at == 0 || at >= PAGES)
			continue;
		bool before = frames[at - 1] != KSM_NO_FRAME, here = frames[at] != KSM_NO_FRAME;
		n += before != here || (here && frames[at] != frames[at - 1] + 1);
	}
	return n;
}

TEST(boundaries_are_what_a_count_says)
{
	struct ksm_member *a = members_join("d");
	struct ksm_region *region = members_region(a, kit_map(PAGES), PAGES);
	ksm_frameno frames[PAGES], changed[PAGES];
	uint64_t state = 3;
	refer_to(a, 0, 60);
	for (int round = 0; round < 2000; round++) {
		for (ksm_pageno page = 0; page < PAGES; page++) {
			uint64_t dice = kit_random(&state) % 8;
			bool goes_on = page && frames[page - 1] != KSM_NO_FRAME && dice < 5;
			frames[page] = goes_on    ? frames[page - 1] + 1
				       : dice < 6 ? KSM_NO_FRAME
						  : (ksm_frameno)(kit_random(&state) % 30);
			set_frame(region, page, frames[page]);
		}
		for (int i = 0; i < 10; i++) {
			ksm_pageno page = kit_random(&state) % PAGES;
			size_t count = 1 + kit_random(&state) % (PAGES - page);
			ksm_frameno frame = (ksm_frameno)(kit_random(&state) % 30);
			if (page && frames[page - 1] != KSM_NO_FRAME && i % 2)
				frame = frames[page - 1] + 1;
			CHECK_EQ(ksm_region_boundaries(region, page, count), count_boundaries(frames, page, count));
			memcpy(changed, frames, sizeof(frames));
			for (size_t j = 0; j < count; j++)
				changed[page + j] = frame + (ksm_frameno)j;
			CHECK_EQ(ksm_region_boundaries_if(region, page, count, frame),
				 count_boundaries(changed, page, count));
		}
	}
	for (ksm_pageno page = 0; page < PAGES; page++)
		set_frame(region, page, KSM_NO_FRAME);
	CHECK_EQ(ksm_region_boundaries(region, 0, PAGES), 0);
	members_leave(a);
}

TEST(home_is_beside_the_neighbours)
{
	struct ksm_member *a = members_join("d");
	struct ksm_region *region = members_region(a, kit_map(PAGES), PAGES);
	CHECK_EQ(ksm_region_home(region, 3), KSM_NO_FRAME);
	region->home = 100;
	refer_to(a, 0, 80);
	CHECK_EQ(ksm_region_home(region, 3), 103);
	set_frame(region, 2, 50);
	CHECK_EQ(ksm_region_home(region, 3), 51);
	CHECK_EQ(ksm_region_home(region, 1), 49);
	set_frame(region, 4, 70);
	CHECK_EQ(ksm_region_home(region, 3), 51); /* the left one first */
	set_frame(region, 6, 0);
	CHECK_EQ(ksm_region_home(region, 5), 71);
	set_frame(region, 4, KSM_NO_FRAME);
	CHECK_LT(ksm_region_home(region, 5), a->peer.layout.frames); /* nothing below frame 0 */
	region->home = (ksm_frameno)a->peer.layout.frames - 1;
	CHECK_EQ(ksm_region_home(region, 15), 14); /* round the end */
	set_frame(region, 2, KSM_NO_FRAME);
	set_frame(region, 6, KSM_NO_FRAME);
	members_leave(a);
}

TEST(forgetting_puts_what_was_held)
{
	struct ksm_member *a = members_join("d");
	struct ksm_region *region = members_region(a, kit_map(PAGES), PAGES);
	ksm_frameno frame = members_publish(a, 4);
	for (ksm_pageno page = 3; page < 6; page++) {
		CHECK(members_take(a, frame));
		set_frame(region, page, frame);
	}
	members_put(a, frame);
	ksm_region_move(region, 4, KSM_PAGE_BROKEN, frame);
	CHECK_EQ(a->peer.counts[frame], 3);
	ksm_region_move(region, 9, KSM_PAGE_SEEN, 5);
	ksm_candidate_add(&a->index, &a->peer, 5, ksm_region_page(region, 9));
	ksm_region_move(region, 9, KSM_PAGE_CANDIDATE, 5);
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(ksm_candidate_find(&a->index, &a->peer, 5, ksm_region_page(region, 9)), KSM_CANDIDATE_OURS);
	CHECK_EQ(ksm_candidate_find(&a->index, &a->peer, 5, ksm_region_page(region, 10)), KSM_CANDIDATE_OTHER);
	ksm_region_forget(region, 0, 4);
	CHECK_EQ(a->peer.counts[frame], 2);
	CHECK(ksm_bit_test(&a->peer, frame));
	ksm_region_forget(region, 4, PAGES - 4);
	CHECK_EQ(a->peer.counts[frame], 0);
	CHECK(!ksm_bit_test(&a->peer, frame));
	CHECK_EQ(ksm_candidate_find(&a->index, &a->peer, 5, ksm_region_page(region, 10)), KSM_CANDIDATE_NONE);
	for (unsigned state = 1; state < KSM_PAGE_STATES; state++)
		CHECK_EQ(region->states[state], 0);
	CHECK_EQ(members_sweep(a), 1);
	members_leave(a);
}
