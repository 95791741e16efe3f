/* SPDX-License-Identifier: MIT */
/* Frames: allocate, write, publish, take and put; FRAME-1 to 4. */
#include "members.h"

TEST(a_frame_lives_and_is_freed)
{
	struct ksm_member *a = members_join("d");
	ksm_frameno frame;
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
	CHECK_EQ(members_cell(a, frame), KSM_CELL_ALLOC);
	CHECK(ksm_bit_test(&a->peer, frame));
	CHECK(!ksm_frame_take(&a->peer, frame, 0, 0)); /* not published */
	CHECK_EQ(a->peer.counts[frame], 1);
	char page[KSM_PAGE_SIZE], back[KSM_PAGE_SIZE];
	kit_fill(page, 5);
	CHECK_EQ(ksm_frame_write(&a->peer, frame, 1, page), 0);
	uint32_t generation = ksm_frame_publish(&a->peer, frame, ksm_page_digest(page));
	CHECK_EQ(members_cell(a, frame), KSM_CELL_PUBLISHED);
	CHECK(ksm_frame_looks_published(&a->peer, frame, generation, KSM_GENERATION_ALL));
	CHECK(ksm_frame_looks_like(&a->peer, frame, ksm_page_digest(page)));
	CHECK(!ksm_frame_looks_like(&a->peer, frame, ~ksm_page_digest(page)));
	CHECK(!ksm_frame_take(&a->peer, frame, generation + 1, KSM_GENERATION_ALL));
	CHECK(ksm_frame_take(&a->peer, frame, generation, KSM_GENERATION_ALL));
	CHECK_EQ(a->peer.counts[frame], 2);
	CHECK_EQ(ksm_frame_read(&a->peer, frame, 1, back), 0);
	CHECK(kit_is(back, 5));
	ksm_frame_put(&a->peer, frame, 1);
	CHECK(ksm_bit_test(&a->peer, frame));
	CHECK_EQ(members_sweep(a), 0); /* still referred to */
	ksm_frame_put(&a->peer, frame, 1);
	CHECK(!ksm_bit_test(&a->peer, frame));
	CHECK_EQ(members_counter(a, KSM_FRAMES_REFERRED), 0);
	CHECK_EQ(members_sweep(a), 1);
	CHECK_EQ(members_cell(a, frame), KSM_CELL_FREE);
	CHECK_EQ(members_generation(a, frame), generation + 1);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	CHECK(!ksm_frame_take(&a->peer, frame, generation, KSM_GENERATION_ALL));
	CHECK_EQ(members_counter(a, KSM_FRAMES_REFERRED), 0);
	members_leave(a);
}

TEST(wishes_and_runs)
{
	struct ksm_member *a = members_join("d");
	ksm_frameno frame, next;
	CHECK_EQ(ksm_frame_alloc(&a->peer, 1234, &frame), 0);
	CHECK_EQ(frame, 1234);
	CHECK_EQ(ksm_frame_alloc(&a->peer, 1234, &next), 0); /* taken: somewhere else */
	CHECK_NE(next, 1234);
	for (int i = 0; i < 100; i++) { /* without a wish they follow one another */
		CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
		CHECK_EQ(frame, next + 1);
		next = frame;
	}
	CHECK_EQ(ksm_frame_alloc(&a->peer, (ksm_frameno)a->peer.layout.frames + 5, &frame), 0); /* no such frame */
	CHECK_LT(frame, a->peer.layout.frames);
	ksm_frame_abandon(&a->peer, frame);
	CHECK_EQ(members_cell(a, frame), KSM_CELL_FREE);
	CHECK(!ksm_bit_test(&a->peer, frame));
	members_leave(a);
}

TEST(a_full_store_is_an_error)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_member *a = NULL;
	options.capacity_bytes = KSM_CHUNK << KSM_PAGE_SHIFT; /* the least there is */
	CHECK_EQ(members_try_join(&options, &a), 0);
	static bool had[KSM_CHUNK];
	ksm_frameno frame;
	CHECK_EQ(a->peer.layout.frames, KSM_CHUNK);
	for (uint64_t i = 0; i < KSM_CHUNK; i++) {
		CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
		CHECK_LT(frame, KSM_CHUNK);
		CHECK(!had[frame]);
		had[frame] = true;
	}
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), -ENOSPC);
	ksm_frame_abandon(&a->peer, 77);
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
	CHECK_EQ(frame, 77);
	members_leave(a);
}

TEST(a_scribbled_cell_does_not_give_away_what_is_mapped)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(b), 0);
	ksm_frameno frame = members_publish(a, 9), other;
	for (unsigned state = 0; state < 8; state++) {
		ksm_store_release(&a->peer.cells[frame], (uint64_t)state << KSM_CELL_STATE_SHIFT);
		CHECK_EQ(ksm_frame_alloc(&b->peer, frame, &other), 0); /* another's */
		CHECK_NE(other, frame);
		ksm_frame_abandon(&b->peer, other);
		CHECK_EQ(ksm_frame_alloc(&a->peer, frame, &other), 0); /* our own */
		CHECK_NE(other, frame);
		ksm_frame_abandon(&a->peer, other);
		CHECK_EQ(members_sweep(b), 0);
		CHECK_EQ(members_sweep(a), 0);
		CHECK(members_frame_is(b, frame, 9));
	}
	members_leave(a);
	members_leave(b);
}

TEST(a_taker_blocks_an_allocator)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	ksm_frameno frame;
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(b), 0);
	ksm_bit_set(&b->peer, 40); /* about to allocate it, or scribbled */
	CHECK_EQ(ksm_frame_alloc(&a->peer, 40, &frame), 0);
	CHECK_NE(frame, 40);
	ksm_bit_clear(&b->peer, 40);
	CHECK_EQ(ksm_frame_alloc(&a->peer, 40, &frame), 0);
	CHECK_EQ(frame, 40);
	members_leave(a);
	members_leave(b);
}

TEST(without_a_peers_bitmap_nothing_is_allocated)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	ksm_frameno frame;
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), -EAGAIN);
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
	struct ksm_member *c = members_join("d"); /* somebody new: unknown until asked */
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), -EAGAIN);
	members_leave(c);
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
	members_leave(a);
	members_leave(b);
}

TEST(who_is_not_dumpable_publishes_nothing)
{
	struct ksm_member *a = members_join("d");
	ksm_frameno frame;
	CHECK_SYS(prctl(PR_SET_DUMPABLE, 0));
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), KSM_EDUMPABLE);
	CHECK_SYS(prctl(PR_SET_DUMPABLE, 1));
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
	members_leave(a);
}

/* ---- races: processes that take, put, allocate and free at the same time ------------------------------------------------- */

#define RACERS 4
#define RING 64

/* Frames' contents follow from a number that travels beside: any byte out of place is a frame given away too early. */
struct race {
	uint32_t go, done;
	uint64_t ring[RING]; /* frame << 32 | seed, of what was published lately */
};

static void race(struct race *race, unsigned number)
{
	uint64_t state = number + 1, page[KSM_PAGE_SIZE / 8];
	struct ksm_member *me = members_join("race");
	uint32_t seed = number << 24;
	ksm_frameno held[16];
	uint32_t seeds[16];
	size_t count = 0;
	ksm_add_seqcst(&race->go, 1);
	for (int step = 0; step < 1500; step++) {
		ksm_exchange_serve(&me->exchange, &me->peer);
		ksm_scan_know_peers(&me->scanner);
		ksm_merge_lock(&me->peer);
		unsigned what = kit_random(&state) % 8;
		uint64_t *slot = &race->ring[kit_random(&state) % RING], offer = ksm_load_acquire(slot);
		if (what < 3 && count < 16) {
			ksm_frameno frame;
			if (!ksm_frame_alloc(&me->peer, (ksm_frameno)(kit_random(&state) % 96), &frame)) {
				kit_fill(page, ++seed);
				CHECK_EQ(ksm_frame_write(&me->peer, frame, 1, page), 0);
				ksm_frame_publish(&me->peer, frame, ksm_page_digest(page));
				held[count] = frame;
				seeds[count++] = seed;
				ksm_store_release(slot, (uint64_t)frame << 32 | seed);
			}
		} else if (what < 5 && offer && count < 16) {
			ksm_frameno frame = (ksm_frameno)(offer >> 32);
			if (ksm_frame_take(&me->peer, frame, 0, 0)) {
				CHECK_EQ(ksm_frame_read(&me->peer, frame, 1, page), 0);
				if (kit_is(page, (uint32_t)offer)) { /* else it is another content by now */
					held[count] = frame;
					seeds[count++] = (uint32_t)offer;
				} else {
					ksm_frame_put(&me->peer, frame, 1);
				}
			}
		} else if (what < 7 && count) {
			size_t which = kit_random(&state) % count;
			CHECK_EQ(ksm_frame_read(&me->peer, held[which], 1, page), 0);
			CHECK(kit_is(page, seeds[which]));
			ksm_frame_put(&me->peer, held[which], 1);
			held[which] = held[--count];
			seeds[which] = seeds[count];
		} else {
			ksm_sweep_chunk(&me->peer, 0);
		}
		for (size_t i = 0; i < count; i++) {
			CHECK_EQ(ksm_frame_read(&me->peer, held[i], 1, page), 0);
			CHECK(kit_is(page, seeds[i]));
		}
		ksm_merge_unlock(&me->peer);
	}
	ksm_add_seqcst(&race->done, 1);
	for (;;) { /* answers until it is killed, with all it holds */
		ksm_exchange_serve(&me->exchange, &me->peer);
		kit_sleep_ms(1);
	}
}

TEST_LIMIT(processes_race_for_frames, 40)
{
	struct race *shared = (struct race *)kit_steps();
	struct ksm_member *mine = members_join("race");
	pid_t racers[RACERS];
	for (unsigned i = 0; i < RACERS; i++) {
		racers[i] = kit_fork();
		if (racers[i] == 0) {
			members_forget();
			race(shared, i + 1);
		}
	}
	members_begin(NULL);
	KIT_WAIT(30, ksm_load_acquire(&shared->done) == RACERS);
	members_end();
	for (unsigned i = 0; i < RACERS; i++)
		kit_kill(racers[i]);
	CHECK_GE(members_sweep(mine), 0);
	CHECK_EQ(members_frames(mine), 0); /* nobody holds anything now */
	CHECK_EQ(kit_blocks(mine->peer.fds.store), 0);
	CHECK_GT(ksm_load_relaxed(&mine->peer.control->frames_freed), 100);
	members_leave(mine);
}
