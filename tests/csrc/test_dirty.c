/* SPDX-License-Identifier: MIT */
/* Which pages were written: DIRTY-1 to 5, with the kernel's help and without. */
#include "crowd.h"
#include "members.h"

#include "arena.h"
#include "dirty.h"

#include <dirent.h>
#include <sys/uio.h>

#define PAGES 300

static bool is_tracked(const struct ksm_member *member)
{
	if (member->scanner.tracker.uffd >= 0)
		return true;
	printf("writes are not tracked here: %s\n", ksm_error_name(member->scanner.tracker.error));
	return false;
}

/* Pages that differ from each other, looked at until all are candidates. */
static struct ksm_region *candidates(struct ksm_member *member, char **at)
{
	*at = kit_map_filled(PAGES, 1);
	struct ksm_region *region = members_region(member, *at, PAGES);
	members_merge(member);
	CHECK_EQ(region->states[KSM_PAGE_CANDIDATE], PAGES);
	return region;
}

/* DIRTY-2. Nobody writes now. */
static void check_notes(struct ksm_member *member, struct ksm_region *region)
{
	ksm_merge_lock(&member->peer);
	for (ksm_pageno page = 0; page < region->used; page += KSM_PIECE_PAGES)
		ksm_dirty_update(region, page, true);
	for (ksm_pageno page = 0; page < region->used; page++) {
		bool clean = ksm_region_is_clean(region, page);
		if (clean && ksm_page_digest(ksm_region_page(region, page)) != ksm_region_digest(region, page))
			FAIL("page %zu is called clean, and is not", page);
		if (!clean && ksm_region_state(region, page) == KSM_PAGE_CANDIDATE)
			if (!(*ksm_region_todo(region, page) & KSM_TODO_LOOK))
				FAIL("page %zu is neither clean nor to be looked at", page);
	}
	ksm_merge_unlock(&member->peer);
}

TEST(what_nobody_writes_is_not_read_again)
{
	char *at;
	struct ksm_member *a = members_join("d");
	if (!kit_can_merge() || !is_tracked(a))
		return;
	struct ksm_region *region = candidates(a, &at);
	for (ksm_pageno page = 0; page < PAGES; page++)
		CHECK(ksm_region_is_clean(region, page));
	kit_fill(kit_page(at, 70), 1000);
	members_pass(a);
	struct ksm_merge_counts counts = {0};
	CHECK(ksm_scan_batch(&a->scanner, 1000000, 1000000, NULL) ||
	      ksm_scan_batch(&a->scanner, 1000000, 1000000, NULL));
	CHECK(ksm_scan_batch(&a->scanner, 1000000, 1000000, NULL));
	counts = a->scanner.pass;
	CHECK_EQ(counts.scanned, 0);
	CHECK_EQ(counts.written, 0);
	check_notes(a, region);
	CHECK_EQ(region->states[KSM_PAGE_CANDIDATE], PAGES);
	members_leave(a);
}

/* As before there was tracking, and the control: the same passes read everything. */
TEST(without_it_everything_is_read)
{
	char *at;
	struct ksm_member *a = members_join("d");
	if (!kit_can_merge())
		return;
	ksm_tracker_fini(&a->scanner.tracker);
	struct ksm_region *region = candidates(a, &at);
	for (int i = 0; i < 3; i++)
		CHECK(ksm_scan_batch(&a->scanner, 1000000, 1000000, NULL));
	CHECK_EQ(a->scanner.pass.scanned, PAGES);
	for (ksm_pageno page = 0; page < PAGES; page++)
		CHECK(!ksm_region_is_clean(region, page));
	kit_fill(kit_page(at, 5), 6 + 1); /* as its neighbour */
	CHECK_EQ(members_merge(a), 2);
	members_leave(a);
}

/* ---- every kind of write ---------------------------------------------------------------------------------------- */

static char *memory;

static void by_store(char *page, uint64_t seed)
{
	kit_fill(page, seed);
}

static void by_read(char *page, uint64_t seed)
{
	char bytes[KSM_PAGE_SIZE];
	int fd = ksm_os_memfd("bytes");
	kit_fill(bytes, seed);
	CHECK_EQ(ksm_os_pwrite(fd, bytes, sizeof(bytes), 0), 0);
	CHECK_EQ(pread(fd, page, KSM_PAGE_SIZE, 0), (ssize_t)KSM_PAGE_SIZE);
	ksm_os_close(fd);
}

static void by_another_process(char *page, uint64_t seed)
{
	pid_t parent = getpid(), child = fork();
	if (child == 0) {
		char bytes[KSM_PAGE_SIZE];
		struct iovec from = {bytes, sizeof(bytes)}, to = {page, KSM_PAGE_SIZE};
		kit_fill(bytes, seed);
		_exit(process_vm_writev(parent, &from, 1, &to, 1, 0) != (ssize_t)KSM_PAGE_SIZE);
	}
	CHECK_CHILD(child);
}

static void by_dropping(char *page, uint64_t seed)
{
	CHECK_SYS(madvise(page, KSM_PAGE_SIZE, MADV_DONTNEED));
	kit_fill(page, seed);
}

static void by_mapping(char *page, uint64_t seed)
{
	CHECK_EQ(ksm_os_map_anon(page, KSM_PAGE_SIZE, true, false, NULL), 0);
	kit_fill(page, seed);
}

static void by_moving(char *page, uint64_t seed)
{
	void *other;
	CHECK_EQ(ksm_os_map_anon(NULL, KSM_PAGE_SIZE, false, false, &other), 0);
	kit_fill(other, seed);
	CHECK(mremap(other, KSM_PAGE_SIZE, KSM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, page) == page);
}

static void by_going_and_coming_back(char *page, uint64_t seed)
{
	void *other;
	CHECK_EQ(ksm_os_map_anon(NULL, KSM_PAGE_SIZE, false, false, &other), 0);
	CHECK(mremap(page, KSM_PAGE_SIZE, KSM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, other) == other);
	kit_fill(other, seed);
	CHECK(mremap(other, KSM_PAGE_SIZE, KSM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, page) == page);
}

static void (*const ways[])(char *page, uint64_t seed) = {
	by_store, by_read, by_another_process, by_dropping, by_mapping, by_moving, by_going_and_coming_back,
};

static void every_way(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	if (!is_tracked(a))
		return;
	struct ksm_region *region = candidates(a, &memory);
	for (size_t way = 0; way < KSM_COUNT(ways); way++) {
		printf("way %zu\n", way);
		ksm_pageno page = 10 + 20 * way, twin = page + 1;
		ways[way](kit_page(memory, page), 1 + twin);
		check_notes(a, region);
		if (ksm_region_is_clean(region, page))
			FAIL("way %zu was not noticed", way);
		CHECK_EQ(members_merge(a), 2);
		ways[way](kit_page(memory, page), 5000 + way); /* now it is a merged page that is written */
		members_merge(a);
		CHECK(kit_is(kit_page(memory, page), 5000 + way));
		CHECK(kit_is(kit_page(memory, twin), 1 + twin));
	}
}

TEST(every_way_of_writing_is_noticed)
{
	members_on_each_barrier(every_way);
}

/* ---- at random ------------------------------------------------------------------------------------------------ */

static void anything(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	uint64_t seeds[PAGES], random = 88172645463325252ull;
	if (!is_tracked(a))
		return;
	struct ksm_region *region = candidates(a, &memory);
	for (size_t i = 0; i < PAGES; i++)
		seeds[i] = 1 + i;
	for (int round = 0; round < 60; round++) {
		for (int i = 0; i < 40; i++) {
			random ^= random << 13, random ^= random >> 7, random ^= random << 17;
			size_t page = random % PAGES;
			seeds[page] = 1 + (random >> 20) % 50; /* many twins */
			by_store(kit_page(memory, page), seeds[page]);
		}
		if (round % 3)
			ksm_scan_batch(&a->scanner, 100, 100, NULL);
		else
			members_pass(a);
		check_notes(a, region);
		for (size_t page = 0; page < PAGES; page++)
			CHECK(kit_is(kit_page(memory, page), seeds[page]));
	}
	CHECK_GT(members_counter(a, KSM_MERGES),
		 kit_is_without("stop") ? 200 : 500); /* broken pages are given back in one */
	members_merge(a);
	CHECK_GE(region->states[KSM_PAGE_MERGED] + region->states[KSM_PAGE_BROKEN], PAGES - 10);
	if (!kit_is_without("stop"))
		CHECK_GE(region->states[KSM_PAGE_MERGED], PAGES - 10);
}

TEST(notes_are_right_whatever_is_written)
{
	members_on_each_barrier(anything);
}

/* ---- pages that are written all the time ------------------------------------------------------------------------- */

TEST(busy_pages_are_left_alone_until_the_debt_is_paid)
{
	char *at;
	struct ksm_member *a = members_join("d");
	if (!kit_can_merge() || !is_tracked(a))
		return;
	struct ksm_region *region = candidates(a, &at);
	uint64_t armed = 0, passes = 0, until = ksm_os_now_ns() + 300000000u;
	while (ksm_os_now_ns() < until) {
		for (size_t i = 0; i < PAGES; i++)
			++*(volatile char *)kit_page(at, i);
		while (!ksm_scan_batch(&a->scanner, 1000000, 1000000, NULL))
			;
		armed += region->pieces[0].watch == KSM_WATCH_ARMED;
		passes++;
	}
	printf("%llu of %llu passes marked the pages again\n", (unsigned long long)armed, (unsigned long long)passes);
	/* a fault costs 1.2 µs, a twentieth of the time is for them; two marks belong to a debt, and it begins with none */
	CHECK_LE(armed, 2 * (300000000u / 20 / 1200 / PAGES) + 4);
	CHECK_GT(passes, armed);
	/* they come to rest, and are found */
	kit_fill(kit_page(at, 17), 3000);
	kit_fill(kit_page(at, 18), 3000);
	KIT_WAIT(20,
		 (ksm_scan_batch(&a->scanner, 1000000, 1000000, NULL),
		  ksm_region_state(region, 17) == KSM_PAGE_MERGED && ksm_region_state(region, 18) == KSM_PAGE_MERGED));
	members_leave(a);
}

/* ---- faults and forks ------------------------------------------------------------------------------------------- */

static void fails(enum ksm_os_call call, uint32_t skip)
{
	char *at;
	struct ksm_member *a = members_join("d");
	if (!is_tracked(a))
		return;
	struct ksm_region *region = candidates(a, &at);
	size_t count;
	const int *errors = ksm_os_fault_errors(call, &count);
	for (size_t i = 0; i < count; i++) {
		kit_fill(kit_page(at, 100 + 2 * i), 7000 + i);
		kit_fill(kit_page(at, 101 + 2 * i), 7000 + i);
		ksm_os_fault_set(call, skip, UINT32_MAX, errors[i]);
		members_merge(a);
		ksm_os_fault_clear();
		members_merge(a);
		CHECK_EQ(ksm_region_state(region, 100 + 2 * i), KSM_PAGE_MERGED);
		CHECK_EQ(ksm_region_state(region, 101 + 2 * i), KSM_PAGE_MERGED);
		check_notes(a, region);
	}
	members_leave(a);
}

TEST(whatever_fails_digests_decide)
{
	if (!kit_can_merge())
		return;
	for (uint32_t skip = 0; skip < 4; skip++) {
		fails(KSM_OS_PAGE_RANGES, skip);
		fails(KSM_OS_UFFD_REGISTER, skip);
		fails(KSM_OS_UFFD_UNREGISTER, skip);
	}
	ksm_os_fault_set(KSM_OS_UFFD_OPEN, 0, UINT32_MAX, -EPERM);
	struct ksm_member *a = members_join_with("e", KSM_BARRIER_STOP);
	ksm_os_fault_clear();
	CHECK_EQ(a->scanner.tracker.error, -EPERM);
	char *at = kit_map_filled(2, 0);
	kit_fill(at, 1);
	kit_fill(kit_page(at, 1), 1);
	members_region(a, at, 2);
	CHECK_EQ(members_merge(a), 2);
	members_leave(a);
}

static size_t written_for(int pagemap, const char *at, size_t pages)
{
	struct ksm_os_query query = {.all = KSM_PAGE_WATCHED | KSM_PAGE_WRITTEN, .any = KSM_PAGE_PRESENT};
	struct ksm_os_range ranges[PAGES] = {0};
	const char *from = at;
	size_t count = 0;
	int n = ksm_os_page_ranges(pagemap, &from, at + pages * KSM_PAGE_SIZE, &query, ranges, PAGES);
	CHECK_GE(n, 0);
	for (int i = 0; i < n; i++)
		count += (ranges[i].to - ranges[i].from) / KSM_PAGE_SIZE;
	return count;
}

/* The program may have a use for it itself: what it has not asked for yet must still be there when it does. */
TEST(marks_of_another_descriptor_stay)
{
	struct ksm_os_query protect = {
		.all = KSM_PAGE_WATCHED | KSM_PAGE_WRITTEN, .any = KSM_PAGE_PRESENT, .protect = true};
	struct ksm_os_range ranges[PAGES] = {0};
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_STOP);
	if (!is_tracked(a))
		return;
	int theirs = ksm_os_uffd_open_watch();
	char *at = kit_map_filled(PAGES, 1), *watched = kit_page(at, 100);
	const char *from = watched;
	CHECK_EQ(ksm_os_uffd_register(theirs, watched, 50 * KSM_PAGE_SIZE, KSM_UFFD_PROTECT), 0);
	CHECK_GE(ksm_os_page_ranges(a->peer.fds.pagemap, &from, watched + 50 * KSM_PAGE_SIZE, &protect, ranges, PAGES),
		 0);
	CHECK_EQ(written_for(a->peer.fds.pagemap, watched, 50), 0);
	struct ksm_region *region = members_region(a, at, PAGES);
	region->registered = true;
	members_merge(a);
	for (size_t i = 0; i < 10; i++)
		kit_fill(kit_page(watched, i), 600 + i);
	members_merge(a);
	members_pass(a);
	CHECK_EQ(written_for(a->peer.fds.pagemap, watched, 50), 10);
	CHECK_EQ(region->pieces[0].watch, KSM_WATCH_NONE);
	ksm_merge_lock(&a->peer);
	ksm_dirty_release(region);
	ksm_merge_unlock(&a->peer);
	CHECK_EQ(written_for(a->peer.fds.pagemap, watched, 50), 10);
	CHECK(kit_is_registered(watched, 50));
	ksm_os_close(theirs);
	members_leave(a);
}

/* Registered memory, some of which the program watches itself: what merges beside it is not watched after all (DIRTY-6). */
TEST(nothing_is_watched_where_not_all_can_be)
{
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_STOP);
	if (!is_tracked(a))
		return;
	int theirs = ksm_os_uffd_open_watch();
	char *at = kit_map_filled(PAGES, 1), *watched = kit_page(at, 100);
	CHECK_EQ(ksm_os_uffd_register(theirs, watched, 20 * KSM_PAGE_SIZE, KSM_UFFD_PROTECT), 0);
	struct ksm_region *region = members_region(a, at, PAGES);
	region->registered = true;
	kit_fill(kit_page(at, 64), 5555);
	kit_fill(kit_page(at, 90), 5555);
	CHECK_EQ(members_merge(a), 2);
	CHECK(!kit_is_registered(kit_page(at, 66), 20));
	CHECK(!(*ksm_region_todo(region, 100) & KSM_TODO_OURS));
	struct ksm_restore_counts counts = {0};
	CHECK_EQ(ksm_scan_restore(&a->scanner, region, KSM_RESTORE_ALWAYS, NULL, &counts), 0);
	CHECK_EQ(counts.restored, 2);
	CHECK(!(*ksm_region_todo(region, 100) & KSM_TODO_OURS));
	ksm_merge_lock(&a->peer);
	ksm_dirty_release(region);
	ksm_merge_unlock(&a->peer);
	CHECK(!kit_is_registered(at, 99));
	CHECK(kit_is_registered(watched, 20));
	ksm_os_close(theirs);
	members_leave(a);
}

/* What has come where the program has unmapped registered memory is not ours to watch. */
TEST(what_has_come_instead_is_not_watched)
{
	struct ksm_member *a = members_join("d");
	if (!kit_can_merge() || !is_tracked(a))
		return;
	char *at = kit_map_filled(PAGES, 1), *new = kit_page(at, 100);
	struct ksm_region *region = members_region(a, at, PAGES);
	region->registered = true;
	members_merge(a);
	CHECK(kit_is_registered(new, 50));
	for (int round = 0; round < 2; round++) { /* it is seen only then that something is gone */
		CHECK(mmap(new, 50 * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
			   0) == new);
		for (size_t i = 0; i < 50; i++)
			kit_fill(kit_page(new, i), 7000 + 100 * (uint64_t)round + i);
		for (int i = 0; i < 3; i++)
			members_pass(a);
		region->gone |= round == 0;
	}
	CHECK(!kit_is_registered(new, 50));
	CHECK(!kit_is_registered(at, PAGES));
	members_leave(a);
}

/* What passes by name have cost a program that writes all the time is forgiven in some seconds, by a fork not at all. */
TEST(the_debt_has_an_end_and_outlives_forks)
{
	struct ksm_member *a = members_join("d");
	if (!kit_can_merge() || !is_tracked(a))
		return;
	struct ksm_tracker *tracker = &a->scanner.tracker;
	char *at = kit_map_filled(PAGES, 1);
	struct ksm_region *region = members_region(a, at, PAGES);
	members_merge(a);
	for (int i = 0; i < 400; i++) {
		for (size_t page = 0; page < PAGES; page++)
			++*(volatile uint64_t *)kit_page(at, page);
		members_pass(a);
	}
	uint64_t debt = tracker->debt_ns;
	uint32_t hot = region->pieces[0].hot;
	CHECK_GT(debt, 50000000);
	CHECK_LE(debt, 100000000);
	CHECK_GT(hot, 0);
	ksm_tracker_fini(tracker);
	ksm_scan_track(&a->scanner);
	CHECK_EQ(tracker->debt_ns, debt);
	CHECK_EQ(region->pieces[0].hot, hot);
	members_leave(a);
}

#define BLOCKS 40
#define BLOCK (4 * KSM_PAGE_SIZE)

static void fill_blocks(struct ksm_block *blocks, size_t step, uint64_t first)
{
	for (size_t i = 0; i < BLOCKS; i += step)
		for (size_t page = 0; page < BLOCK / KSM_PAGE_SIZE; page++)
			kit_fill(kit_page(blocks[i].address, page), first + i * 10 + page);
}

/* DIRTY-7. Every other block was merged, is given back, and is in use again at once: that is one mapping. */
TEST(memory_that_comes_back_joins_its_neighbours)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_domain *domain;
	struct ksm_arena *arena;
	struct ksm_report report;
	struct ksm_block blocks[BLOCKS], twins[BLOCKS];
	if (!kit_can_merge())
		return;
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
	for (size_t i = 0; i < BLOCKS; i++)
		CHECK_EQ(ksm_arena_alloc(arena, BLOCK, 0, &blocks[i]), 0);
	for (size_t i = 0; i < BLOCKS; i += 2)
		CHECK_EQ(ksm_arena_alloc(arena, BLOCK, 0, &twins[i]), 0);
	char *at = blocks[0].address;
	fill_blocks(blocks, 1, 100000);
	fill_blocks(blocks, 2, 1);
	fill_blocks(twins, 2, 1);
	CHECK_EQ(ksm_arena_scan(arena, &report), 0);
	CHECK_EQ(report.pages_merged, BLOCKS * BLOCK / KSM_PAGE_SIZE);
	CHECK_GE(kit_smaps(at, BLOCKS * BLOCK, NULL, NULL), BLOCKS - 1);
	for (size_t i = 0; i < BLOCKS; i += 2) {
		CHECK_EQ(ksm_arena_free(arena, &blocks[i]), 0);
		CHECK_EQ(ksm_arena_alloc(arena, BLOCK, 0, &blocks[i]), 0);
		CHECK(ksm_page_is_zero(blocks[i].address));
	}
	fill_blocks(blocks, 2, 200000);
	CHECK_LE(kit_smaps(at, BLOCKS * BLOCK, NULL, NULL), 2);
	CHECK_EQ(ksm_arena_scan(arena, &report), 0);
	CHECK_LE(kit_smaps(at, BLOCKS * BLOCK, NULL, NULL), 2);
	for (size_t i = 0; i < BLOCKS; i++)
		CHECK_EQ(ksm_arena_free(arena, &blocks[i]), 0);
	for (size_t i = 0; i < BLOCKS; i += 2)
		CHECK_EQ(ksm_arena_free(arena, &twins[i]), 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

static int hold_up(struct ksm_member *member KSM_UNUSED, void *context)
{
	uint32_t *state = context;
	ksm_store_release(state, 1);
	while (ksm_load_acquire(state) == 1)
		ksm_os_sleep_ns(1000000);
	return 0;
}

struct holding {
	struct ksm_domain *domain;
	uint32_t state; /* 1: the scanner is held up; 2: no more */
};

static void *hold_scanner(void *argument)
{
	struct holding *holding = argument;
	CHECK_EQ(ksm_worker_call(&holding->domain->worker, hold_up, &holding->state), 0);
	return NULL;
}

static size_t count_threads(void)
{
	size_t n = 0;
	DIR *tasks = opendir("/proc/self/task");
	while (readdir(tasks))
		n++;
	closedir(tasks);
	return n - 2;
}

/* An allocation waits for a scanner only if that comes at once, and starts none. */
TEST(nobody_waits_for_a_busy_scanner)
{
	struct ksm_domain_options options = kit_options("d");
	struct holding holding = {0};
	struct ksm_arena *arena;
	struct ksm_report report;
	struct ksm_block blocks[BLOCKS];
	pthread_t thread;
	if (!kit_can_merge())
		return;
	CHECK_EQ(ksm_domain_attach(&options, &holding.domain), 0);
	if (!is_tracked(&holding.domain->worker.member))
		return;
	CHECK_EQ(ksm_arena_create(holding.domain, KSM_ARENA_NO_SCAN, &arena), 0);
	for (size_t i = 0; i < BLOCKS; i++) {
		CHECK_EQ(ksm_arena_alloc(arena, BLOCK, 0, &blocks[i]), 0);
		for (size_t page = 0; page < BLOCK / KSM_PAGE_SIZE; page++)
			kit_fill(kit_page(blocks[i].address, page), 1 + page);
	}
	struct ksm_area *area = blocks[0].owner;
	CHECK_EQ(ksm_arena_scan(arena, &report), 0);
	CHECK_EQ(report.pages_merged, BLOCKS * BLOCK / KSM_PAGE_SIZE);
	CHECK_EQ(pthread_create(&thread, NULL, hold_scanner, &holding), 0);
	KIT_WAIT(20, ksm_load_acquire(&holding.state) == 1);
	for (size_t i = 4; i < BLOCKS; i++) { /* it would wait for ever */
		CHECK_EQ(ksm_arena_free(arena, &blocks[i]), 0);
		CHECK_GT(area->region.fresh, 0);
		CHECK_EQ(ksm_arena_alloc(arena, BLOCK, 0, &blocks[i]), 0);
		CHECK_EQ(area->region.fresh, 0);
		kit_fill(blocks[i].address, 2);
	}
	ksm_store_release(&holding.state, 2);
	pthread_join(thread, NULL);
	CHECK_EQ(ksm_arena_free(arena, &blocks[1]), 0);
	CHECK_GT(area->region.fresh, 0);
	pid_t child = kit_fork();
	if (child == 0) {
		CHECK_GT(area->region.fresh, 0);
		CHECK_EQ(ksm_arena_alloc(arena, BLOCK, 0, &blocks[1]), 0);
		kit_fill(blocks[1].address, 3);
		CHECK_EQ(count_threads(), 1);
		_exit(0);
	}
	CHECK_CHILD(child);
	CHECK_EQ(ksm_arena_free(arena, &blocks[0]), 0);
	CHECK_EQ(ksm_arena_scan(arena, &report), 0); /* a pass, too, watches what is fresh */
	CHECK_EQ(area->region.fresh, 0);
	for (size_t i = 2; i < BLOCKS; i++)
		CHECK_EQ(ksm_arena_free(arena, &blocks[i]), 0);
	ksm_arena_release(arena);
	ksm_domain_detach(holding.domain);
}

/* Where a region has grown in the middle of a stretch, and then goes on for some pieces: each is entered at its beginning. */
TEST(every_piece_is_brought_up_to_date)
{
	const size_t many = 2 * KSM_PIECE_PAGES + 100;
	struct ksm_member *a = members_join("d");
	if (!kit_can_merge() || !is_tracked(a))
		return;
	char *at = kit_map_filled(many, 1);
	struct ksm_region *region = members_region(a, at, many);
	region->used = 10;
	ksm_merge_lock(&a->peer);
	struct ksm_merge_counts counts = {0};
	ksm_pageno page = 0;
	for (struct ksm_scan_step step; (step = ksm_scan_step(&a->scanner, region, page, true, true, &counts)).pages;) {
		page += step.pages;
		region->used = page == 10 ? many : region->used;
	}
	ksm_merge_unlock(&a->peer);
	CHECK_EQ(page, many);
	for (size_t piece = 0; piece < 3; piece++)
		CHECK_EQ(region->pieces[piece].watch, KSM_WATCH_ARMED);
	members_leave(a);
}

TEST(memory_of_another_descriptor_is_left_to_digests)
{
	char *at;
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_STOP);
	if (!is_tracked(a))
		return;
	int theirs = ksm_os_uffd_open_watch();
	CHECK_GE(theirs, 0);
	at = kit_map_filled(PAGES, 1);
	CHECK_EQ(ksm_os_uffd_register(theirs, kit_page(at, 100), 50 * KSM_PAGE_SIZE, KSM_UFFD_PROTECT), 0);
	struct ksm_region *region = members_region(a, at, PAGES);
	members_merge(a);
	check_notes(a, region);
	kit_fill(kit_page(at, 120), 1 + 20);
	CHECK_EQ(members_merge(a), 2);
	check_notes(a, region);
	ksm_os_close(theirs);
	members_leave(a);
}
