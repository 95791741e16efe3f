/* SPDX-License-Identifier: MIT */
/* Joining, and living on through a fork, while system calls fail for a moment: MEMBER-2 and MEMBER-4. */
#include "members.h"

#include "domain.h"

#define PAGES 20

static struct ksm_domain *domain;
static struct ksm_arena *arena;
static struct ksm_block blocks[2];

static int try_attach(enum ksm_barrier_kind barrier)
{
	struct ksm_domain_options options = kit_options("d");
	options.barrier = barrier;
	return ksm_domain_attach(&options, &domain);
}

static void begin(enum ksm_barrier_kind barrier)
{
	CHECK_EQ(try_attach(barrier), 0);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
	for (size_t i = 0; i < 2; i++) {
		CHECK_EQ(ksm_arena_alloc(arena, PAGES * KSM_PAGE_SIZE, 0, &blocks[i]), 0);
		for (size_t page = 0; page < PAGES; page++)
			kit_fill(kit_page(blocks[i].address, page), 1 + page);
	}
}

static void end(void)
{
	for (size_t i = 0; i < 2; i++) {
		kit_check_filled(blocks[i].address, PAGES, 1);
		CHECK_EQ(ksm_arena_free(arena, &blocks[i]), 0);
	}
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

static struct ksm_stats self_stats(void)
{
	struct ksm_stats stats;
	CHECK_EQ(ksm_domain_self_stats(domain, &stats), 0);
	return stats;
}

static int scan(void)
{
	struct ksm_report report;
	return ksm_domain_scan(domain, &report);
}

/* A child that only looks at its bytes. */
static void fork_once(void)
{
	pid_t child = kit_fork();
	if (child == 0) {
		kit_check_filled(blocks[1].address, PAGES, 1);
		_exit(0);
	}
	CHECK_CHILD(child);
}

/* ---- joining ------------------------------------------------------------------------------------------------------ */

TEST(a_bitmap_that_cannot_be_sealed_is_no_seat)
{
	int files = kit_open_files();
	ksm_os_fault_set(KSM_OS_SEAL, 0, UINT32_MAX, -EBUSY);
	CHECK_EQ(try_attach(KSM_BARRIER_AUTO), -EBUSY);
	ksm_os_fault_clear();
	CHECK_EQ(kit_open_files(), files);
	for (uint32_t number = 0; number < 4; number++) { /* the store's, the control file's, the bitmap's */
		ksm_os_fault_set(KSM_OS_SEAL, number, 1, -EINVAL);
		int r = try_attach(KSM_BARRIER_AUTO);
		CHECK(r == 0 || r == -EINVAL);
		if (!r)
			ksm_domain_detach(domain);
		ksm_os_fault_clear();
	}
	CHECK_EQ(kit_open_files(), files);
}

/* Somebody cleans the domain away between our making its directory and our opening it. */
TEST(a_rendezvous_that_goes_while_it_is_joined_is_made_again)
{
	for (uint32_t number = 0; number < 2; number++) {
		ksm_os_fault_set(KSM_OS_MKDIR, number, 1, -EEXIST);
		CHECK_EQ(try_attach(KSM_BARRIER_AUTO), 0);
		CHECK_GT(ksm_os_fault_hits(KSM_OS_MKDIR), 0);
		ksm_os_fault_clear();
		ksm_domain_detach(domain);
		struct ksm_domain_options options = kit_options("d");
		CHECK_EQ(ksm_domain_clean(&options), 0);
	}
}

/* What a first try has closed is not the caller's object, and nothing else that has its number meanwhile. */
TEST(the_callers_object_outlives_a_try_that_fails)
{
	uint32_t tried = 0;
	int object = ksm_os_memfd("object");
	for (uint32_t number = 0, hits = 1; hits; number++) {
		struct ksm_domain_options options = kit_options("d");
		options.backing = KSM_BACKING_SHM;
		options.store_fd = object;
		memcpy(options.store_id, "a test's object", sizeof(options.store_id));
		size_t files = kit_open_files();
		ksm_os_fault_set(KSM_OS_ADVISE, number, 1, -EAGAIN);
		CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
		hits = ksm_os_fault_hits(KSM_OS_ADVISE);
		ksm_os_fault_clear();
		tried += hits;
		CHECK_EQ(domain->worker.member.inodes[KSM_SEED_STORE], ksm_member_inode(object));
		ksm_domain_detach(domain);
		CHECK_EQ(kit_open_files(), files);
	}
	CHECK_GT(tried, 3);
	ksm_os_close(object);
}

/* The join lock is given back, whatever the kernel says: others can join. */
TEST(a_lock_that_cannot_be_given_back_shuts_nobody_out)
{
	ksm_os_fault_set(KSM_OS_UNLOCK, 0, UINT32_MAX, -ENOLCK);
	CHECK_EQ(try_attach(KSM_BARRIER_AUTO), 0);
	ksm_os_fault_clear();
	pid_t child = kit_fork();
	if (child == 0) {
		struct ksm_domain_options options = kit_options("d");
		struct ksm_member *member = calloc(1, sizeof(*member)); /* another one than the child is anyway */
		ksm_member_init(member, &options);
		CHECK_EQ(ksm_member_join(member), 0);
		ksm_member_leave(member);
		free(member);
		_exit(0);
	}
	ksm_process_resume(); /* somebody has to answer */
	CHECK_CHILD(child);
	ksm_domain_detach(domain);
}

/* ---- fork ----------------------------------------------------------------------------------------------------------- */

TEST(a_child_without_a_seat_costs_no_descriptor)
{
	if (!kit_can_merge())
		return;
	begin(KSM_BARRIER_AUTO);
	CHECK_EQ(scan(), 0);
	fork_once();
	CHECK_EQ(scan(), 0); /* the seeds have come home */
	int files = kit_open_files();
	uint64_t failures = self_stats().failures;
	for (int i = 0; i < 3; i++) {
		ksm_os_fault_set(KSM_OS_MEMFD, 0, 1, -ENFILE);
		pid_t child = kit_fork();
		ksm_os_fault_clear();
		if (child == 0) {
			kit_check_filled(blocks[1].address, PAGES, 1);
			CHECK_EQ(self_stats().why_not, KSM_ELOST);
			CHECK_EQ(scan(), KSM_ELOST);
			CHECK_EQ(kit_open_files(), files); /* none of ours: the store can go without it */
			_exit(0);
		}
		CHECK_CHILD(child);
		CHECK_EQ(scan(), 0);
		CHECK_EQ(kit_open_files(), files);
	}
	CHECK_EQ(self_stats().failures, failures + 3);
	CHECK_EQ(self_stats().pages_merged, 2 * PAGES);
	end();
	CHECK_LE(kit_open_files(), files);
}

/* What a new scanner needs fails once, or for a while: the call says so, the next one works. */
static void starts_again(enum ksm_os_call call, int error, uint32_t times)
{
	begin(KSM_BARRIER_AUTO);
	CHECK_EQ(scan(), 0);
	fork_once();
	CHECK_EQ(scan(), 0);
	int files = kit_open_files();
	fork_once();
	ksm_os_fault_set(call, 0, times, error);
	for (uint32_t i = 0; i < times; i++) {
		CHECK_EQ(scan(), error);
		CHECK_EQ(self_stats().why_not, error);
	}
	CHECK_EQ(scan(), 0);
	ksm_os_fault_clear();
	CHECK_EQ(kit_open_files(), files);
	CHECK_EQ(self_stats().why_not, 0);
	CHECK_EQ(self_stats().pages_merged, 2 * PAGES);
	end();
	CHECK_LE(kit_open_files(), files);
}

TEST(a_scanner_that_has_no_table_starts_again)
{
	if (kit_can_merge())
		starts_again(KSM_OS_UNSHARE_FILES, -ENOMEM, 3);
}

TEST(a_scanner_that_has_no_signal_starts_again)
{
	if (kit_can_merge())
		starts_again(KSM_OS_SIGNALFD, -EMFILE, 1);
}

/* A fork, or the end, while it could not be started again: nothing stays open, and no number is closed that is the program's. */
TEST(a_fork_while_no_scanner_starts)
{
	if (!kit_can_merge())
		return;
	int before = kit_open_files();
	begin(KSM_BARRIER_AUTO);
	CHECK_EQ(scan(), 0);
	fork_once();
	ksm_os_fault_set(KSM_OS_SIGNALFD, 0, UINT32_MAX, -EMFILE);
	CHECK_EQ(scan(), -EMFILE);
	pid_t child = kit_fork();
	if (child == 0) {
		kit_check_filled(blocks[0].address, PAGES, 1);
		CHECK_EQ(self_stats().why_not, KSM_ELOST);
		CHECK_EQ(kit_open_files(), before);
		_exit(0);
	}
	CHECK_CHILD(child);
	end();
	ksm_os_fault_clear();
	CHECK_EQ(kit_open_files(), before);
}

/* A window may fail between the scanner's noting the descriptors that a fork needs and the fork's asking for them. */
TEST(a_number_that_is_another_file_by_now_is_not_kept)
{
	struct ksm_domain_options options = kit_options("d");
	if (!kit_can_move())
		return;
	options.barrier = KSM_BARRIER_MOVE;
	struct ksm_member *a;
	CHECK_EQ(members_try_join(&options, &a), 0);
	CHECK_EQ(ksm_member_prepare_child(a), 0);
	for (int round = 0; round < 2; round++) {
		int files = kit_open_files();
		if (round)
			a->exchange.seeds[KSM_SEED_UFFD] = a->peer.fds.maps;
		members_begin(NULL);
		ksm_member_fetch_seeds(a);
		members_end();
		CHECK_EQ(kit_open_files(), files + KSM_SEEDS - round);
		CHECK_EQ(a->seeds[KSM_SEED_UFFD] == -1, round);
		ksm_member_drop_seeds(a, true);
		CHECK_EQ(kit_open_files(), files);
	}
	ksm_seat_leave(&a->child);
	members_leave(a);
}

/* Threads cannot be held: those that there are could not be listed. It is tried again. */
TEST_LIMIT(a_barrier_that_was_lost_comes_back, 90)
{
	begin(KSM_BARRIER_STOP);
	CHECK_EQ(scan(), 0);
	fork_once();
	ksm_os_fault_set(KSM_OS_LIST, 0, UINT32_MAX, -EMFILE);
	scan();
	CHECK_EQ(self_stats().barrier, KSM_BARRIER_NONE);
	CHECK_EQ(self_stats().why_not, -EMFILE);
	ksm_os_fault_clear();
	CHECK_EQ(scan(), 0);
	KIT_WAIT(60, self_stats().barrier == KSM_BARRIER_STOP);
	CHECK_EQ(ksm_arena_unmerge(arena, &(uint64_t){0}, &(uint64_t){0}), 0);
	struct ksm_report report;
	KIT_WAIT(60, !ksm_arena_scan(arena, &report) && self_stats().pages_merged == 2 * PAGES);
	end();
}
