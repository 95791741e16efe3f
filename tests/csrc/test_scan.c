/* SPDX-License-Identifier: MIT */
/* Passes: one may be made in the middle of another. */
#include "members.h"

#define PAGES 64

struct nesting {
	struct ksm_member *member;
	struct ksm_region *only;
	bool wanted;
	unsigned times;
};

/* What a scanner does for somebody who scans by name while somebody else settles. */
static int scan_by_name(void *context)
{
	struct nesting *nesting = context;
	struct ksm_merge_counts counts = {0};
	uint64_t passes;
	if (!nesting->wanted || nesting->times++)
		return 0;
	return ksm_scan_exhaust(&nesting->member->scanner, nesting->only, NULL, &counts, &passes);
}

static bool is_quiet(const struct ksm_peer *peer)
{
	return ksm_load_acquire(&peer->self->quiet_at) == ksm_load_seqcst(&peer->control->changes) &&
	       ksm_load_acquire(&peer->self->settled_seq) == ksm_load_seqcst(&peer->control->settle_seq);
}

/* Who settles is told so when all regions have been looked at, whatever was scanned by name meanwhile. */
static void settle(bool with_scans)
{
	struct ksm_member *a = members_join("d");
	char *at = kit_map_filled(2 * PAGES, 1);
	struct ksm_region *first = members_region(a, at, PAGES);
	members_merge(a);
	struct ksm_region *second = members_region(a, kit_page(at, PAGES), PAGES);
	kit_fill(kit_page(at, PAGES + 3), 777);
	kit_fill(kit_page(at, PAGES + 9), 777);
	kit_fill(kit_page(at, 1), 4444); /* something to look at in the first, and nothing to merge */
	ksm_add_seqcst(&a->peer.control->settle_seq, 1);
	struct nesting nesting = {a, first, with_scans, 0};
	struct ksm_scan_between hook = {scan_by_name, &nesting, NULL};
	for (int i = 0; i < 20 && !is_quiet(&a->peer); i++) {
		struct ksm_merge_counts counts = {0};
		nesting.times = 0;
		CHECK_EQ(ksm_scan_pass(&a->scanner, NULL, KSM_SCAN_ALL, &hook, &counts), 0);
	}
	CHECK(is_quiet(&a->peer));
	CHECK_EQ(ksm_region_state(second, 3), KSM_PAGE_MERGED);
	CHECK_EQ(ksm_region_state(second, 9), KSM_PAGE_MERGED);
	CHECK_EQ(nesting.times > 0, with_scans);
	members_leave(a);
}

TEST(a_settle_is_not_disturbed_by_scans_by_name)
{
	if (!kit_can_merge())
		return;
	settle(false);
	settle(true);
}

/* What a pass has noted to be given back, and a scan by name in its middle forgets, is not settled. */
TEST(what_a_scan_by_name_makes_a_pass_forget_is_not_settled)
{
	if (!kit_can_move() || kit_is_without("stop")) /* in which they are given back */
		return;
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_MOVE);
	char *at = kit_map_filled(2 * PAGES, 1);
	for (size_t i = 0; i < PAGES; i++)
		kit_fill(kit_page(at, i), 1000 + i / 2);
	struct ksm_region *worn = members_region(a, at, PAGES), *other = members_region(a, kit_page(at, PAGES), PAGES);
	CHECK_EQ(members_merge(a), PAGES);
	for (size_t i = 0; i < PAGES; i += 2)
		kit_fill(kit_page(at, i), 5000 + i);
	ksm_add_seqcst(&a->peer.control->settle_seq, 1);
	struct nesting nesting = {a, other, true, 0};
	struct ksm_scan_between hook = {scan_by_name, &nesting, NULL};
	for (int i = 0; i < 100 && !is_quiet(&a->peer); i++) {
		struct ksm_merge_counts counts = {0};
		nesting.times = i < 8 ? 0 : 1; /* for a while, right after the worn pages were noted */
		CHECK_EQ(ksm_scan_pass(&a->scanner, NULL, KSM_SCAN_ALL, &hook, &counts), 0);
	}
	CHECK(is_quiet(&a->peer));
	CHECK_EQ(worn->states[KSM_PAGE_BROKEN], 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(at, i), i % 2 ? 1000 + i / 2 : 5000 + i));
	members_leave(a);
}

/* Nor is the background's pass. */
TEST(a_batch_is_not_disturbed_by_scans_by_name)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char *at = kit_map_filled(2 * PAGES, 1);
	kit_fill(kit_page(at, PAGES + 3), 777);
	kit_fill(kit_page(at, PAGES + 9), 777);
	struct ksm_region *first = members_region(a, at, PAGES),
			  *second = members_region(a, kit_page(at, PAGES), PAGES);
	struct nesting nesting = {a, first, true, 0};
	struct ksm_scan_between hook = {scan_by_name, &nesting, NULL};
	for (int i = 0; i < 8; i++) {
		nesting.times = 0;
		CHECK(ksm_scan_batch(&a->scanner, 1000000, 1000000, &hook));
	}
	CHECK_GT(nesting.times, 0);
	CHECK_EQ(ksm_region_state(second, 3), KSM_PAGE_MERGED);
	CHECK_EQ(ksm_region_state(second, 9), KSM_PAGE_MERGED);
	members_leave(a);
}
