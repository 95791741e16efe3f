/* SPDX-License-Identifier: MIT */
/*
 * One suite for every barrier there is: what windows promise (BARRIER-1 to 3). "stop" and "segv" work wherever /proc is;
 * "move" is left out, and named, where the kernel or the container refuses it.
 *
 * Under "segv" a system call that stores is not made to wait, it is refused (EFAULT): then it must have stored nothing.
 */
#include "crowd.h"

#include "barrier.h"
#include "guard.h"
#include "handler.h"
#include "park.h"

#include <sys/socket.h>

#define MOST 4096 /* frames of the store */

struct bench {
	struct ksm_barrier barrier;
	struct ksm_park park;
	int store;
	bool refuses; /* system calls, instead of making them wait */
	struct ksm_guard *guards[8];
	size_t guards_count;
};

static void on_each_barrier(void (*body)(struct bench *))
{
	for (size_t i = 0; ksm_barriers[i]; i++) {
		if (ksm_barriers[i]->kind != KSM_BARRIER_MOVE && !kit_has_barrier(ksm_barriers[i]->kind))
			continue;
		struct bench b = {.refuses = ksm_barriers[i]->kind == KSM_BARRIER_SEGV};
		CHECK_EQ(ksm_park_create(&b.park), 0);
		int r = ksm_barrier_create(&b.barrier, ksm_barriers[i]->kind, &b.park, -1);
		if (r) {
			CHECK(r == -EPERM || r == -EACCES || r == -ENOSYS || r == -EINVAL || r == -ENODEV);
			CHECK_EQ(ksm_barriers[i]->kind, KSM_BARRIER_MOVE);
			printf("%s does not work here: %s\n", ksm_barriers[i]->name, ksm_error_name(r));
			ksm_park_destroy(&b.park);
			continue;
		}
		b.store = ksm_os_memfd("store");
		CHECK_GE(b.store, 0);
		CHECK_EQ(ksm_os_truncate(b.store, MOST * KSM_PAGE_SIZE), 0);
		body(&b);
		while (b.guards_count)
			ksm_guard_destroy(b.guards[--b.guards_count]);
		ksm_barrier_destroy(&b.barrier);
		ksm_park_destroy(&b.park);
		close(b.store);
		printf("%s: as it should be\n", ksm_barriers[i]->name);
	}
}

static struct ksm_guard *guard(struct bench *b, char *at, size_t pages)
{
	CHECK_LT(b->guards_count, KSM_COUNT(b->guards));
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(ksm_guard_create(at, pages, &b->guards[b->guards_count]), 0);
	return b->guards[b->guards_count++];
}

/* Pages for windows of this barrier, as kit_map_filled(). */
static char *field(struct bench *b, size_t pages, uint64_t first)
{
	char *at = kit_map_filled(pages, first);
	if (b->barrier.ops->kind == KSM_BARRIER_SEGV)
		guard(b, at, pages);
	return at;
}

static void field_unmap(struct bench *b, char *at, size_t pages)
{
	if (b->barrier.ops->kind == KSM_BARRIER_SEGV)
		ksm_guard_destroy(b->guards[--b->guards_count]);
	munmap(at, pages * KSM_PAGE_SIZE);
}

/* On a busy machine threads may not stop in time: that is an answer, not a failure, and later they do. */
static void open_window(struct bench *b, char *at, size_t pages)
{
	double until = harness_now() + harness_limit(30);
	int r;
	while ((r = ksm_window_open(&b->barrier, at, pages)) == KSM_EUNSTOPPABLE && harness_now() < until)
		kit_sleep_ms(1);
	if (r)
		FAIL("no window: %s (%s)", ksm_error_name(r), b->park.reason);
}

static void write_frame(struct bench *b, size_t frame, const void *bytes)
{
	CHECK_EQ(ksm_os_pwrite(b->store, bytes, KSM_PAGE_SIZE, frame * KSM_PAGE_SIZE), 0);
}

static int map(struct bench *b, size_t page, size_t count, size_t frame)
{
	return ksm_window_map(&b->barrier, page, count, b->store, frame * KSM_PAGE_SIZE, true);
}

/* ---- what a window shows, and leaves ------------------------------------------------------------------------------ */

static void view_is_exact(struct bench *b)
{
	char *at = field(b, 100, 1);
	for (size_t n = 1; n <= KSM_WINDOW_PAGES; n += 21) {
		open_window(b, at, n);
		CHECK(b->barrier.at == at);
		CHECK_EQ(b->barrier.pages, n);
		kit_check_filled(b->barrier.view, n, 1);
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
		kit_check_filled(at, 100, 1);
		CHECK(!kit_is_registered(at, 100));
	}
	open_window(b, at, 100); /* more than fit */
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
	char *at = field(b, 12, 1);
	kit_fill(kit_page(at, 4), 0);
	kit_fill(kit_page(at, 5), 0);
	open_window(b, at, 10);
	for (size_t i = 0; i < 3; i++)
		write_frame(b, 7 + i, b->barrier.view + i * KSM_PAGE_SIZE);
	write_frame(b, 2, b->barrier.view + 8 * KSM_PAGE_SIZE);
	CHECK_EQ(map(b, 0, 3, 7), 0);
	CHECK_EQ(ksm_window_drop(&b->barrier, 4, 2), 0);
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
	open_window(b, kit_page(at, 6), 2);
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
	uint32_t tid, refusals;
	int from, to;
};

static ssize_t call(struct visitor *v)
{
	struct iovec iov = {v->at, 8};
	return v->way == READ    ? read(v->from, v->at, 8)
	       : v->way == READV ? readv(v->from, &iov, 1)
				 : recv(v->from, v->at, 8, 0);
}

static void *visit(void *argument)
{
	struct visitor *v = argument;
	ksm_store_release(&v->tid, (uint32_t)ksm_os_tid());
	while (!ksm_load_acquire(v->go))
		;
	switch (v->way) {
	case STORE:
		*(volatile uint64_t *)v->at = v->value;
		break;
	case LOAD:
		v->value = *(volatile uint64_t *)v->at;
		break;
	default:
		for (ssize_t n; (n = call(v)) != 8;) { /* refused: what was to be read is still there */
			CHECK(n == -1 && errno == EFAULT);
			ksm_add_relaxed(&v->refusals, 1);
			ksm_os_sleep_ns(1000000);
		}
	}
	ksm_store_release(&v->done, 1);
	return NULL;
}

static void visitor_start(struct visitor *v, enum way way, char *at, uint64_t value, uint32_t *go)
{
	int ends[2];
	CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	*v = (struct visitor){.way = way, .at = at, .value = value, .go = go, .from = ends[1], .to = ends[0]};
	CHECK_EQ(pthread_create(&v->thread, NULL, visit, v), 0);
}

static void visitor_end(struct visitor *v)
{
	pthread_join(v->thread, NULL);
	close(v->from);
	close(v->to);
}

static void visitors_wait(struct bench *b)
{
	static struct visitor visitors[3 * WAYS];
	static uint32_t go;
	char *at = field(b, 3 * WAYS, 1);
	uint64_t was[3 * WAYS];
	uint32_t refusals = 0;
	go = 0;
	for (size_t i = 0; i < 3 * WAYS; i++) {
		if (i / WAYS == 1)
			kit_fill(kit_page(at, i), 0);
		memcpy(&was[i], kit_page(at, i) + 64, 8);
		visitor_start(&visitors[i], i % WAYS, kit_page(at, i) + 64, 0xabcdef00 + i, &go);
		CHECK_EQ(write(visitors[i].to, &visitors[i].value, 8), 8);
	}
	kit_sleep_ms(10);
	for (size_t i = 0; i < WAYS; i++)
		write_frame(b, i, kit_page(at, i));
	open_window(b, at, 3 * WAYS);
	CHECK_EQ(b->barrier.pages, 3 * WAYS);
	ksm_store_release(&go, 1);
	kit_sleep_ms(60);
	for (size_t i = 0; i < 3 * WAYS; i++) {
		CHECK(visitors[i].way == LOAD || !ksm_load_acquire(&visitors[i].done));
		CHECK(kit_is(b->barrier.view + i * KSM_PAGE_SIZE, i / WAYS == 1 ? 0 : 1 + i)); /* nothing arrived */
	}
	CHECK_EQ(map(b, 0, WAYS, 0), 0);
	CHECK_EQ(ksm_window_drop(&b->barrier, WAYS, WAYS), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	for (size_t i = 0; i < 3 * WAYS; i++) {
		visitor_end(&visitors[i]);
		refusals += visitors[i].refusals;
		uint64_t now;
		memcpy(&now, visitors[i].at, 8);
		CHECK_EQ(now, visitors[i].way == LOAD ? was[i] : 0xabcdef00 + i);
		CHECK_EQ(visitors[i].value, now);
		memcpy(visitors[i].at, &was[i], 8);
		CHECK(kit_is(kit_page(at, i), i / WAYS == 1 ? 0 : 1 + i));
	}
	CHECK_EQ(refusals > 0, b->refuses);
}

TEST_LIMIT(stores_and_system_calls_wait_and_land, 20)
{
	on_each_barrier(visitors_wait);
}

/* Does it sleep in the kernel? */
static bool sleeps(const struct visitor *v)
{
	char path[64], text[256] = "";
	if (!ksm_load_acquire(&v->tid))
		return false;
	snprintf(path, sizeof(path), "/proc/self/task/%u/stat", ksm_load_acquire(&v->tid));
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK_GT(read(fd, text, sizeof(text) - 1), 0);
	close(fd);
	return strstr(text, ") S ") != NULL;
}

/* They have been in their calls for a while when the window opens; what they wait for comes while it is open. */
static void calls_in_progress(struct bench *b)
{
	static struct visitor visitors[WAYS];
	static uint32_t go;
	char *at = field(b, WAYS, 1);
	uint32_t *steps = kit_steps(), refusals = 0;
	go = 0;
	for (size_t i = READ; i < WAYS; i++)
		visitor_start(&visitors[i], i, kit_page(at, i) + 64, 0xabcdef00 + i, &go);
	pid_t sender = kit_fork(); /* another process, so that no barrier holds it up */
	if (sender == 0) {
		kit_await(steps, 1);
		for (size_t i = READ; i < WAYS; i++)
			CHECK_EQ(write(visitors[i].to, &visitors[i].value, 8), 8);
		kit_reach(steps, 2);
		_exit(0);
	}
	ksm_store_release(&go, 1);
	for (size_t i = READ; i < WAYS; i++) {
		KIT_WAIT(10, sleeps(&visitors[i]));
		write_frame(b, i, kit_page(at, i));
	}
	for (size_t i = 0; i < WAYS && !b->barrier.ops->shared; i++)
		kit_fill(kit_page(at, i), 1 + i); /* the sender has a copy of it */
	open_window(b, at, WAYS);
	kit_reach(steps, 1);
	kit_await(steps, 2);
	kit_sleep_ms(50);
	kit_check_filled(b->barrier.view, WAYS, 1);
	CHECK_EQ(map(b, READ, WAYS - READ, READ), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	for (size_t i = READ; i < WAYS; i++) {
		visitor_end(&visitors[i]);
		refusals += visitors[i].refusals;
		CHECK_EQ(*(uint64_t *)visitors[i].at, visitors[i].value);
	}
	CHECK_EQ(refusals > 0, b->refuses);
	CHECK_CHILD(sender);
}

TEST_LIMIT(calls_that_were_in_progress_wait_and_land, 20)
{
	on_each_barrier(calls_in_progress);
}

/* ---- nothing is lost under load --------------------------------------------------------------------------------------- */

#define FIELD 2048 /* pages */

/* All of the field onto frames, in windows or without. Returns how many words are not what they should be. */
static size_t lost_under_load(struct bench *b, bool windows)
{
	struct crowd crowd;
	char copy[KSM_PAGE_SIZE];
	char *at = field(b, FIELD, 1);
	uint64_t state = 99;
	size_t mapped = 0;
	crowd_start(&crowd, at, FIELD, 3, 0);
	crowd.may_refuse = b->refuses;
	for (size_t page = 0; page < FIELD;) {
		size_t n = KSM_MIN(1 + kit_random(&state) % 16, FIELD - page);
		if (!windows) {
			memcpy(copy, kit_page(at, page), KSM_PAGE_SIZE);
			write_frame(b, page, copy);
			CHECK_EQ(ksm_os_map_frames(kit_page(at, page), KSM_PAGE_SIZE, b->store, page * KSM_PAGE_SIZE,
						   true),
				 0);
			page++;
			continue;
		}
		open_window(b, kit_page(at, page), n);
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
	field_unmap(b, at, FIELD);
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

TEST_LIMIT(writers_lose_nothing_and_would_without_windows, 60)
{
	on_each_barrier(loses_nothing);
}

/* ---- pages that cannot be had -------------------------------------------------------------------------------------------- */

static void open_when_free(struct bench *b, char *at, size_t pages)
{
	double until = harness_now() + harness_limit(5);
	int r;
	while (((r = ksm_window_open(&b->barrier, at, pages)) == -EBUSY || r == KSM_EDEVICES) && harness_now() < until)
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
	if (b->barrier.ops->kind == KSM_BARRIER_SEGV)
		return; /* cannot see it: BARRIER-3 */
	char *at = field(b, 8, 1);
	pthread_t other;
	int ring = kit_pin(kit_page(at, 3), 1);
	if (ring < 0)
		return;
	if (b->barrier.ops->kind == KSM_BARRIER_STOP) { /* as long as there is such a descriptor, every page */
		CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, 3), 1), KSM_EDEVICES);
		CHECK_EQ(ksm_window_open(&b->barrier, at, 8), KSM_EDEVICES);
		printf("it says: %s\n", b->park.reason);
		CHECK(b->park.reason[0]);
		close(ring);
		open_when_free(b, at, 8);
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
		kit_check_filled(at, 8, 1);
		return;
	}
	CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, 3), 1), -EBUSY);
	CHECK_EQ(ksm_window_open(&b->barrier, kit_page(at, 3), 5), -EBUSY);
	CHECK(!kit_is_registered(at, 8));
	kit_check_filled(at, 8, 1);
	/* In the middle: the window is what lies before; nobody who touches the rest waits, even where nothing is there. */
	madvise(kit_page(at, 6), KSM_PAGE_SIZE, MADV_DONTNEED);
	open_window(b, at, 8);
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
	char *at = field(b, 4, 1);
	uint32_t *steps = kit_steps();
	pid_t child = kit_fork();
	if (child == 0) {
		kit_await(steps, 1);
		kit_check_filled(at, 4, 1); /* whatever the other side has done with its own */
		kit_reach(steps, 2);
		for (;;)
			pause();
	}
	if (b->barrier.ops->shared) {
		open_window(b, at, 4);
		CHECK_EQ(b->barrier.pages, 4);
		write_frame(b, 0, b->barrier.view);
		CHECK_EQ(map(b, 0, 1, 0), 0);
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
		kit_check_filled(at, 4, 1);
		CHECK_EQ(kit_is_file(at), 1);
		for (size_t i = 0; i < 4; i++)
			kit_fill(kit_page(at, i), 11 + i);
		kit_reach(steps, 1);
		kit_await(steps, 2);
		kit_check_filled(at, 4, 11);
		kit_kill(child);
		return;
	}
	CHECK_EQ(ksm_window_open(&b->barrier, at, 4), -EBUSY);
	kit_check_filled(at, 4, 1);
	kit_fill(kit_page(at, 0), 1); /* a copy of our own */
	open_window(b, at, 4);
	CHECK_EQ(b->barrier.pages, 1);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 4, 1);
	kit_kill(child);
	for (size_t i = 0; i < 4; i++)
		kit_fill(kit_page(at, i), 1 + i);
	open_window(b, at, 4);
	CHECK_EQ(b->barrier.pages, 4);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 4, 1);
}

TEST(pages_shared_by_fork_are_refused_or_had)
{
	on_each_barrier(shared_by_fork);
}

static void windows_follow(struct bench *b)
{
	char *at = field(b, 64, 1);
	for (int round = 0; round < 50; round++) {
		size_t first = (size_t)round % 40;
		open_window(b, kit_page(at, first), 24);
		kit_check_filled(b->barrier.view, 24, 1 + first);
		CHECK_EQ(ksm_window_close(&b->barrier), 0);
	}
	kit_check_filled(at, 64, 1);
	open_window(b, at, 64);
	for (size_t i = 0; i < 64; i++)
		write_frame(b, i, b->barrier.view + i * KSM_PAGE_SIZE);
	CHECK_EQ(map(b, 0, 64, 0), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	char *other = field(b, 64, 1);
	open_window(b, other, 64); /* scratch is empty again */
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
	go = 0;
	open_window(b, at, WAYS + 2);
	for (size_t i = 0; i < WAYS + 2; i++)
		write_frame(b, i, b->barrier.view + i * KSM_PAGE_SIZE);
	CHECK_EQ(map(b, 0, WAYS + 2, 0), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_fill(kit_page(at, WAYS), 50); /* one that is broken, and one that nobody has touched */
	for (size_t i = 0; i < WAYS; i++) {
		visitor_start(&visitors[i], i, kit_page(at, i), 7 + i, &go);
		CHECK_EQ(write(visitors[i].to, &visitors[i].value, 8), 8);
	}
	int r;
	double until = harness_now() + harness_limit(10);
	while ((r = b->barrier.ops->hold(&b->barrier, at, WAYS + 2)) == KSM_EUNSTOPPABLE && harness_now() < until)
		kit_sleep_ms(1);
	CHECK_EQ(r, 0);
	ksm_store_release(&go, 1);
	kit_sleep_ms(50);
	for (size_t i = 0; i < WAYS; i++) {
		CHECK_EQ(ksm_load_acquire(&visitors[i].done), visitors[i].way == LOAD && !b->barrier.ops->in_place);
		CHECK(kit_is(kit_page(at, i), 1 + i));
	}
	CHECK(kit_is(kit_page(at, WAYS), 50));
	CHECK_EQ(b->barrier.ops->release(&b->barrier, at, WAYS + 2), 0);
	for (size_t i = 0; i < WAYS; i++) {
		visitor_end(&visitors[i]);
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

/* ---- pages that are readable only afterwards ------------------------------------------------------------------------------------ */

static void read_only(struct bench *b)
{
	char *at = kit_map_filled(6, 1), frame[KSM_PAGE_SIZE];
	struct ksm_guard *mine = guard(b, at, 6);
	open_window(b, at, 6);
	for (size_t i = 0; i < 6; i++)
		write_frame(b, i, b->barrier.view + i * KSM_PAGE_SIZE);
	CHECK_EQ(ksm_window_map(&b->barrier, 1, 4, b->store, KSM_PAGE_SIZE, false), 0);
	if (!b->refuses) /* that one does it itself */
		ksm_guard_set(mine, 1, 4, KSM_GUARD_MERGED);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(at, 6, 1);
	for (size_t i = 0; i < 6; i++) {
		bool mapped = i >= 1 && i < 5;
		CHECK_EQ(kit_is_file(kit_page(at, i)), mapped);
		CHECK_EQ(kit_is_readonly(kit_page(at, i)), mapped);
		CHECK_EQ(KSM_GUARD_STATE(ksm_guard_get(mine, i)), mapped ? KSM_GUARD_MERGED : KSM_GUARD_OPEN);
		CHECK_EQ(kit_call_store(kit_page(at, i)), mapped ? -EFAULT : 0);
	}
	CHECK_EQ(mine->breaks, 0);
	kit_fill(kit_page(at, 2), 50);
	kit_fill(kit_page(at, 4), 51);
	CHECK_EQ(mine->breaks, 2);
	for (size_t i = 0; i < 6; i++)
		CHECK(kit_is(kit_page(at, i), i == 2 ? 50 : i == 4 ? 51 : 1 + i));
	CHECK(!kit_is_readonly(kit_page(at, 2)) && kit_is_readonly(kit_page(at, 3)));
	CHECK_EQ(ksm_os_pread(b->store, frame, sizeof(frame), 2 * KSM_PAGE_SIZE), 0);
	CHECK(kit_is(frame, 3));
}

TEST(pages_mapped_readable_only_are_copied_when_they_are_written)
{
	on_each_barrier(read_only);
}

/* ---- calls that fail ---------------------------------------------------------------------------------------------------------- */

static void failing_calls(struct bench *b)
{
	char *at = field(b, 8, 1);
	kit_fill(kit_page(at, 5), 0);
	open_window(b, at, 8);
	for (size_t i = 0; i < 8; i++)
		write_frame(b, i, b->barrier.view + i * KSM_PAGE_SIZE);
	ksm_os_fault_set(KSM_OS_MAP_FRAMES, 0, 1, -ENOMEM);
	CHECK_EQ(map(b, 0, 3, 0), -ENOMEM);
	CHECK_EQ(map(b, 2, 2, 2), 0); /* one of those */
	if (b->barrier.ops->drop) {
		ksm_os_fault_set(KSM_OS_ADVISE, 0, 1, -ENOMEM);
		CHECK_EQ(ksm_window_drop(&b->barrier, 5, 1), -ENOMEM);
	}
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	ksm_os_fault_clear();
	for (size_t i = 0; i < 8; i++) {
		CHECK(kit_is(kit_page(at, i), i == 5 ? 0 : 1 + i));
		CHECK_EQ(kit_is_file(kit_page(at, i)), i == 2 || i == 3);
		CHECK_EQ(kit_call_store(kit_page(at, i)), 0);
	}
	/* The kernel has taken the old mapping away before it failed. */
	if (b->barrier.ops->in_place) {
		open_window(b, at, 2);
		CHECK_SYS(munmap(at, 2 * KSM_PAGE_SIZE));
		ksm_os_fault_set(KSM_OS_MAP_FRAMES, 0, 1, -ENOMEM);
		CHECK_EQ(map(b, 0, 2, 0), -ENOMEM);
		ksm_os_fault_clear();
		ksm_window_close(&b->barrier);
		kit_check_filled(at, 2, 1);
		CHECK_EQ(kit_is_file(at), 0);
		kit_fill(at, 60);
		CHECK_EQ(kit_call_store(kit_page(at, 1)), 0);
	}
	open_window(b, kit_page(at, 6), 2); /* as good as new */
	CHECK_EQ(map(b, 0, 2, 6), 0);
	CHECK_EQ(ksm_window_close(&b->barrier), 0);
	kit_check_filled(kit_page(at, 6), 2, 7);
}

TEST(calls_that_fail_leave_pages_as_they_were)
{
	on_each_barrier(failing_calls);
}

/* ---- asking ----------------------------------------------------------------------------------------------------------------------- */

TEST(asking_for_a_barrier)
{
	struct ksm_barrier barrier;
	struct ksm_park park;
	CHECK_EQ(ksm_park_create(&park), 0);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_AUTO, &park, -1), 0);
	CHECK(barrier.ops == (kit_can_move() ? &ksm_barrier_move : &ksm_barrier_stop));
	printf("chosen here: %s\n", barrier.ops->name);
	ksm_barrier_destroy(&barrier);
	CHECK(barrier.ops == NULL);
	ksm_os_fault_set(KSM_OS_UFFD_OPEN, 0, UINT32_MAX, -EPERM);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_MOVE, &park, -1), -EPERM); /* by name: with the reason */
	CHECK(barrier.ops == NULL);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_AUTO, &park, -1), 0); /* not by name: the next best */
	CHECK(barrier.ops == &ksm_barrier_stop);
	ksm_barrier_destroy(&barrier);
	CHECK_NE(ksm_barrier_create(&barrier, KSM_BARRIER_STOP, NULL, -1), 0);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_AUTO, NULL, -1), -EPERM); /* never segv for ordinary memory */
	CHECK(barrier.ops == NULL);
	char *at = kit_map_filled(1, 1);
	CHECK_EQ(ksm_window_open(&barrier, at, 1), -EPERM);
	CHECK(kit_is(at, 1));
	ksm_os_fault_clear();
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_STOP, &park, -1), 0);
	ksm_barrier_destroy(&barrier);
	ksm_park_destroy(&park);
}

TEST(a_handler_in_our_place_is_the_reason_against_segv)
{
	struct ksm_barrier barrier;
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_SEGV, NULL, -1), 0);
	ksm_barrier_destroy(&barrier);
	signal(SIGSEGV, SIG_DFL);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_SEGV, NULL, -1), KSM_EDISPLACED);
	CHECK(barrier.ops == NULL);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_SEGV, NULL, -1), KSM_EDISPLACED);
}
