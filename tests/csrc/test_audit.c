/* SPDX-License-Identifier: MIT */
/*
 * Self-checking: whatever is wrong with our own books is found, by the check that README.md's table names, before
 * anything is done about it. Each case breaks one invariant by hand, in a child that must say so and end.
 */
#include "members.h"

#include "arena.h"
#include "audit.h"
#include "slab.h"
#include "span.h"

#define PAGES 16

struct books {
	struct ksm_member *member;
	struct ksm_peer *peer;
	struct ksm_region *region;
	char *at;
	ksm_frameno frame; /* of page 0, and of page PAGES / 2 */
};

/* The second half of the pages is like the first; all are merged. */
static struct books books_of_merged(void)
{
	struct books b = {.member = members_join("d"), .at = kit_map(PAGES)};
	for (size_t i = 0; i < PAGES; i++)
		kit_fill(kit_page(b.at, i), 1 + i % (PAGES / 2));
	b.peer = &b.member->peer;
	b.region = members_region(b.member, b.at, PAGES);
	CHECK_EQ(members_merge(b.member), PAGES);
	b.frame = ksm_region_frame(b.region, 0);
	CHECK_EQ(ksm_region_frame(b.region, PAGES / 2), b.frame);
	CHECK_EQ(b.peer->counts[b.frame], 2);
	return b;
}

static void flip_bit(struct books *b, ksm_frameno frame)
{
	b->peer->seat.bits[frame / 64] ^= 1ull << (frame % 64);
}

/* In a process of its own: what a peer has of its domain is not inherited by a fork. */
#define BOOKS_PANIC(words, ...) KIT_PANICS(words, struct books b = books_of_merged(); __VA_ARGS__)

/* ---- release: level 1 ---------------------------------------------------------------------------------------------- */

TEST(references)
{
	if (!kit_can_merge())
		return;
	kit_directory();
	BOOKS_PANIC("peer->counts[f] > 0", for (int i = 0; i < 3; i++) ksm_frame_put(b.peer, b.frame, 1));
	BOOKS_PANIC("f < peer->layout.frames", ksm_frame_put(b.peer, (ksm_frameno)b.peer->layout.frames, 1));
	BOOKS_PANIC("peer->counts[frame] == 0", ksm_bit_clear(b.peer, b.frame));
	BOOKS_PANIC("frame < peer->layout.frames", ksm_bit_set(b.peer, KSM_NO_FRAME));
}

TEST(pages_and_their_frames)
{
	if (!kit_can_merge())
		return;
	kit_directory();
	BOOKS_PANIC("ksm_region_edge_is_legal", ksm_region_move(b.region, 0, KSM_PAGE_SEEN, 1));
	BOOKS_PANIC("refers_rightly", ksm_region_move(b.region, 0, KSM_PAGE_BROKEN, b.frame + 1));
	BOOKS_PANIC("refers_rightly", ksm_region_move(b.region, 0, KSM_PAGE_UNKNOWN, 0);
		    ksm_region_move(b.region, 0, KSM_PAGE_SEEN, 1);
		    ksm_region_move(b.region, 0, KSM_PAGE_MERGED, (ksm_frameno)b.peer->layout.frames - 1));
	BOOKS_PANIC("refers_rightly", ksm_frame_put(b.peer, b.frame, 1); ksm_frame_put(b.peer, b.frame, 1);
		    ksm_region_move(b.region, 0, KSM_PAGE_UNKNOWN, 0));
	BOOKS_PANIC("page < region->room", ksm_region_state(b.region, PAGES));
	BOOKS_PANIC("region->states[from] > 0", b.region->states[KSM_PAGE_MERGED] = 0;
		    ksm_region_move(b.region, 0, KSM_PAGE_BROKEN, b.frame));
}

TEST(windows)
{
	struct ksm_park park;
	struct ksm_barrier barrier;
	char *at = kit_map_filled(8, 1);
	int store = ksm_os_memfd("store");
	if (!kit_has_barrier(KSM_BARRIER_STOP))
		return;
	CHECK_EQ(ksm_os_truncate(store, 8 * KSM_PAGE_SIZE), 0);
	CHECK_EQ(ksm_park_create(&park), 0);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_STOP, &park, -1), 0);
	KIT_PANICS("barrier->pages > 0", ksm_window_close(&barrier));
	KIT_WAIT(20, !ksm_window_open(&barrier, at, 4));
	KIT_PANICS("barrier->pages == 0", ksm_window_open(&barrier, at, 4));
	KIT_PANICS("barrier->pages", ksm_window_map(&barrier, 3, 2, store, 0, true));
	KIT_PANICS("barrier->pages", ksm_window_drop(&barrier, 4, 1));
	KIT_PANICS("is_out(barrier, page, count)", ksm_window_map(&barrier, 0, 2, store, 0, true);
		   ksm_window_map(&barrier, 1, 2, store, 0, true));
	ksm_window_close(&barrier);
}

TEST(guards)
{
	struct ksm_guard *guard;
	CHECK_EQ(ksm_guard_create(kit_map(8), 8, &guard), 0);
	KIT_PANICS("guard->pages", ksm_guard_set(guard, 7, 2, KSM_GUARD_WRITABLE));
	KIT_PANICS("before >= were", ksm_guard_set(guard, 1, 1, KSM_GUARD_BUSY); guard->busy = 0;
		   ksm_guard_set(guard, 1, 1, KSM_GUARD_OPEN));
	KIT_PANICS("KSM_GUARD_BUSY", ksm_guard_claim_from_sigsafe(guard, 1, KSM_GUARD_BUSY));
	KIT_PANICS("sequence & 1", guard->sequence++; ksm_guard_destroy(guard));
}

TEST(spans_and_slabs)
{
	struct ksm_spans spans;
	struct ksm_slabs slabs = {0};
	struct ksm_slab *slab;
	ksm_pageno page;
	CHECK_EQ(ksm_spans_init(&spans, 100), 0);
	CHECK_EQ(ksm_span_alloc(&spans, 10, &page), 0);
	KIT_PANICS("spans->pages", ksm_span_free(&spans, 95, 6));
	KIT_PANICS("spans->pages", ksm_span_free(&spans, (ksm_pageno)0 - 1, 1));
	KIT_PANICS("node(spans, after)->page >= to", ksm_span_free(&spans, 5, 6));
	CHECK(ksm_slab_add(&slabs, 2, kit_map(1), NULL));
	char *one = ksm_slab_alloc(&slabs, 2, &slab);
	KIT_PANICS("slab->taken", ksm_slab_free(&slabs, slab, one + 8));          /* in the middle */
	KIT_PANICS("slab->taken", ksm_slab_free(&slabs, slab, one + slab->size)); /* not handed out */
	KIT_PANICS("slab->base", ksm_slab_free(&slabs, slab, one - slab->size));
	KIT_PANICS("slab->objects", slab->used = 0, slab->objects = 1; ksm_slab_alloc(&slabs, 2, &slab));
}

TEST(blocks)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_domain *domain;
	struct ksm_arena *arena;
	struct ksm_block one, wrong;
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
	CHECK_EQ(ksm_arena_alloc(arena, PAGES * KSM_PAGE_SIZE, 0, &one), 0);
	KIT_PANICS("offset", wrong = one; wrong.address = kit_page(one.address, PAGES); ksm_arena_free(arena, &wrong));
	KIT_PANICS("offset", wrong = one; wrong.address = (char *)one.address + 64; ksm_arena_free(arena, &wrong));
	KIT_PANICS("pages <=", wrong = one; wrong.nbytes += KSM_PAGE_SIZE; ksm_arena_free(arena, &wrong));
	KIT_PANICS("", wrong = one; ksm_arena_free(arena, &wrong); ksm_arena_free(arena, &one)); /* twice */
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

/* ---- recounting: level 3 ----------------------------------------------------------------------------------------------- */

static void check_books(const struct books *b, const char *what)
{
	char why[200] = "";
	int r = ksm_books_are_valid(b->peer, b->region, why, sizeof(why));
	if (r != (what ? KSM_ECORRUPT : 0) || (what && strncmp(why, what, strlen(what))))
		FAIL("%s, not %s: %s", ksm_error_name(r), what ? what : "in order", why);
}

TEST(books_are_recounted)
{
	if (!kit_can_merge())
		return;
	struct books b = books_of_merged();
	uint64_t word = b.region->words[3];
	check_books(&b, NULL);

	b.region->states[KSM_PAGE_MERGED]++;
	check_books(&b, "AUDIT-1");
	b.region->states[KSM_PAGE_MERGED]--;

	b.peer->counts[b.frame]++;
	check_books(&b, "AUDIT-2");
	b.peer->counts[b.frame] -= 2;
	check_books(&b, "AUDIT-2");
	b.peer->counts[b.frame]++;

	flip_bit(&b, b.frame);
	check_books(&b, "AUDIT-3");
	flip_bit(&b, b.frame);

	b.peer->vmas_used++;
	check_books(&b, "AUDIT-6");
	b.peer->vmas_used--;
	check_books(&b, NULL);

	CHECK_EQ(ksm_region_guard(b.region), 0);
	ksm_store_release(&b.region->guard->bytes[3], KSM_GUARD_MERGED); /* true */
	check_books(&b, NULL);
	b.region->words[3] = (uint64_t)KSM_PAGE_BROKEN << 60 | ksm_region_frame(b.region, 3);
	check_books(&b, "AUDIT-5");
	b.region->words[3] = (uint64_t)9 << 60;
	check_books(&b, "PAGE-2");
	b.region->words[3] = word;
	ksm_store_release(&b.region->guard->bytes[3], KSM_GUARD_WRITABLE);
	check_books(&b, NULL);
}

TEST(mappings_are_compared_with_words)
{
	if (!kit_can_merge())
		return;
	struct books b = books_of_merged();
	off_t other = (off_t)ksm_region_frame(b.region, 3) * (off_t)KSM_PAGE_SIZE;
	CHECK(mmap(kit_page(b.at, 2), KSM_PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_FIXED, b.peer->fds.store, other) !=
	      MAP_FAILED);
	check_books(&b, "AUDIT-4: page 2 ");
	ksm_region_forget(b.region, 2, 1); /* the word, not the mapping */
	check_books(&b, "AUDIT-4: page 2 ");
}

TEST(a_pass_ends_with_an_audit)
{
	if (!kit_can_merge())
		return;
	kit_directory();
	BOOKS_PANIC("AUDIT-3", flip_bit(&b, b.frame); members_pass(b.member));
}
