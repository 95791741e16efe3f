/* SPDX-License-Identifier: MIT */
/* A promoted page's twin in the same process merges at once, from the bytes at hand: TWIN-1, TWIN-2. */
#include "members.h"

#define PAGES 200 /* some stretches, and a part of one */
#define OWN 40    /* pages before them in the first area, which are like no others */

struct field {
	struct ksm_member *member;
	struct ksm_region *first, *second;
	char *one, *two;
};

static uint64_t merged_in(const struct ksm_region *region)
{
	return region->states[KSM_PAGE_MERGED];
}

/* Two areas that hold the same, after some pages that only one of them has: OWN in the first, `lead` in the second. */
static struct field field_of(enum ksm_barrier_kind kind, size_t lead)
{
	struct field f = {.member = members_join_with("d", kind)};
	char *at = kit_map(4 * PAGES + lead), *second = kit_page(at, 2 * PAGES);
	f.one = kit_page(at, OWN);
	f.two = kit_page(second, lead);
	for (size_t i = 0; i < OWN; i++)
		kit_fill(kit_page(at, i), 4000 + i);
	for (size_t i = 0; i < lead; i++)
		kit_fill(kit_page(second, i), 5000 + i);
	for (size_t i = 0; i < PAGES; i++) {
		kit_fill(kit_page(f.one, i), 1 + i);
		kit_fill(kit_page(f.two, i), 1 + i);
	}
	f.first = members_region(f.member, at, OWN + PAGES);
	f.second = members_region(f.member, second, lead + PAGES);
	return f;
}

static void check(const struct field *f, size_t lead)
{
	kit_check_filled(f->one, PAGES, 1);
	kit_check_filled(f->two, PAGES, 1);
	CHECK_EQ(kit_smaps_bytes(f->one, PAGES, "Anonymous"), 0);
	CHECK_EQ(kit_blocks(f->member->peer.fds.store), PAGES * KSM_PAGE_SIZE);
	CHECK_EQ(members_counter(f->member, KSM_FRAMES_REFERRED), PAGES);
	CHECK_EQ(members_counter(f->member, KSM_FAILURES), 0);
	for (size_t i = 0; i < PAGES; i++) { /* what was taken meanwhile was put again */
		ksm_frameno frame = ksm_region_frame(f->first, OWN + i);
		CHECK_EQ(frame, ksm_region_frame(f->second, lead + i));
		CHECK_EQ(f->member->peer.counts[frame], 2);
	}
}

static void one_pass(enum ksm_barrier_kind kind)
{
	for (size_t lead = 0; lead < 100; lead += 33) { /* also across the stretches that notes are kept of */
		struct field f = field_of(kind, lead);
		members_know(f.member);
		if (kind == KSM_BARRIER_MOVE) /* nothing is read from the store; others read what threads are doing */
			ksm_os_fault_set(KSM_OS_PREAD, 0, UINT32_MAX, -EIO);
		struct ksm_merge_counts counts = members_pass(f.member);
		ksm_os_fault_clear();
		CHECK_EQ(counts.merged, 2 * PAGES);
		CHECK_EQ(counts.promoted, PAGES);
		check(&f, lead);
		CHECK_EQ(members_pass(f.member).merged, 0);
		check(&f, lead);
		members_leave(f.member);
	}
}

TEST(twins_merge_in_one_pass)
{
	members_on_each_barrier(one_pass);
}

/* The control: who has forgotten where they are needs another pass, and reads. */
static void forgotten(enum ksm_barrier_kind kind)
{
	struct field f = field_of(kind, 0);
	struct ksm_merger *merger = &f.member->scanner.merger;
	struct ksm_merge_counts counts = {0};
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	CHECK_EQ(f.first->states[KSM_PAGE_CANDIDATE], OWN + PAGES);
	memset(merger->hints, 0, sizeof(merger->hints));
	CHECK_EQ(members_pass(f.member).merged, PAGES);
	CHECK_EQ(merged_in(f.first), 0);
	ksm_os_fault_set(KSM_OS_PREAD, 0, UINT32_MAX, -EIO);
	CHECK_EQ(members_pass(f.member).merged, 0);
	ksm_os_fault_clear();
	CHECK_EQ(members_merge(f.member), PAGES);
	kit_check_filled(f.one, PAGES, 1);
	members_leave(f.member);
}

TEST(what_is_forgotten_merges_later)
{
	members_on_each_barrier(forgotten);
}

/* Some of the twins have been written since they were called candidates, or are about to be. */
static void written(enum ksm_barrier_kind kind)
{
	struct field f = field_of(kind, 0);
	struct ksm_merge_counts counts = {0};
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	for (size_t i = 0; i < PAGES; i += 10)
		kit_fill(kit_page(f.one, i), 9000 + i);
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.second, KSM_SCAN_ALL, NULL, &counts), 0);
	CHECK_EQ(merged_in(f.second), PAGES);
	CHECK_EQ(merged_in(f.first), 0); /* that was about the other one only */
	members_merge(f.member);
	CHECK_EQ(merged_in(f.first), PAGES - PAGES / 10);
	for (size_t i = 0; i < PAGES; i++) {
		CHECK(kit_is(kit_page(f.one, i), i % 10 ? 1 + i : 9000 + i));
		CHECK(kit_is(kit_page(f.two, i), 1 + i));
	}
	members_leave(f.member);
}

TEST(what_was_written_since_stays_as_it_is)
{
	members_on_each_barrier(written);
}

/* Under way: the frames are at hand, and both the page they were written for and its twin change. */
static void changing(enum ksm_barrier_kind kind)
{
	struct field f = field_of(kind, 0);
	struct ksm_merger *merger = &f.member->scanner.merger;
	struct ksm_merge_counts counts = {0};
	ksm_pageno first;
	size_t count;
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	ksm_merge_lock(&f.member->peer);
	ksm_merge_stretch(merger, f.second, 0, KSM_STRETCH, true, &counts);
	CHECK_EQ(merged_in(f.second), KSM_STRETCH);
	CHECK(ksm_merge_find_twins(merger, f.member->scanner.regions, &first, &count) == f.first);
	CHECK_EQ(first, OWN);
	CHECK_EQ(count, KSM_STRETCH);
	kit_fill(kit_page(f.two, 5), 7005);
	kit_fill(kit_page(f.one, 6), 7006);
	ksm_merge_twins(merger, f.first, first, count, true, &counts);
	ksm_merge_unlock(&f.member->peer);
	CHECK_EQ(merged_in(f.first), KSM_STRETCH - 1);
	for (size_t i = 0; i < KSM_STRETCH; i++) {
		CHECK(kit_is(kit_page(f.one, i), i == 6 ? 7006 : 1 + i));
		CHECK(kit_is(kit_page(f.two, i), i == 5 ? 7005 : 1 + i));
	}
	members_merge(f.member);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(f.member->peer.counts[ksm_region_frame(f.first, OWN + (i == 6 ? 7 : i))], i == 5 ? 1 : 2);
	members_leave(f.member);
}

TEST(both_may_change_under_way)
{
	members_on_each_barrier(changing);
}

/* What lies beside a twin and was written in this pass is not looked at twice in it, as if that were two passes. */
static void young(enum ksm_barrier_kind kind)
{
	struct field f = field_of(kind, 0);
	struct ksm_merger *merger = &f.member->scanner.merger;
	struct ksm_merge_counts counts = {0};
	ksm_pageno first, page = OWN + 7;
	size_t count;
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	kit_fill(kit_page(f.one, 7), 9007);
	ksm_merge_lock(&f.member->peer);
	ksm_dirty_update(f.first, 0, true);
	ksm_merge_stretch(merger, f.first, 0, KSM_STRETCH, false, &counts);
	CHECK_EQ(ksm_region_state(f.first, page), KSM_PAGE_SEEN);
	ksm_merge_stretch(merger, f.second, 0, KSM_STRETCH, true, &counts);
	CHECK(ksm_merge_find_twins(merger, f.member->scanner.regions, &first, &count) == f.first);
	uint64_t scanned = counts.scanned;
	ksm_merge_twins(merger, f.first, first, count, false, &counts);
	ksm_merge_unlock(&f.member->peer);
	CHECK_EQ(merged_in(f.first), KSM_STRETCH - 1);
	CHECK_EQ(ksm_region_state(f.first, page), KSM_PAGE_SEEN);
	CHECK_EQ(counts.scanned, scanned + KSM_STRETCH - 1);
	members_merge(f.member);
	CHECK(kit_is(kit_page(f.one, 7), 9007));
	members_leave(f.member);
}

TEST(what_is_young_beside_a_twin_stays_young)
{
	members_on_each_barrier(young);
}

/* What the background leaves alone is nobody's twin, and neither is what was unmerged by name. */
TEST(who_takes_no_part_is_left_alone)
{
	if (!kit_can_merge())
		return;
	struct field f = field_of(KSM_BARRIER_AUTO, 0);
	struct ksm_merge_counts counts = {0};
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	f.first->background = false;
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, NULL, KSM_SCAN_BACKGROUND, NULL, &counts), 0);
	CHECK_EQ(merged_in(f.second), PAGES);
	CHECK_EQ(merged_in(f.first), 0);
	members_leave(f.member);
	f = field_of(KSM_BARRIER_AUTO, 0);
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	f.first->excluded = true;
	members_merge(f.member);
	CHECK_EQ(merged_in(f.second), PAGES);
	CHECK_EQ(merged_in(f.first), 0);
	members_leave(f.member);
}

/* A hint may be about memory that is nobody's, or another region's by now. */
TEST(regions_may_be_gone)
{
	if (!kit_can_merge())
		return;
	struct field f = field_of(KSM_BARRIER_AUTO, 0);
	struct ksm_merge_counts counts = {0};
	CHECK_EQ(ksm_scan_pass(&f.member->scanner, f.first, KSM_SCAN_ALL, NULL, &counts), 0);
	members_unmap(f.member, f.first);
	f.first = members_region(f.member, f.one, PAGES / 2); /* somebody else's by now */
	members_merge(f.member);
	CHECK_EQ(merged_in(f.first), 0); /* it was mapped anew: zeros, and not there */
	CHECK(kit_is(kit_page(f.two, 3), 4));
	members_leave(f.member);
}

/* One region that holds everything twice, at a distance of less than a stretch. */
TEST(a_stretch_is_not_its_own_twin)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char *at = kit_map(80);
	for (size_t i = 0; i < 80; i++)
		kit_fill(kit_page(at, i), 1 + i % 40);
	struct ksm_region *region = members_region(a, at, 80);
	members_merge(a);
	CHECK_EQ(merged_in(region), 80);
	CHECK_EQ(members_frames(a), 40);
	for (size_t i = 0; i < 80; i++)
		CHECK(kit_is(kit_page(at, i), 1 + i % 40));
	members_leave(a);
}

/* All different: nothing merges, and nothing is looked at twice. */
TEST(without_twins_nothing_happens)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	members_region(a, kit_map_filled(PAGES, 1), PAGES);
	members_region(a, kit_map_filled(PAGES, 1 + PAGES), PAGES);
	struct ksm_merge_counts counts = members_pass(a);
	CHECK_EQ(counts.merged + counts.promoted, 0);
	CHECK_EQ(counts.scanned, 2 * PAGES);
	members_leave(a);
}
