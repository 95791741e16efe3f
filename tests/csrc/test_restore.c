/* SPDX-License-Identifier: MIT */
/* From frames back to private memory, under a running program; RESTORE-1 and 2, MERGE-7. */
#include "crowd.h"
#include "members.h"

#define PAGES 1100 /* more than one piece of work */

static struct ksm_member *merged(char **one, char **two, struct ksm_region **r1, struct ksm_region **r2)
{
	struct ksm_member *a = members_join("d");
	*one = kit_map_filled(PAGES, 1);
	*two = kit_map_filled(PAGES, 1);
	*r1 = members_region(a, *one, PAGES);
	*r2 = members_region(a, *two, PAGES);
	CHECK_EQ(members_merge(a), 2 * PAGES);
	return a;
}

static struct ksm_restore_counts restore(struct ksm_member *a, struct ksm_region *region,
					 enum ksm_restore_broken broken)
{
	struct ksm_restore_counts counts = {0};
	CHECK_EQ(ksm_scan_restore(&a->scanner, region, broken, NULL, &counts), 0);
	return counts;
}

TEST(everything_is_private_again)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	if (!kit_can_merge())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	CHECK_EQ(restore(a, r1, KSM_RESTORE_PARKED).restored, PAGES); /* never touched since they were merged */
	kit_check_filled(one, PAGES, 1);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Anonymous"), PAGES * KSM_PAGE_SIZE);
	CHECK_LE(kit_smaps(one, PAGES * KSM_PAGE_SIZE, NULL, NULL), PAGES / 512 + 1);
	CHECK(!kit_is_registered(one, PAGES));
	CHECK_EQ(r1->states[KSM_PAGE_MERGED] + r1->states[KSM_PAGE_BROKEN], 0);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), PAGES);
	CHECK_EQ(members_sweep(a), 0);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(restore(a, r2, KSM_RESTORE_PARKED).restored, PAGES); /* all of it read before */
	CHECK_EQ(members_counter(a, KSM_VMAS_USED), 0);
	CHECK_EQ(members_sweep(a), PAGES);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	kit_check_filled(one, PAGES, 1);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(members_merge(a), 2 * PAGES); /* and back */
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	members_leave(a);
}

TEST(broken_pages_stay_where_threads_cannot_be_held)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	if (!kit_can_move())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	bool ready = a->scanner.park.ready;
	a->scanner.park.ready = false;
	for (size_t i = 0; i < PAGES; i += 3)
		kit_fill(kit_page(one, i), 5000 + i);
	size_t broken = (PAGES + 2) / 3;
	struct ksm_restore_counts counts = restore(a, r1, KSM_RESTORE_PARKED);
	CHECK_EQ(counts.restored, PAGES - broken);
	CHECK_EQ(counts.broken, broken);
	CHECK_EQ(r1->states[KSM_PAGE_BROKEN], broken);
	CHECK_EQ(members_counter(a, KSM_COW_BREAKS), broken);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i % 3 ? 1 + i : 5000 + i));
	counts = restore(a, r1, KSM_RESTORE_ALWAYS); /* somebody vouches for it */
	CHECK_EQ(counts.restored, broken);
	a->scanner.park.ready = ready;
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i % 3 ? 1 + i : 5000 + i));
	CHECK_EQ(r1->states[KSM_PAGE_BROKEN], 0);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Anonymous"), PAGES * KSM_PAGE_SIZE);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(members_sweep(a), 0);
	members_leave(a);
}

/* ---- while threads write ------------------------------------------------------------------------------------------------ */

TEST(broken_pages_are_restored_while_threads_are_held)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	if (!kit_can_merge())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	for (size_t i = 0; i < PAGES; i += 3)
		kit_fill(kit_page(one, i), 5000 + i);
	struct ksm_restore_counts counts = restore(a, r1, KSM_RESTORE_PARKED);
	CHECK_EQ(counts.restored, PAGES);
	CHECK_EQ(counts.broken, 0);
	CHECK_EQ(r1->states[KSM_PAGE_BROKEN] + r1->states[KSM_PAGE_MERGED], 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i % 3 ? 1 + i : 5000 + i));
	CHECK_GT(a->scanner.park.stops, 0);
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	kit_check_filled(two, PAGES, 1);
	members_leave(a);
}

static int hold_nothing(struct ksm_barrier *barrier KSM_UNUSED, char *at KSM_UNUSED, size_t pages KSM_UNUSED)
{
	return 0;
}

enum way {
	HELD,     /* the barrier keeps stores away */
	LOOSE,    /* the same without: a control */
	PARKED,   /* all threads are held */
	UNPARKED, /* the same without: a control */
};

/* What giving back does, with everybody running. */
static void give_back_unparked(struct ksm_region *region, ksm_pageno page)
{
	char bytes[KSM_PAGE_SIZE], *at = ksm_region_page(region, page);
	memcpy(bytes, at, KSM_PAGE_SIZE);
	CHECK_EQ(ksm_os_map_anon(at, KSM_PAGE_SIZE, true, false, NULL), 0);
	memcpy(at, bytes, KSM_PAGE_SIZE);
	ksm_region_forget(region, page, 1);
}

static uint64_t way_back(struct ksm_member *a, struct ksm_region *region, ksm_pageno page, enum way way)
{
	struct ksm_barrier *barrier = &a->scanner.barrier;
	struct ksm_restore_counts counts = {0};
	char buffer[KSM_PAGE_SIZE];
	bool worn = true;
	uint64_t given = 0;
	int r = 0;
	if (way == UNPARKED) {
		give_back_unparked(region, page);
		return 1;
	}
	if (way == PARKED) {
		char *at = ksm_region_page(region, page);
		bool rests = ksm_must_rest(region, barrier) && ksm_region_frame(region, page) != KSM_NO_FRAME;
		if (rests)
			CHECK_EQ(barrier->ops->hold(barrier, at, 1), 0);
		r = ksm_give_back(region, barrier, &a->scanner.park, page, 1, &worn, buffer, &given);
		CHECK(!r || r == KSM_EUNSTOPPABLE); /* a busy machine */
		if (rests)
			CHECK_EQ(barrier->ops->release(barrier, at, 1), 0);
		return given;
	}
	struct ksm_barrier_ops lax = *barrier->ops;
	lax.hold = lax.release = hold_nothing;
	const struct ksm_barrier_ops *ops = barrier->ops;
	if (way == LOOSE)
		barrier->ops = &lax;
	CHECK_EQ(ksm_restore(region, barrier, NULL, page, 1, KSM_RESTORE_ALWAYS, &counts), 0);
	barrier->ops = ops;
	return counts.restored;
}

/* Page `page` onto a frame, as it is: a window, the bytes written, mapped. */
static void put_onto_frame(struct ksm_member *a, struct ksm_region *region, ksm_pageno page)
{
	struct ksm_barrier *barrier = &a->scanner.barrier;
	ksm_frameno frame;
	if (ksm_region_frame(region, page) != KSM_NO_FRAME ||
	    ksm_window_open(barrier, ksm_region_page(region, page), 1))
		return;
	CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
	CHECK_EQ(ksm_frame_write(&a->peer, frame, 1, barrier->view), 0);
	ksm_frame_publish(&a->peer, frame, 1);
	CHECK_EQ(ksm_window_map(barrier, 0, 1, a->peer.fds.store, (uint64_t)frame << KSM_PAGE_SHIFT, true), 0);
	CHECK_EQ(ksm_window_close(barrier), 0);
	if (ksm_region_state(region, page) != KSM_PAGE_UNKNOWN)
		ksm_region_unknow(region, page);
	ksm_region_move(region, page, KSM_PAGE_SEEN, 1);
	ksm_region_move(region, page, KSM_PAGE_MERGED, frame);
}

/* Merge and restore over and over under a crowd. Returns what was lost. */
static size_t lost_under_way_back(enum way way, double seconds)
{
	enum {
		FIELD = 256
	};
	static const char *const names[] = {"held", "loose", "parked", "unparked"};
	struct ksm_member *a = members_join(names[way]);
	char *field = kit_map_filled(FIELD, 1), *twin = kit_map_filled(FIELD, 1);
	struct crowd crowd;
	uint64_t restored = 0;
	for (size_t i = 0; i < FIELD; i++)
		memset(kit_page(twin, i), 0, 2 * 8);
	struct ksm_region *r1 = members_region(a, field, FIELD), *r2 = members_region(a, twin, FIELD);
	members_merge(a);                      /* the frames are there from now on */
	ksm_tracker_fini(&a->scanner.tracker); /* windows are opened by hand */
	crowd_start(&crowd, field, FIELD, 2, 0);
	uint64_t least = way == PARKED ? 20 : FIELD;
	for (double start = harness_now(); kit_goes_on(start, seconds, restored >= least);) {
		for (size_t page = 0; page < FIELD; page++) {
			ksm_merge_lock(&a->peer);
			put_onto_frame(a, r1, page);
			restored += way_back(a, r1, page, way);
			ksm_merge_unlock(&a->peer);
		}
	}
	size_t lost = crowd_end(&crowd);
	crowd_check_rest(&crowd, 1);
	printf("%s: %llu pages made private again, %zu words lost\n", names[way], (unsigned long long)restored, lost);
	CHECK_GE(restored, least);
	members_unmap(a, r1);
	members_unmap(a, r2);
	CHECK_GE(members_sweep(a), 0);
	CHECK_EQ(members_frames(a), 0);
	members_leave(a);
	munmap(field, FIELD * KSM_PAGE_SIZE);
	munmap(twin, FIELD * KSM_PAGE_SIZE);
	return lost;
}

/* The second way is the first one without its protection: the test can tell. */
static void loses_nothing(enum way way, enum way control)
{
	if (way == HELD ? !kit_can_move() : !kit_can_merge())
		return;
	size_t lost = 0;
	CHECK_EQ(lost_under_way_back(way, 1.5), 0);
	for (int round = 0; round < 20 && !lost; round++)
		lost += lost_under_way_back(control, 0.3);
	CHECK_GT(lost, 0);
}

TEST_LIMIT(writers_lose_nothing_and_would_without_holding, 60)
{
	loses_nothing(HELD, LOOSE);
}

TEST_LIMIT(writers_lose_nothing_and_would_without_parking, 60)
{
	loses_nothing(PARKED, UNPARKED);
}

TEST(a_restore_that_fails_leaves_all_valid)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	struct ksm_restore_counts counts = {0};
	if (!kit_can_move())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	kit_fill(kit_page(one, 3), 9000);
	ksm_os_fault_set(KSM_OS_REMAP, 1, 1, -ENOMEM);
	a->scanner.park.ready = false; /* one way is enough */
	CHECK_EQ(ksm_scan_restore(&a->scanner, r1, KSM_RESTORE_ALWAYS, NULL, &counts), -ENOMEM);
	ksm_os_fault_clear();
	CHECK_GT(counts.restored, 0);
	CHECK_LT(counts.restored, PAGES);
	CHECK(!kit_is_registered(one, PAGES));
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 3 ? 9000 : 1 + i));
	kit_fill(kit_page(one, PAGES - 1), 9001); /* nobody waits */
	uint64_t before = counts.restored;
	CHECK_EQ(ksm_scan_restore(&a->scanner, r1, KSM_RESTORE_ALWAYS, NULL, &counts), 0);
	CHECK_EQ(counts.restored, PAGES);
	CHECK_LT(before, counts.restored);
	CHECK(kit_is(kit_page(one, PAGES - 1), 9001));
	CHECK_EQ(members_sweep(a), 0);
	members_leave(a);
}

TEST(without_a_barrier_nothing_is_restored)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	struct ksm_restore_counts counts = {0};
	if (!kit_can_merge())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	const struct ksm_barrier_ops *ops = a->scanner.barrier.ops;
	a->scanner.barrier.ops = NULL;
	a->scanner.park.ready = false;
	CHECK_EQ(ksm_scan_restore(&a->scanner, r1, KSM_RESTORE_ALWAYS, NULL, &counts), -ENOSYS);
	kit_check_filled(one, PAGES, 1);
	CHECK_EQ(counts.restored, 0);
	a->scanner.park.ready = true; /* holding all threads is enough */
	kit_fill(one, 70);
	CHECK_EQ(restore(a, r1, KSM_RESTORE_PARKED).restored, PAGES);
	CHECK(kit_is(one, 70));
	kit_check_filled(kit_page(one, 1), PAGES - 1, 2);
	a->scanner.barrier.ops = ops;
	CHECK_EQ(restore(a, r2, KSM_RESTORE_PARKED).restored, PAGES);
	kit_check_filled(two, PAGES, 1);
	members_leave(a);
}

/* ---- broken pages are given back by the scan -------------------------------------------------------------------------------- */

#define THIRD 100

/* Two thirds that nobody else has, and one in the middle that is merged. */
static struct ksm_member *sandwich(enum ksm_barrier_kind kind, char **at, struct ksm_region **region)
{
	struct ksm_member *a = members_join_with("d", kind);
	char *twin = kit_map_filled(THIRD, 1 + THIRD);
	*at = kit_map_filled(3 * THIRD, 1);
	*region = members_region(a, *at, 3 * THIRD);
	members_region(a, twin, THIRD);
	CHECK_EQ(members_merge(a), 2 * THIRD);
	return a;
}

static size_t mappings(const char *at)
{
	return kit_smaps(at, 3 * THIRD * KSM_PAGE_SIZE, NULL, NULL);
}

static void give_back_and_join(enum ksm_barrier_kind kind)
{
	struct ksm_region *region;
	char *at;
	struct ksm_member *a = sandwich(kind, &at, &region);
	CHECK_EQ(mappings(at), 3);
	uint64_t frames = members_frames(a);
	for (size_t i = THIRD; i < 2 * THIRD; i++)
		kit_fill(kit_page(at, i), 5000 + i);
	CHECK_EQ(mappings(at), 3);
	members_pass(a);
	CHECK_EQ(region->states[KSM_PAGE_BROKEN], THIRD); /* since when is not known: not yet */
	CHECK_EQ(members_counter(a, KSM_GIVE_BACKS), 0);
	KIT_WAIT(20, (members_pass(a), members_counter(a, KSM_GIVE_BACKS) == THIRD));
	CHECK_EQ(region->states[KSM_PAGE_BROKEN], 0);
	members_pass(a); /* which watches what is new, as the rest is */
	printf("%zu mappings are left\n", mappings(at));
	if (kind == KSM_BARRIER_MOVE)
		CHECK_LE(mappings(at), 5); /* moved there in one step, three pieces that join nobody */
	else
		CHECK_EQ(mappings(at), 1);
	CHECK_LE(members_counter(a, KSM_VMAS_USED), 2);
	kit_check_filled(at, THIRD, 1);
	kit_check_filled(kit_page(at, THIRD), THIRD, 5000 + THIRD);
	kit_check_filled(kit_page(at, 2 * THIRD), THIRD, 1 + 2 * THIRD);
	CHECK_EQ(kit_smaps_bytes(at, 3 * THIRD, "Anonymous"), 3 * THIRD * KSM_PAGE_SIZE);
	CHECK_EQ(members_sweep(a), 0); /* the twin has them */
	CHECK_EQ(members_frames(a), frames);
	members_unmap(a, a->scanner.regions == region ? region->next : a->scanner.regions);
	CHECK_EQ(members_sweep(a), THIRD);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	char *again = kit_map_filled(THIRD, 5000 + THIRD); /* ordinary pages: they can merge again */
	members_region(a, again, THIRD);
	CHECK_EQ(members_merge(a), 2 * THIRD);
	kit_check_filled(kit_page(at, THIRD), THIRD, 5000 + THIRD);
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	members_leave(a);
}

TEST_LIMIT(broken_pages_become_ordinary_ones_again, 60)
{
	members_on_each_barrier(give_back_and_join);
}

TEST_LIMIT(nothing_is_given_back_while_a_ring_exists, 30)
{
	struct io_uring_params params = {0};
	struct ksm_region *region;
	char *at;
	if (!kit_can_move())
		return;
	struct ksm_member *a = sandwich(KSM_BARRIER_MOVE, &at, &region);
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0) {
		printf("no io_uring here: %s\n", strerror(errno));
		return;
	}
	kit_fill(kit_page(at, THIRD + 5), 7000);
	members_begin(NULL); /* the scanner's own table does not count: somebody else has the descriptor */
	struct ksm_merge_counts counts = members_pass(a);
	for (int i = 0; i < 5; i++) {
		counts = members_pass(a);
		CHECK_EQ(counts.why_not, KSM_EDEVICES);
	}
	if (!strstr(a->scanner.park.reason, "io_uring"))
		FAIL("the reason is \"%s\"", a->scanner.park.reason);
	CHECK_EQ(region->states[KSM_PAGE_BROKEN], 1);
	CHECK_EQ(a->scanner.park.stops, 0);
	CHECK(kit_is(kit_page(at, THIRD + 5), 7000));
	CHECK_EQ(restore(a, region, KSM_RESTORE_PARKED).broken, 1); /* nor by name */
	CHECK_EQ(region->states[KSM_PAGE_BROKEN], 1);
	close(ring);
	KIT_WAIT(20, (members_pass(a), region->states[KSM_PAGE_BROKEN] == 0));
	CHECK(kit_is(kit_page(at, THIRD + 5), 7000));
	members_end();
	members_leave(a);
}

TEST(giving_back_that_fails_leaves_all_valid)
{
	static const enum ksm_os_call calls[] = {KSM_OS_MAP_ANON, KSM_OS_THREAD_SIGNAL, KSM_OS_LIST};
	struct ksm_region *region;
	char *at;
	if (!kit_can_move())
		return;
	struct ksm_member *a = sandwich(KSM_BARRIER_MOVE, &at, &region);
	kit_fill(kit_page(at, THIRD + 5), 7000);
	kit_fill(kit_page(at, THIRD + 9), 7001);
	members_pass(a);
	members_begin(NULL); /* somebody to be held */
	for (size_t i = 0; i < KSM_COUNT(calls); i++) {
		ksm_os_fault_set(calls[i], 0, UINT32_MAX, -ENOMEM);
		a->scanner.park.retry_at_ns = 0;
		int why_not = members_pass(a).why_not;
		ksm_os_fault_clear();
		if (!why_not)
			FAIL("with %s failing nobody says why", ksm_os_call_name(calls[i]));
		CHECK_EQ(region->states[KSM_PAGE_BROKEN], 2);
		CHECK(kit_is(kit_page(at, THIRD + 5), 7000));
		CHECK(kit_is(kit_page(at, THIRD + 9), 7001));
	}
	members_end();
	KIT_WAIT(20, (members_pass(a), region->states[KSM_PAGE_BROKEN] == 0));
	CHECK(kit_is(kit_page(at, THIRD + 5), 7000));
	CHECK(kit_is(kit_page(at, THIRD + 9), 7001));
	members_leave(a);
}
