/* SPDX-License-Identifier: MIT */
/*
 * The way back out of a window by userfaultfd: MOVE-1 to 3, with every call of it failing. Windows are made to end
 * without a merge by letting the mapping of frames fail.
 *
 * Two ends of a process are by design, named here and tested for themselves: a page that can be put back by none of
 * UFFDIO_MOVE, UFFDIO_COPY and mremap in a thousand attempts; and a scratch area that cannot be mapped again after a
 * page was put back by mremap.
 */
#include "faults.h"

#define ALWAYS(name, skip, error) {KSM_OS_##name, skip, FAULT_ALWAYS, error}

TEST_LIMIT(putting_back_survives_every_failing_call, 60)
{
	static const struct work work = {.name = "put back",
					 .run = world_merge,
					 .judge = world_judge_merge,
					 .check = world_check_merged,
					 .base = {ALWAYS(MAP_FRAMES, 0, -ENOMEM)}};
	if (kit_can_move())
		walk_all(&work, NULL);
}

TEST_LIMIT(putting_back_by_copying_survives, 60)
{
	static const struct work work = {.name = "put back by copying",
					 .run = world_merge,
					 .judge = world_judge_merge,
					 .check = world_check_merged,
					 .base = {ALWAYS(MAP_FRAMES, 0, -ENOMEM), ALWAYS(UFFD_MOVE, 1, -EEXIST)}};
	if (kit_can_move())
		walk_all(&work, NULL);
}

/* The scratch area cannot be mapped again; or nothing of all works. */
static bool ends_the_process(const struct fault *fault)
{
	return fault->call == KSM_OS_MAP_ANON || (fault->call == KSM_OS_REMAP && fault->count == FAULT_ALWAYS);
}

TEST_LIMIT(putting_back_by_mremap_survives, 60)
{
	static const struct work work = {
		.name = "put back by mremap",
		.run = world_merge,
		.judge = world_judge_merge,
		.check = world_check_merged,
		.base = {ALWAYS(MAP_FRAMES, 0, -ENOMEM), ALWAYS(UFFD_MOVE, 1, -ENOMEM), ALWAYS(UFFD_COPY, 0, -ENOMEM)}};
	if (kit_can_move())
		walk_all(&work, ends_the_process);
}

/* ---- a page in the middle is pinned ---------------------------------------------------------------------------------------- */

static void pin_one(struct world *w)
{
	struct io_uring_params params = {0};
	struct iovec iov[2];
	w->pinned = 7;
	for (size_t i = 0; i < 2; i++)
		iov[i] = (struct iovec){kit_page(w->toucher.fields[i], w->pinned), KSM_PAGE_SIZE};
	w->ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (w->ring >= 0)
		CHECK_SYS(syscall(SYS_io_uring_register, w->ring, IORING_REGISTER_BUFFERS, iov, 2));
}

TEST_LIMIT(partial_windows_survive_every_failing_call, 60)
{
	static const struct work work = {.name = "window cut short",
					 .prepare = pin_one,
					 .run = world_merge,
					 .judge = world_judge_merge,
					 .check = world_check_merged};
	if (kit_can_move())
		walk_all(&work, NULL);
}

TEST_LIMIT(partial_windows_survive_when_moving_back_fails, 60)
{
	/* Which window is the one cut short depends on what was found before: each of the first ones. */
	for (uint32_t windows = 2; windows <= 4; windows++) {
		struct work work = {.name = "window cut short, put back by mremap",
				    .prepare = pin_one,
				    .run = world_merge,
				    .judge = world_judge_merge,
				    .check = world_check_merged,
				    .base = {ALWAYS(UFFD_MOVE, windows, -EBUSY), ALWAYS(UFFD_COPY, 0, -EEXIST)}};
		if (kit_can_move())
			walk_all(&work, ends_the_process);
	}
}

/* ---- the ends by design ------------------------------------------------------------------------------------------------------- */

static void ends_with(const struct fault *first, const struct fault *second, const char *message)
{
	int ends[2];
	char text[1024] = "";
	CHECK_SYS(pipe(ends));
	pid_t pid = kit_fork();
	if (pid == 0) {
		struct ksm_barrier barrier;
		char *at = kit_map_filled(4, 1);
		signal(SIGABRT, SIG_DFL);
		dup2(ends[1], STDERR_FILENO);
		CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_MOVE, NULL, -1), 0);
		CHECK_EQ(ksm_window_open(&barrier, at, 4), 0);
		ksm_os_fault_set(KSM_OS_UFFD_MOVE, 0, FAULT_ALWAYS, -ENOMEM);
		ksm_os_fault_set(KSM_OS_UFFD_COPY, 0, FAULT_ALWAYS, -ENOMEM);
		fault_set(first);
		fault_set(second);
		ksm_window_close(&barrier);
		_exit(0);
	}
	close(ends[1]);
	CHECK_KILLED(pid, SIGABRT);
	CHECK_GT(read(ends[0], text, sizeof(text) - 1), 0);
	if (!strstr(text, message))
		FAIL("it said: %s", text);
	close(ends[0]);
}

TEST(a_page_that_cannot_be_put_back_ends_the_process)
{
	static const struct fault none = {0}, remap = ALWAYS(REMAP, 0, -ENOMEM), map = ALWAYS(MAP_ANON, 0, -ENOMEM);
	if (!kit_can_move())
		return;
	ends_with(&remap, &none, "a page taken out for comparing could not be put back");
	ends_with(&map, &none, "the scratch area could not be mapped again");
}

/* Five ways in a row, then the barrier is as good as new. */
TEST(the_scratch_area_is_whole_after_mremap)
{
	struct ksm_barrier barrier;
	char *at = kit_map_filled(8, 1);
	if (!kit_can_move())
		return;
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_MOVE, NULL, -1), 0);
	for (int round = 0; round < 5; round++) {
		CHECK_EQ(ksm_window_open(&barrier, at, 8), 0);
		CHECK_EQ(barrier.pages, 8);
		ksm_os_fault_set(KSM_OS_UFFD_MOVE, 0, FAULT_ALWAYS, -ENOMEM);
		ksm_os_fault_set(KSM_OS_UFFD_COPY, 0, FAULT_ALWAYS, -ENOMEM);
		CHECK_GT(ksm_window_close(&barrier), 0);
		ksm_os_fault_clear();
		kit_check_filled(at, 8, 1);
		CHECK(!kit_is_registered(at, 8));
	}
	pid_t child = kit_fork(); /* pages from the scratch area are inherited like any other */
	if (child == 0) {
		kit_check_filled(at, 8, 1);
		_exit(0);
	}
	CHECK_CHILD(child);
	ksm_barrier_destroy(&barrier);
	kit_check_filled(at, 8, 1);
}
