/* SPDX-License-Identifier: MIT */
/*
 * stall.c: how long a window keeps a thread from its work. A thread stores into a page over and over and notes every
 * gap; meanwhile windows are opened on that page, what they show is compared, and they are closed. For each window the
 * longest gap that touches it counts. The row "none" is the same without windows: what the machine does by itself.
 *
 *	stall [WINDOWS [THREADS]]	windows of each row (5000); threads that sleep in poll (3)
 */
#include "barrier.h"
#include "error.h"
#include "os.h"
#include "park.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES KSM_WINDOW_PAGES
#define NOTED_NS 1000u /* gaps that are shorter are not noted */
#define GAPS_MOST (1u << 20)
#define PAUSE_NS 1000000u /* between windows */
#define SLEEPERS_MOST 256
#define BUSY_MOST 128

struct gap {
	uint64_t from, to;
};

static struct gap *gaps;
static size_t gaps_count;
static char *field, *copy;
static uint32_t over;

static bool is_over(void)
{
	return __atomic_load_n(&over, __ATOMIC_ACQUIRE);
}

static void *store(void *unused KSM_UNUSED)
{
	volatile uint64_t *word = (uint64_t *)(field + (PAGES / 2) * KSM_PAGE_SIZE);
	uint64_t last = ksm_os_now_ns();
	while (!is_over()) {
		for (int i = 0; i < 8; i++)
			*word = *word + 1;
		uint64_t now = ksm_os_now_ns();
		if (now - last > NOTED_NS && gaps_count < GAPS_MOST)
			gaps[gaps_count++] = (struct gap){last, now};
		last = now;
	}
	return NULL;
}

static void *be_busy(void *unused KSM_UNUSED)
{
	while (!is_over())
		;
	return NULL;
}

static void *doze(void *unused KSM_UNUSED)
{
	while (!is_over())
		poll(NULL, 0, 5);
	return NULL;
}

static void start(pthread_t *thread, void *(*function)(void *))
{
	if (pthread_create(thread, NULL, function, NULL)) {
		fprintf(stderr, "a thread cannot be made\n");
		exit(1);
	}
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static uint64_t longest(const struct gap *window, size_t *first)
{
	uint64_t most = 0;
	while (*first < gaps_count && gaps[*first].to <= window->from)
		(*first)++;
	for (size_t i = *first; i < gaps_count && gaps[i].from < window->to; i++)
		most = KSM_MAX(most, gaps[i].to - gaps[i].from);
	return most;
}

/* Windows of one kind (barrier NULL: none). Returns how many could be had; their times are in windows[]. */
static size_t open_windows(struct ksm_barrier *barrier, struct gap *windows, size_t count)
{
	size_t had = 0, differ = 0;
	for (size_t i = 0; i < count; i++) {
		struct gap *window = &windows[had];
		window->from = ksm_os_now_ns();
		if (!barrier || !ksm_window_open(barrier, field, PAGES)) {
			const char *view = barrier ? barrier->view : field;
			for (size_t page = 0; page < PAGES; page++)
				differ += memcmp(view + page * KSM_PAGE_SIZE, copy, KSM_PAGE_SIZE) != 0;
			if (barrier)
				ksm_window_close(barrier);
			window->to = ksm_os_now_ns();
			had++;
		}
		ksm_os_sleep_ns(KSM_MAX(PAUSE_NS, barrier && barrier->park ? ksm_park_rest_ns(barrier->park) : 0));
	}
	if (!differ)
		printf("nothing was compared\n");
	return had;
}

static void print_row(const char *name, const char *load, struct gap *windows, size_t had, size_t count)
{
	uint64_t *stalls = calloc(had + 1, sizeof(*stalls));
	size_t first = 0;
	uint64_t open_ns = 0;
	for (size_t i = 0; i < had; i++) {
		stalls[i] = longest(&windows[i], &first);
		open_ns += windows[i].to - windows[i].from;
	}
	qsort(stalls, had, sizeof(*stalls), compare);
	if (had)
		printf("| %s | %s | %zu of %zu | %.0f | %.0f | %.0f | %.0f | %.0f |\n", name, load, had, count,
		       (double)open_ns / (double)had / 1e3, (double)stalls[had / 2] / 1e3,
		       (double)stalls[had * 99 / 100] / 1e3, (double)stalls[had * 999 / 1000] / 1e3,
		       (double)stalls[had - 1] / 1e3);
	else
		printf("| %s | %s | 0 of %zu | | | | | |\n", name, load, count);
	fflush(stdout);
	free(stalls);
}

static void run(enum ksm_barrier_kind kind, const char *name, size_t busy, size_t sleepers, size_t count)
{
	pthread_t writer, others[BUSY_MOST + SLEEPERS_MOST];
	struct ksm_barrier barrier;
	struct ksm_park park = {0};
	int r = kind == KSM_BARRIER_STOP ? ksm_park_create(&park) : 0;
	if (!r && kind != KSM_BARRIER_NONE)
		r = ksm_barrier_create(&barrier, kind, kind == KSM_BARRIER_STOP ? &park : NULL, -1);
	if (r) {
		printf("| %s | does not work here: %s | | | | | | |\n", name, ksm_error_name(r));
		return;
	}
	struct gap *windows = calloc(count, sizeof(*windows));
	gaps_count = 0;
	__atomic_store_n(&over, 0, __ATOMIC_RELEASE);
	for (size_t i = 0; i < busy + sleepers; i++)
		start(&others[i], i < busy ? be_busy : doze);
	start(&writer, store);
	ksm_os_sleep_ns(50000000);
	size_t had = open_windows(kind == KSM_BARRIER_NONE ? NULL : &barrier, windows, count);
	__atomic_store_n(&over, 1, __ATOMIC_RELEASE);
	pthread_join(writer, NULL);
	for (size_t i = 0; i < busy + sleepers; i++)
		pthread_join(others[i], NULL);
	print_row(name, busy ? "busy" : "idle", windows, had, count);
	if (kind != KSM_BARRIER_NONE)
		ksm_barrier_destroy(&barrier);
	ksm_park_destroy(&park);
	free(windows);
}

int main(int argc, char **argv)
{
	size_t count = argc > 1 ? strtoull(argv[1], NULL, 10) : 5000;
	size_t sleepers = argc > 2 ? strtoull(argv[2], NULL, 10) : 3;
	long cores = sysconf(_SC_NPROCESSORS_ONLN);
	if (!count || sleepers > SLEEPERS_MOST || cores < 1 || 2 * cores > BUSY_MOST) {
		fprintf(stderr, "usage: %s [WINDOWS [THREADS]]\n", argv[0]);
		return 2;
	}
	gaps = calloc(GAPS_MOST, sizeof(*gaps));
	copy = calloc(1, KSM_PAGE_SIZE);
	field = mmap(NULL, PAGES * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!gaps || !copy || field == MAP_FAILED)
		return 1;
	madvise(field, PAGES * KSM_PAGE_SIZE, MADV_NOHUGEPAGE);
	for (size_t page = 0; page < PAGES; page++)
		field[page * KSM_PAGE_SIZE + KSM_PAGE_SIZE - 1] = 1; /* differs at the very end */
	printf("%ld cores, a storing thread, %zu that sleep; busy: %ld more that spin\n\n", cores, sleepers, 2 * cores);
	printf("| barrier | load | windows of %d pages | open, mean µs | p50 | p99 | p99.9 | max µs |\n", PAGES);
	printf("|---|---|---|---|---|---|---|---|\n");
	for (size_t busy = 0; busy <= (size_t)(2 * cores); busy += (size_t)(2 * cores)) {
		run(KSM_BARRIER_NONE, "none", busy, sleepers, count);
		run(KSM_BARRIER_MOVE, "move", busy, sleepers, count);
		run(KSM_BARRIER_STOP, "stop", busy, sleepers, count);
	}
	return 0;
}
