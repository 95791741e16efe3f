/* SPDX-License-Identifier: MIT */
/* Frozen memory, and memory made ready for system calls; FREEZE-1 and 2, ACCESS-1. Through the public interface. */
#include "crowd.h"

#include "arena.h"
#include "freeze.h"
#include "handler.h"

#include <sched.h>

#define PAGES 100
#define BYTES (PAGES * KSM_PAGE_SIZE)

static struct ksm_domain *domain;
static struct ksm_arena *arena;

static void take_it(int signal KSM_UNUSED)
{
}

/* KSM_BARRIER_NONE: as in a process that may do neither, and never will: no real-time signal is free. */
static void attach(enum ksm_barrier_kind kind)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_stats stats;
	if (kind == KSM_BARRIER_NONE) {
		ksm_os_fault_set(KSM_OS_UFFD_OPEN, 0, UINT32_MAX, -EPERM);
		for (int number = SIGRTMIN; number <= SIGRTMAX; number++)
			signal(number, take_it);
	} else {
		options.barrier = kind;
	}
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_domain_self_stats(domain, &stats), 0);
	CHECK(kind == KSM_BARRIER_AUTO || stats.barrier == kind);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
}

static void on_each_kind(void (*body)(enum ksm_barrier_kind kind))
{
	static const enum ksm_barrier_kind kinds[] = {KSM_BARRIER_NONE, KSM_BARRIER_MOVE, KSM_BARRIER_STOP,
						      KSM_BARRIER_SEGV};
	kit_directory();
	for (size_t i = 0; i < KSM_COUNT(kinds); i++) {
		if (!kit_has_barrier(kinds[i]))
			continue;
		pid_t child = kit_fork();
		if (child == 0) {
			attach(kinds[i]);
			body(kinds[i]);
			fflush(NULL);
			_exit(0);
		}
		int status = harness_wait(__FILE__, __LINE__, child);
		if (status)
			FAIL("barrier %d: wait status 0x%x", (int)kinds[i], (unsigned)status);
	}
}

static struct ksm_block block(size_t pages, uint64_t first)
{
	struct ksm_block block;
	CHECK_EQ(ksm_arena_alloc(arena, pages * KSM_PAGE_SIZE, 0, &block), 0);
	for (size_t i = 0; i < pages; i++)
		kit_fill(kit_page(block.address, i), first + i);
	return block;
}

static struct ksm_report scan(void)
{
	struct ksm_report report;
	CHECK_EQ(ksm_arena_scan(arena, &report), 0);
	return report;
}

static struct ksm_arena_stats stats(void)
{
	struct ksm_arena_stats stats;
	CHECK_EQ(ksm_arena_stats(arena, &stats), 0);
	return stats;
}

static void freeze(const struct ksm_block *block)
{
	size_t pages;
	CHECK_EQ(ksm_arena_freeze(arena, block->address, block->nbytes, &pages), 0);
	CHECK_EQ(pages, block->nbytes / KSM_PAGE_SIZE);
}

/* On a busy machine threads do not always stop in time: until so many pages are merged. */
static void scan_until(uint64_t merged)
{
	KIT_WAIT(30, (scan(), stats().pages_merged >= merged));
	CHECK_EQ(stats().pages_merged, merged);
}

/* ---- states -------------------------------------------------------------------------------------------------------------- */

TEST(a_frozen_page_is_read_only_until_it_is_written)
{
	attach(KSM_BARRIER_AUTO);
	struct ksm_block one = block(PAGES, 1);
	char *at = one.address;
	size_t pages = 99;
	CHECK_EQ(ksm_arena_freeze(arena, at + 1, 3 * KSM_PAGE_SIZE, &pages), 0); /* whole pages only */
	CHECK_EQ(pages, 2);
	for (size_t i = 0; i < 5; i++) {
		bool frozen = i == 1 || i == 2;
		CHECK_EQ(kit_is_readonly(kit_page(at, i)), frozen);
		CHECK_EQ(kit_call_store(kit_page(at, i)), frozen ? -EFAULT : 0);
	}
	CHECK_EQ(stats().pages_frozen, 2);
	freeze(&one);
	freeze(&one); /* again is nothing */
	CHECK_EQ(stats().pages_frozen, PAGES);
	kit_check_filled(at, PAGES, 1);
	kit_fill(kit_page(at, 7), 500);
	*(volatile char *)kit_page(at, 9) = 5;
	CHECK_EQ(stats().pages_frozen, PAGES - 2);
	CHECK(!kit_is_readonly(kit_page(at, 7)) && !kit_is_readonly(kit_page(at, 9)));
	CHECK(kit_is_readonly(kit_page(at, 6)) && kit_is_readonly(kit_page(at, 8)));
	CHECK_EQ(kit_call_store(kit_page(at, 7)), 0);
	CHECK_EQ(*kit_page(at, 9), 5);
	CHECK_EQ(stats().cow_breaks, 0); /* nothing was merged: nothing copied */
	CHECK_EQ(ksm_arena_thaw(arena, at, BYTES), 0);
	CHECK_EQ(ksm_arena_thaw(arena, at, BYTES), 0);
	CHECK_EQ(stats().pages_frozen, 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(kit_call_store(kit_page(at, i)), 0);
	kit_check_filled(at, 7, 1);
	kit_check_filled(kit_page(at, 10), PAGES - 10, 11);
	CHECK_EQ(kit_smaps(at, BYTES, NULL, NULL), 1); /* one mapping again */
}

TEST(what_cannot_be_frozen_is_refused)
{
	attach(KSM_BARRIER_AUTO);
	struct ksm_block one = block(4, 1), small, apart;
	size_t pages = 99;
	char *at = one.address;
	CHECK_EQ(ksm_arena_alloc(arena, 100, 0, &small), 0);
	CHECK_EQ(ksm_arena_alloc(arena, BYTES, KSM_ALLOC_UNMERGEABLE, &apart), 0);
	CHECK_EQ(ksm_arena_freeze(arena, &pages, 8, &pages), -EINVAL);
	CHECK_EQ(ksm_arena_freeze(arena, at - KSM_PAGE_SIZE, KSM_PAGE_SIZE, &pages), -EINVAL);
	CHECK_EQ(ksm_arena_freeze(arena, at, (size_t)1 << 40, &pages), -EINVAL);
	CHECK_EQ(ksm_arena_freeze(arena, at, SIZE_MAX, &pages), -EINVAL);
	CHECK_EQ(ksm_arena_thaw(arena, &pages, 8), -EINVAL);
	CHECK_EQ(ksm_arena_writable_begin(arena, &pages, 8), -EINVAL);
	CHECK_EQ(ksm_arena_writable_end(arena, at, 8), -EINVAL); /* never begun */
	CHECK_EQ(ksm_arena_freeze(arena, at, 0, &pages), 0);
	CHECK_EQ(ksm_arena_freeze(arena, at + 5, KSM_PAGE_SIZE, &pages), 0); /* no whole page */
	CHECK_EQ(pages, 0);
	CHECK_EQ(ksm_arena_freeze(arena, small.address, small.nbytes, &pages), 0);
	CHECK_EQ(pages, 0);
	CHECK_EQ(ksm_arena_freeze(arena, apart.address, apart.nbytes, &pages), 0); /* never merged: nothing to do */
	CHECK_EQ(pages, 0);
	CHECK(!kit_is_readonly(apart.address));
	CHECK_EQ(stats().pages_frozen, 0);
}

static uint32_t others;

static void somebody_elses(int signal KSM_UNUSED)
{
	others++;
}

TEST(nothing_is_frozen_while_nobody_answers_faults)
{
	attach(KSM_BARRIER_AUTO);
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	size_t pages = 99;
	freeze(&one);
	signal(SIGSEGV, somebody_elses);
	CHECK_EQ(ksm_arena_freeze(arena, two.address, two.nbytes, &pages), KSM_EDISPLACED);
	CHECK_EQ(pages, 0);
	kit_fill(two.address, 1); /* goes through without a fault */
	kit_fill(one.address, 70);
	CHECK_EQ(others, 0);
	CHECK_EQ(ksm_process_handler_reinstall(), 0);
	CHECK_EQ(ksm_arena_freeze(arena, two.address, two.nbytes, &pages), 0);
	CHECK_EQ(pages, PAGES);
	CHECK_EQ(kit_call_store(two.address), -EFAULT);
	kit_fill(two.address, 71);
	CHECK_EQ(others, 0);
	CHECK(kit_is(one.address, 70) && kit_is(two.address, 71));
	kit_check_filled(kit_page(one.address, 1), PAGES - 1, 2);
	ksm_process_handler_popped();
}

/* ---- merging ----------------------------------------------------------------------------------------------------------------- */

static void frozen_pages_merge(enum ksm_barrier_kind kind)
{
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1), loose = block(PAGES, 1), zeros = block(10, 5);
	struct ksm_stats self;
	memset(zeros.address, 0, zeros.nbytes);
	freeze(&one);
	freeze(&two);
	freeze(&zeros);
	if (kind == KSM_BARRIER_NONE) { /* only what is frozen */
		CHECK_NE(scan().why_not, 0);
		CHECK_EQ(stats().pages_merged, 2 * PAGES);
		CHECK_EQ(kit_smaps_bytes(zeros.address, 10, "Anonymous"), 0);
	} else {
		scan_until(3 * PAGES);
	}
	CHECK_EQ(stats().pages_frozen, 2 * PAGES + 10);
	CHECK_EQ(stats().pages_zero, 10);
	kit_check_filled(one.address, PAGES, 1);
	kit_check_filled(two.address, PAGES, 1);
	for (size_t i = 0; i < PAGES; i++) {
		char *at = kit_page(one.address, i);
		CHECK(kit_is_readonly(at) && kit_is_file(at) == 1);
		CHECK_EQ(kit_call_store(at), -EFAULT);
	}
	CHECK_EQ(kit_smaps(one.address, BYTES, NULL, NULL), 1);
	uint64_t thawed = 0;
	for (size_t i = 3; i < PAGES; i += 7, thawed++)
		kit_fill(kit_page(one.address, i), 1000 + i);
	kit_fill(kit_page(zeros.address, 4), 2000);
	CHECK_EQ(stats().cow_breaks, thawed);
	CHECK_EQ(stats().pages_frozen, 2 * PAGES + 10 - thawed - 1);
	for (size_t i = 0; i < PAGES; i++) {
		bool written = i % 7 == 3;
		char *at = kit_page(one.address, i);
		CHECK(kit_is(at, written ? 1000 + i : 1 + i));
		CHECK_EQ(kit_is_readonly(at), !written);
		CHECK_EQ(kit_is_file(at), !written);
	}
	kit_check_filled(two.address, PAGES, 1);
	kit_check_filled(loose.address, PAGES, 1);
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	CHECK_EQ(self.cow_breaks, thawed);
	/* Thawed by name: still merged, and the kernel's copy-on-write looks after them. */
	CHECK_EQ(ksm_arena_thaw(arena, two.address, two.nbytes), 0);
	CHECK(!kit_is_readonly(two.address));
	CHECK_EQ(kit_is_file(two.address), 1);
	CHECK_EQ(kit_call_store(two.address), 0);
	CHECK_EQ(kit_is_file(two.address), 0);
	kit_check_filled(two.address, PAGES, 1);
	/* Frozen again: the one that a call has written is private now, and merges anew. */
	freeze(&two);
	CHECK(kit_is_readonly(two.address));
	CHECK_EQ(kit_is_file(two.address), 0);
	scan_until(kind == KSM_BARRIER_NONE ? 2 * PAGES - thawed : 3 * PAGES - thawed);
	CHECK_EQ(kit_is_file(two.address), 1);
	kit_check_filled(two.address, PAGES, 1);
	CHECK_EQ(self.failures, 0);
}

TEST_LIMIT(frozen_pages_merge_under_every_barrier, 60)
{
	on_each_kind(frozen_pages_merge);
}

static void freeze_merged(enum ksm_barrier_kind kind)
{
	if (kind == KSM_BARRIER_NONE)
		return;
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	scan_until(2 * PAGES);
	kit_fill(kit_page(one.address, 5), 600); /* broken by the kernel, nobody has seen it */
	freeze(&one);
	CHECK_EQ(kit_is_file(kit_page(one.address, 4)), 1);
	CHECK_EQ(kit_is_file(kit_page(one.address, 5)), 0);
	CHECK_EQ(stats().pages_frozen, PAGES);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is_readonly(kit_page(one.address, i)));
	kit_fill(kit_page(one.address, 4), 601);
	kit_fill(kit_page(one.address, 5), 602);
	CHECK_EQ(stats().cow_breaks, 1);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 4 ? 601 : i == 5 ? 602 : 1 + i));
	kit_check_filled(two.address, PAGES, 1);
	uint64_t unmerged = 0, broken = 0;
	CHECK_EQ(ksm_arena_unmerge(arena, &unmerged, &broken), 0);
	CHECK_EQ(unmerged, 2 * PAGES - 2);
	CHECK_EQ(stats().pages_merged, 0);
	CHECK_EQ(stats().pages_frozen, PAGES - 2); /* as before: frozen, but private */
	CHECK_EQ(kit_call_store(one.address), -EFAULT);
	CHECK_EQ(kit_is_file(one.address), 0);
	kit_fill(one.address, 603);
	kit_check_filled(kit_page(one.address, 6), PAGES - 6, 7);
	kit_check_filled(two.address, PAGES, 1);
}

TEST_LIMIT(merged_and_broken_pages_can_be_frozen, 60)
{
	on_each_kind(freeze_merged);
}

static void free_frozen(enum ksm_barrier_kind kind KSM_UNUSED)
{
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	freeze(&one);
	freeze(&two);
	scan();
	char *was = one.address;
	CHECK_EQ(kit_is_file(was), 1);
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(stats().pages_frozen, PAGES);
	CHECK_EQ(ksm_arena_alloc(arena, BYTES, 0, &one), 0);
	CHECK(one.address == was);
	for (size_t i = 0; i < PAGES; i++) {
		CHECK(kit_is(kit_page(one.address, i), 0));
		CHECK_EQ(kit_call_store(kit_page(one.address, i)), 0);
	}
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	kit_check_filled(two.address, PAGES, 1);
	CHECK_EQ(ksm_arena_free(arena, &two), 0); /* the last one */
	uint64_t freed;
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	struct ksm_stats all;
	CHECK_EQ(ksm_domain_stats(domain, &all), 0);
	CHECK_EQ(all.store_bytes, 0);
	CHECK_EQ(all.pages_merged, 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

TEST(freed_frozen_memory_comes_back_zeroed_and_writable)
{
	on_each_kind(free_frozen);
}

/* ---- threads -------------------------------------------------------------------------------------------------------------- */

static void storm(enum ksm_barrier_kind kind)
{
	struct ksm_block field = block(PAGES, 1), twin = block(PAGES, 1);
	struct crowd crowd;
	uint64_t frozen = 0, state = 7, refused = 0;
	for (size_t i = 0; i < PAGES; i++)
		memset(kit_page(twin.address, i), 0, 3 * 8);
	crowd_start(&crowd, field.address, PAGES, 3, 50);
	crowd.may_refuse = true;
	for (double until = harness_now() + 1.5; harness_now() < until;) {
		size_t first = kit_random(&state) % PAGES, n = 1 + kit_random(&state) % (PAGES - first), pages = 0;
		char *at = kit_page(field.address, first);
		int r = ksm_arena_freeze(arena, at, n * KSM_PAGE_SIZE, &pages);
		CHECK(!r || r == KSM_EMASKED);
		refused += r != 0;
		frozen += pages;
		CHECK_EQ(ksm_arena_freeze(arena, twin.address, twin.nbytes, NULL), r);
		switch (kit_random(&state) % 4) {
		case 0:
			scan();
			break;
		case 1:
			CHECK_EQ(ksm_arena_thaw(arena, at, n * KSM_PAGE_SIZE), 0);
			break;
		case 2:
			CHECK_EQ(ksm_arena_writable_begin(arena, at, n * KSM_PAGE_SIZE), 0);
			scan();
			CHECK_EQ(ksm_arena_writable_end(arena, at, n * KSM_PAGE_SIZE), 0);
			break;
		default:
			sched_yield();
		}
	}
	size_t lost = crowd_end(&crowd);
	crowd_check_rest(&crowd, 1);
	struct ksm_stats self;
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	printf("barrier %d: %llu pages frozen, %llu times refused, %llu merges, %llu breaks, %llu calls refused\n",
	       (int)kind, (unsigned long long)frozen, (unsigned long long)refused, (unsigned long long)self.merges,
	       (unsigned long long)self.cow_breaks, (unsigned long long)crowd.refusals);
	CHECK_EQ(lost, 0);
	CHECK_EQ(self.failures, 0);
	CHECK_GT(frozen, PAGES);
}

TEST_LIMIT(writers_lose_nothing_while_pages_freeze_thaw_and_merge, 60)
{
	on_each_kind(storm);
}

/* ---- for system calls ------------------------------------------------------------------------------------------------------- */

static void writable(enum ksm_barrier_kind kind)
{
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	char *at = one.address;
	freeze(&one);
	freeze(&two);
	scan();
	CHECK_EQ(stats().pages_merged, 2 * PAGES);
	CHECK_EQ(ksm_arena_writable_begin(arena, at + KSM_PAGE_SIZE - 1, 2), 0); /* touches two pages */
	CHECK_EQ(ksm_arena_writable_begin(arena, kit_page(at, 1), 9 * KSM_PAGE_SIZE), 0);
	CHECK_EQ(stats().pages_frozen, 2 * PAGES - 10);
	CHECK_EQ(kit_call_store(kit_page(at, 10)), -EFAULT);
	for (size_t i = 0; i < 10; i++) {
		CHECK_EQ(kit_is_file(kit_page(at, i)), 0);
		CHECK_EQ(kit_call_store(kit_page(at, i)), 0);
	}
	scan();
	scan();
	for (size_t i = 0; i < 10; i++)
		CHECK_EQ(kit_is_file(kit_page(at, i)), 0);       /* not merged meanwhile, though equal */
	CHECK_EQ(ksm_arena_writable_end(arena, at, 1), -EINVAL); /* other pages */
	CHECK_EQ(ksm_arena_writable_end(arena, at + KSM_PAGE_SIZE - 1, 2), 0);
	scan();
	CHECK_EQ(kit_is_file(kit_page(at, 1)), 0); /* the other one holds it still */
	CHECK_EQ(ksm_arena_writable_end(arena, kit_page(at, 1), 9 * KSM_PAGE_SIZE), 0);
	CHECK_EQ(ksm_arena_writable_end(arena, kit_page(at, 1), 9 * KSM_PAGE_SIZE), -EINVAL);
	if (kind == KSM_BARRIER_NONE)
		freeze(&one);
	scan_until(2 * PAGES);
	kit_check_filled(at, PAGES, 1);
	kit_check_filled(two.address, PAGES, 1);
	/* The same range twice: ended twice. */
	CHECK_EQ(ksm_arena_writable_begin(arena, at, BYTES), 0);
	CHECK_EQ(ksm_arena_writable_begin(arena, at, BYTES), 0);
	CHECK_EQ(ksm_arena_writable_end(arena, at, BYTES), 0);
	scan();
	CHECK_EQ(kit_is_file(at), 0);
	CHECK_EQ(ksm_arena_writable_end(arena, at, BYTES), 0);
	CHECK_EQ(ksm_arena_writable_end(arena, at, BYTES), -EINVAL);
	kit_check_filled(at, PAGES, 1);
}

TEST_LIMIT(what_is_held_for_calls_is_private_and_stays_so, 60)
{
	on_each_kind(writable);
}

/* ---- fork -------------------------------------------------------------------------------------------------------------------- */

static void across_a_fork(enum ksm_barrier_kind kind)
{
	uint32_t *steps = kit_steps();
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1), alone = block(PAGES, 7000);
	freeze(&one);
	freeze(&two);
	freeze(&alone);
	scan();
	CHECK_EQ(stats().pages_merged, 2 * PAGES);
	pid_t child = kit_fork();
	size_t mine = child ? 3 : 4, others_page = child ? 4 : 3;
	kit_fill(kit_page(one.address, mine), 900 + mine);
	kit_fill(kit_page(alone.address, mine), 950 + mine);
	kit_fill(kit_page(alone.address, 50), child ? 970 : 971);
	ksm_add_seqcst(steps, 1);
	KIT_WAIT(20, ksm_load_acquire(steps) >= 2); /* both have */
	CHECK(kit_is(kit_page(one.address, others_page), 1 + others_page));
	CHECK(kit_is(kit_page(alone.address, others_page), 7000 + others_page));
	CHECK(kit_is(kit_page(alone.address, 50), child ? 970 : 971));
	CHECK(kit_is_readonly(kit_page(one.address, others_page)));
	CHECK_EQ(kit_call_store(kit_page(one.address, others_page)), -EFAULT);
	CHECK_EQ(kit_call_store(kit_page(one.address, mine)), 0);
	CHECK(kit_is(kit_page(one.address, mine), 900 + mine));
	ksm_process_resume();
	CHECK_EQ(stats().pages_frozen, 3 * PAGES - 3);
	CHECK_EQ(stats().pages_merged, 2 * PAGES - 1);
	CHECK_EQ(ksm_arena_thaw(arena, two.address, two.nbytes), 0);
	kit_fill(kit_page(two.address, mine), 980 + mine);
	struct ksm_block again = block(PAGES, 1);
	freeze(&again);
	KIT_WAIT(20, (scan(), kit_is_file(again.address) == 1));
	for (size_t i = 0; i < PAGES; i++) {
		CHECK(kit_is(kit_page(one.address, i), i == mine ? 900 + mine : 1 + i));
		CHECK(kit_is(kit_page(two.address, i), i == mine ? 980 + mine : 1 + i));
		CHECK(kit_is(kit_page(alone.address, i), i == 50     ? child ? 970 : 971
							 : i == mine ? 950 + mine
								     : 7000 + i));
	}
	kit_check_filled(again.address, PAGES, 1);
	fflush(NULL);
	if (child == 0)
		_exit(0);
	CHECK_CHILD(child);
	(void)kind;
}

TEST_LIMIT(parent_and_child_thaw_each_their_own, 60)
{
	on_each_kind(across_a_fork);
}

/* A thread of the parent's is in the middle of thawing and of writing while another one forks, again and again. */
static char *pages_to_write;
static uint32_t writer_stop;

static void *keep_writing(void *argument)
{
	uint64_t *rounds = argument;
	while (!ksm_load_relaxed(&writer_stop)) {
		for (size_t i = 0; i < PAGES; i++)
			((volatile uint64_t *)kit_page(pages_to_write, i))[1] = *rounds;
		ksm_add_relaxed(rounds, 1);
	}
	return NULL;
}

TEST_LIMIT(a_fork_in_the_middle_of_a_fault, 60)
{
	attach(KSM_BARRIER_AUTO);
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	uint64_t rounds = 0;
	pthread_t writer;
	pages_to_write = one.address;
	CHECK_EQ(pthread_create(&writer, NULL, keep_writing, &rounds), 0);
	freeze(&two);
	for (int i = 0; i < 60; i++) {
		int r = ksm_arena_freeze(arena, one.address, one.nbytes, NULL);
		CHECK(!r || r == KSM_EMASKED);
		pid_t child = kit_fork();
		if (child == 0) {
			alarm((unsigned)harness_limit(20));
			for (size_t page = 0; page < PAGES; page++)
				kit_fill(kit_page(one.address, page), 4000 + page);
			kit_check_filled(one.address, PAGES, 4000);
			kit_check_filled(two.address, PAGES, 1);
			if (i % 10 == 0) {
				ksm_process_resume();
				freeze(&one);
				scan();
				kit_check_filled(one.address, PAGES, 4000);
				CHECK_EQ(ksm_arena_free(arena, &one), 0);
			}
			_exit(0);
		}
		CHECK_CHILD(child);
	}
	ksm_store_release(&writer_stop, 1);
	pthread_join(writer, NULL);
	CHECK_GT(rounds, 60);
	for (size_t page = 0; page < PAGES; page++) {
		((uint64_t *)kit_page(one.address, page))[1] = 0;
		char expected[KSM_PAGE_SIZE];
		kit_fill(expected, 1 + page);
		memset(expected + 8, 0, 8);
		CHECK(!memcmp(expected, kit_page(one.address, page), KSM_PAGE_SIZE));
	}
}
