/* SPDX-License-Identifier: MIT */
/* Every system call of a merge, a restore, a sweep, of freezing and giving back fails, one after the other; see faults.h. The
 * way back out of a window by moving has its own walk in test_barrier_move.c. */
#include "faults.h"

#include "freeze.h"
#include "handler.h"

TEST_LIMIT(merges_survive_every_failing_call, 120)
{
	static const struct work work = {
		.name = "merge", .run = world_merge, .judge = world_judge_merge, .check = world_check_merged};
	if (kit_can_move())
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
	if (kit_can_move())
		walk_all(&work, NULL);
}

/* ---- restoring ------------------------------------------------------------------------------------------------------------ */

static void restore(struct world *w)
{
	struct ksm_restore_counts counts = {0};
	uint64_t failures = members_counter(w->member, KSM_FAILURES);
	w->result = 0;
	for (size_t i = 0; i < 2; i++) {
		int r = ksm_scan_restore(&w->member->scanner, w->regions[i], KSM_RESTORE_ALWAYS, NULL, &counts);
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
	if (kit_can_move())
		walk_all(&work, NULL);
}

TEST_LIMIT(restores_survive_a_descriptor_lost, 120)
{
	static const struct work work = {.name = "restore with a new descriptor each time",
					 .prepare = world_merge,
					 .run = restore,
					 .judge = judge_restore,
					 .check = check_restored,
					 .base = {{KSM_OS_UFFD_UNREGISTER, 0, FAULT_ALWAYS, -EINVAL}}};
	if (kit_can_move())
		walk_all(&work, NULL);
}

/*
 * In the handler a store comes again until a copy can be had, or a protection taken away; a call that fails for ever lets it
 * wait for ever, by design. One that fails once must not be noticed.
 */
static bool comes_again(const struct fault *fault)
{
	return fault->count == FAULT_ALWAYS && fault->call == KSM_OS_PROTECT;
}

/* ---- where threads are held, or pages are guarded --------------------------------------------------------------------------- */

/* What was refused a moment ago may work now. */
static void be_willing(struct world *w)
{
	w->member->scanner.park.retry_at_ns = 0;
	w->member->scanner.park.in_a_row = 0;
}

static void merge_willingly(struct world *w)
{
	be_willing(w);
	world_merge(w);
}

/* Without faults, but on a busy machine: it takes as long as it takes. */
static void check_merged_willingly(struct world *w)
{
	size_t page = 0;
	for (double until = harness_now() + 15; world_unmerged(w, &page) && harness_now() < until;) {
		kit_sleep_ms(1);
		merge_willingly(w);
	}
	world_check_bytes(w);
	world_check_merged(w);
}

TEST_LIMIT(merges_under_stop_survive_every_failing_call, 240)
{
	static const struct work work = {.name = "merge under stop",
					 .run = merge_willingly,
					 .judge = world_judge_merge,
					 .check = check_merged_willingly,
					 .barrier = KSM_BARRIER_STOP};
	walk_all(&work, NULL);
}

TEST_LIMIT(merges_under_segv_survive_every_failing_call, 240)
{
	static const struct work work = {.name = "merge under segv",
					 .run = merge_willingly,
					 .judge = world_judge_merge,
					 .check = check_merged_willingly,
					 .barrier = KSM_BARRIER_SEGV};
	walk_all(&work, NULL);
}

/* ---- read-only merging ------------------------------------------------------------------------------------------------------- */

static void make_sigsegv(struct world *w)
{
	CHECK_EQ(ksm_handler_install(), 0);
	for (size_t i = 0; i < 2; i++)
		w->regions[i]->sigsegv = true;
}

/* Merge, and have every merged page broken by a store; the toucher's are broken by itself. */
static void merge_and_store(struct world *w)
{
	merge_willingly(w);
	for (size_t page = 0; page < FIELD_PAGES; page++) {
		volatile uint64_t *at = (uint64_t *)kit_page(w->toucher.fields[1], page);
		at[7] = at[7]; /* what is there */
	}
}

TEST_LIMIT(read_only_merges_survive_every_failing_call, 240)
{
	static const struct work work = {.name = "merge read-only, and break",
					 .prepare = make_sigsegv,
					 .run = merge_and_store,
					 .check = check_merged_willingly};
	if (kit_can_merge())
		walk_all(&work, comes_again);
}

/* ---- giving back --------------------------------------------------------------------------------------------------------------- */

static void break_some(struct world *w)
{
	for (size_t page = 4; page < 10; page++)
		((volatile uint64_t *)kit_page(w->toucher.fields[page % 2], page))[7] =
			((volatile uint64_t *)kit_page(w->toucher.fields[page % 2], page))[7];
}

static void merge_and_break(struct world *w)
{
	merge_willingly(w);
	break_some(w);
}

/* Broken, seen, given back, merged again. */
static void give_back(struct world *w)
{
	merge_willingly(w);
	break_some(w);
	merge_willingly(w);
}

/* A page that is written all the time never rests, and keeps its place: RESTORE-3. */
static uint64_t broken(const struct world *w)
{
	uint64_t pages = 0;
	for (size_t i = 0; i < 2 * FIELD_PAGES; i++) {
		bool is_hot = i < FIELD_PAGES && FIELD_HOT(i);
		pages += !is_hot && ksm_region_state(w->regions[i / FIELD_PAGES], i % FIELD_PAGES) == KSM_PAGE_BROKEN;
	}
	return pages;
}

static void judge_give_back(struct world *w)
{
	CHECK(!broken(w) || w->count || w->result);
}

TEST_LIMIT(giving_back_survives_every_failing_call, 240)
{
	static const struct work work = {.name = "give back",
					 .prepare = merge_and_break,
					 .run = give_back,
					 .judge = judge_give_back,
					 .check = check_merged_willingly,
					 .few = true};
	if (kit_can_merge())
		walk_all(&work, NULL);
}

TEST_LIMIT(giving_back_under_stop_survives_every_failing_call, 240)
{
	static const struct work work = {.name = "give back under stop",
					 .prepare = merge_and_break,
					 .run = give_back,
					 .judge = judge_give_back,
					 .check = check_merged_willingly,
					 .few = true,
					 .barrier = KSM_BARRIER_STOP};
	walk_all(&work, NULL);
}

/* ---- freezing ------------------------------------------------------------------------------------------------------------------ */

static void no_barrier(struct world *w)
{
	CHECK_EQ(ksm_handler_install(), 0);
	ksm_barrier_destroy(&w->member->scanner.barrier);
	w->member->scanner.barrier.error = -EPERM;
}

static int on_both(struct world *w, int (*what)(struct ksm_region *, ksm_pageno, size_t), size_t first, size_t count)
{
	int result = 0;
	sigset_t every, old;
	sigfillset(&every);
	pthread_sigmask(SIG_SETMASK, &every, &old); /* as in the scanner */
	for (size_t i = 0; i < 2; i++) {
		ksm_merge_lock(&w->member->peer);
		int r = what(w->regions[i], first, count);
		ksm_merge_unlock(&w->member->peer);
		result = r ? r : result;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return result;
}

/* Freeze, merge what is frozen, make some of it ready for calls, thaw. The toucher writes in between. */
static void freeze_and_thaw(struct world *w)
{
	int r = on_both(w, ksm_freeze, 0, FIELD_PAGES);
	merge_willingly(w);
	int r2 = on_both(w, ksm_make_private, 2, 6);
	if (!r2)
		for (size_t page = 2; page < 8; page++) {
			CHECK_EQ(kit_is_file(kit_page(w->toucher.fields[0], page)), 0);
			CHECK_EQ(kit_is_file(kit_page(w->toucher.fields[1], page)), 0);
		}
	int r3 = on_both(w, ksm_freeze, 0, FIELD_PAGES);
	merge_willingly(w);
	int r4 = on_both(w, ksm_thaw, 0, FIELD_PAGES);
	w->result = r ? r : r2 ? r2 : r3 ? r3 : r4;
}

static void check_thawed(struct world *w)
{
	CHECK_EQ(w->result, 0);
	for (size_t i = 0; i < 2 * FIELD_PAGES; i++) {
		size_t page = i % FIELD_PAGES;
		CHECK_EQ(ksm_region_guard_of(w->regions[i / FIELD_PAGES], page) & KSM_GUARD_FROZEN, 0);
		CHECK(!kit_is_readonly(kit_page(w->toucher.fields[i / FIELD_PAGES], page)));
	}
	CHECK_EQ(kit_call_store(w->toucher.fields[1]), 0);
	world_check_bytes(w);
	CHECK_GT(w->regions[1]->states[KSM_PAGE_MERGED], FIELD_PAGES / 2);
}

TEST_LIMIT(freezing_and_thawing_survive_every_failing_call, 240)
{
	static const struct work work = {
		.name = "freeze, thaw", .prepare = no_barrier, .run = freeze_and_thaw, .check = check_thawed};
	if (kit_can_merge())
		walk_all(&work, comes_again);
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
