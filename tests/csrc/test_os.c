/* SPDX-License-Identifier: MIT */
/* Every system call of a merge, a restore and a sweep fails, one after the other; see faults.h. The way back out of a
 * window has its own walk in test_barrier_move.c. */
#include "faults.h"

TEST_LIMIT(merges_survive_every_failing_call, 120)
{
	static const struct work work = {
		.name = "merge", .run = world_merge, .judge = world_judge_merge, .check = world_check_merged};
	if (kit_can_merge())
		walk_all(&work, NULL);
}

/* A descriptor that will not let go is replaced; what if that fails as well? */
TEST_LIMIT(merges_survive_a_descriptor_lost, 60)
{
	static const struct work work = {.name = "merge with a new descriptor each time",
					 .run = world_merge,
					 .judge = world_judge_merge,
					 .check = world_check_merged,
					 .base = {{KSM_OS_UFFD_UNREGISTER, 2, FAULT_ALWAYS, -ENOMEM}}};
	if (kit_can_merge())
		walk_all(&work, NULL);
}

/* ---- restoring ------------------------------------------------------------------------------------------------------------ */

static void restore(struct world *w)
{
	struct ksm_restore_counts counts = {0};
	uint64_t failures = members_counter(w->member, KSM_FAILURES);
	w->result = 0;
	for (size_t i = 0; i < 2; i++) {
		int r = ksm_scan_restore(&w->member->scanner, w->regions[i], true, NULL, &counts);
		w->result = r ? r : w->result;
	}
	w->count = members_counter(w->member, KSM_FAILURES) - failures;
}

static uint64_t framed(struct world *w)
{
	uint64_t pages = 0;
	for (size_t i = 0; i < 2; i++)
		pages += w->regions[i]->states[KSM_PAGE_MERGED] + w->regions[i]->states[KSM_PAGE_BROKEN];
	return pages;
}

static void judge_restore(struct world *w)
{
	CHECK(!framed(w) || w->result < 0);
}

static void check_restored(struct world *w)
{
	CHECK_EQ(w->result, 0);
	CHECK_EQ(framed(w), 0);
	world_merge(w);
	world_check_merged(w);
	world_check_bytes(w);
}

TEST_LIMIT(restores_survive_every_failing_call, 120)
{
	static const struct work work = {.name = "restore",
					 .prepare = world_merge,
					 .run = restore,
					 .judge = judge_restore,
					 .check = check_restored};
	if (kit_can_merge())
		walk_all(&work, NULL);
}

TEST_LIMIT(restores_survive_a_descriptor_lost, 60)
{
	static const struct work work = {.name = "restore with a new descriptor each time",
					 .prepare = world_merge,
					 .run = restore,
					 .judge = judge_restore,
					 .check = check_restored,
					 .base = {{KSM_OS_UFFD_UNREGISTER, 0, FAULT_ALWAYS, -EINVAL}}};
	if (kit_can_merge())
		walk_all(&work, NULL);
}

/* ---- sweeping ---------------------------------------------------------------------------------------------------------------- */

/* Frames that nobody refers to, and a peer whose bitmap is not at hand and who refers to one. */
static struct ksm_member *other;
static ksm_frameno others_frame;

static void make_garbage(struct world *w)
{
	world_merge(w);
	for (size_t i = 0; i < 40; i++)
		members_put(w->member, members_publish(w->member, 500 + i));
	others_frame = members_publish(w->member, 700);
	members_put(w->member, others_frame);
	struct ksm_domain_options options = w->member->options;
	CHECK_EQ(members_try_join(&options, &other), 0);
	CHECK(members_take(other, others_frame));
	members_begin(w->member);
}

/* What stays besides the one: the frames of the fields. */
static uint64_t frames_to_stay(struct world *w)
{
	return members_counter(w->member, KSM_FRAMES_REFERRED) + 1;
}

static void sweep(struct world *w)
{
	w->result = (int)ksm_scan_sweep(&w->member->scanner, true, NULL);
	w->count = members_frames(w->member);
}

static void judge_sweep(struct world *w)
{
	CHECK(w->count == frames_to_stay(w) || w->result < 0 || ksm_chunks_any(&w->member->peer));
	CHECK_EQ(members_cell(w->member, others_frame), KSM_CELL_PUBLISHED);
	CHECK(members_frame_is(w->member, others_frame, 700));
}

static void check_swept(struct world *w)
{
	for (int attempt = 0; attempt < 20 && w->result == -EAGAIN; attempt++)
		sweep(w); /* a busy machine: the other was slow to answer */
	CHECK_GE(w->result, 0);
	CHECK_EQ(w->count, frames_to_stay(w));
	CHECK_EQ(kit_blocks(w->member->peer.fds.store), w->count * KSM_PAGE_SIZE);
	members_end();
	members_put(other, others_frame);
	members_leave(other);
	CHECK_EQ(members_know(w->member), 0); /* forgets it */
	w->files = kit_open_files();
}

TEST_LIMIT(sweeps_survive_every_failing_call, 120)
{
	static const struct work work = {
		.name = "sweep", .prepare = make_garbage, .run = sweep, .judge = judge_sweep, .check = check_swept};
	if (kit_can_merge())
		walk_all(&work, NULL);
}
