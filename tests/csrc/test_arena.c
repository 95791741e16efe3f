/* SPDX-License-Identifier: MIT */
/* Arenas whose merged pages are read-only, and copied by our SIGSEGV handler when they are written: KSM_ARENA_SIGSEGV. */
#include "crowd.h"

#include "arena.h"

#define PAGES 200
#define BYTES (PAGES * KSM_PAGE_SIZE)

static struct ksm_domain *domain;
static struct ksm_arena *arena;

static void attach(enum ksm_barrier_kind kind)
{
	struct ksm_domain_options options = kit_options("d");
	options.barrier = kind;
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_SIGSEGV | KSM_ARENA_NO_SCAN, &arena), 0);
}

static void on_each_kind(void (*body)(enum ksm_barrier_kind kind))
{
	static const enum ksm_barrier_kind kinds[] = {KSM_BARRIER_MOVE, KSM_BARRIER_STOP, KSM_BARRIER_SEGV};
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

static struct ksm_arena_stats stats(void)
{
	struct ksm_arena_stats stats;
	CHECK_EQ(ksm_arena_stats(arena, &stats), 0);
	return stats;
}

static void scan(void)
{
	struct ksm_report report;
	CHECK_EQ(ksm_arena_scan(arena, &report), 0);
}

/* On a busy machine threads do not always stop in time. */
static void scan_until(uint64_t merged)
{
	KIT_WAIT(30, (scan(), stats().pages_merged >= merged));
	CHECK_EQ(stats().pages_merged, merged);
}

static void merged_is_read_only(enum ksm_barrier_kind kind KSM_UNUSED)
{
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	struct ksm_stats self;
	scan_until(2 * PAGES);
	CHECK_EQ(stats().sigsegv, 1);
	CHECK_EQ(stats().pages_frozen, 0);
	for (size_t i = 0; i < PAGES; i++) {
		CHECK(kit_is_readonly(kit_page(one.address, i)));
		CHECK_EQ(kit_is_file(kit_page(two.address, i)), 1);
	}
	CHECK_EQ(kit_call_store(one.address), -EFAULT);
	kit_check_filled(one.address, PAGES, 1);
	uint64_t written = 0;
	for (size_t i = 2; i < PAGES; i += 3, written++) {
		kit_fill(kit_page(one.address, i), 1000 + i); /* many stores */
		*(volatile char *)kit_page(one.address, i) ^= 0;
	}
	CHECK_EQ(stats().cow_breaks, written);
	CHECK_EQ(stats().pages_merged, 2 * PAGES - written);
	CHECK_EQ(stats().pages_broken, 0); /* they are ordinary pages at once */
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	CHECK_EQ(self.cow_breaks, written);
	for (size_t i = 0; i < PAGES; i++) {
		bool is_written = i % 3 == 2;
		char *at = kit_page(one.address, i);
		CHECK(kit_is(at, is_written ? 1000 + i : 1 + i));
		CHECK_EQ(kit_is_file(at), !is_written);
		CHECK_EQ(kit_is_readonly(at), !is_written);
	}
	kit_check_filled(two.address, PAGES, 1);
	for (size_t i = 2; i < PAGES; i += 3)
		kit_fill(kit_page(one.address, i), 1 + i); /* as they were: they merge again */
	scan_until(2 * PAGES);
	kit_fill(one.address, 77);
	CHECK_EQ(stats().cow_breaks, written + 1);
	/* All private again. */
	uint64_t unmerged = 0, broken = 9;
	CHECK_EQ(ksm_arena_unmerge(arena, &unmerged, &broken), 0);
	CHECK_EQ(unmerged, 2 * PAGES - 1);
	CHECK_EQ(broken, 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(kit_call_store(kit_page(two.address, i)), 0);
	CHECK(kit_is(one.address, 77));
	kit_check_filled(kit_page(one.address, 1), PAGES - 1, 2);
	kit_check_filled(two.address, PAGES, 1);
	CHECK_EQ(stats().cow_breaks, written + 1);
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	CHECK_EQ(self.failures, 0);
	CHECK_EQ(self.stops > 0, kind == KSM_BARRIER_STOP);
	uint64_t freed;
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	CHECK_LE(freed, PAGES); /* the scanner may have been quicker */
	struct ksm_stats all;
	CHECK_EQ(ksm_domain_stats(domain, &all), 0);
	CHECK_EQ(all.pages_shared, 0);
}

TEST_LIMIT(merged_pages_are_read_only_and_breaks_are_counted_exactly, 60)
{
	on_each_kind(merged_is_read_only);
}

/* ---- threads ------------------------------------------------------------------------------------------------------------- */

#define THREADS 4

static struct {
	char *at;
	uint32_t go;
} race;

static void *write_all(void *argument)
{
	size_t number = (size_t)(uintptr_t)argument;
	while (!ksm_load_acquire(&race.go))
		;
	for (size_t i = 0; i < PAGES; i += 2)
		((volatile uint64_t *)kit_page(race.at, i))[number] = 0xabc + i;
	return NULL;
}

static void exact_when_threads_race(enum ksm_barrier_kind kind KSM_UNUSED)
{
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	pthread_t threads[THREADS];
	uint64_t breaks = 0;
	race.at = one.address;
	for (int round = 0; round < 10; round++) {
		char expected[KSM_PAGE_SIZE];
		scan_until(2 * PAGES);
		race.go = 0;
		for (size_t i = 0; i < THREADS; i++)
			CHECK_EQ(pthread_create(&threads[i], NULL, write_all, (void *)(uintptr_t)i), 0);
		kit_sleep_ms(1);
		ksm_store_release(&race.go, 1);
		for (size_t i = 0; i < THREADS; i++)
			pthread_join(threads[i], NULL);
		breaks += PAGES / 2;
		CHECK_EQ(stats().cow_breaks, breaks); /* each page once, whoever came first */
		for (size_t i = 0; i < PAGES; i++) {
			kit_fill(expected, 1 + i);
			for (size_t j = 0; j < THREADS && i % 2 == 0; j++)
				((uint64_t *)expected)[j] = 0xabc + i;
			CHECK(!memcmp(expected, kit_page(one.address, i), KSM_PAGE_SIZE));
			if (i % 2 == 0)
				kit_fill(kit_page(one.address, i), 1 + i);
		}
	}
	kit_check_filled(two.address, PAGES, 1);
}

TEST_LIMIT(threads_that_race_for_a_page_break_it_once, 60)
{
	on_each_kind(exact_when_threads_race);
}

static void under_a_crowd(enum ksm_barrier_kind kind)
{
	struct ksm_block field = block(PAGES, 1), twin = block(PAGES, 1);
	struct crowd crowd;
	for (size_t i = 0; i < PAGES; i++)
		memset(kit_page(twin.address, i), 0, 3 * 8);
	crowd_start(&crowd, field.address, PAGES, 3, 200);
	crowd.may_refuse = true;
	for (double until = harness_now() + 2; harness_now() < until;) {
		scan();
		CHECK_EQ(ksm_arena_unmerge(arena, NULL, NULL), 0);
		for (size_t i = 0; i < PAGES;
		     i++) /* what the crowd is going to write is what frames hold for a while */
			((uint64_t *)kit_page(twin.address, i))[0] =
				((volatile uint64_t *)kit_page(field.address, i))[0];
	}
	CHECK_EQ(crowd_end(&crowd), 0);
	crowd_check_rest(&crowd, 1);
	struct ksm_stats self;
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	printf("barrier %d: %llu merges, %llu breaks, %llu calls refused, why_not %s\n", (int)kind,
	       (unsigned long long)self.merges, (unsigned long long)stats().cow_breaks,
	       (unsigned long long)crowd.refusals, ksm_error_name(self.why_not));
	CHECK_GT(self.merges, 0);
}

TEST_LIMIT(writers_lose_nothing, 60)
{
	on_each_kind(under_a_crowd);
}

/* ---- a program that reads into its memory ----------------------------------------------------------------------------------- */

static void calls_inside_writable(enum ksm_barrier_kind kind KSM_UNUSED)
{
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	scan_until(2 * PAGES);
	CHECK_EQ(read(zero, kit_page(one.address, 3), KSM_PAGE_SIZE), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(ksm_arena_writable_begin(arena, kit_page(one.address, 3), 2 * KSM_PAGE_SIZE), 0);
	scan();
	CHECK_EQ(read(zero, kit_page(one.address, 3), 2 * KSM_PAGE_SIZE), (ssize_t)(2 * KSM_PAGE_SIZE));
	scan(); /* zeros: they are not taken away either */
	CHECK_EQ(kit_call_store(kit_page(one.address, 3)), 0);
	CHECK_EQ(ksm_arena_writable_end(arena, kit_page(one.address, 3), 2 * KSM_PAGE_SIZE), 0);
	scan();
	CHECK_EQ(stats().pages_zero, 2);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 3 || i == 4 ? 0 : 1 + i));
	kit_check_filled(two.address, PAGES, 1);
	CHECK_EQ(kit_call_store(kit_page(one.address, 2)), -EFAULT);
	CHECK_EQ(stats().cow_breaks, 0); /* made private, not broken by a store */
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	struct ksm_block fresh = block(PAGES, 5000);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(kit_call_store(kit_page(fresh.address, i)), 0);
	kit_check_filled(fresh.address, PAGES, 5000);
}

TEST_LIMIT(calls_write_inside_writable, 60)
{
	on_each_kind(calls_inside_writable);
}

/* ---- fork ------------------------------------------------------------------------------------------------------------------- */

static void fork_breaks(enum ksm_barrier_kind kind KSM_UNUSED)
{
	uint32_t *steps = kit_steps();
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	scan_until(2 * PAGES);
	pid_t child = kit_fork();
	if (child == 0) {
		for (size_t i = 0; i < PAGES; i += 4)
			kit_fill(kit_page(one.address, i), 3000 + i);
		kit_reach(steps, 1);
		kit_await(steps, 2);
		ksm_process_resume();
		CHECK_EQ(stats().cow_breaks, PAGES / 4);
		for (size_t i = 0; i < PAGES; i++)
			CHECK(kit_is(kit_page(one.address, i), i % 4 ? 1 + i : 3000 + i));
		kit_check_filled(two.address, PAGES, 1);
		CHECK_EQ(kit_call_store(kit_page(one.address, 1)), -EFAULT);
		_exit(0);
	}
	kit_await(steps, 1);
	kit_check_filled(one.address, PAGES, 1);
	CHECK_EQ(stats().cow_breaks, 0);
	kit_fill(kit_page(one.address, 8), 4000);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	uint64_t freed;
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	kit_reach(steps, 2);
	CHECK_CHILD(child);
	CHECK_EQ(stats().cow_breaks, 1);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one.address, i), i == 8 ? 4000 : 1 + i));
}

TEST_LIMIT(parent_and_child_break_each_their_own, 60)
{
	on_each_kind(fork_breaks);
}

/* ---- mappings ------------------------------------------------------------------------------------------------------------------ */

/* Every second page of many is written: within the budget each costs two mappings; beyond it whole runs become writable. */
TEST_LIMIT(breaks_keep_to_the_budget_of_mappings, 60)
{
	enum {
		MANY = 30000,
		STEP = 2
	};
	if (!kit_can_merge())
		return;
	attach(KSM_BARRIER_AUTO);
	struct ksm_block one = block(MANY, 1), two = block(MANY, 1);
	scan_until(2 * MANY);
	printf("%d pages\n", 2 * MANY); /* what is printed has its buffer before mappings are counted */
	uint64_t before = ksm_os_count_maps(), budget;
	struct ksm_stats self;
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	budget = self.vma_budget;
	for (size_t i = 0; i < MANY; i += STEP)
		((uint64_t *)kit_page(one.address, i))[5] = i;
	uint64_t after = ksm_os_count_maps();
	printf("%llu mappings before, %llu after %d writes, budget %llu, %llu copied by us\n",
	       (unsigned long long)before, (unsigned long long)after, MANY / STEP, (unsigned long long)budget,
	       (unsigned long long)stats().cow_breaks);
	CHECK_LE(after, before + budget + 2);
	CHECK_LT(stats().cow_breaks, MANY / STEP); /* the kernel did the others */
	CHECK_GT(stats().cow_breaks, 1000);
	for (size_t i = 0; i < MANY; i++) {
		char expected[KSM_PAGE_SIZE];
		kit_fill(expected, 1 + i);
		if (i % STEP == 0)
			((uint64_t *)expected)[5] = i;
		CHECK(!memcmp(expected, kit_page(one.address, i), KSM_PAGE_SIZE));
	}
	kit_check_filled(two.address, MANY, 1);
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	CHECK_LE(ksm_os_count_maps(), before);
}

/* ---- who answers ----------------------------------------------------------------------------------------------------------------- */

/* Somebody takes the handler's place: until the scanner sees it stores may kill; afterwards all is writable, unmerged
 * nowhere, and nothing is lost. */
TEST_LIMIT(a_displaced_handler_suspends, 60)
{
	if (!kit_can_merge())
		return;
	attach(KSM_BARRIER_AUTO);
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	struct ksm_stats self;
	scan_until(2 * PAGES);
	signal(SIGSEGV, SIG_DFL);
	KIT_WAIT(10, !kit_is_readonly(one.address) && !kit_is_readonly(two.address));
	kit_fill(one.address, 50); /* the kernel's copy-on-write */
	kit_check_filled(two.address, PAGES, 1);
	KIT_WAIT(10, (ksm_domain_self_stats(domain, &self), self.suspensions == 1));
	struct ksm_block three = block(PAGES, 1);
	struct ksm_report report;
	CHECK_EQ(ksm_arena_scan(arena, &report), 0);
	CHECK_EQ(report.why_not, KSM_EDISPLACED);
	CHECK_EQ(kit_is_file(three.address), 0);
	CHECK_EQ(ksm_process_handler_reinstall(), 0);
	KIT_WAIT(10, (scan(), kit_is_file(three.address) == 1));
	CHECK(kit_is_readonly(three.address));
	kit_fill(three.address, 60);
	CHECK(kit_is(one.address, 50) && kit_is(three.address, 60));
	kit_check_filled(two.address, PAGES, 1);
	kit_check_filled(kit_page(three.address, 1), PAGES - 1, 2);
}

TEST(arenas_flags_are_checked)
{
	struct ksm_domain_options options = kit_options("d");
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_arena_create(domain, 4, &arena), -EINVAL);
	ksm_os_fault_set(KSM_OS_HANDLER, 0, UINT32_MAX, -EPERM);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_SIGSEGV, &arena), -EPERM); /* with the reason */
	ksm_os_fault_clear();
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_SIGSEGV, &arena), 0);
	CHECK_EQ(stats().sigsegv, 1);
	CHECK_EQ(stats().scan, 1);
	ksm_arena_release(arena);
	CHECK_EQ(ksm_arena_create(domain, 0, &arena), 0);
	CHECK_EQ(stats().sigsegv, 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

/* Each its own blocks, of one page and of many, of an object's size and of a page's; the books are everybody's: ARENA-3. */
static void *take_and_give(void *argument)
{
	static const size_t sizes[] = {1, 100, KSM_PAGE_SIZE, 5 * KSM_PAGE_SIZE, 3000, 40 * KSM_PAGE_SIZE};
	struct ksm_block blocks[KSM_COUNT(sizes)];
	uint64_t seed = (uintptr_t)argument;
	for (int round = 0; round < 300; round++) {
		for (size_t i = 0; i < KSM_COUNT(sizes); i++) {
			CHECK_EQ(ksm_arena_alloc(arena, sizes[i], i % 2 ? KSM_ALLOC_UNMERGEABLE : 0, &blocks[i]), 0);
			memset(blocks[i].address, (int)seed, sizes[i]);
		}
		for (size_t i = 0; i < KSM_COUNT(sizes); i++) {
			const unsigned char *bytes = blocks[i].address;
			CHECK(bytes[0] == seed && !memcmp(bytes, bytes + 1, sizes[i] - 1));
			CHECK_EQ(ksm_arena_free(arena, &blocks[i]), 0);
		}
	}
	return NULL;
}

TEST(threads_share_an_arena)
{
	pthread_t threads[4];
	attach(KSM_BARRIER_STOP);
	for (size_t i = 0; i < KSM_COUNT(threads); i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, take_and_give, (void *)(i + 1)), 0);
	for (size_t i = 0; i < KSM_COUNT(threads); i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	CHECK_EQ(stats().blocks, 0);
	CHECK_EQ(stats().allocated_bytes, 0);
	CHECK_EQ(stats().pages, 0);
}

/* A program unmaps 16 GiB that are registered, and an arena would come to lie there: every page would be known twice. */
TEST(areas_keep_away_from_what_is_registered)
{
	const size_t area = (size_t)16 << 30, nbytes = area + (64u << 20);
	struct ksm_region *region;
	attach(KSM_BARRIER_STOP);
	char *first = block(1, 1).address;
	char *at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(at != MAP_FAILED);
	CHECK_EQ(ksm_region_register(domain, at, nbytes, &region, NULL), 0);
	CHECK_SYS(munmap(at, nbytes));
	char *probe = mmap(NULL, area, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(probe + area > at && probe < at + nbytes); /* it is what the kernel gives next */
	CHECK_SYS(munmap(probe, area));
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
	char *second = block(1, 1).address;
	CHECK(second + KSM_PAGE_SIZE <= at || second >= at + nbytes);
	CHECK(second != first);
	CHECK_EQ(ksm_region_unregister(region), 0);
}
