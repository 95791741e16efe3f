/* SPDX-License-Identifier: MIT */
/* The sweep: what it frees, what it must not (SWEEP-1 to 4), whoever dies or stops when. */
#include "members.h"

/* What a peer of another process shall do with frames; it answers the others until it is killed. */
struct orders {
	uint32_t step;
	ksm_frameno frame;
	ksm_slotno slot;
	uint32_t epoch;
};

enum deed {
	ALLOCATE,
	PUBLISH,
	TAKE,
	MARK_DYING,
	MARK_DYING_RAW,
	NOTHING
};

static void serve(struct orders *orders, enum deed deed)
{
	members_forget();
	struct ksm_member *me = members_join("d");
	orders->slot = me->peer.seat.slot;
	orders->epoch = me->peer.seat.epoch;
	members_begin(me);
	KIT_WAIT(10, ksm_scan_know_peers(&me->scanner) == 0);
	members_end();
	switch (deed) {
	case ALLOCATE: {
		char page[KSM_PAGE_SIZE];
		kit_fill(page, 3);
		CHECK_EQ(ksm_frame_alloc(&me->peer, KSM_NO_FRAME, &orders->frame), 0);
		CHECK_EQ(ksm_frame_write(&me->peer, orders->frame, 1, page), 0);
		break;
	}
	case PUBLISH:
		orders->frame = members_publish(me, 3);
		break;
	case TAKE:
		CHECK(members_take(me, orders->frame));
		break;
	case MARK_DYING:
	case MARK_DYING_RAW:
		ksm_bit_set(&me->peer, orders->frame);
		ksm_store_release(&me->peer.cells[orders->frame],
				  ksm_cell_make(deed == MARK_DYING ? KSM_CELL_DYING : KSM_CELL_DYING_RAW, orders->slot,
						orders->epoch, members_generation(me, orders->frame)));
		break;
	default:
		break;
	}
	kit_reach(&orders->step, 1);
	for (;;) {
		ksm_exchange_serve(&me->exchange, &me->peer);
		ksm_os_sleep_ns(200000);
	}
}

static pid_t start(struct orders *orders, enum deed deed)
{
	orders->step = 0;
	pid_t pid = kit_fork();
	if (pid == 0)
		serve(orders, deed);
	members_begin(NULL);
	kit_await(&orders->step, 1);
	members_end();
	return pid;
}

static void check_freed(struct ksm_member *a, ksm_frameno frame, uint32_t generation)
{
	CHECK_EQ(members_cell(a, frame), KSM_CELL_FREE);
	CHECK_EQ(members_generation(a, frame), generation + 1);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	CHECK(!ksm_bit_test(&a->peer, frame));
}

TEST(what_another_process_refers_to_stays)
{
	struct orders *orders = (struct orders *)kit_steps();
	struct ksm_member *a = members_join("d");
	orders->frame = members_publish(a, 3);
	pid_t other = start(orders, TAKE);
	members_put(a, orders->frame);
	CHECK_EQ(members_sweep(a), 0);
	CHECK_EQ(members_cell(a, orders->frame), KSM_CELL_PUBLISHED);
	CHECK(members_frame_is(a, orders->frame, 3));
	/* Scribbles over the cell take nothing from it either. */
	uint64_t good = ksm_load_acquire(&a->peer.cells[orders->frame]);
	for (uint64_t state = 0; state < 8; state++) {
		ksm_frameno frame;
		for (uint32_t who = 0; who < 3; who++) {
			uint32_t slot = who == 0 ? a->peer.seat.slot : who == 1 ? 900 : KSM_CELL_NOBODY;
			uint32_t epoch = who == 0 ? a->peer.seat.epoch : 0;
			ksm_store_release(&a->peer.cells[orders->frame],
					  ksm_cell_make((enum ksm_cell_state)state, slot, epoch, 0));
			CHECK_EQ(members_sweep(a), 0);
			CHECK_EQ(ksm_frame_alloc(&a->peer, orders->frame, &frame), 0);
			CHECK_NE(frame, orders->frame);
			ksm_frame_abandon(&a->peer, frame);
			CHECK(members_frame_is(a, orders->frame, 3));
			CHECK(!ksm_bit_test(&a->peer, orders->frame));
		}
	}
	ksm_store_release(&a->peer.cells[orders->frame], good);
	kit_stop(other); /* a stopped one still counts */
	CHECK_EQ(members_sweep(a), 0);
	CHECK(members_frame_is(a, orders->frame, 3));
	kit_kill(other);
	CHECK_EQ(members_sweep(a), 1);
	check_freed(a, orders->frame, ksm_cell_generation(good));
	members_leave(a);
}

TEST(an_allocation_of_the_dead_is_freed)
{
	struct orders *orders = (struct orders *)kit_steps();
	struct ksm_member *a = members_join("d");
	pid_t other = start(orders, ALLOCATE);
	CHECK_EQ(members_cell(a, orders->frame), KSM_CELL_ALLOC);
	CHECK_EQ(members_sweep(a), 0);
	kit_stop(other);
	CHECK_EQ(members_sweep(a), 0);
	CHECK_EQ(members_cell(a, orders->frame), KSM_CELL_ALLOC);
	CHECK_EQ(kit_blocks(a->peer.fds.store), KSM_PAGE_SIZE);
	kit_kill(other);
	CHECK_EQ(members_sweep(a), 1);
	check_freed(a, orders->frame, 0);
	members_leave(a);
}

static void dying_of(enum deed deed)
{
	struct orders *orders = (struct orders *)kit_steps();
	struct ksm_member *a = members_join("d");
	enum ksm_cell_state state = deed == MARK_DYING ? KSM_CELL_DYING : KSM_CELL_DYING_RAW;
	orders->frame = members_publish(a, 3);
	uint32_t generation = members_generation(a, orders->frame);
	pid_t other = start(orders, deed);
	members_put(a, orders->frame);
	CHECK_EQ(members_sweep(a), 0);
	kit_stop(other); /* of a living owner, however long it sleeps: left alone */
	for (int i = 0; i < 5; i++)
		CHECK_EQ(members_sweep(a), 0);
	CHECK_EQ(members_cell(a, orders->frame), state);
	CHECK_EQ(ksm_cell_slot(ksm_load_acquire(&a->peer.cells[orders->frame])), orders->slot);
	CHECK(!members_take(a, orders->frame)); /* a miss */
	kit_kill(other);
	CHECK_EQ(members_sweep(a), 1);
	check_freed(a, orders->frame, generation);
	members_leave(a);
}

TEST(dying_of_a_dead_owner_is_taken_over)
{
	dying_of(MARK_DYING);
}

TEST(dying_raw_of_a_dead_owner_is_taken_over)
{
	dying_of(MARK_DYING_RAW);
}

TEST(what_is_taken_over_is_never_published_again)
{
	struct orders *orders = (struct orders *)kit_steps();
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	CHECK_EQ(members_know(a), 0);
	orders->frame = members_publish(a, 3);
	pid_t other = start(orders, MARK_DYING);
	kit_kill(other);
	CHECK_EQ(members_sweep(b), 0); /* a refers to it */
	CHECK_EQ(members_cell(b, orders->frame), KSM_CELL_DYING_RAW);
	CHECK_EQ(ksm_cell_slot(ksm_load_acquire(&b->peer.cells[orders->frame])), KSM_CELL_NOBODY);
	CHECK(members_frame_is(a, orders->frame, 3));
	CHECK(!members_take(b, orders->frame));
	CHECK_EQ(members_sweep(a), 0);
	members_put(a, orders->frame);
	CHECK_EQ(members_sweep(a), 1); /* anybody goes on with it */
	check_freed(a, orders->frame, 0);
	members_leave(a);
	members_leave(b);
}

TEST(a_slot_taken_again_is_not_its_dead_owner)
{
	struct orders *orders = (struct orders *)kit_steps();
	struct ksm_member *a = members_join("d");
	pid_t other = start(orders, ALLOCATE);
	ksm_slotno slot = orders->slot;
	ksm_frameno frame = orders->frame;
	kit_kill(other);
	other = start(orders, NOTHING);
	CHECK_EQ(orders->slot, slot); /* somebody else in the same slot */
	CHECK_EQ(members_sweep(a), 1);
	check_freed(a, frame, 0);
	kit_kill(other);
	members_leave(a);
}

TEST(somebody_comes_meanwhile)
{
	struct ksm_member *a = members_join("d");
	ksm_frameno frame = members_publish(a, 3);
	members_put(a, frame);
	CHECK_EQ(ksm_peer_refresh(&a->peer), 0);
	/* Listed, but its bitmap is not at hand. */
	struct ksm_member *b = members_join("d");
	CHECK_EQ(ksm_sweep_chunk(&a->peer, 0), -EAGAIN);
	CHECK_EQ(members_cell(a, frame), KSM_CELL_PUBLISHED);
	CHECK(ksm_chunks_any(&a->peer)); /* stays marked */
	CHECK(members_frame_is(a, frame, 3));
	ksm_frameno again;
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &again), -EAGAIN);
	CHECK_EQ(members_sweep(a), 1);
	check_freed(a, frame, 0);
	members_leave(a);
	members_leave(b);
}

/* A thread moves the peer epoch all the time: what is marked between two reads of it is undone. */
static void *move_epoch(void *argument)
{
	struct ksm_member *a = argument;
	while (!ksm_load_relaxed(&members_stop))
		ksm_add_seqcst(&a->peer.control->peer_epoch, 1);
	return NULL;
}

TEST(the_epoch_moves_and_all_is_undone)
{
	struct ksm_member *a = members_join("d");
	ksm_frameno frames[32];
	char page[KSM_PAGE_SIZE];
	pthread_t mover;
	ksm_store_release(&members_stop, 0);
	CHECK_EQ(pthread_create(&mover, NULL, move_epoch, a), 0);
	int undone = 0;
	for (double until = harness_now() + 20; undone < 5 && harness_now() < until;) {
		for (size_t i = 0; i < 32; i++)
			frames[i] = KSM_NO_FRAME;
		for (size_t i = 0; i < 32; i++) { /* as seldom as the epoch allows */
			ksm_frameno frame;
			if (ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame))
				continue;
			kit_fill(page, 3 + i);
			CHECK_EQ(ksm_frame_write(&a->peer, frame, 1, page), 0);
			ksm_frame_publish(&a->peer, frame, ksm_page_digest(page));
			frames[i] = frame;
		}
		for (size_t i = 0; i < 32; i++)
			if (frames[i] != KSM_NO_FRAME)
				ksm_frame_put(&a->peer, frames[i], 1);
		int r = ksm_sweep_chunk(&a->peer, 0);
		CHECK(r == -EAGAIN || r >= 0);
		undone += r == -EAGAIN;
		for (size_t i = 0; i < 32 && r == -EAGAIN; i++) {
			if (frames[i] == KSM_NO_FRAME)
				continue;
			CHECK_EQ(members_cell(a, frames[i]), KSM_CELL_PUBLISHED);
			CHECK(members_frame_is(a, frames[i], 3 + i));
			CHECK(!ksm_bit_test(&a->peer, frames[i]));
		}
	}
	CHECK_GT(undone, 0);
	ksm_store_release(&members_stop, 1);
	pthread_join(mover, NULL);
	members_sweep(a);
	CHECK_EQ(members_frames(a), 0);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	members_leave(a);
}

TEST(without_a_bitmap_nothing_is_freed)
{
	struct orders *orders = (struct orders *)kit_steps();
	struct ksm_member *a = members_join("d");
	ksm_frameno frame = members_publish(a, 3);
	pid_t other = start(orders, NOTHING);
	kit_stop(other); /* so that it gives its bitmap to nobody */
	members_put(a, frame);
	CHECK_EQ(members_sweep(a), -EAGAIN);
	CHECK_EQ(ksm_sweep_chunk(&a->peer, 0), -EAGAIN);
	CHECK_EQ(members_cell(a, frame), KSM_CELL_PUBLISHED);
	CHECK(members_frame_is(a, frame, 3));
	CHECK_SYS(kill(other, SIGCONT));
	CHECK_EQ(members_sweep(a), 1);
	check_freed(a, frame, 0);
	kit_kill(other);
	members_leave(a);
}

/* Somebody scribbles PUBLISHED over the cell of a frame that another peer is writing, or about to punch: REFS-7. */
TEST(a_busy_frame_is_a_miss_whatever_its_cell_says)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(b), 0);
	ksm_frameno frame = members_publish(a, 3), fresh;
	members_put(a, frame);
	ksm_bit_set(&a->peer, frame); /* as the sweep does between its steps 2 and 6 */
	ksm_busy_set(&a->peer, frame);
	CHECK(!members_take(b, frame));
	CHECK(!ksm_bit_test(&b->peer, frame));
	CHECK(!ksm_busy_with_others(&a->peer, frame));
	CHECK(!ksm_busy_with_others(&b->peer, frame + 1));
	ksm_busy_clear(&a->peer, frame);
	ksm_bit_clear(&a->peer, frame);
	CHECK(members_take(b, frame));
	members_put(b, frame);
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &fresh), 0);
	uint64_t cell = a->peer.cells[fresh];
	a->peer.cells[fresh] = ksm_cell_make(KSM_CELL_PUBLISHED, 0, 0, ksm_cell_generation(cell));
	CHECK(!members_take(b, fresh));
	a->peer.cells[fresh] = cell;
	ksm_frame_abandon(&a->peer, fresh);
	CHECK_EQ(ksm_load_relaxed(&a->peer.seat.bitmap->busy), 0);
	CHECK_EQ(members_sweep(a), 1);
	CHECK_EQ(ksm_load_relaxed(&a->peer.seat.bitmap->busy), 0);
	members_leave(a);
	members_leave(b);
}

TEST(no_sweep_means_never)
{
	struct ksm_member *a = members_join("d");
	ksm_frameno frame = members_publish(a, 3);
	members_put(a, frame);
	ksm_store_release(&a->peer.control->no_sweep, 1);
	CHECK_EQ(members_sweep(a), 0);
	CHECK_EQ(members_cell(a, frame), KSM_CELL_PUBLISHED);
	CHECK(members_frame_is(a, frame, 3));
	members_leave(a);
}

/* Killed at any instant of a sweep: the next one finishes it. */
TEST(sweepers_are_killed)
{
	uint32_t *steps = kit_steps();
	struct ksm_member *a = members_join("d");
	ksm_frameno frames[64];
	uint64_t state = 1;
	for (int round = 0; round < 40; round++) {
		kit_reach(steps, 0);
		pid_t sweeper = kit_fork();
		if (sweeper == 0) {
			members_forget();
			struct ksm_member *me = members_join("d");
			kit_reach(steps, 1);
			for (;;) {
				ksm_exchange_serve(&me->exchange, &me->peer);
				if (!ksm_scan_know_peers(&me->scanner))
					ksm_sweep_chunk(&me->peer, 0);
			}
		}
		members_begin(NULL);
		kit_await(steps, 1);
		members_end();
		CHECK_EQ(members_know(a), 0);
		for (size_t i = 0; i < 64; i++)
			frames[i] = members_publish(a, 100 + i);
		members_begin(a);
		for (size_t i = 0; i < 32; i++)
			members_put(a, frames[i]);
		ksm_os_sleep_ns(kit_random(&state) % 300000);
		kit_kill(sweeper);
		members_end();
		CHECK_GE(members_sweep(a), 0);
		CHECK_EQ(members_frames(a), 32);
		for (size_t i = 32; i < 64; i++) {
			CHECK(members_frame_is(a, frames[i], 100 + i));
			members_put(a, frames[i]);
		}
		CHECK_EQ(members_sweep(a), 32);
		CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	}
	members_leave(a);
}
