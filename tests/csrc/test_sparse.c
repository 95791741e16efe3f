/* SPDX-License-Identifier: MIT */
#include "members.h"

#include "page.h"
#include "sweep.h"

#define FAR (5 * KSM_CHUNK) /* frames whose bits lie on another page than the first frame's */

static struct ksm_member *everybody[2];

/* Is a page of the control memfd in somebody's book, or made sure of when it was mapped? */
static bool was_asked_for(const struct ksm_layout *layout, uint64_t at)
{
	const struct {
		enum ksm_sparse_table table;
		uint64_t from, to;
	} tables[] = {
		{KSM_SPARSE_SLOTS, layout->slots, layout->chunks},
		{KSM_SPARSE_CELLS, layout->cells, layout->checks},
		{KSM_SPARSE_CHECKS, layout->checks, layout->index},
		{KSM_SPARSE_INDEX, layout->index, layout->candidates},
		{KSM_SPARSE_CANDIDATES, layout->candidates, layout->index_touched},
		{KSM_SPARSE_TOUCHED, layout->index_touched, layout->total},
	};
	if (at < layout->slots || (at >= layout->chunks && at < layout->cells))
		return true;
	for (size_t i = 0; i < KSM_COUNT(tables); i++) {
		if (at < tables[i].from || at >= tables[i].to)
			continue;
		for (size_t j = 0; j < KSM_COUNT(everybody); j++) {
			struct ksm_peer *peer = &everybody[j]->peer;
			struct ksm_sparse sparse = ksm_peer_sparse(peer, tables[i].table, tables[i].from);
			if (ksm_sparse_knows(&sparse, (char *)peer->control + at))
				return true;
		}
	}
	return false;
}

/* The first page that is there and that nobody has asked for; UINT64_MAX: none. pages: how many are there. */
static uint64_t first_touched(uint64_t *pages)
{
	const struct ksm_peer *peer = &everybody[0]->peer;
	uint64_t at = 0;
	for (*pages = 0; at < peer->layout.total; at += KSM_PAGE_SIZE, ++*pages) {
		int64_t data = ksm_os_seek_data(peer->fds.control, at);
		if (data >= (int64_t)peer->layout.total)
			break;
		at = (uint64_t)data;
		if (!was_asked_for(&peer->layout, at))
			return at;
	}
	return UINT64_MAX;
}

/* The same for a bitmap. */
static void check_bitmap(const struct ksm_member *member)
{
	const struct ksm_seat *seat = &member->peer.seat;
	uint64_t half = ksm_bitmap_half(member->peer.layout.frames),
		 end = ksm_bitmap_page(seat->room - 1) + KSM_PAGE_SIZE;
	for (uint64_t at = 0;; at += KSM_PAGE_SIZE) {
		int64_t data = ksm_os_seek_data(seat->bitmap_fd, at);
		if (data == INT64_MAX)
			return;
		at = (uint64_t)data;
		CHECK(at < end || (at >= half && at < half + end));
	}
}

static void join_both(void)
{
	kit_directory();
	for (size_t i = 0; i < KSM_COUNT(everybody); i++)
		everybody[i] = members_join("d");
}

static void leave_both(void)
{
	for (size_t i = 0; i < KSM_COUNT(everybody); i++)
		members_leave(everybody[i]);
}

TEST_LIMIT(no_page_is_touched_that_was_not_asked_for, 240)
{
	if (!kit_can_merge())
		return;
	enum {
		PAGES = 20000 /* several levels of the tables; two pages of bits */
	};
	join_both();
	struct ksm_member *a = everybody[0], *b = everybody[1];
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	struct ksm_region *r1 = members_region(a, one, PAGES), *r2 = members_region(b, two, PAGES);
	for (int i = 0; i < 3; i++) {
		members_merge(a);
		members_merge(b);
	}
	CHECK_EQ(members_counter(b, KSM_PAGES_MERGED), PAGES);
	CHECK_EQ(members_counter(a, KSM_PAGES_MERGED), PAGES);
	ksm_frameno frame, last = (ksm_frameno)a->peer.layout.frames - 1;
	ksm_merge_lock(&a->peer);
	CHECK_EQ(ksm_frame_alloc(&a->peer, last, &frame), 0); /* far away */
	CHECK_EQ(frame, last);
	ksm_merge_unlock(&a->peer);
	CHECK(!ksm_frame_looks_published(&b->peer, last - 3 * KSM_CHUNK, 0, 0)); /* what nobody ever had */
	members_unmap(b, r2);
	members_unmap(a, r1);
	ksm_merge_lock(&a->peer);
	ksm_frame_abandon(&a->peer, frame);
	ksm_merge_unlock(&a->peer);
	CHECK_EQ(members_sweep(b), PAGES);
	uint64_t pages;
	CHECK_EQ(first_touched(&pages), UINT64_MAX);
	printf("%llu pages of the control memfd are there\n", (unsigned long long)pages);
	CHECK_GE(pages, 2 * PAGES * 8 / KSM_PAGE_SIZE);
	check_bitmap(a);
	check_bitmap(b);
	last -= 6 * KSM_CHUNK;
	a->peer.cells[last] = 0; /* the control: one touch more is noticed */
	CHECK_EQ(first_touched(&pages), (a->peer.layout.cells + last * sizeof(uint64_t)) & ~(KSM_PAGE_SIZE - 1));
	leave_both();
}

TEST(what_exists_below_high_is_readable_for_others)
{
	join_both();
	struct ksm_peer *a = &everybody[0]->peer, *b = &everybody[1]->peer;
	CHECK_EQ(members_know(everybody[1]), 0);
	ksm_merge_lock(a);
	CHECK_EQ(ksm_bit_set(a, FAR + 3), 0);
	ksm_busy_set(a, FAR + 3);
	ksm_merge_unlock(a);
	struct stat before, after;
	CHECK_SYS(fstat(a->seat.bitmap_fd, &before));
	for (ksm_frameno frame = 0; frame < 2 * FAR; frame += 64) { /* REFS-8 */
		CHECK_EQ(ksm_bits_of_others(b, frame), frame == FAR ? 8 : 0);
		CHECK(!ksm_busy_with_others(b, frame));
	}
	CHECK(ksm_busy_with_others(b, FAR + 3));
	CHECK_SYS(fstat(a->seat.bitmap_fd, &after));
	CHECK_EQ(after.st_blocks, before.st_blocks); /* reading took nothing */
	ksm_merge_lock(a);
	ksm_busy_clear(a, FAR + 3);
	ksm_bit_clear(a, FAR + 3);
	ksm_merge_unlock(a);
	leave_both();
}

TEST(without_memory_nothing_is_allocated_taken_or_lost)
{
	join_both();
	struct ksm_member *a = everybody[0], *b = everybody[1];
	CHECK_EQ(members_know(b), 0);
	CHECK_EQ(members_know(a), 0);
	ksm_frameno near = members_publish(a, 1), frame;
	uint64_t high = ksm_load_relaxed(&a->peer.control->frames_high);
	ksm_os_fault_set(KSM_OS_POPULATE, 0, UINT32_MAX, -ENOMEM);
	ksm_merge_lock(&b->peer);
	for (int i = 0; i < 100; i++)
		CHECK_EQ(ksm_frame_alloc(&b->peer, KSM_NO_FRAME, &frame), -ENOMEM);
	CHECK_EQ(ksm_load_relaxed(&a->peer.control->frames_high), high); /* no stretch was given away for nothing */
	CHECK(!ksm_frame_take(&b->peer, near, 0, 0));                    /* its cell is not in b's book */
	CHECK_EQ(ksm_bit_set(&b->peer, FAR), -ENOMEM);
	CHECK(!ksm_bit_test(&b->peer, FAR));
	CHECK_EQ(b->peer.book.error, -ENOMEM);
	CHECK_EQ(ksm_index_make_room(&b->index, &b->peer, 77), -ENOMEM);
	CHECK_EQ(ksm_candidate_find(&b->index, &b->peer, 77, &frame), KSM_CANDIDATE_NONE);
	ksm_candidate_add(&b->index, &b->peer, 77, &frame);
	ksm_merge_unlock(&b->peer);
	ksm_os_fault_clear();
	ksm_merge_lock(&b->peer);
	CHECK_EQ(ksm_candidate_find(&b->index, &b->peer, 77, &frame), KSM_CANDIDATE_NONE);
	ksm_candidate_add(&b->index, &b->peer, 77, &frame);
	CHECK_EQ(ksm_candidate_find(&b->index, &b->peer, 77, &frame), KSM_CANDIDATE_OURS);
	CHECK_EQ(ksm_frame_alloc(&b->peer, KSM_NO_FRAME, &frame), 0);
	ksm_frame_abandon(&b->peer, frame);
	ksm_merge_unlock(&b->peer);
	CHECK(members_take(b, near));
	members_put(b, near);
	members_put(a, near);
	leave_both();
}

/* A dead peer's frames are looked at, though its slot cannot be read to see who it was; and again when it can. */
TEST(the_dead_are_buried_without_memory)
{
	join_both();
	struct ksm_peer *a = &everybody[0]->peer;
	CHECK_EQ(members_know(everybody[0]), 0);
	ksm_frameno frame = members_publish(everybody[0], 1);
	members_leave(everybody[1]);
	for (int readable = 0; readable < 2; readable++) {
		a->book.near[0] &= (uint8_t)~(1u << KSM_SPARSE_SLOTS);
		ksm_chunk_unmark(a, 0);
		ksm_os_fault_set(KSM_OS_POPULATE, 0, readable ? 0 : UINT32_MAX, -ENOMEM);
		CHECK_EQ(members_know(everybody[0]), 0);
		ksm_os_fault_clear();
		CHECK(ksm_chunk_unmark(a, 0));
	}
	CHECK_EQ(members_know(everybody[0]), 0);
	CHECK(!ksm_chunk_unmark(a, 0)); /* once is enough */
	members_put(everybody[0], frame);
	members_leave(everybody[0]);
}

/* Then it has no seat, and what it refers to is never freed: MEMBER-2. */
TEST(a_child_whose_bits_have_no_memory)
{
	join_both();
	struct ksm_member *a = everybody[0];
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(everybody[1]), 0);
	ksm_frameno frame = members_publish(a, 1);
	CHECK_EQ(ksm_member_prepare_child(a), 0);
	CHECK_NE(a->child_slot, KSM_NO_SLOT);
	ksm_merge_lock(&a->peer);
	CHECK_EQ(ksm_bit_set(&a->peer, FAR), 0); /* since then */
	ksm_os_fault_set(KSM_OS_POPULATE, 0, UINT32_MAX, -ENOMEM);
	uint64_t failures = members_counter(a, KSM_FAILURES);
	ksm_member_fork_prepare(a);
	ksm_os_fault_clear();
	CHECK_EQ(a->child_slot, KSM_NO_SLOT);
	CHECK_EQ(a->child.slot, KSM_NO_SLOT);
	CHECK_EQ(members_counter(a, KSM_FAILURES), failures + 1);
	CHECK_EQ(a->peer.control->no_sweep, 1);
	ksm_bit_clear(&a->peer, FAR);
	ksm_merge_unlock(&a->peer);
	members_put(a, frame);
	CHECK_EQ(members_sweep(everybody[1]), 0);
	leave_both();
}

TEST(a_sweep_without_memory_goes_on_later)
{
	join_both();
	struct ksm_member *a = everybody[0], *b = everybody[1];
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(b), 0);
	ksm_frameno near = members_publish(a, 1), far;
	uint64_t page[KSM_PAGE_SIZE / 8];
	kit_fill(page, 2);
	ksm_merge_lock(&a->peer);
	CHECK_EQ(ksm_frame_alloc(&a->peer, FAR, &far), 0);
	CHECK_EQ(ksm_frame_write(&a->peer, far, 1, page), 0);
	ksm_frame_publish(&a->peer, far, ksm_page_digest(page));
	ksm_merge_unlock(&a->peer);
	members_put(a, near);
	members_put(a, far);
	ksm_merge_lock(&b->peer);
	CHECK_EQ(ksm_sparse_reach(&b->peer.cells_there, &b->peer.cells[near]), 0);
	CHECK_EQ(ksm_sparse_reach(&b->peer.cells_there, &b->peer.cells[far]), 0);
	ksm_merge_unlock(&b->peer);
	ksm_os_fault_set(KSM_OS_POPULATE, 0, UINT32_MAX, -ENOMEM);
	CHECK_EQ(members_sweep(b), 1); /* where its own bit has a page */
	CHECK_EQ(members_cell(a, near), KSM_CELL_FREE);
	CHECK_EQ(members_cell(a, far), KSM_CELL_PUBLISHED);
	CHECK_EQ(members_sweep(b), -ENOMEM);
	CHECK(ksm_chunks_any(&b->peer));
	ksm_os_fault_clear();
	CHECK_EQ(members_sweep(b), 1);
	CHECK_EQ(members_cell(a, far), KSM_CELL_FREE);
	CHECK(!ksm_chunks_any(&b->peer));
	leave_both();
}

TEST(joining_and_forking_say_so)
{
	kit_directory();
	struct ksm_member *a = members_join("d"), *b = NULL;
	struct ksm_domain_options options = kit_options("d");
	for (uint32_t skip = 0;; skip++) { /* each page that a newcomer needs */
		ksm_os_fault_set(KSM_OS_POPULATE, skip, 1, -ENOMEM);
		int r = members_try_join(&options, &b);
		bool failed = ksm_os_fault_hits(KSM_OS_POPULATE);
		ksm_os_fault_clear();
		CHECK_EQ(r, failed ? -ENOMEM : 0);
		if (!r)
			members_leave(b);
		CHECK_LE(skip, 20);
		if (failed)
			continue;
		CHECK_GE(skip, 4); /* control and bitmap, twice each at least */
		break;
	}
	ksm_merge_lock(&a->peer);
	CHECK_EQ(ksm_bit_set(&a->peer, FAR), 0);
	ksm_os_fault_set(KSM_OS_POPULATE, 0, UINT32_MAX, -ENOMEM);
	struct ksm_seat seat = {.slot = KSM_NO_SLOT, .bitmap_fd = -1};
	CHECK_EQ(ksm_seat_take(&a->peer, true, &seat), -ENOMEM);
	ksm_os_fault_clear();
	CHECK_EQ(ksm_seat_take(&a->peer, true, &seat), 0);
	ksm_os_fault_set(KSM_OS_POPULATE, 0, UINT32_MAX, -ENOMEM);
	CHECK_EQ(ksm_seat_copy_bits(&a->peer, &seat, &a->peer.seat), -ENOMEM);
	CHECK_EQ(seat.bitmap->high, 0);
	ksm_os_fault_clear();
	CHECK_EQ(ksm_seat_copy_bits(&a->peer, &seat, &a->peer.seat), 0);
	CHECK_EQ(seat.bits[FAR / 64], 1);
	ksm_seat_leave(&seat);
	ksm_bit_clear(&a->peer, FAR);
	ksm_merge_unlock(&a->peer);
	members_leave(a);
}

/* What would be SIGBUS is an error: here because the file ends. */
TEST(populate_says_what_a_touch_would_end_in)
{
	void *map;
	int fd = ksm_os_memfd("test");
	CHECK_SYS(fd);
	CHECK_EQ(ksm_os_truncate(fd, KSM_PAGE_SIZE), 0);
	CHECK_EQ(ksm_os_map_shared(fd, 2 * KSM_PAGE_SIZE, true, &map), 0);
	CHECK_EQ(ksm_os_populate((char *)map + KSM_PAGE_SIZE, KSM_PAGE_SIZE), -ENOMEM);
	CHECK_EQ(ksm_os_populate(map, 2 * KSM_PAGE_SIZE), -ENOMEM);
	CHECK_EQ(ksm_os_populate(map, KSM_PAGE_SIZE), 0);
	struct stat stat;
	CHECK_SYS(fstat(fd, &stat));
	CHECK_EQ(stat.st_blocks * 512, KSM_PAGE_SIZE);
	CHECK_EQ(*(char *)map, 0);
	munmap(map, 2 * KSM_PAGE_SIZE);
	close(fd);
}
