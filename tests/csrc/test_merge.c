/* SPDX-License-Identifier: MIT */
/* Merging, seen from inside and from outside (smaps, the store's blocks). */
#include "crowd.h"
#include "members.h"

#include <linux/io_uring.h>
#include <sys/uio.h>

#define PAGES 100

static uint64_t pages_in(const struct ksm_region *region, enum ksm_page_state state)
{
	return region->states[state];
}

static void equal_pages(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	CHECK_EQ(a->peer.self->barrier, kind);
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	struct ksm_region *r1 = members_region(a, one, PAGES), *r2 = members_region(a, two, PAGES);
	CHECK_EQ(members_merge(a), 2 * PAGES);
	CHECK_EQ(pages_in(r1, KSM_PAGE_MERGED), PAGES);
	CHECK_EQ(pages_in(r2, KSM_PAGE_MERGED), PAGES);
	CHECK_EQ(members_frames(a), PAGES);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), 2 * PAGES);
	CHECK_EQ(members_counter(a, KSM_FRAMES_REFERRED), PAGES);
	CHECK_EQ(members_counter(a, KSM_MERGES), 2 * PAGES);
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	kit_check_filled(one, PAGES, 1);
	kit_check_filled(two, PAGES, 1);
	/* The kernel's word: every byte read, no anonymous memory, and the store holds each page once. */
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Rss"), PAGES * KSM_PAGE_SIZE);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Anonymous"), 0);
	CHECK_EQ(kit_smaps_bytes(two, PAGES, "Anonymous"), 0);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Pss") + kit_smaps_bytes(two, PAGES, "Pss"), PAGES * KSM_PAGE_SIZE);
	CHECK_EQ(kit_blocks(a->peer.fds.store), PAGES * KSM_PAGE_SIZE);
	CHECK_EQ(kit_smaps(one, PAGES * KSM_PAGE_SIZE, NULL, NULL), 1);
	CHECK_EQ(kit_smaps(two, PAGES * KSM_PAGE_SIZE, NULL, NULL), 1);
	CHECK_LE(members_counter(a, KSM_VMAS_USED), 4);
	CHECK(!kit_is_registered(one, PAGES));
	members_unmap(a, r1);
	CHECK_EQ(members_sweep(a), 0);
	members_unmap(a, r2);
	CHECK_EQ(members_sweep(a), PAGES);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	CHECK_EQ(members_counter(a, KSM_VMAS_USED), 0);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), 0);
	members_leave(a);
}

TEST(equal_pages_become_one)
{
	members_on_each_barrier(equal_pages);
}

TEST(a_write_makes_a_page_private)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	struct ksm_region *r1 = members_region(a, one, PAGES), *r2 = members_region(a, two, PAGES);
	members_merge(a);
	for (size_t i = 0; i < PAGES; i += 10)
		kit_fill(kit_page(one, i), 1000 + i);
	int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	CHECK_EQ(read(zero, kit_page(one, 5), KSM_PAGE_SIZE), (ssize_t)KSM_PAGE_SIZE);
	kit_check_filled(two, PAGES, 1);
	CHECK_EQ(kit_smaps_bytes(one, PAGES, "Anonymous"), 11 * KSM_PAGE_SIZE);
	CHECK_EQ(kit_smaps_bytes(two, PAGES, "Anonymous"), 0);
	struct ksm_park *park = a->scanner.merger.park;
	a->scanner.merger.park = NULL; /* where threads cannot be held */
	members_merge(a);              /* sees it; a broken page stays where it is */
	CHECK_EQ(pages_in(r1, KSM_PAGE_BROKEN), 11);
	CHECK_EQ(members_counter(a, KSM_COW_BREAKS), 11);
	CHECK_EQ(members_counter(a, KSM_PAGES_BROKEN), 11);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 5 ? 0 : i % 10 ? 1 + i : 1000 + i));
	/* Its mapping still refers to the frame: nothing is freed, even with the other copy gone. */
	members_unmap(a, r2);
	CHECK_EQ(members_sweep(a), 0);
	CHECK_EQ(members_frames(a), PAGES);
	a->scanner.merger.park = park; /* where they can, it becomes an ordinary page again */
	members_merge(a);
	CHECK_EQ(pages_in(r1, KSM_PAGE_BROKEN), 0);
	CHECK_EQ(members_counter(a, KSM_GIVE_BACKS), 11);
	CHECK_EQ(members_sweep(a), 11);
	CHECK_EQ(members_frames(a), PAGES - 11);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(one, i), i == 5 ? 0 : i % 10 ? 1 + i : 1000 + i));
	kit_fill(kit_page(one, 0), 1);
	members_unmap(a, r1);
	CHECK_EQ(members_sweep(a), PAGES - 11);
	members_leave(a);
}

TEST(zeros_need_no_frame)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char *at = kit_map(PAGES);
	memset(at, 0, PAGES * KSM_PAGE_SIZE); /* written, so private */
	struct ksm_region *region = members_region(a, at, PAGES);
	CHECK_EQ(kit_smaps_bytes(at, PAGES, "Anonymous"), PAGES * KSM_PAGE_SIZE);
	CHECK_EQ(members_merge(a), 0);
	CHECK_EQ(pages_in(region, KSM_PAGE_DROPPED), PAGES);
	CHECK_EQ(members_counter(a, KSM_PAGES_ZERO), PAGES);
	CHECK_EQ(members_frames(a), 0);
	CHECK_EQ(kit_blocks(a->peer.fds.store), 0);
	CHECK_EQ(kit_smaps_bytes(at, PAGES, "Rss"), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(at, i), 0));
	members_merge(a); /* read meanwhile */
	CHECK_EQ(pages_in(region, KSM_PAGE_DROPPED), PAGES);
	for (size_t i = 0; i < PAGES; i += 2)
		kit_fill(kit_page(at, i), 5); /* one content */
	members_merge(a);
	CHECK_EQ(pages_in(region, KSM_PAGE_DROPPED), PAGES / 2);
	CHECK_EQ(pages_in(region, KSM_PAGE_MERGED), PAGES / 2);
	CHECK_LE(members_frames(a), 8);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(at, i), i % 2 ? 0 : 5));
	members_unmap(a, region);
	CHECK_GT(members_sweep(a), 0);
	CHECK_EQ(members_counter(a, KSM_PAGES_ZERO), 0);
	members_leave(a);
}

TEST(the_budget_of_mappings_is_kept)
{
	if (!kit_can_merge())
		return;
	enum {
		MANY = 600,
		BUDGET = 40
	};
	struct ksm_member *a = members_join("d");
	char *one = kit_map_filled(MANY, 1), *two = kit_map(MANY);
	for (size_t i = 0; i < MANY; i++) /* the same pages in another order: no two make a run */
		kit_fill(kit_page(two, i), 1 + (i * 7) % MANY + 0);
	members_region(a, one, MANY);
	members_region(a, two, MANY);
	a->scanner.merger.vma_budget = BUDGET;
	struct ksm_merge_counts counts = members_pass(a);
	for (int i = 0; i < 4; i++)
		counts = members_pass(a);
	CHECK_EQ(counts.why_not, KSM_EBUDGET);
	CHECK_LE(members_counter(a, KSM_VMAS_USED), BUDGET);
	CHECK_GT(members_counter(a, KSM_PAGES_MERGED), 0);
	size_t mappings =
		kit_smaps(one, MANY * KSM_PAGE_SIZE, NULL, NULL) + kit_smaps(two, MANY * KSM_PAGE_SIZE, NULL, NULL);
	CHECK_LE(mappings, members_counter(a, KSM_VMAS_USED) + 2);
	kit_check_filled(one, MANY, 1);
	for (size_t i = 0; i < MANY; i++)
		CHECK(kit_is(kit_page(two, i), 1 + (i * 7) % MANY));
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	a->scanner.merger.vma_budget = 0;
	members_merge(a);
	members_leave(a);
}

TEST(mappings_are_counted_as_the_kernel_does)
{
	if (!kit_can_merge())
		return;
	enum {
		MANY = 300
	};
	struct ksm_member *a = members_join("d");
	uint64_t state = 4;
	char *one = kit_map(MANY), *two = kit_map(MANY);
	for (size_t i = 0; i < MANY; i++) {
		kit_fill(kit_page(one, i), 1 + i);
		kit_fill(kit_page(two, i), kit_random(&state) % 3 ? 1 + i : 1 + kit_random(&state) % MANY);
	}
	members_region(a, one, MANY);
	members_region(a, two, MANY);
	for (int i = 0; i < 5; i++) {
		members_merge(a);
		size_t mappings = kit_smaps(one, MANY * KSM_PAGE_SIZE, NULL, NULL) +
				  kit_smaps(two, MANY * KSM_PAGE_SIZE, NULL, NULL);
		/* what was given back joins neither of its neighbours */
		CHECK_LE(mappings, members_counter(a, KSM_VMAS_USED) + 2 * members_counter(a, KSM_GIVE_BACKS) + 2);
		for (size_t page = (size_t)i; page < MANY; page += 9)
			kit_fill(kit_page(one, page), 2000 + page);
	}
	members_leave(a);
}

TEST(peers_merge_without_reading_one_another)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	members_region(a, one, PAGES);
	members_region(b, two, PAGES);
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(b), 0);
	CHECK_EQ(members_pass(a).merged, 0); /* alone with it: candidates, no frames */
	CHECK_EQ(members_frames(a), 0);
	CHECK_EQ(members_merge(b), PAGES); /* finds the candidates: promotes its own */
	CHECK_EQ(members_frames(a), PAGES);
	CHECK_EQ(members_merge(a), PAGES);
	CHECK_EQ(members_frames(a), PAGES);
	CHECK_EQ(members_counter(a, KSM_PROMOTIONS), 0);
	CHECK_EQ(members_counter(b, KSM_PROMOTIONS), PAGES);
	CHECK_EQ(kit_blocks(a->peer.fds.store), PAGES * KSM_PAGE_SIZE);
	kit_check_filled(one, PAGES, 1);
	kit_check_filled(two, PAGES, 1);
	kit_fill(one, 500);
	CHECK(kit_is(two, 1));
	members_leave(b);
	CHECK_EQ(members_sweep(a), 0);
	members_leave(a);
}

TEST(a_digest_only_proposes)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char page[KSM_PAGE_SIZE];
	char *at = kit_map_filled(1, 1);
	ksm_frameno frame = members_publish(a, 2); /* other bytes, said to have the digest of ours */
	kit_fill(page, 1);
	uint64_t digest = ksm_page_digest(page);
	ksm_store_release(&a->peer.checks[frame], (uint32_t)(digest >> KSM_DIGEST_CHECK_SHIFT));
	ksm_index_insert(&a->index, &a->peer, digest, frame, members_generation(a, frame));
	members_put(a, frame); /* it stays until a sweep */
	members_region(a, at, 1);
	CHECK_EQ(members_merge(a), 0);
	CHECK(kit_is(at, 1));
	CHECK_EQ(kit_is_file(at), 0);
	CHECK_EQ(a->peer.counts[frame], 0);
	members_leave(a);
}

TEST(young_pages_are_left_alone)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char *at = kit_map(4);
	for (size_t i = 0; i < 4; i++)
		kit_fill(kit_page(at, i), 1 + i / 2);
	members_region(a, at, 4);
	CHECK(ksm_scan_batch(&a->scanner, 1000, 1000, NULL) || ksm_scan_batch(&a->scanner, 1000, 1000, NULL));
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), 0); /* seen once */
	kit_fill(kit_page(at, 2), 7);                      /* written since */
	kit_fill(kit_page(at, 3), 7);
	for (int i = 0; i < 4; i++)
		ksm_scan_batch(&a->scanner, 1000, 1000, NULL);
	CHECK_GE(members_counter(a, KSM_PAGES_MERGED), 2);
	for (int i = 0; i < 8; i++)
		ksm_scan_batch(&a->scanner, 1000, 1000, NULL);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), 4);
	members_leave(a);
}

TEST(pinned_pages_are_skipped_and_the_others_merge)
{
	if (!kit_can_move())
		return;
	struct ksm_member *a = members_join("d");
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	struct io_uring_params params = {0};
	struct iovec iov = {kit_page(one, 40), 3 * KSM_PAGE_SIZE};
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0)
		return;
	CHECK_SYS(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1));
	struct ksm_region *r1 = members_region(a, one, PAGES), *r2 = members_region(a, two, PAGES);
	members_merge(a);
	CHECK_EQ(pages_in(r1, KSM_PAGE_MERGED), PAGES - 3);
	CHECK_EQ(pages_in(r1, KSM_PAGE_REFUSED), 3);
	CHECK_EQ(pages_in(r2, KSM_PAGE_MERGED), PAGES);
	CHECK_GE(members_counter(a, KSM_PAGES_SKIPPED), 3);
	kit_check_filled(one, PAGES, 1);
	kit_check_filled(two, PAGES, 1);
	close(ring);
	KIT_WAIT(10, (members_merge(a), pages_in(r1, KSM_PAGE_MERGED) == PAGES));
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	members_leave(a);
}

/* Pages for which no frame can be had are no news pass after pass: or their peers would never be done, nor ever rest. */
static void check_nothing_is_new(struct ksm_member *member)
{
	uint64_t changes = member->peer.control->changes;
	for (int i = 0; i < 3; i++)
		members_pass(member);
	CHECK_EQ(member->peer.control->changes, changes);
}

/* Every other page is read into all the time, and is like no other: the kernel can write there while its neighbours merge. */
struct reading {
	char *at;
	int file;
	uint32_t stop;
	uint64_t calls, failed;
};

static void *read_into(void *argument)
{
	struct reading *r = argument;
	while (!ksm_load_relaxed(&r->stop))
		for (size_t i = 1; i < PAGES; i += 2) {
			r->failed += pread(r->file, kit_page(r->at, i) + 8, KSM_PAGE_SIZE - 8, 0) < 0;
			ksm_add_relaxed(&r->calls, 1);
		}
	return NULL;
}

static void reading_between(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	struct reading r = {.at = kit_map(PAGES), .file = ksm_os_memfd("source")};
	char *twin = kit_map(PAGES);
	pthread_t thread;
	CHECK_EQ(ksm_os_truncate(r.file, KSM_PAGE_SIZE), 0);
	members_region(a, r.at, PAGES);
	members_region(a, twin, PAGES);
	for (size_t i = 1; i < PAGES; i += 2)
		*(uint64_t *)kit_page(r.at, i) = i; /* and zeros behind */
	CHECK_EQ(pthread_create(&thread, NULL, read_into, &r), 0);
	uint64_t merged = 0;
	for (uint64_t round = 0; round < 50; round++) {
		for (size_t i = 0; i < PAGES; i += 2) {
			kit_fill(kit_page(r.at, i), 1000 * round + i + 1);
			kit_fill(kit_page(twin, i), 1000 * round + i + 1);
		}
		merged += members_merge(a);
		for (size_t i = 0; i < PAGES; i += 2)
			CHECK(kit_is(kit_page(r.at, i), 1000 * round + i + 1));
	}
	KIT_WAIT(20, ksm_load_relaxed(&r.calls) > 10 * PAGES);
	ksm_store_relaxed(&r.stop, 1);
	pthread_join(thread, NULL);
	for (size_t i = 1; i < PAGES; i += 2)
		CHECK_EQ(*(uint64_t *)kit_page(r.at, i), i);
	CHECK_GT(merged,
		 kit_is_without("stop") ? 0 : 10 * PAGES); /* in one broken pages are given back, and merge again */
	printf("%llu calls, %llu failed, %llu merged\n", (unsigned long long)r.calls, (unsigned long long)r.failed,
	       (unsigned long long)merged);
	CHECK_EQ(r.failed, 0);
	members_leave(a);
}

TEST_LIMIT(what_is_read_between_merges_is_read, 60)
{
	members_on_each_barrier(reading_between);
}

TEST(who_is_not_dumpable_takes_but_does_not_give)
{
	if (!kit_can_merge())
		return;
	struct ksm_member *a = members_join("d");
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	struct ksm_region *r1 = members_region(a, one, PAGES);
	members_region(a, two, PAGES);
	ksm_frameno frame = members_publish(a, 6);
	char page[KSM_PAGE_SIZE];
	kit_fill(page, 6);
	ksm_index_insert(&a->index, &a->peer, ksm_page_digest(page), frame, 0);
	members_put(a, frame); /* it stays until a sweep */
	CHECK_SYS(prctl(PR_SET_DUMPABLE, 0));
	int why_not = members_pass(a).why_not;
	CHECK_EQ(members_pass(a).merged + members_pass(a).merged, 0);
	CHECK_EQ(why_not, KSM_EDUMPABLE);
	CHECK_EQ(pages_in(r1, KSM_PAGE_MERGED), 1); /* the frame that was there */
	CHECK_EQ(members_frames(a), 1);
	check_nothing_is_new(a);
	CHECK_SYS(prctl(PR_SET_DUMPABLE, 1));
	members_merge(a);
	CHECK_EQ(pages_in(r1, KSM_PAGE_MERGED), PAGES);
	members_leave(a);
}

TEST(a_full_store_stops_merging_and_nothing_else)
{
	if (!kit_can_merge())
		return;
	enum {
		MANY = KSM_CHUNK + 500
	};
	struct ksm_domain_options options = kit_options("d");
	struct ksm_member *a = NULL;
	options.capacity_bytes = 1;
	CHECK_EQ(members_try_join(&options, &a), 0);
	char *one = kit_map_filled(MANY, 1), *two = kit_map_filled(MANY, 1);
	members_region(a, one, MANY);
	members_region(a, two, MANY);
	int why_not = members_pass(a).why_not;
	CHECK_EQ(why_not, -ENOSPC);
	members_merge(a);
	CHECK_EQ(members_frames(a), KSM_CHUNK);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), 2 * KSM_CHUNK);
	check_nothing_is_new(a);
	kit_check_filled(one, MANY, 1);
	kit_check_filled(two, MANY, 1);
	members_leave(a);
}

TEST(huge_pages_are_merged_too)
{
	if (!kit_can_merge())
		return;
	size_t huge = (2u << 20) / KSM_PAGE_SIZE;
	struct ksm_member *a = members_join("d");
	char *room = kit_map(3 * huge);
	char *at = (char *)(((uintptr_t)room + (2u << 20) - 1) & ~((uintptr_t)(2u << 20) - 1));
	madvise(at, 2 * huge * KSM_PAGE_SIZE, MADV_HUGEPAGE);
	for (size_t i = 0; i < 2 * huge; i++)
		kit_fill(kit_page(at, i), 1 + i % huge);
	struct ksm_region *region = members_region(a, at, 2 * huge);
	members_merge(a);
	CHECK_EQ(pages_in(region, KSM_PAGE_MERGED), 2 * huge);
	CHECK_EQ(kit_blocks(a->peer.fds.store), huge * KSM_PAGE_SIZE);
	kit_check_filled(at, huge, 1);
	kit_check_filled(kit_page(at, huge), huge, 1);
	members_leave(a);
}

/* ---- while threads write ------------------------------------------------------------------------------------------------ */

#define FLICKERING 64 /* the second half of them zeros */

struct flicker {
	pthread_t thread;
	char *field;
	uint32_t stop;
	uint64_t writes;
};

/* Each page is now one, now the other of two contents, both of which have frames: to merge what was there a moment ago is
 * to lose a write. */
static void *flicker(void *argument)
{
	struct flicker *self = argument;
	uint64_t state = 1, expected[FLICKERING] = {0};
	while (!ksm_load_relaxed(&self->stop)) {
		uint64_t dice = kit_random(&state);
		size_t page = dice % FLICKERING;
		volatile uint64_t *at = (uint64_t *)kit_page(self->field, page);
		if (*at != expected[page])
			FAIL("a write to page %zu was lost: %llu", page, (unsigned long long)*at);
		*at = expected[page] = dice >> 63;
		ksm_add_relaxed(&self->writes, 1);
		if (dice >> 32 & 1) /* sometimes slowly */
			ksm_os_sleep_ns(1000);
	}
	return NULL;
}

static void flickering(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	struct ksm_region *regions[3];
	struct flicker self = {0};
	for (uint64_t i = 0; i < 3; i++) { /* one content, the other, and the one that flickers */
		char *at = kit_map(FLICKERING);
		for (size_t page = 0; page < FLICKERING; page++) {
			kit_fill(kit_page(at, page), page < FLICKERING / 2 ? 1 + page : 0);
			*(uint64_t *)kit_page(at, page) = i == 1;
		}
		regions[i] = members_region(a, at, FLICKERING);
		self.field = at;
	}
	members_merge(a);
	CHECK_EQ(pthread_create(&self.thread, NULL, flicker, &self), 0);
	uint64_t merges = members_counter(a, KSM_MERGES);
	double start = harness_now();
	while (kit_goes_on(start, 1.5,
			   members_counter(a, KSM_MERGES) > merges + 20 && members_counter(a, KSM_ZERO_MERGES) > 20 &&
				   ksm_load_relaxed(&self.writes) > 1000)) {
		struct ksm_restore_counts counts = {0};
		members_pass(a);
		CHECK_EQ(ksm_scan_restore(&a->scanner, regions[2], KSM_RESTORE_ALWAYS, NULL, &counts), 0);
	}
	ksm_store_release(&self.stop, 1);
	pthread_join(self.thread, NULL);
	printf("%llu merges, %llu of zeros, %llu put back, %llu writes\n",
	       (unsigned long long)(members_counter(a, KSM_MERGES) - merges),
	       (unsigned long long)members_counter(a, KSM_ZERO_MERGES),
	       (unsigned long long)members_counter(a, KSM_PUT_BACKS), (unsigned long long)self.writes);
	CHECK_GT(members_counter(a, KSM_MERGES), merges + 20);
	CHECK_GT(members_counter(a, KSM_ZERO_MERGES), 20);
	CHECK_GT(self.writes, 1000);
	members_leave(a);
}

TEST_LIMIT(what_flickers_is_merged_as_it_is_now, 60)
{
	members_on_each_barrier(flickering);
}

static void under_a_crowd(enum ksm_barrier_kind kind)
{
	enum {
		FIELD = 600
	};
	struct ksm_member *a = members_join_with("d", kind);
	struct crowd crowd;
	for (unsigned pause = 0; pause <= 1000; pause += 500) {
		char *field = kit_map_filled(FIELD, 1), *twin = kit_map_filled(FIELD, 1);
		for (size_t i = 0; i < FIELD; i++)
			memset(kit_page(twin, i), 0, 3 * 8);
		struct ksm_region *r1 = members_region(a, field, FIELD), *r2 = members_region(a, twin, FIELD);
		crowd_start(&crowd, field, FIELD, 3, pause);
		crowd.may_refuse = kind == KSM_BARRIER_SEGV;
		uint64_t merges = members_counter(a, KSM_MERGES);
		double start = harness_now();
		while (kit_goes_on(start, 0.7, !pause || members_counter(a, KSM_MERGES) > merges + FIELD / 4))
			members_pass(a);
		CHECK_EQ(crowd_end(&crowd), 0);
		crowd_check_rest(&crowd, 1);
		printf("%u us: %llu merges, %llu given back, %llu stops, %llu calls refused\n", pause,
		       (unsigned long long)(members_counter(a, KSM_MERGES) - merges),
		       (unsigned long long)members_counter(a, KSM_GIVE_BACKS),
		       (unsigned long long)a->scanner.park.stops, (unsigned long long)crowd.refusals);
		if (pause)
			CHECK_GT(members_counter(a, KSM_MERGES), merges + FIELD / 4);
		members_unmap(a, r1);
		members_unmap(a, r2);
		munmap(field, FIELD * KSM_PAGE_SIZE);
		munmap(twin, FIELD * KSM_PAGE_SIZE);
	}
	CHECK_EQ(members_counter(a, KSM_FAILURES), 0);
	CHECK_GE(members_sweep(a), 0);
	CHECK_EQ(members_frames(a), 0);
	members_leave(a);
}

TEST_LIMIT(nothing_is_lost_while_threads_write, 60)
{
	members_on_each_barrier(under_a_crowd);
}
