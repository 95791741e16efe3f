/* SPDX-License-Identifier: MIT */
#include "guarded.h"

/* ---- one store --------------------------------------------------------------------------------------------------- */

typedef uint64_t across __attribute__((aligned(1)));

TEST(a_store_copies_its_page)
{
	struct guarded g = guarded_make(8, 1);
	uint64_t expected[KSM_PAGE_SIZE / 8];
	CHECK_EQ(ksm_handler_install(), 0);
	guarded_merge(&g, 2, 4, false);
	CHECK_EQ(guarded_mappings(&g), 3);
	for (size_t page = 0; page < 8; page++) /* loads do not come here */
		CHECK(kit_is(kit_page(g.at, page), 1 + page));
	CHECK_EQ(g.guard->breaks, 0);
	g.guard->vmas_left = 10;
	errno = 77;
	*guarded_word(&g, 3, 9) = 0x1234;
	CHECK_EQ(errno, 77);
	CHECK_EQ(g.guard->breaks, 1);
	CHECK_EQ(g.guard->thaws, 0);
	CHECK_EQ(g.guard->vmas_left, 8);
	CHECK_EQ(ksm_guard_get(g.guard, 3), KSM_GUARD_OPEN);
	kit_fill(expected, 4);
	expected[9] = 0x1234;
	CHECK(!memcmp(expected, kit_page(g.at, 3), KSM_PAGE_SIZE));
	CHECK_EQ(kit_is_file(kit_page(g.at, 3)), 0); /* anonymous memory again */
	CHECK_EQ(guarded_mappings(&g), 5);
	for (size_t page = 2; page < 6; page++) {
		guarded_check_frame(&g, page, 1 + page);
		CHECK_EQ(guarded_state(&g, page), page == 3 ? KSM_GUARD_OPEN : KSM_GUARD_MERGED);
	}
	*guarded_word(&g, 3, 9) = 0; /* no fault any more */
	CHECK_EQ(g.guard->breaks, 1);
	/* A store across two pages meets both. */
	volatile across *both = (volatile across *)(kit_page(g.at, 5) - 4);
	*both = UINT64_MAX;
	CHECK_EQ(g.guard->breaks, 3);
	CHECK_EQ(*both, UINT64_MAX);
	guarded_drop(&g);
}

TEST(a_store_thaws_its_page)
{
	struct guarded g = guarded_make(8, 1);
	CHECK_EQ(ksm_handler_install(), 0);
	guarded_freeze(&g, 0, 4);
	guarded_merge(&g, 4, 4, true);
	CHECK_EQ(ksm_guard_get(g.guard, 1), KSM_GUARD_READONLY | KSM_GUARD_FROZEN);
	*guarded_word(&g, 1, 7) ^= 0;
	CHECK_EQ(ksm_guard_get(g.guard, 1), KSM_GUARD_OPEN);
	CHECK_EQ(g.guard->thaws, 1);
	CHECK_EQ(g.guard->breaks, 0);
	*guarded_word(&g, 6, 7) ^= 0;
	CHECK_EQ(ksm_guard_get(g.guard, 6), KSM_GUARD_OPEN);
	CHECK_EQ(g.guard->thaws, 2);
	CHECK_EQ(g.guard->breaks, 1);
	CHECK_EQ(ksm_guard_get(g.guard, 0), KSM_GUARD_READONLY | KSM_GUARD_FROZEN);
	CHECK_EQ(ksm_guard_get(g.guard, 7), KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
	kit_check_filled(g.at, 8, 1);
	guarded_drop(&g);
}

TEST(breaking_by_hand)
{
	struct guarded g = guarded_make(6, 1);
	guarded_merge(&g, 0, 2, false);
	guarded_merge(&g, 2, 1, true);
	guarded_freeze(&g, 3, 1);
	ksm_guard_set(g.guard, 4, 1, KSM_GUARD_WRITABLE);
	for (size_t page = 0; page < 6; page++)
		CHECK_EQ(ksm_cow_break(g.guard, page), 0);
	for (size_t page = 0; page < 6; page++) {
		CHECK_EQ(ksm_guard_get(g.guard, page), page == 4 ? KSM_GUARD_WRITABLE : KSM_GUARD_OPEN);
		*guarded_word(&g, page, 100) ^= 0; /* nobody handles faults here */
	}
	CHECK_EQ(g.guard->breaks, 3);
	CHECK_EQ(g.guard->thaws, 2);
	kit_check_filled(g.at, 6, 1);
	/* No memory for anything: it says so, and everything is as it was. */
	guarded_merge(&g, 0, 2, true);
	g.guard->vmas_left = 100;
	ksm_os_fault_set(KSM_OS_MAP_ANON, 0, 1, -ENOMEM);
	ksm_os_fault_set(KSM_OS_PROTECT, 0, 1, -ENOMEM);
	CHECK_EQ(ksm_cow_break(g.guard, 0), 0); /* both by protection, one after the other */
	ksm_os_fault_clear();
	CHECK_EQ(ksm_guard_get(g.guard, 0), KSM_GUARD_WRITABLE);
	CHECK_EQ(ksm_guard_get(g.guard, 1), KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
	CHECK_EQ(ksm_cow_break(g.guard, 1), 0);
	guarded_merge(&g, 2, 1, true);
	ksm_os_fault_set(KSM_OS_MAP_ANON, 0, 1, -ENOMEM);
	ksm_os_fault_set(KSM_OS_PROTECT, 0, 2, -ENOMEM);
	CHECK_EQ(ksm_cow_break(g.guard, 2), -ENOMEM);
	ksm_os_fault_clear();
	CHECK_EQ(ksm_guard_get(g.guard, 2), KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
	CHECK_EQ(g.guard->busy, 0);
	CHECK_EQ(g.guard->vmas_left, 98);
	kit_check_filled(g.at, 6, 1);
	/* What was let through is let through again. */
	sigset_t mask;
	CHECK_EQ(pthread_sigmask(SIG_SETMASK, NULL, &mask), 0);
	CHECK_EQ(sigismember(&mask, SIGSEGV), 0);
	guarded_drop(&g);
}

/* ---- the copy, as others see it ------------------------------------------------------------------------------------- */

struct reader {
	pthread_t thread;
	const char *at;
	size_t pages;
	uint64_t first, rounds;
	uint32_t *stop;
	int through; /* read by system calls, too, through this */
};

static void *read_on(void *argument)
{
	struct reader *r = argument;
	uint64_t bytes[KSM_PAGE_SIZE / 8];
	while (!ksm_load_relaxed(r->stop)) {
		for (size_t page = 0; page < r->pages; page++) {
			const char *at = r->at + page * KSM_PAGE_SIZE;
			CHECK(kit_is(at, r->first + page));
			CHECK_EQ(pwrite(r->through, at, KSM_PAGE_SIZE, 0), (ssize_t)KSM_PAGE_SIZE);
			CHECK_EQ(pread(r->through, bytes, KSM_PAGE_SIZE, 0), (ssize_t)KSM_PAGE_SIZE);
			CHECK(kit_is(bytes, r->first + page));
		}
		r->rounds++;
	}
	return NULL;
}

TEST(a_copy_takes_the_place_in_one_step) /* COW-2 */
{
	static uint32_t stop;
	struct guarded g = guarded_make(16, 1);
	struct reader reader = {.at = g.at, .pages = 16, .first = 1, .stop = &stop, .through = ksm_os_memfd("x")};
	uint64_t state = 1, copies = 0;
	CHECK_EQ(ksm_os_pwrite(g.store, g.at, 16 * KSM_PAGE_SIZE, 0), 0);
	CHECK_EQ(pthread_create(&reader.thread, NULL, read_on, &reader), 0);
	for (double until = harness_now() + 1.5; harness_now() < until; copies++) {
		size_t n = 1 + kit_random(&state) % 8, page = kit_random(&state) % (16 - n);
		CHECK_EQ(ksm_os_map_frames(g.at, 16 * KSM_PAGE_SIZE, g.store, 0, false), 0);
		if (copies % 8 == 0)
			ksm_os_fault_set(KSM_OS_REMAP, 0, 1, -ENOMEM);
		CHECK_EQ(ksm_cow_copy_sigsafe(kit_page(g.at, page), n, copies % 2, copies % 4 < 2),
			 copies % 8 ? 0 : -ENOMEM);
		ksm_os_fault_clear();
		CHECK_EQ(kit_is_file(kit_page(g.at, page)), copies % 8 == 0);
	}
	ksm_store_release(&stop, 1);
	pthread_join(reader.thread, NULL);
	CHECK_GT(reader.rounds, 0);
	printf("%llu copies under %llu rounds of reading\n", (unsigned long long)copies,
	       (unsigned long long)reader.rounds);
	/* What is wanted writable is, and nothing is left behind. */
	CHECK_EQ(ksm_os_map_frames(g.at, 16 * KSM_PAGE_SIZE, g.store, 0, false), 0);
	uint64_t before = ksm_os_count_maps();
	for (int i = 0; i < 100; i++) {
		CHECK_EQ(ksm_os_map_frames(g.at, 16 * KSM_PAGE_SIZE, g.store, 0, false), 0);
		ksm_os_fault_set(i % 2 ? KSM_OS_REMAP : KSM_OS_PROTECT, 0, 1, -ENOMEM);
		CHECK_EQ(ksm_cow_copy_sigsafe(g.at, 8, false, true), -ENOMEM);
		ksm_os_fault_clear();
	}
	CHECK_EQ(ksm_os_count_maps(), before);
	CHECK_EQ(ksm_cow_copy_sigsafe(g.at, 16, true, true), 0);
	kit_check_filled(g.at, 16, 1);
	kit_fill(g.at, 5);
}

/* ---- many stores into the same pages --------------------------------------------------------------------------------- */

#define WRITERS 4
#define FIELD 48

static struct {
	struct guarded g;
	uint32_t stop;
	uint64_t shadows[WRITERS][FIELD], stores[WRITERS], merges;
} storm;

static void *store_on(void *argument)
{
	size_t self = (size_t)(uintptr_t)argument;
	uint64_t state = self + 1;
	while (!ksm_load_relaxed(&storm.stop)) {
		size_t page = kit_random(&state) % FIELD;
		volatile uint64_t *at = guarded_word(&storm.g, page, self);
		*at = *at + 1;
		storm.shadows[self][page]++;
		storm.stores[self]++;
	}
	return NULL;
}

/* What is OPEN is merged again, at once. */
static void merge_on(void)
{
	uint8_t was;
	for (size_t page = 0; page < FIELD; page++) {
		char *at = kit_page(storm.g.at, page);
		if (guarded_state(&storm.g, page) != KSM_GUARD_OPEN)
			continue;
		CHECK(ksm_guard_claim_sigsafe(storm.g.guard, page, &was));
		CHECK_EQ(was, KSM_GUARD_OPEN);
		CHECK_EQ(ksm_os_protect(at, KSM_PAGE_SIZE, false), 0);
		CHECK_EQ(ksm_os_pwrite(storm.g.store, at, KSM_PAGE_SIZE, page * KSM_PAGE_SIZE), 0);
		CHECK_EQ(ksm_os_map_frames(at, KSM_PAGE_SIZE, storm.g.store, page * KSM_PAGE_SIZE, false), 0);
		ksm_guard_set(storm.g.guard, page, 1, KSM_GUARD_MERGED);
		storm.merges++;
	}
}

/* For so long, and until there were so many copies. Returns how many words are not what was stored. */
static size_t run_storm(double seconds, uint64_t copies)
{
	pthread_t threads[WRITERS];
	size_t lost = 0;
	storm.g = guarded_make(FIELD, 1);
	storm.stop = 0;
	storm.merges = 0;
	memset(storm.shadows, 0, sizeof(storm.shadows));
	for (size_t page = 0; page < FIELD; page++)
		memset(kit_page(storm.g.at, page), 0, WRITERS * 8);
	for (size_t i = 0; i < WRITERS; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, store_on, (void *)(uintptr_t)i), 0);
	double start = harness_now();
	while (kit_goes_on(start, seconds, ksm_load_relaxed(&storm.g.guard->breaks) >= copies))
		merge_on();
	ksm_store_release(&storm.stop, 1);
	for (size_t i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	for (size_t page = 0; page < FIELD; page++) {
		char expected[KSM_PAGE_SIZE];
		kit_fill(expected, 1 + page);
		CHECK(!memcmp(kit_page(storm.g.at, page) + WRITERS * 8, expected + WRITERS * 8,
			      KSM_PAGE_SIZE - WRITERS * 8));
		for (size_t i = 0; i < WRITERS; i++)
			lost += *guarded_word(&storm.g, page, i) != storm.shadows[i][page];
	}
	return lost;
}

TEST_LIMIT(no_store_is_lost_and_every_copy_is_counted, 60)
{
	CHECK_EQ(ksm_handler_install(), 0);
	for (int round = 0; round < 3; round++) {
		uint64_t merged = 0;
		CHECK_EQ(run_storm(2, 101), 0);
		for (size_t page = 0; page < FIELD; page++)
			merged += guarded_state(&storm.g, page) == KSM_GUARD_MERGED;
		CHECK_EQ(storm.g.guard->breaks, storm.merges - merged);
		CHECK_GT(storm.g.guard->breaks, 100);
		printf("%llu merges, %llu copies, %llu stores\n", (unsigned long long)storm.merges,
		       (unsigned long long)storm.g.guard->breaks,
		       (unsigned long long)(storm.stores[0] + storm.stores[1] + storm.stores[2] + storm.stores[3]));
		guarded_drop(&storm.g);
	}
}

/* The same without the claim: two threads copy one page, and the second copy takes the first thread's store away. */
static void copy_unclaimed(int signal, siginfo_t *info, void *context)
{
	size_t page;
	struct ksm_guard *guard = ksm_guard_find_sigsafe(info->si_addr, &page);
	(void)signal;
	(void)context;
	if (!guard)
		_exit(1);
	char *at = kit_page(guard->base, page);
	if (KSM_GUARD_STATE(ksm_guard_get(guard, page)) != KSM_GUARD_MERGED) {
		/* Merged, and then said to be OPEN by a late one: nobody merges it again, and it would fault for ever. */
		if (ksm_load_relaxed(&storm.stop))
			mprotect(at, KSM_PAGE_SIZE, PROT_READ | PROT_WRITE);
		return;
	}
	ksm_cow_copy_sigsafe(at, 1, true, false);
	ksm_guard_set(guard, page, 1, KSM_GUARD_OPEN);
}

TEST_LIMIT(without_the_claim_stores_are_lost, 240)
{
	struct sigaction action = {.sa_sigaction = copy_unclaimed, .sa_flags = SA_SIGINFO | SA_RESTART};
	size_t lost = 0;
	sigfillset(&action.sa_mask);
	CHECK_SYS(sigaction(SIGSEGV, &action, NULL));
	for (int round = 0; round < 40 && !lost; round++)
		lost += run_storm(1, 0);
	CHECK_GT(lost, 0); /* the test can tell */
}

/* ---- no room, no memory -------------------------------------------------------------------------------------------------- */

TEST(beyond_the_budget_whole_runs_become_writable) /* COW-3 */
{
	struct guarded g = guarded_make(64, 1);
	CHECK_EQ(ksm_handler_install(), 0);
	guarded_merge(&g, 0, 40, false);
	guarded_merge(&g, 41, 10, true);
	guarded_freeze(&g, 52, 5);
	g.guard->vmas_left = 5;
	*guarded_word(&g, 20, 0) ^= 0;
	*guarded_word(&g, 30, 0) ^= 0;
	CHECK_EQ(g.guard->breaks, 2);
	CHECK_EQ(g.guard->vmas_left, 1);
	size_t mappings = guarded_mappings(&g);
	*guarded_word(&g, 25, 0) ^= 0; /* between the two */
	CHECK_EQ(guarded_mappings(&g), mappings);
	CHECK_EQ(g.guard->vmas_left, 1);
	CHECK_EQ(g.guard->breaks, 2);
	for (size_t page = 0; page < 40; page++) {
		bool copied = page == 20 || page == 30, writable = page > 20 && page < 30;
		CHECK_EQ(ksm_guard_get(g.guard, page), copied     ? KSM_GUARD_OPEN
						       : writable ? KSM_GUARD_WRITABLE
								  : KSM_GUARD_MERGED);
	}
	*guarded_word(&g, 45, 0) ^= 0;
	CHECK_EQ(g.guard->thaws, 10);
	for (size_t page = 41; page < 51; page++)
		CHECK_EQ(ksm_guard_get(g.guard, page), KSM_GUARD_WRITABLE);
	*guarded_word(&g, 54, 0) ^= 0;
	CHECK_EQ(g.guard->thaws, 15);
	for (size_t page = 52; page < 57; page++)
		CHECK_EQ(ksm_guard_get(g.guard, page), KSM_GUARD_OPEN);
	CHECK_LE(guarded_mappings(&g), mappings);
	kit_check_filled(g.at, 64, 1);
	for (size_t page = 0; page < 64; page++) { /* the kernel's copy-on-write takes over: frames stay as they are */
		kit_fill(kit_page(g.at, page), 7);
		if (page < 51 && page != 40)
			guarded_check_frame(&g, page, 1 + page);
	}
	guarded_drop(&g);
}

struct storer {
	pthread_t thread;
	volatile uint64_t *at;
	uint64_t value;
	uint32_t done;
};

static void *store_once(void *argument)
{
	struct storer *self = argument;
	*self->at = self->value;
	ksm_store_release(&self->done, 1);
	return NULL;
}

TEST_LIMIT(without_memory_no_store_is_refused, 60) /* COW-3 */
{
	static const uint32_t many[] = {0, 1, 2, 3, 30};
	CHECK_EQ(ksm_handler_install(), 0);
	for (size_t i = 0; i < 5 * 5 * 5 * 2; i++) {
		struct guarded g = guarded_make(12, 1);
		struct storer storers[3];
		bool frozen = i % 2;
		guarded_merge(&g, 1, 8, frozen);
		ksm_os_fault_set(KSM_OS_MAP_ANON, 0, many[i / 2 % 5], -ENOMEM);
		ksm_os_fault_set(KSM_OS_REMAP, 0, many[i / 10 % 5], -ENOMEM);
		ksm_os_fault_set(KSM_OS_PROTECT, 0, many[i / 50], -ENOMEM);
		for (size_t j = 0; j < 3; j++) {
			storers[j] = (struct storer){.at = guarded_word(&g, 2 + 2 * j, 3), .value = 99 + j};
			CHECK_EQ(pthread_create(&storers[j].thread, NULL, store_once, &storers[j]), 0);
		}
		for (size_t j = 0; j < 3; j++)
			pthread_join(storers[j].thread, NULL);
		ksm_os_fault_clear();
		uint64_t copied = 0;
		for (size_t page = 0; page < 12; page++) {
			enum ksm_guard_state state = guarded_state(&g, page);
			bool stored = page == 2 || page == 4 || page == 6;
			uint64_t expected[KSM_PAGE_SIZE / 8];
			kit_fill(expected, 1 + page);
			if (stored)
				expected[3] = 99 + (page - 2) / 2;
			CHECK(!memcmp(expected, kit_page(g.at, page), KSM_PAGE_SIZE));
			CHECK(!stored || state == KSM_GUARD_OPEN || state == KSM_GUARD_WRITABLE);
			CHECK(page > 0 && page < 9 ? state != KSM_GUARD_READONLY : state == KSM_GUARD_OPEN);
			copied += stored && state == KSM_GUARD_OPEN;
			/* What says MERGED is read-only: nobody can have stored there unseen. */
			char *at = kit_page(g.at, page);
			if (state == KSM_GUARD_MERGED)
				CHECK_EQ(pread(g.store, at, 1, 0) < 0 ? errno : 0, EFAULT);
			else
				CHECK_EQ(pread(g.store, at, 0, 0), 0);
		}
		CHECK_EQ(g.guard->breaks, copied);
		CHECK_EQ(g.guard->busy, 0);
		guarded_drop(&g);
	}
}

/* ---- stores that wait -------------------------------------------------------------------------------------------------- */

TEST(a_store_waits_while_somebody_is_at_work)
{
	struct guarded g = guarded_make(4, 1);
	struct storer storer = {.at = guarded_word(&g, 2, 0), .value = 5};
	uint8_t was;
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK(ksm_guard_claim_sigsafe(g.guard, 2, &was));
	CHECK_EQ(ksm_os_protect(kit_page(g.at, 2), KSM_PAGE_SIZE, false), 0);
	CHECK_EQ(pthread_create(&storer.thread, NULL, store_once, &storer), 0);
	kit_sleep_ms(100);
	CHECK(!ksm_load_acquire(&storer.done));
	CHECK(kit_is(kit_page(g.at, 2), 3));
	CHECK_EQ(ksm_os_protect(kit_page(g.at, 2), KSM_PAGE_SIZE, true), 0);
	ksm_guard_set(g.guard, 2, 1, was);
	pthread_join(storer.thread, NULL);
	CHECK_EQ(*storer.at, 5);
	guarded_drop(&g);
}

/* A thread that nobody else gets the processor from must not wait for one that needs it: COW-5. */
TEST(a_real_time_thread_waits_without_harm)
{
	struct guarded g = guarded_make(4, 1);
	struct storer storer = {.at = guarded_word(&g, 2, 0), .value = 5};
	struct sched_param param = {.sched_priority = 10};
	pthread_attr_t attributes;
	cpu_set_t one;
	uint8_t was;
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	CHECK_EQ(ksm_handler_install(), 0);
	pthread_attr_init(&attributes);
	pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
	pthread_attr_setschedparam(&attributes, &param);
	CHECK_SYS(sched_setaffinity(0, sizeof(one), &one)); /* and of the thread */
	CHECK(ksm_guard_claim_sigsafe(g.guard, 2, &was));
	CHECK_EQ(ksm_os_protect(kit_page(g.at, 2), KSM_PAGE_SIZE, false), 0);
	int r = pthread_create(&storer.thread, &attributes, store_once, &storer);
	if (r == EPERM) {
		printf("no real-time threads here\n");
		return;
	}
	CHECK_EQ(r, 0);
	kit_sleep_ms(20); /* comes back although that thread has priority */
	CHECK_EQ(ksm_os_protect(kit_page(g.at, 2), KSM_PAGE_SIZE, true), 0);
	ksm_guard_set(g.guard, 2, 1, was);
	pthread_join(storer.thread, NULL);
	CHECK_EQ(*storer.at, 5);
}

/* ---- whose fault is it ---------------------------------------------------------------------------------------------------- */

static int tries_until_refused(void *at, int tid)
{
	int tries = 1;
	while (ksm_cow_fault_sigsafe(at, tid) == KSM_COW_RETRY)
		CHECK_LT(tries++, 1000);
	return tries;
}

TEST(others_faults_are_refused_after_a_while) /* COW-4 */
{
	struct guarded g = guarded_make(4, 1);
	char *outside = kit_map(1);
	uint8_t was;
	CHECK_EQ(tries_until_refused(outside, 7), 1);
	CHECK_EQ(tries_until_refused(g.at, 7), 100);
	CHECK_EQ(tries_until_refused(g.at, 7), 100);
	ksm_guard_set(g.guard, 1, 1, KSM_GUARD_WRITABLE);
	CHECK_EQ(tries_until_refused(kit_page(g.at, 1), 7), 100);
	/* In a row, by one thread, at one address. */
	for (int i = 0; i < 1000; i++) {
		CHECK_EQ(ksm_cow_fault_sigsafe(g.at, 8), KSM_COW_RETRY);
		CHECK_EQ(ksm_cow_fault_sigsafe(g.at + 8, 8), KSM_COW_RETRY);
	}
	/* Somebody at work on the page: begin again. */
	for (int i = 0; i < 90; i++)
		CHECK_EQ(ksm_cow_fault_sigsafe(g.at, 9), KSM_COW_RETRY);
	CHECK(ksm_guard_claim_sigsafe(g.guard, 0, &was));
	CHECK_EQ(ksm_cow_fault_sigsafe(g.at, 9), KSM_COW_RETRY);
	ksm_guard_set(g.guard, 0, 1, was);
	CHECK_EQ(tries_until_refused(g.at, 9), 100);
	/* More threads than there are places: each comes to an end. */
	for (int tid = 1000; tid < 3000; tid++)
		CHECK_EQ(tries_until_refused(g.at, tid), 100);
	/* A guard that has just gone: once. */
	ksm_guard_destroy(g.guard);
	CHECK_EQ(tries_until_refused(g.at, 7), 2);
	CHECK_EQ(tries_until_refused(g.at, 7), 1);
	CHECK_EQ(tries_until_refused(outside, 7), 1);
}

/* Memory stops being guarded while it is written: COW-6. */
TEST_LIMIT(guards_come_and_go_under_stores, 30)
{
	pthread_t threads[WRITERS];
	uint64_t guards = 0, breaks = 0;
	CHECK_EQ(ksm_handler_install(), 0);
	storm.g = guarded_make(FIELD, 0);
	for (size_t page = 0; page < FIELD; page++)
		kit_fill(kit_page(storm.g.at, page), 0);
	for (size_t i = 0; i < WRITERS; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, store_on, (void *)(uintptr_t)i), 0);
	for (double until = harness_now() + 3; harness_now() < until; guards++) {
		merge_on();
		for (size_t page = 0; page < FIELD; page++)
			CHECK_EQ(ksm_cow_break(storm.g.guard, page), 0);
		breaks += storm.g.guard->breaks;
		ksm_guard_destroy(storm.g.guard);
		CHECK_EQ(ksm_guard_create(storm.g.at, FIELD, &storm.g.guard), 0);
	}
	ksm_store_release(&storm.stop, 1);
	for (size_t i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQ(breaks, storm.merges);
	for (size_t page = 0; page < FIELD; page++)
		for (size_t i = 0; i < WRITERS; i++)
			CHECK_EQ(*guarded_word(&storm.g, page, i), storm.shadows[i][page]);
	printf("%llu guards, %llu merges\n", (unsigned long long)guards, (unsigned long long)storm.merges);
}
