/* SPDX-License-Identifier: MIT */
/* A process that changes its user: its membership moves to that user's domain of the same name; USER-1 and 2. */
#include "crowd.h"

#include "arena.h"

#define PAGES 200

static struct ksm_domain *domain;
static struct ksm_arena *arena;

/* path NULL: at the default place, each user's own. */
static void attach(const char *path, enum ksm_barrier_kind kind)
{
	struct ksm_domain_options options = kit_options(kit_name("d"));
	options.path = path;
	options.barrier = kind;
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_arena_create(domain, 0, &arena), 0);
}

static struct ksm_block block(size_t pages, uint64_t first)
{
	struct ksm_block block;
	CHECK_EQ(ksm_arena_alloc(arena, pages * KSM_PAGE_SIZE, 0, &block), 0);
	for (size_t i = 0; i < pages; i++)
		kit_fill(kit_page(block.address, i), first + i);
	return block;
}

static uint64_t pages_merged(void)
{
	struct ksm_stats self;
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	return self.pages_merged;
}

static int why_not(void)
{
	struct ksm_stats self;
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	return self.why_not;
}

static struct ksm_stats all(void)
{
	struct ksm_stats stats;
	CHECK_EQ(ksm_domain_stats(domain, &stats), 0);
	return stats;
}

static bool merges_to(uint64_t pages)
{
	struct ksm_report report;
	CHECK_EQ(ksm_domain_scan(domain, &report), 0);
	return pages_merged() == pages;
}

static bool is_nobodys(void)
{
	return strstr(ksm_domain_directory(domain), "/ksmalloc-65534/") != NULL;
}

static void on_each_barrier(void (*body)(enum ksm_barrier_kind kind))
{
	static const enum ksm_barrier_kind kinds[] = {KSM_BARRIER_AUTO, KSM_BARRIER_STOP, KSM_BARRIER_SEGV};
	kit_name("d");
	for (size_t i = 0; i < KSM_COUNT(kinds) && kit_is_root(); i++) {
		if (!kit_has_barrier(kinds[i]))
			continue;
		pid_t child = kit_fork();
		if (child == 0) {
			body(kinds[i]);
			fflush(NULL);
			_exit(0);
		}
		int status = harness_wait(__FILE__, __LINE__, child);
		if (status)
			FAIL("barrier %d: wait status 0x%x", (int)kinds[i], (unsigned)status);
	}
}

/* Those of nobody's who were there already. */
static pid_t start_other(uint32_t *steps)
{
	pid_t pid = kit_fork();
	if (pid)
		return pid;
	kit_become_nobody();
	attach(NULL, KSM_BARRIER_AUTO);
	struct ksm_block one = block(PAGES, 1), own = block(PAGES, 9000), twin = block(PAGES, 9000);
	KIT_WAIT(20, merges_to(2 * PAGES));
	kit_reach(steps, 1);
	for (;;) {
		kit_check_filled(one.address, PAGES, 1);
		kit_check_filled(own.address, PAGES, 9000);
		kit_check_filled(twin.address, PAGES, 9000);
		ksm_add_relaxed(&steps[1], 1);
		kit_sleep_ms(5);
	}
}

static void moves(enum ksm_barrier_kind kind)
{
	uint32_t *steps = kit_steps();
	pid_t other = start_other(steps);
	kit_await(steps, 1);
	attach(NULL, kind);
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1), frozen = block(PAGES, 1);
	char before[33], after[33];
	KIT_WAIT(20, merges_to(3 * PAGES));
	CHECK_EQ(ksm_arena_freeze(arena, frozen.address, frozen.nbytes, NULL), 0);
	KIT_WAIT(20, merges_to(3 * PAGES));
	kit_fill(kit_page(one.address, 7), 70000); /* broken */
	CHECK(!is_nobodys());
	CHECK_EQ(all().peers, 1);
	ksm_domain_id(domain, before);
	kit_become_nobody();
	KIT_WAIT(20, is_nobodys());
	ksm_domain_id(domain, after);
	CHECK(strcmp(before, after));
	KIT_WAIT(20, merges_to(3 * PAGES - 1)); /* onto the other's frames */
	CHECK_EQ(why_not(), 0);
	CHECK_EQ(all().peers, 2);
	struct ksm_report report;
	CHECK_EQ(ksm_domain_settle(domain, 20000, 0, &report), 0);
	CHECK_EQ(report.settled, 1);
	CHECK_EQ(all().pages_shared, 2 * PAGES);
	CHECK_EQ(all().pages_merged, 6 * PAGES - 1);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 7 ? 70000 : 1 + i));
	kit_check_filled(two.address, PAGES, 1);
	kit_check_filled(frozen.address, PAGES, 1);
	CHECK_EQ(kit_call_store(frozen.address), -EFAULT); /* still frozen */
	kit_fill(frozen.address, 50000);
	CHECK(kit_is(frozen.address, 50000));
	struct ksm_block more = block(PAGES, 1);
	KIT_WAIT(20, merges_to(4 * PAGES - 2));
	uint32_t rounds = ksm_load_relaxed(&steps[1]);
	KIT_WAIT(10, ksm_load_relaxed(&steps[1]) > rounds + 2);
	/* And it can fork, and leave. */
	pid_t child = kit_fork();
	if (child == 0) {
		CHECK_SYS(prctl(PR_SET_PDEATHSIG, SIGKILL));
		ksm_process_resume();
		kit_check_filled(two.address, PAGES, 1);
		kit_fill(two.address, 60000);
		struct ksm_block fresh = block(PAGES, 1);
		/* also those that both have, and nobody else */
		KIT_WAIT(20, merges_to(5 * PAGES - 3) || pages_merged() > 5 * PAGES - 3);
		kit_check_filled(fresh.address, PAGES, 1);
		_exit(0);
	}
	CHECK_CHILD(child);
	kit_check_filled(two.address, PAGES, 1);
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	CHECK_EQ(ksm_arena_free(arena, &frozen), 0);
	CHECK_EQ(ksm_arena_free(arena, &more), 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
	CHECK_SYS(kill(other, 0) && errno != EPERM ? -1 : 0);
	CHECK_SYS(kill(other, SIGKILL));
	CHECK_KILLED(other, SIGKILL);
}

TEST_LIMIT(a_membership_follows_its_process, 90)
{
	on_each_barrier(moves);
}

/* A server that starts its workers as root; each becomes somebody else before it does anything. */
static void workers(enum ksm_barrier_kind kind)
{
	uint32_t *steps = kit_steps();
	pid_t pids[2];
	attach(NULL, kind);
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	KIT_WAIT(20, merges_to(2 * PAGES));
	for (uint32_t i = 0; i < KSM_COUNT(pids); i++) {
		pids[i] = kit_fork();
		if (pids[i])
			continue;
		kit_become_nobody();
		kit_check_filled(one.address, PAGES, 1);
		kit_fill(one.address, 40000 + i);
		ksm_process_resume();
		KIT_WAIT(20, is_nobodys());
		KIT_WAIT(20, merges_to(2 * PAGES - 1));
		CHECK(kit_is(one.address, 40000 + i));
		kit_check_filled(kit_page(one.address, 1), PAGES - 1, 2);
		kit_check_filled(two.address, PAGES, 1);
		CHECK_EQ(why_not(), 0);
		ksm_add_seqcst(steps, 1);
		KIT_WAIT(20, ksm_load_acquire(steps) >= 2);
		KIT_WAIT(20, all().peers == 2);
		KIT_WAIT(20, (merges_to(2 * PAGES - 1), all().pages_shared == PAGES)); /* the same frames for both */
		ksm_add_seqcst(steps, 1);
		kit_await(steps, 4);
		_exit(0);
	}
	kit_await(steps, 4);
	for (size_t i = 0; i < KSM_COUNT(pids); i++)
		CHECK_CHILD(pids[i]);
	CHECK(!is_nobodys());
	CHECK_EQ(all().peers, 1);
	kit_check_filled(one.address, PAGES, 1);
	kit_check_filled(two.address, PAGES, 1);
	KIT_WAIT(20, merges_to(2 * PAGES));
	uint64_t freed;
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	CHECK_EQ(all().store_bytes, 0);
}

TEST_LIMIT(workers_of_a_server_that_drops_root, 90)
{
	on_each_barrier(workers);
}

static void under_a_crowd(enum ksm_barrier_kind kind)
{
	struct crowd crowd;
	attach(NULL, kind);
	struct ksm_block field = block(PAGES, 1), twin = block(PAGES, 1);
	for (size_t i = 0; i < PAGES; i++)
		memset(kit_page(twin.address, i), 0, 3 * 8);
	memset(field.address, 0, 3 * 8);
	crowd_start(&crowd, field.address, PAGES, 3, 300);
	crowd.may_refuse = kind == KSM_BARRIER_SEGV;
	for (int i = 0; i < 10; i++)
		merges_to(0);
	kit_become_nobody();
	KIT_WAIT(40, is_nobodys());
	for (int i = 0; i < 10; i++)
		merges_to(0);
	CHECK_EQ(crowd_end(&crowd), 0);
	crowd_check_rest(&crowd, 1);
}

TEST_LIMIT(writers_lose_nothing_meanwhile, 90)
{
	on_each_barrier(under_a_crowd);
}

/* ---- when it cannot be ----------------------------------------------------------------------------------------------------- */

static void stays(enum ksm_barrier_kind kind)
{
	attach(kit_directory(), kind); /* closed to others */
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	char before[33], after[33];
	KIT_WAIT(20, merges_to(2 * PAGES));
	ksm_domain_id(domain, before);
	kit_become_nobody();
	KIT_WAIT(20, why_not() == KSM_EUSER);
	ksm_domain_id(domain, after);
	CHECK_STR_EQ(before, after);
	CHECK_EQ(pages_merged(), 2 * PAGES);
	kit_fill(kit_page(one.address, 3), 80000);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 3 ? 80000 : 1 + i));
	kit_check_filled(two.address, PAGES, 1);
	struct ksm_block three = block(PAGES, 1); /* the old membership is as good as before */
	KIT_WAIT(20, merges_to(3 * PAGES - 1));
	kit_check_filled(three.address, PAGES, 1);
	CHECK_EQ(all().peers, 1);
	uint64_t freed;
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	CHECK_EQ(ksm_arena_free(arena, &three), 0);
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	CHECK_EQ(all().store_bytes, 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

TEST_LIMIT(who_cannot_join_stays, 90)
{
	on_each_barrier(stays);
}

/* Broken pages that threads cannot be held for keep it where it is, for as long as that is so. */
TEST_LIMIT(broken_pages_hold_it_back, 60)
{
	struct io_uring_params params = {0};
	if (!kit_is_root() || !kit_can_move())
		return;
	kit_name("d");
	attach(NULL, KSM_BARRIER_MOVE);
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	KIT_WAIT(20, merges_to(2 * PAGES));
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0) {
		printf("no io_uring here: %s\n", strerror(errno));
		return;
	}
	kit_fill(kit_page(one.address, 3), 80000);
	kit_become_nobody();
	KIT_WAIT(20, why_not() == KSM_EUSER);
	CHECK(!is_nobodys());
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 3 ? 80000 : 1 + i));
	close(ring);
	KIT_WAIT(30, is_nobodys());
	KIT_WAIT(20, merges_to(2 * PAGES - 2));
	CHECK_EQ(why_not(), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 3 ? 80000 : 1 + i));
	kit_check_filled(two.address, PAGES, 1);
}
