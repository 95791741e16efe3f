/* SPDX-License-Identifier: MIT */
/*
 * One suite for every barrier there is: what windows promise (BARRIER-1 to 3). A barrier that does not work here, by the
 * kernel's or the container's will, is left out and named.
 */
#include "crowd.h"

#include "barrier.h"

#include <linux/io_uring.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define MOST 4096 /* frames of the store */

struct bench {
	struct ksm_barrier barrier;
	int store;
};

static void on_each_barrier(void (*body)(struct bench *))
{
	for (size_t i = 0; ksm_barriers[i]; i++) {
		struct bench bench;
		int r = ksm_barrier_create(&bench.barrier, ksm_barriers[i]->kind);
		if (r) {
			CHECK(r == -EPERM || r == -EACCES || r == -ENOSYS || r == -EINVAL || r == -ENODEV);
			printf("%s does not work here: %s\n", ksm_barriers[i]->name, ksm_error_name(r));
			continue;
		}
		bench.store = ksm_os_memfd("store");
		CHECK_GE(bench.store, 0);
		CHECK_EQ(ksm_os_truncate(bench.store, MOST * KSM_PAGE_SIZE), 0);
		body(&bench);
		ksm_barrier_destroy(&bench.barrier);
		close(bench.store);
	}
}

static void write_frame(struct bench *b, size_t frame, const void *bytes)
{
	CHECK_EQ(ksm_os_pwrite(b->store, bytes, KSM_PAGE_SIZE, frame * KSM_PAGE_SIZE), 0);
}

static int map(struct bench *b, size_t page, size_t count, size_t frame)
{
	return ksm_window_map(&b->barrier, page, count, b->store, frame * KSM_PAGE_SIZE);
}

/* ---- what a window shows, and leaves ------------------------------------------------------------------------------ */

static void view_is_exact(struct bench *b)
{
	char *at = kit_map_filled(100, 1);
	for (size_t n = 1; n <= KSM_WINDOW_PAGES; n += 21) {
		CHECK_EQ(ksm_window_open(&b->barrier, at, n), 0);
		CHECK(b->barrier.at == at);
		CHECK_EQ(b->barrier.pages, n);
		kit_check_filled(b->barrier.view, n, 1);
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
		kit_check_filled(at, 100, 1);
		CHECK(!kit_is_registered(at, 100));
	}
	CHECK_EQ(ksm_window_open(&b->barrier, at, 100), 0); /* more than fit */
	CHECK_LE(b->barrier.pages, KSM_WINDOW_PAGES);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 100, 1);
}

TEST(view_is_exact)
{
	on_each_barrier(view_is_exact);
}

static void fates(struct bench *b)
{
	char *at = kit_map_filled(12, 1);
	kit_fill(kit_page(at, 4), 0);
	kit_fill(kit_page(at, 5), 0);
	CHECK_EQ(ksm_window_open(&b->barrier, at, 10), 0);
	for (size_t i = 0; i < 3; i++)
		write_frame(b, 7 + i, b->barrier.view + i * KSM_PAGE_SIZE);
	write_frame(b, 2, b->barrier.view + 8 * KSM_PAGE_SIZE);
	CHECK_EQ(map(b, 0, 3, 7), 0);
	ksm_window_drop(&b->barrier, 4, 2);
	CHECK_EQ(map(b, 8, 1, 2), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	for (size_t i = 0; i < 12; i++) {
		CHECK(kit_is(kit_page(at, i), i == 4 || i == 5 ? 0 : 1 + i));
		CHECK_EQ(kit_is_file(kit_page(at, i)), i < 3 || i == 8);
	}
	/* A write makes a mapped page private and leaves the frame alone; the others can be had again. */
	kit_fill(kit_page(at, 1), 77);
	char frame[KSM_PAGE_SIZE];
	CHECK_EQ(ksm_os_pread(b->store, frame, sizeof(frame), 8 * KSM_PAGE_SIZE), 0);
	CHECK(kit_is(frame, 2));
	CHECK_EQ(kit_is_file(kit_page(at, 1)), 0);
	CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, 6), 2), 0);
	kit_check_filled(b->barrier.view, 2, 7);
	CHECK_EQ(map(b, 0, 1, 7), 0); /* whatever is mapped is there then */
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	CHECK(kit_is(kit_page(at, 6), 1));
	CHECK(kit_is(kit_page(at, 7), 8));
	CHECK(!kit_is_registered(at, 12));
}

TEST(pages_are_mapped_dropped_or_put_back)
{
	on_each_barrier(fates);
}

/* ---- who comes while it is open ------------------------------------------------------------------------------------- */

enum way {
	STORE,
	LOAD,
	READ,
	READV,
	RECEIVE,
	WAYS
};

struct visitor {
	pthread_t thread;
	enum way way;
	char *at; /* eight bytes there */
	uint64_t value;
	uint32_t *go, done;
	int from;
};

static void *visit(void *argument)
{
	struct visitor *v = argument;
	struct iovec iov = {v->at, 8};
	while (!ksm_load_acquire(v->go))
		;
	switch (v->way) {
	case STORE:
		*(volatile uint64_t *)v->at = v->value;
		break;
	case LOAD:
		v->value = *(volatile uint64_t *)v->at;
		break;
	case READ:
		CHECK_EQ(read(v->from, v->at, 8), 8);
		break;
	case READV:
		CHECK_EQ(readv(v->from, &iov, 1), 8);
		break;
	default:
		CHECK_EQ(recv(v->from, v->at, 8, 0), 8);
	}
	ksm_store_release(&v->done, 1);
	return NULL;
}

static void visitors_wait(struct bench *b)
{
	static struct visitor visitors[3 * WAYS];
	static uint32_t go;
	char *at = kit_map_filled(3 * WAYS, 1);
	uint64_t was[3 * WAYS];
	go = 0;
	for (size_t i = 0; i < 3 * WAYS; i++) {
		int ends[2];
		if (i / WAYS == 1)
			kit_fill(kit_page(at, i), 0);
		memcpy(&was[i], kit_page(at, i) + 64, 8);
		visitors[i] = (struct visitor){
			.way = i % WAYS, .at = kit_page(at, i) + 64, .value = 0xabcdef00 + i, .go = &go};
		CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
		CHECK_EQ(write(ends[0], &visitors[i].value, 8), 8);
		visitors[i].from = ends[1];
		CHECK_EQ(pthread_create(&visitors[i].thread, NULL, visit, &visitors[i]), 0);
	}
	kit_sleep_ms(10);
	for (size_t i = 0; i < WAYS; i++)
		write_frame(b, i, kit_page(at, i));
	CHECK_EQ(ksm_window_open(&b->barrier, at, 3 * WAYS), 0);
	CHECK_EQ(b->barrier.pages, 3 * WAYS);
	ksm_store_release(&go, 1);
	kit_sleep_ms(60);
	for (size_t i = 0; i < 3 * WAYS; i++) {
		CHECK(visitors[i].way == LOAD || !ksm_load_acquire(&visitors[i].done));
		CHECK(kit_is(b->barrier.view + i * KSM_PAGE_SIZE, i / WAYS == 1 ? 0 : 1 + i)); /* nothing arrived */
	}
	CHECK_EQ(map(b, 0, WAYS, 0), 0);
	ksm_window_drop(&b->barrier, WAYS, WAYS);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	for (size_t i = 0; i < 3 * WAYS; i++) {
		pthread_join(visitors[i].thread, NULL);
		uint64_t now;
		memcpy(&now, visitors[i].at, 8);
		CHECK_EQ(now, visitors[i].way == LOAD ? was[i] : 0xabcdef00 + i);
		CHECK_EQ(visitors[i].value, now);
		memcpy(visitors[i].at, &was[i], 8);
		CHECK(kit_is(kit_page(at, i), i / WAYS == 1 ? 0 : 1 + i));
	}
}

TEST_LIMIT(stores_and_system_calls_wait_and_land, 20)
{
	on_each_barrier(visitors_wait);
}

/* ---- nothing is lost under load --------------------------------------------------------------------------------------- */

#define FIELD 2048 /* pages */

/* All of the field onto frames, in windows or without. Returns how many words are not what they should be. */
static size_t lost_under_load(struct bench *b, bool windows)
{
	struct crowd crowd;
	char copy[KSM_PAGE_SIZE];
	char *field = kit_map_filled(FIELD, 1);
	uint64_t state = 99;
	size_t mapped = 0;
	crowd_start(&crowd, field, FIELD, 3, 0);
	for (size_t page = 0; page < FIELD;) {
		size_t n = KSM_MIN(1 + kit_random(&state) % 16, FIELD - page);
		if (!windows) {
			memcpy(copy, kit_page(field, page), KSM_PAGE_SIZE);
			write_frame(b, page, copy);
			CHECK_EQ(
				ksm_os_map_frames(kit_page(field, page), KSM_PAGE_SIZE, b->store, page * KSM_PAGE_SIZE),
				0);
			page++;
			continue;
		}
		CHECK_EQ(ksm_window_open(&b->barrier, kit_page(field, page), n), 0);
		n = b->barrier.pages;
		for (size_t i = 0; i < n; i++) {
			if (kit_random(&state) % 4 == 0)
				continue; /* put back */
			write_frame(b, page + i, b->barrier.view + i * KSM_PAGE_SIZE);
			CHECK_EQ(map(b, i, 1, page + i), 0);
			mapped++;
		}
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
		page += n;
	}
	kit_sleep_ms(20);
	size_t lost = crowd_end(&crowd);
	crowd_check_rest(&crowd, 1);
	CHECK(!windows || mapped > FIELD / 2);
	munmap(field, FIELD * KSM_PAGE_SIZE);
	return lost;
}

static void loses_nothing(struct bench *b)
{
	for (int round = 0; round < 3; round++)
		CHECK_EQ(lost_under_load(b, true), 0);
	size_t lost = 0;
	for (int round = 0; round < 20 && !lost; round++)
		lost += lost_under_load(b, false);
	CHECK_GT(lost, 0); /* without windows it does: the test can tell */
}

TEST_LIMIT(writers_lose_nothing_and_would_without_windows, 30)
{
	on_each_barrier(loses_nothing);
}

/* ---- pages that cannot be had -------------------------------------------------------------------------------------------- */

/* Pin a page as a device would: an io_uring's registered buffer. -1: not here. */
static int pin(void *page)
{
	struct io_uring_params params = {0};
	struct iovec iov = {page, KSM_PAGE_SIZE};
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0) {
		printf("no io_uring here: %s\n", strerror(errno));
		return -1;
	}
	CHECK_SYS(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1));
	return ring;
}

static void open_when_free(struct bench *b, char *at, size_t pages)
{
	double until = harness_now() + 5;
	int r;
	while ((r = ksm_window_open(&b->barrier, at, pages)) == -EBUSY && harness_now() < until)
		kit_sleep_ms(1); /* the kernel lets pins go some time after the descriptor is closed */
	CHECK_EQ(r, 0);
}

static void *touch_all(void *argument)
{
	char *at = argument;
	for (size_t i = 3; i < 8; i++)
		kit_page(at, i)[5] ^= 0;
	return NULL;
}

static void pinned(struct bench *b)
{
	char *at = kit_map_filled(8, 1);
	pthread_t other;
	int ring = pin(kit_page(at, 3));
	if (ring < 0)
		return;
	CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, 3), 1), -EBUSY);
	CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, 3), 5), -EBUSY);
	CHECK(!kit_is_registered(at, 8));
	kit_check_filled(at, 8, 1);
	/* In the middle: the window is what lies before; nobody who touches the rest waits, even where nothing is there. */
	madvise(kit_page(at, 6), KSM_PAGE_SIZE, MADV_DONTNEED);
	CHECK_EQ(ksm_window_open(&b->barrier, at, 8), 0);
	CHECK_EQ(b->barrier.pages, 3);
	kit_check_filled(b->barrier.view, 3, 1);
	CHECK_EQ(pthread_create(&other, NULL, touch_all, at), 0);
	pthread_join(other, NULL);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	CHECK(kit_is(kit_page(at, 6), 0));
	kit_check_filled(at, 6, 1);
	CHECK(!kit_is_registered(at, 8));
	close(ring);
	open_when_free(b, kit_page(at, 3), 3);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 6, 1);
}

TEST_LIMIT(pinned_pages_are_refused, 20)
{
	on_each_barrier(pinned);
}

static void shared_by_fork(struct bench *b)
{
	char *at = kit_map_filled(4, 1);
	pid_t child = kit_fork();
	if (child == 0)
		for (;;)
			pause();
	CHECK_EQ(ksm_window_open(&b->barrier, at, 4), -EBUSY);
	kit_check_filled(at, 4, 1);
	kit_fill(kit_page(at, 0), 1); /* a copy of our own */
	CHECK_EQ(ksm_window_open(&b->barrier, at, 4), 0);
	CHECK_EQ(b->barrier.pages, 1);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 4, 1);
	kit_kill(child);
	for (size_t i = 0; i < 4; i++)
		kit_fill(kit_page(at, i), 1 + i);
	CHECK_EQ(ksm_window_open(&b->barrier, at, 4), 0);
	CHECK_EQ(b->barrier.pages, 4);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 4, 1);
}

TEST(pages_shared_by_fork_are_refused)
{
	on_each_barrier(shared_by_fork);
}

static void windows_follow(struct bench *b)
{
	char *at = kit_map_filled(64, 1);
	for (int round = 0; round < 50; round++) {
		size_t first = (size_t)round % 40;
		CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, first), 24), 0);
		kit_check_filled(b->barrier.view, 24, 1 + first);
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
	}
	kit_check_filled(at, 64, 1);
	CHECK_EQ(ksm_window_open(&b->barrier, at, 64), 0);
	for (size_t i = 0; i < 64; i++)
		write_frame(b, i, b->barrier.view + i * KSM_PAGE_SIZE);
	CHECK_EQ(map(b, 0, 64, 0), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	char *other = kit_map_filled(64, 1);
	CHECK_EQ(ksm_window_open(&b->barrier, other, 64), 0); /* scratch is empty again */
	CHECK_EQ(map(b, 0, 64, 0), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 64, 1);
	kit_check_filled(other, 64, 1);
	CHECK_EQ(kit_smaps(other, 64 * KSM_PAGE_SIZE, NULL, NULL), 1); /* one mapping */
}

TEST(windows_follow_one_another)
{
	on_each_barrier(windows_follow);
}

/* ---- holding ----------------------------------------------------------------------------------------------------------------- */

static void hold(struct bench *b)
{
	static struct visitor visitors[WAYS];
	static uint32_t go;
	char *at = kit_map_filled(WAYS + 2, 1), frame[KSM_PAGE_SIZE];
	if (!b->barrier.ops->hold)
		return;
	CHECK_EQ(ksm_window_open(&b->barrier, at, WAYS + 2), 0);
	for (size_t i = 0; i < WAYS + 2; i++)
		write_frame(b, i, b->barrier.view + i * KSM_PAGE_SIZE);
	CHECK_EQ(map(b, 0, WAYS + 2, 0), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_fill(kit_page(at, WAYS), 50); /* one that is broken, and one that nobody has touched */
	for (size_t i = 0; i < WAYS; i++) {
		int ends[2];
		CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
		visitors[i] =
			(struct visitor){.way = i, .at = kit_page(at, i), .value = 7 + i, .go = &go, .from = ends[1]};
		CHECK_EQ(write(ends[0], &visitors[i].value, 8), 8);
		CHECK_EQ(pthread_create(&visitors[i].thread, NULL, visit, &visitors[i]), 0);
	}
	CHECK_EQ(b->barrier.ops->hold(&b->barrier, at, WAYS + 2), 0);
	ksm_store_release(&go, 1);
	kit_sleep_ms(50);
	for (size_t i = 0; i < WAYS; i++) {
		CHECK_EQ(ksm_load_acquire(&visitors[i].done), visitors[i].way == LOAD);
		CHECK(kit_is(kit_page(at, i), 1 + i));
	}
	CHECK(kit_is(kit_page(at, WAYS), 50));
	CHECK_EQ(b->barrier.ops->release(&b->barrier, at, WAYS + 2), 0);
	for (size_t i = 0; i < WAYS; i++) {
		pthread_join(visitors[i].thread, NULL);
		CHECK(visitors[i].way == LOAD || *(uint64_t *)kit_page(at, i) == 7 + i);
		CHECK_EQ(ksm_os_pread(b->store, frame, sizeof(frame), i * KSM_PAGE_SIZE), 0);
		CHECK(kit_is(frame, 1 + i));
	}
	kit_fill(kit_page(at, WAYS), 51);
	CHECK(kit_is(kit_page(at, WAYS + 1), 2 + WAYS));
	CHECK(!kit_is_registered(at, WAYS + 2));
}

TEST_LIMIT(held_pages_are_not_written_until_released, 20)
{
	on_each_barrier(hold);
}

TEST(asking_for_a_barrier)
{
	struct ksm_barrier barrier;
	int r = ksm_barrier_create(&barrier, KSM_BARRIER_AUTO);
	CHECK_EQ(r != 0, barrier.ops == NULL);
	if (!r)
		CHECK(barrier.ops == ksm_barriers[0] || ksm_barriers[1]);
	ksm_barrier_destroy(&barrier);
	CHECK(barrier.ops == NULL);
	char *at = kit_map_filled(1, 1);
	CHECK_EQ(ksm_window_open(&barrier, at, 1), -ENOSYS);
	CHECK(kit_is(at, 1));
}
