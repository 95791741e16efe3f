/* SPDX-License-Identifier: MIT */
/* From frames back to private memory, under a running program; RESTORE-1 and 2. */
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

static struct ksm_restore_counts restore(struct ksm_member *a, struct ksm_region *region, bool broken_too)
{
	struct ksm_restore_counts counts = {0};
	CHECK_EQ(ksm_scan_restore(&a->scanner, region, broken_too, NULL, &counts), 0);
	return counts;
}

TEST(everything_is_private_again)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	if (!kit_can_merge())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	CHECK_EQ(restore(a, r1, false).restored, PAGES); /* never touched since they were merged */
	kit_check_filled(one, PAGES, 1);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Anonymous"), PAGES * KSM_PAGE_SIZE);
	CHECK_LE(kit_smaps(one, PAGES * KSM_PAGE_SIZE, NULL, NULL), PAGES / 512 + 1);
	CHECK(!kit_is_registered(one, PAGES));
	CHECK_EQ(r1->states[KSM_PAGE_MERGED] + r1->states[KSM_PAGE_BROKEN], 0);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), PAGES);
	CHECK_EQ(members_sweep(a), 0);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(restore(a, r2, false).restored, PAGES); /* all of it read before */
	CHECK_EQ(members_counter(a, KSM_VMAS_USED), 0);
	CHECK_EQ(members_sweep(a), PAGES);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	kit_check_filled(one, PAGES, 1);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(members_merge(a), 2 * PAGES); /* and back */
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	members_leave(a);
}

TEST(broken_pages_stay_unless_asked_for)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	if (!kit_can_merge())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	for (size_t i = 0; i < PAGES; i += 3)
		kit_fill(kit_page(one, i), 5000 + i);
	size_t broken = (PAGES + 2) / 3;
	struct ksm_restore_counts counts = restore(a, r1, false);
	CHECK_EQ(counts.restored, PAGES - broken);
	CHECK_EQ(counts.broken, broken);
	CHECK_EQ(r1->states[KSM_PAGE_BROKEN], broken);
	CHECK_EQ(members_counter(a, KSM_COW_BREAKS), broken);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i % 3 ? 1 + i : 5000 + i));
	counts = restore(a, r1, true);
	CHECK_EQ(counts.restored, broken);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i % 3 ? 1 + i : 5000 + i));
	CHECK_EQ(r1->states[KSM_PAGE_BROKEN], 0);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Anonymous"), PAGES * KSM_PAGE_SIZE);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(members_sweep(a), 0);
	members_leave(a);
}

/* ---- while threads write ------------------------------------------------------------------------------------------------ */

static int hold_nothing(struct ksm_barrier *barrier KSM_UNUSED, char *at KSM_UNUSED, size_t pages KSM_UNUSED)
{
	return 0;
}

/* Merge and restore over and over under a crowd. Returns what was lost. */
static size_t lost_under_restores(bool hold, double seconds)
{
	enum {
		FIELD = 256
	};
	struct ksm_member *a = members_join(hold ? "held" : "loose");
	struct ksm_barrier_ops lax = *a->scanner.barrier.ops;
	char *field = kit_map_filled(FIELD, 1), *twin = kit_map_filled(FIELD, 1);
	struct crowd crowd;
	uint64_t restored = 0;
	for (size_t i = 0; i < FIELD; i++)
		memset(kit_page(twin, i), 0, 2 * 8);
	struct ksm_region *r1 = members_region(a, field, FIELD), *r2 = members_region(a, twin, FIELD);
	members_merge(a); /* the frames are there from now on */
	crowd_start(&crowd, field, FIELD, 2, 0);
	for (double until = harness_now() + seconds; harness_now() < until;) {
		/* The crowd's pages go onto frames as they are: a window, the bytes written, mapped. */
		for (size_t page = 0; page < FIELD; page++) {
			ksm_frameno frame;
			ksm_merge_lock(&a->peer);
			if (ksm_region_frame(r1, page) == KSM_NO_FRAME &&
			    !ksm_window_open(&a->scanner.barrier, kit_page(field, page), 1)) {
				CHECK_EQ(ksm_frame_alloc(&a->peer, KSM_NO_FRAME, &frame), 0);
				CHECK_EQ(ksm_frame_write(&a->peer, frame, 1, a->scanner.barrier.view), 0);
				ksm_frame_publish(&a->peer, frame, 1);
				CHECK_EQ(ksm_window_map(&a->scanner.barrier, 0, 1, a->peer.fds.store,
							(uint64_t)frame << KSM_PAGE_SHIFT),
					 0);
				CHECK_EQ(ksm_window_close(&a->scanner.barrier), 0);
				if (ksm_region_state(r1, page) != KSM_PAGE_UNKNOWN)
					ksm_region_unknow(r1, page);
				ksm_region_move(r1, page, KSM_PAGE_SEEN, 1);
				ksm_region_move(r1, page, KSM_PAGE_MERGED, frame);
			}
			struct ksm_restore_counts counts = {0};
			if (!hold)
				lax.hold = lax.release = hold_nothing;
			a->scanner.barrier.ops = &lax;
			CHECK_EQ(ksm_restore(r1, &a->scanner.barrier, page, 1, true, &counts), 0);
			a->scanner.barrier.ops = ksm_barriers[0];
			restored += counts.restored;
			ksm_merge_unlock(&a->peer);
		}
	}
	size_t lost = crowd_end(&crowd);
	crowd_check_rest(&crowd, 1);
	CHECK_GT(restored, FIELD);
	members_unmap(a, r1);
	members_unmap(a, r2);
	CHECK_GE(members_sweep(a), 0);
	CHECK_EQ(members_frames(a), 0);
	members_leave(a);
	munmap(field, FIELD * KSM_PAGE_SIZE);
	munmap(twin, FIELD * KSM_PAGE_SIZE);
	return lost;
}

TEST_LIMIT(writers_lose_nothing_and_would_without_holding, 40)
{
	if (!kit_can_merge())
		return;
	CHECK_EQ(lost_under_restores(true, 1.5), 0);
	size_t lost = 0;
	for (int round = 0; round < 20 && !lost; round++)
		lost += lost_under_restores(false, 0.3);
	CHECK_GT(lost, 0); /* the test can tell */
}

TEST(a_restore_that_fails_leaves_all_valid)
{
	char *one, *two;
	struct ksm_region *r1, *r2;
	struct ksm_restore_counts counts = {0};
	if (!kit_can_merge())
		return;
	struct ksm_member *a = merged(&one, &two, &r1, &r2);
	kit_fill(kit_page(one, 3), 9000);
	ksm_os_fault_set(KSM_OS_REMAP, 1, 1, -ENOMEM);
	CHECK_EQ(ksm_scan_restore(&a->scanner, r1, true, NULL, &counts), -ENOMEM);
	ksm_os_fault_clear();
	CHECK_GT(counts.restored, 0);
	CHECK_LT(counts.restored, PAGES);
	CHECK(!kit_is_registered(one, PAGES));
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 3 ? 9000 : 1 + i));
	kit_fill(kit_page(one, PAGES - 1), 9001); /* nobody waits */
	uint64_t before = counts.restored;
	CHECK_EQ(ksm_scan_restore(&a->scanner, r1, true, NULL, &counts), 0);
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
	CHECK_EQ(ksm_scan_restore(&a->scanner, r1, true, NULL, &counts), -ENOSYS);
	a->scanner.barrier.ops = ops;
	kit_check_filled(one, PAGES, 1);
	CHECK_EQ(restore(a, r1, true).restored, PAGES);
	members_leave(a);
}
