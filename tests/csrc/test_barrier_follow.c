/* SPDX-License-Identifier: MIT */
/* Memory that is moved, unmapped or protected while its pages are out, or held: FOLLOW-1 to 3. */
#include "members.h"

#define PAGES 8

struct mover {
	pthread_t thread;
	char *from, *to;
	size_t pages;
	int flags;
	uint32_t done;
};

static struct ksm_barrier barrier;
static char *at;
static int store;

static bool begin(void)
{
	if (!kit_can_move())
		return false;
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_MOVE, NULL, -1), 0);
	at = kit_map_filled(PAGES + 2, 0) + KSM_PAGE_SIZE; /* zeros on both sides */
	for (size_t i = 0; i < PAGES; i++)
		kit_fill(kit_page(at, i), 1 + i);
	store = ksm_os_memfd("store");
	CHECK_EQ(ksm_os_truncate(store, PAGES * KSM_PAGE_SIZE), 0);
	CHECK_EQ(ksm_os_pwrite(store, at, PAGES * KSM_PAGE_SIZE, 0), 0);
	return true;
}

static void open_window(void)
{
	barrier.foreign = true;
	CHECK_EQ(ksm_window_open(&barrier, at, PAGES), 0);
	CHECK_EQ(barrier.pages, PAGES);
}

/* As good as new: everything comes and goes. */
static void end(void)
{
	char *other = kit_map_filled(PAGES, 50);
	CHECK_EQ(ksm_window_open(&barrier, other, PAGES), 0);
	CHECK_EQ(ksm_window_close(&barrier), 0);
	kit_check_filled(other, PAGES, 50);
	CHECK(!kit_is_registered(other, PAGES));
	ksm_barrier_destroy(&barrier);
}

static void *move_memory(void *argument)
{
	struct mover *m = argument;
	size_t nbytes = m->pages * KSM_PAGE_SIZE;
	CHECK(mremap(m->from, nbytes, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED | m->flags, m->to) == m->to);
	ksm_store_release(&m->done, 1);
	return NULL;
}

/* Returns when the memory has been moved. Who moves it waits for us. */
static void start_moving(struct mover *m)
{
	struct pollfd poll_for = {.fd = barrier.uffd, .events = POLLIN};
	m->to = m->to ? m->to : kit_map(m->pages);
	CHECK_EQ(pthread_create(&m->thread, NULL, move_memory, m), 0);
	CHECK_EQ(poll(&poll_for, 1, 20000), 1);
	CHECK(!ksm_load_acquire(&m->done));
}

static void finish_moving(struct mover *m)
{
	KIT_WAIT(20, ksm_load_acquire(&m->done));
	pthread_join(m->thread, NULL);
}

static void check_moved(const struct mover *m, uint64_t first)
{
	kit_check_filled(m->to, m->pages, first);
	CHECK(!kit_is_registered(m->to, m->pages));
	memset(m->to, 1, m->pages * KSM_PAGE_SIZE); /* nobody is kept waiting */
}

/* ---- moved ---------------------------------------------------------------------------------------------------------- */

TEST(pages_go_where_their_mapping_is)
{
	if (!begin())
		return;
	struct mover m = {.from = at, .pages = PAGES};
	open_window();
	start_moving(&m);
	ksm_window_close(&barrier);
	finish_moving(&m);
	check_moved(&m, 1);
	CHECK(!ksm_os_is_mapped(at, KSM_PAGE_SIZE));
	CHECK(kit_is(at - KSM_PAGE_SIZE, 0));
	end();
}

TEST(some_of_them)
{
	if (!begin())
		return;
	struct mover m = {.from = kit_page(at, 2), .pages = 3};
	open_window();
	start_moving(&m);
	CHECK_NE(ksm_window_map(&barrier, 2, 3, store, 2 * KSM_PAGE_SIZE, true), 0);
	finish_moving(&m); /* we know by now; whoever looks waits for the bytes */
	CHECK_EQ(ksm_window_map(&barrier, 6, 2, store, 6 * KSM_PAGE_SIZE, true), 0);
	ksm_window_close(&barrier);
	check_moved(&m, 3);
	kit_check_filled(at, 2, 1);
	kit_check_filled(kit_page(at, 5), 3, 6);
	CHECK(!ksm_os_is_mapped(kit_page(at, 2), KSM_PAGE_SIZE));
	end();
}

TEST(the_old_mapping_may_stay)
{
	if (!begin())
		return;
	struct mover m = {.from = at, .pages = PAGES, .flags = MREMAP_DONTUNMAP};
	open_window();
	start_moving(&m);
	ksm_window_close(&barrier);
	finish_moving(&m);
	check_moved(&m, 1);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(at, i), 0));
	CHECK(!kit_is_registered(at, PAGES));
	end();
}

TEST(something_else_takes_their_place)
{
	if (!begin())
		return;
	struct mover m = {.from = at, .pages = PAGES};
	open_window();
	start_moving(&m);
	char *other =
		mmap(at, PAGES * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(other == at);
	for (size_t i = 0; i < PAGES; i++)
		kit_fill(kit_page(at, i), 100 + i);
	CHECK_NE(ksm_window_map(&barrier, 0, PAGES, store, 0, true), 0);
	ksm_window_close(&barrier);
	finish_moving(&m);
	check_moved(&m, 1);
	kit_check_filled(at, PAGES, 100);
	end();
}

/* Right before a frame was mapped there: then there is a mapping too many, and no byte too few. */
TEST(moved_right_before_they_were_mapped)
{
	if (!begin())
		return;
	struct mover m = {.from = at, .pages = PAGES};
	open_window();
	start_moving(&m);
	CHECK_EQ(ksm_os_map_frames(at, PAGES * KSM_PAGE_SIZE, store, 0, true), 0);
	memset(barrier.fate, KSM_WINDOW_MAPPED, PAGES);
	ksm_window_close(&barrier);
	finish_moving(&m);
	check_moved(&m, 1);
	end();
}

/* While a part of it is registered there are several mappings: since Linux 6.17 mremap then moves some and says EFAULT. */
static void move_all(char *from, char *to, size_t pages)
{
	size_t nbytes = pages * KSM_PAGE_SIZE;
	if (mremap(from, nbytes, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to)
		return;
	CHECK_EQ(errno, EFAULT);
	for (size_t i = 0; i < pages; i++) {
		char *page = kit_page(from, i);
		if (ksm_os_is_mapped(page, KSM_PAGE_SIZE))
			CHECK(mremap(page, KSM_PAGE_SIZE, KSM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED,
				     kit_page(to, i)) == kit_page(to, i));
	}
}

static void *move_on_and_on(void *argument)
{
	struct mover *m = argument;
	char *places[2] = {m->from, m->to};
	for (uint32_t n = 0; !ksm_load_relaxed(&m->done); n++) {
		m->from = places[(n + 1) % 2];
		move_all(places[n % 2], m->from, m->pages);
		kit_check_filled(m->from, m->pages, 1);
		if (n % 2)
			usleep(100); /* so that it is not only looking, which waits for the window's end */
	}
	return NULL;
}

/* A thread moves its memory without end, wherever a window finds it. */
TEST(moved_all_the_time)
{
	if (!begin())
		return;
	struct mover m = {.from = at, .to = kit_map(PAGES), .pages = PAGES};
	unsigned opened = 0, followed = 0;
	CHECK_EQ(pthread_create(&m.thread, NULL, move_on_and_on, &m), 0);
	for (double until = harness_now() + 20; followed < 500 && harness_now() < until;) {
		barrier.foreign = true;
		if (ksm_window_open(&barrier, at, PAGES))
			continue;
		opened++;
		struct pollfd event = {.fd = barrier.uffd, .events = POLLIN};
		poll(&event, 1, 2);
		ksm_follow(&barrier);
		followed += barrier.moved[0] != NULL;
		ksm_window_close(&barrier);
	}
	ksm_store_relaxed(&m.done, 1);
	pthread_join(m.thread, NULL);
	printf("%u windows, moved inside %u of them\n", opened, followed);
	CHECK_GT(followed, 0);
	check_moved(&(struct mover){.to = m.from, .pages = PAGES}, 1);
	end();
}

/* An arena's memory is not the program's to move, but it would be moved. */
TEST(memory_of_our_own_is_followed_too)
{
	if (!begin())
		return;
	struct mover m = {.from = at, .pages = PAGES};
	open_window();
	barrier.foreign = false;
	start_moving(&m);
	ksm_window_close(&barrier);
	finish_moving(&m);
	check_moved(&m, 1);
	end();
}

/* ---- unmapped, and protected ------------------------------------------------------------------------------------------- */

TEST(unmapped_memory_stays_unmapped)
{
	if (!begin())
		return;
	open_window();
	CHECK_SYS(munmap(kit_page(at, 2), 3 * KSM_PAGE_SIZE));
	CHECK_NE(ksm_window_map(&barrier, 2, 2, store, 2 * KSM_PAGE_SIZE, true), 0);
	CHECK_NE(ksm_window_map(&barrier, 1, 2, store, KSM_PAGE_SIZE, true), 0); /* half of it is there */
	ksm_window_close(&barrier);
	for (size_t i = 2; i < 5; i++)
		CHECK(!ksm_os_is_mapped(kit_page(at, i), KSM_PAGE_SIZE));
	kit_check_filled(at, 2, 1);
	kit_check_filled(kit_page(at, 5), 3, 6);
	end();
}

static void takes_its_place(int fd, int flags, uint64_t first)
{
	open_window();
	char *other = mmap(at, PAGES * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
	CHECK(other == at);
	for (size_t i = 0; i < PAGES; i++)
		kit_fill(kit_page(at, i), first + i);
	CHECK_NE(ksm_window_map(&barrier, 0, PAGES, store, 0, true), 0);
	CHECK_EQ(ksm_window_close(&barrier), 0);
	kit_check_filled(at, PAGES, first);
	CHECK(!kit_is_registered(at, PAGES));
}

TEST(what_takes_its_place_keeps_its_bytes)
{
	if (!begin())
		return;
	int file = ksm_os_memfd("file");
	CHECK_EQ(ksm_os_truncate(file, PAGES * KSM_PAGE_SIZE), 0);
	takes_its_place(-1, MAP_PRIVATE | MAP_ANONYMOUS, 200);
	takes_its_place(-1, MAP_PRIVATE | MAP_ANONYMOUS, 0);
	takes_its_place(file, MAP_SHARED, 300);
	end();
}

TEST(a_file_takes_its_place)
{
	char path[96];
	snprintf(path, sizeof(path), "%s/file", kit_directory()); /* before there are pages that a fork would share */
	if (!begin())
		return;
	int file = open(path, O_RDWR | O_CREAT, 0600);
	CHECK_SYS(file);
	CHECK_SYS(ftruncate(file, PAGES * KSM_PAGE_SIZE));
	takes_its_place(file, MAP_PRIVATE, 400);
	end();
}

static void protected_meanwhile(int protection)
{
	open_window();
	CHECK_SYS(mprotect(kit_page(at, 3), 2 * KSM_PAGE_SIZE, protection));
	ksm_window_close(&barrier);
	CHECK_SYS(mprotect(kit_page(at, 3), 2 * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE));
	kit_check_filled(at, PAGES, 1);
	CHECK(!kit_is_registered(at, PAGES));
}

TEST(protected_memory_gets_its_bytes_back)
{
	if (!begin())
		return;
	protected_meanwhile(PROT_NONE);
	protected_meanwhile(PROT_READ);
	protected_meanwhile(PROT_READ | PROT_WRITE | PROT_EXEC);
	end();
}

/* ---- held ---------------------------------------------------------------------------------------------------------------- */

static void *attend(void *stop)
{
	while (!ksm_load_relaxed((uint32_t *)stop))
		CHECK_EQ(barrier.ops->attend(&barrier, 1000000), 0);
	return NULL;
}

TEST(held_memory_is_let_go_where_it_went)
{
	pthread_t thread;
	uint32_t stop = 0;
	if (!begin())
		return;
	struct mover m = {.from = at, .pages = PAGES, .to = kit_map(PAGES)};
	barrier.foreign = true;
	CHECK_EQ(barrier.ops->hold(&barrier, at, PAGES), 0);
	CHECK(barrier.ops->holds(&barrier, at, PAGES));
	CHECK_EQ(pthread_create(&thread, NULL, attend, &stop), 0);
	move_memory(&m);
	KIT_WAIT(10,
		 !kit_is_registered(m.to, m.pages)); /* it goes on as soon as we know: a moment later it is let go */
	check_moved(&m, 1);
	ksm_store_relaxed(&stop, 1);
	pthread_join(thread, NULL);
	CHECK(!barrier.ops->holds(&barrier, at, PAGES));
	CHECK_EQ(barrier.ops->release(&barrier, at, PAGES), 0);
	end();
}

TEST(held_memory_may_go)
{
	if (!begin())
		return;
	barrier.foreign = true;
	CHECK_EQ(barrier.ops->hold(&barrier, at, PAGES), 0);
	CHECK_SYS(munmap(kit_page(at, 4), KSM_PAGE_SIZE));
	CHECK(!barrier.ops->holds(&barrier, at, PAGES));
	CHECK(barrier.ops->holds(&barrier, at, 4));
	CHECK_EQ(barrier.ops->release(&barrier, at, PAGES), 0);
	memset(at, 1, 4 * KSM_PAGE_SIZE);
	CHECK(!kit_is_registered(at, PAGES));
	end();
}

static void *store_into(void *page)
{
	*(volatile char *)page = 1;
	return NULL;
}

/* Who waits for a held page is told of once: a call that fails then must not leave it asleep. */
TEST(whoever_waits_is_let_go_whatever_fails)
{
	static const struct {
		enum ksm_os_call call;
		int error;
	} faults[] = {{KSM_OS_UFFD_PROTECT, -ENOENT},
		      {KSM_OS_UFFD_PROTECT, -EAGAIN},
		      {KSM_OS_UFFD_WAKE, -EINVAL},
		      {KSM_OS_UFFD_WAKE, -EAGAIN}};
	if (!begin())
		return;
	for (size_t i = 0; i < KSM_COUNT(faults); i++) {
		pthread_t writer, thread;
		uint32_t stop = 0;
		CHECK_EQ(barrier.ops->hold(&barrier, at, PAGES), 0);
		ksm_os_fault_set(faults[i].call, 0, 3, faults[i].error);
		CHECK_EQ(pthread_create(&thread, NULL, attend, &stop), 0);
		CHECK_EQ(pthread_create(&writer, NULL, store_into, kit_page(at, i)), 0);
		pthread_join(writer, NULL); /* while everything is held still */
		ksm_store_relaxed(&stop, 1);
		pthread_join(thread, NULL);
		CHECK_EQ(ksm_os_fault_hits(faults[i].call), 3);
		ksm_os_fault_clear();
		CHECK_EQ(barrier.ops->release(&barrier, at, PAGES), 0);
		CHECK_EQ(*kit_page(at, i), 1);
	}
	CHECK(!kit_is_registered(at, PAGES));
	end();
}
