/* SPDX-License-Identifier: MIT */
/* What a look at pages finds: breaks, also where there is no pagemap, and which pages are left alone. */
#include "crowd.h"
#include "members.h"

#define PAGES 100

static struct ksm_member *merged(enum ksm_barrier_kind kind, char **one, char **two, struct ksm_region **region)
{
	struct ksm_member *a = members_join_with("d", kind);
	*one = kit_map_filled(PAGES, 1);
	*two = kit_map_filled(PAGES, 1);
	*region = members_region(a, *one, PAGES);
	members_region(a, *two, PAGES);
	CHECK_EQ(members_merge(a), 2 * PAGES);
	return a;
}

/* ---- broken pages, and who is left alone ------------------------------------------------------------------------------------ */

static void rests_a_pass(enum ksm_barrier_kind kind)
{
	struct ksm_region *region;
	char *one, *two;
	struct ksm_member *a = merged(kind, &one, &two, &region);
	kit_fill(kit_page(one, 7), 500);
	members_pass(a);
	CHECK_EQ(ksm_region_state(region, 7), KSM_PAGE_BROKEN);
	kit_fill(kit_page(one, 8), 501); /* written since: one later */
	KIT_WAIT(20, (members_pass(a), ksm_region_state(region, 7) != KSM_PAGE_BROKEN));
	CHECK_EQ(ksm_region_state(region, 8), KSM_PAGE_BROKEN);
	KIT_WAIT(20, (members_pass(a), ksm_region_state(region, 8) != KSM_PAGE_BROKEN));
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 7 ? 500 : i == 8 ? 501 : 1 + i));
	CHECK_EQ(members_counter(a, KSM_COW_BREAKS), 2);
	members_leave(a);
}

TEST(broken_pages_rest_for_a_pass)
{
	members_on_each_barrier(rests_a_pass);
}

static void held_for_writing(enum ksm_barrier_kind kind)
{
	struct ksm_region *region;
	char *one, *two;
	struct ksm_member *a = merged(kind, &one, &two, &region);
	struct ksm_hold hold = {.first = 10, .count = 10};
	kit_fill(kit_page(one, 15), 900);
	members_pass(a);
	CHECK_EQ(ksm_region_state(region, 15), KSM_PAGE_BROKEN);
	region->holds = &hold;
	for (int i = 0; i < 3; i++)
		members_pass(a);
	CHECK_EQ(ksm_region_state(region, 15), KSM_PAGE_BROKEN); /* a call may be writing it */
	region->holds = NULL;
	KIT_WAIT(20, (members_pass(a), ksm_region_state(region, 15) != KSM_PAGE_BROKEN));
	region->holds = &hold;
	kit_fill(kit_page(one, 15), 16); /* as its twin: private, and to stay so */
	for (int i = 0; i < 3; i++)
		members_pass(a);
	CHECK_EQ(kit_is_file(kit_page(one, 15)), 0);
	region->holds = NULL;
	members_merge(a);
	CHECK_EQ(kit_is_file(kit_page(one, 15)), 1);
	CHECK(kit_is(kit_page(one, 15), 16));
	members_leave(a);
}

TEST(pages_held_for_writing_are_left_alone)
{
	members_on_each_barrier(held_for_writing);
}

TEST(swapped_out_pages_are_left_alone)
{
	struct ksm_region *region;
	char *one, *two, text[512] = "";
	int swaps = open("/proc/swaps", O_RDONLY | O_CLOEXEC),
	    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint16_t kind = 0;
	if (!kit_can_merge())
		return;
	CHECK_GE(read(swaps, text, sizeof(text) - 1), 0);
	if (!strchr(text, '/')) {
		printf("there is no swap here\n");
		return;
	}
	struct ksm_member *a = merged(KSM_BARRIER_MOVE, &one, &two, &region);
	kit_fill(kit_page(one, 7), 500);
	members_pass(a);
	madvise(kit_page(one, 7), KSM_PAGE_SIZE, 21); /* MADV_PAGEOUT */
	CHECK_EQ(ksm_os_pagemap(pagemap, kit_page(one, 7), 1, &kind), 0);
	if (!(kind & KSM_PAGE_SWAPPED)) {
		printf("the kernel keeps the page\n");
		return;
	}
	for (int i = 0; i < 3; i++)
		members_pass(a);
	CHECK_EQ(ksm_region_state(region, 7), KSM_PAGE_BROKEN);
	CHECK(kit_is(kit_page(one, 7), 500)); /* read in again */
	KIT_WAIT(20, (members_pass(a), ksm_region_state(region, 7) != KSM_PAGE_BROKEN));
	members_leave(a);
}

/* ---- no pagemap ---------------------------------------------------------------------------------------------------------------- */

static void make_blind(struct ksm_member *member)
{
	ksm_os_close(member->peer.fds.pagemap);
	member->peer.fds.pagemap = -1;
}

static void blind(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	make_blind(a);
	struct ksm_region *r1 = members_region(a, one, PAGES), *r2 = members_region(a, two, PAGES);
	memset(kit_page(one, 90), 0, 10 * KSM_PAGE_SIZE);
	memset(kit_page(two, 90), 0, 10 * KSM_PAGE_SIZE);
	CHECK_EQ(members_merge(a), 2 * 90);
	CHECK_EQ(r1->states[KSM_PAGE_MERGED] + r2->states[KSM_PAGE_MERGED], 2 * 90);
	CHECK_EQ(r1->states[KSM_PAGE_DROPPED], 10);
	kit_check_filled(one, 90, 1);
	for (size_t i = 90; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), 0)); /* read: the kernel's page of zeros */
	kit_fill(kit_page(one, 20), 500);
	kit_fill(kit_page(one, 30), 31); /* the bytes that were there: nothing to see */
	kit_fill(kit_page(one, 95), 501);
	members_pass(a);
	CHECK_NE(ksm_region_state(r1, 20), KSM_PAGE_MERGED);
	CHECK_EQ(members_counter(a, KSM_COW_BREAKS), 1);
	CHECK_EQ(ksm_region_state(r1, 30), KSM_PAGE_MERGED);
	CHECK_EQ(r1->states[KSM_PAGE_DROPPED], 9);
	KIT_WAIT(20, (members_pass(a), r1->states[KSM_PAGE_BROKEN] == 0));
	CHECK_EQ(members_counter(a, KSM_GIVE_BACKS), 1);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 20 ? 500 : i == 95 ? 501 : i < 90 ? 1 + i : 0));
	kit_check_filled(two, 90, 1);
	/* Back again, in the way that needs no look at pages. */
	kit_fill(kit_page(one, 40), 600);
	struct ksm_restore_counts counts = {0};
	for (int attempt = 0; attempt < 50 && r1->states[KSM_PAGE_MERGED] + r1->states[KSM_PAGE_BROKEN]; attempt++) {
		ksm_scan_restore(&a->scanner, r1, KSM_RESTORE_PARKED, NULL, &counts);
		kit_sleep_ms(20);
	}
	CHECK_EQ(r1->states[KSM_PAGE_MERGED] + r1->states[KSM_PAGE_BROKEN], 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 20 ? 500 : i == 95 ? 501 : i == 40 ? 600 : i < 90 ? 1 + i : 0));
	members_unmap(a, r1);
	members_unmap(a, r2);
	CHECK_GT(members_sweep(a), 0);
	CHECK_EQ(members_frames(a), 0);
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	members_leave(a);
}

TEST_LIMIT(without_a_pagemap_breaks_are_found_by_comparing, 60)
{
	members_on_each_barrier(blind);
}

static void blind_under_a_crowd(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	char *field = kit_map_filled(PAGES, 1), *twin = kit_map_filled(PAGES, 1);
	struct crowd crowd;
	for (size_t i = 0; i < PAGES; i++)
		memset(kit_page(twin, i), 0, 3 * 8);
	make_blind(a);
	struct ksm_region *r1 = members_region(a, field, PAGES), *r2 = members_region(a, twin, PAGES);
	members_merge(a);
	crowd_start(&crowd, field, PAGES, 3, 2000);
	crowd.may_refuse = kind == KSM_BARRIER_SEGV;
	uint64_t merges = members_counter(a, KSM_MERGES);
	for (double until = harness_now() + 1.5; harness_now() < until;) {
		members_pass(a);
		struct ksm_restore_counts counts = {0};
		int r = ksm_scan_restore(&a->scanner, r2, KSM_RESTORE_PARKED, NULL, &counts);
		CHECK(!r || r == KSM_EUNSTOPPABLE);
	}
	CHECK_EQ(crowd_end(&crowd), 0);
	crowd_check_rest(&crowd, 1);
	printf("%llu merges, %llu given back\n", (unsigned long long)(members_counter(a, KSM_MERGES) - merges),
	       (unsigned long long)members_counter(a, KSM_GIVE_BACKS));
	members_unmap(a, r1);
	members_unmap(a, r2);
	CHECK_GE(members_sweep(a), 0);
	CHECK_EQ(members_frames(a), 0);
	members_leave(a);
}

TEST_LIMIT(without_a_pagemap_nothing_is_lost, 60)
{
	members_on_each_barrier(blind_under_a_crowd);
}

/* In the background, too, but now and then only: looking costs a comparison. */
TEST(without_a_pagemap_the_background_compares_now_and_then)
{
	if (!kit_can_move())
		return;
	struct ksm_region *region;
	char *one, *two;
	struct ksm_member *a = merged(KSM_BARRIER_MOVE, &one, &two, &region);
	make_blind(a);
	uint64_t passes = 0;
	for (int round = 0; round < 3; round++) {
		kit_fill(kit_page(one, 10 + (size_t)round), 600 + (uint64_t)round);
		uint64_t before = a->scanner.merger.passes, breaks = members_counter(a, KSM_COW_BREAKS);
		while (members_counter(a, KSM_COW_BREAKS) == breaks) {
			ksm_scan_batch(&a->scanner, 100000, 100000, NULL);
			CHECK_LT(a->scanner.merger.passes, before + 40);
		}
		passes += a->scanner.merger.passes - before;
	}
	CHECK_GT(passes, 8);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i >= 10 && i < 13 ? 590 + i : 1 + i));
	members_leave(a);
}

/* ---- a process that changed its user --------------------------------------------------------------------------------------------- */

static struct ksm_member *join_as_nobody(const char *path)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_member *member = NULL;
	options.path = path;
	CHECK_EQ(members_try_join(&options, &member), 0);
	return member;
}

TEST(who_is_not_dumpable_merges_finds_breaks_and_gives_back)
{
	if (!kit_is_root())
		return;
	uint32_t *steps = kit_steps();
	const char *path = kit_directory_of(KIT_NOBODY);
	pid_t giver = kit_fork();
	if (giver == 0) {
		kit_become_nobody();
		struct ksm_member *a = join_as_nobody(path);
		members_region(a, kit_map_filled(PAGES, 1), PAGES);
		members_region(a, kit_map_filled(PAGES, 1), PAGES);
		CHECK_EQ(members_merge(a), 2 * PAGES);
		kit_reach(steps, 1);
		members_begin(NULL);
		for (;;)
			pause();
	}
	kit_await(steps, 1);
	pid_t taker = kit_fork();
	if (taker == 0) {
		kit_become_nobody();
		CHECK_EQ(open("/proc/self/pagemap", O_RDONLY), -1);
		struct ksm_member *a = join_as_nobody(path);
		CHECK_LT(a->peer.fds.pagemap, 0);
		printf("not dumpable: barrier %d (%s), threads can%s be held (%s)\n", a->peer.self->barrier,
		       a->scanner.barrier.ops ? a->scanner.barrier.ops->name : ksm_error_name(a->scanner.barrier.error),
		       a->scanner.park.ready ? "" : "not", ksm_error_name(a->scanner.park.why));
		char *one = kit_map_filled(PAGES, 1), *own = kit_map_filled(PAGES, 5000);
		struct ksm_region *region = members_region(a, one, PAGES);
		members_region(a, own, PAGES);
		members_region(a, kit_map_filled(PAGES, 5000), PAGES);
		CHECK(a->scanner.barrier.ops);
		CHECK_EQ(members_merge(a), 3 * PAGES);
		CHECK_EQ(members_counter(a, KSM_PROMOTIONS), PAGES); /* its own; the others were there */
		CHECK_EQ(members_pass(a).why_not, 0);
		CHECK_EQ(region->states[KSM_PAGE_MERGED], PAGES);
		kit_check_filled(one, PAGES, 1);
		kit_fill(kit_page(one, 3), 700);
		members_pass(a);
		CHECK_EQ(members_counter(a, KSM_COW_BREAKS), 1);
		KIT_WAIT(20, (members_pass(a), region->states[KSM_PAGE_BROKEN] == 0));
		for (size_t i = 0; i < PAGES; i++)
			CHECK(kit_is(kit_page(one, i), i == 3 ? 700 : 1 + i));
		kit_check_filled(own, PAGES, 5000);
		members_leave(a);
		fflush(NULL);
		_exit(0);
	}
	CHECK_CHILD(taker);
	kit_kill(giver);
}

/* ---- refused, and had after all ------------------------------------------------------------------------------------------- */

/* Pins end, and nothing tells: what both sides were refused once must not stay apart for ever. */
static struct ksm_member *refused(struct ksm_region **region)
{
	struct ksm_merge_counts counts = {0};
	uint64_t passes;
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_MOVE);
	*region = members_region(a, kit_map_filled(PAGES, 1), PAGES);
	members_region(a, kit_map_filled(PAGES, 1), PAGES);
	ksm_os_fault_set(KSM_OS_UFFD_MOVE, 0, UINT32_MAX, -EBUSY);
	CHECK_EQ(ksm_scan_exhaust(&a->scanner, NULL, NULL, &counts, &passes), 0);
	CHECK_EQ(counts.merged, 0);
	CHECK_EQ((*region)->states[KSM_PAGE_REFUSED], PAGES);
	ksm_os_fault_clear();
	return a;
}

TEST(a_scan_tries_refused_pages_again)
{
	struct ksm_merge_counts counts = {0};
	struct ksm_region *region;
	uint64_t passes;
	if (!kit_can_move())
		return;
	struct ksm_member *a = refused(&region);
	CHECK_EQ(ksm_scan_exhaust(&a->scanner, NULL, NULL, &counts, &passes), 0);
	CHECK_EQ(counts.merged, 2 * PAGES);
	CHECK_EQ(kit_is_file(ksm_region_page(region, 3)), 1);
	members_leave(a);
}

TEST(the_background_tries_refused_pages_now_and_then)
{
	struct ksm_region *region;
	if (!kit_can_move())
		return;
	struct ksm_member *a = refused(&region);
	for (int batch = 0; batch < 400 && region->states[KSM_PAGE_MERGED] < PAGES; batch++)
		ksm_scan_batch(&a->scanner, 1000, 1000, NULL);
	CHECK_EQ(region->states[KSM_PAGE_MERGED], PAGES);
	CHECK_EQ(kit_is_file(ksm_region_page(region, 3)), 1);
	members_leave(a);
}
