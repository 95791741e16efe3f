/* SPDX-License-Identifier: MIT */
/*
 * breaks [N]: what the first store into a merged page costs, three ways side by side in one run, N pages each:
 *
 *    kernel copy-on-write of a private mapping of a frame      cow="kernel"
 *    SIGSEGV, and ksmalloc copies the page                     cow="sigsegv"
 *    kernel KSM: madvise(MADV_MERGEABLE), merged by ksmd       needs root, and a kernel with CONFIG_KSM
 *
 * and a store into a private page, which costs nothing but the clock. The same pages in the same random order; a store
 * of each kind in turn. KSM's settings are put back as they were found, however this program ends.
 *
 * It is built from this file and all of csrc.
 */
#include "guard.h"
#include "handler.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	NOTHING,
	KERNEL,
	SIGNAL,
	KSM,
	WAYS
};
static const char *const names[WAYS] = {"private page", "kernel CoW of a frame", "SIGSEGV CoW of a frame",
					"kernel KSM"};

static void die(const char *what, int error)
{
	fprintf(stderr, "breaks: %s: %s\n", what, strerror(error < 0 ? -error : error));
	exit(1);
}

static uint64_t random_of(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* Page i is like no other one, and like page i of every call. */
static char *make_pages(size_t pages)
{
	void *at;
	int r = ksm_os_map_anon(NULL, pages << KSM_PAGE_SHIFT, false, false, &at);
	if (r)
		die("memory", r);
	ksm_os_advise(at, pages << KSM_PAGE_SHIFT, MADV_NOHUGEPAGE);
	uint64_t state = (uint64_t)getpid() << 32; /* and nobody else's on this machine */
	for (size_t i = 0; i < pages * KSM_PAGE_SIZE / 8; i++)
		((uint64_t *)at)[i] = random_of(&state);
	return at;
}

/* ---- KSM ----------------------------------------------------------------------------------------------------- */

#define KSM_FILES 5
static const char *const ksm_files[KSM_FILES] = {"advisor_mode", "smart_scan", "pages_to_scan", "sleep_millisecs",
						 "run"};

static bool ksm_file(const char *name, char *text, size_t room, const char *put)
{
	char path[96];
	snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", name);
	int fd = open(path, (put ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t n = put ? write(fd, put, strlen(put)) : read(fd, text, room - 1);
	close(fd);
	if (!put && n >= 0)
		text[n] = 0;
	return n > 0;
}

/* "none [scan-time]" says which one it is. */
static void keep_choice(char *text)
{
	char *from = strchr(text, '['), *to = from ? strchr(from, ']') : NULL;
	if (!to)
		return;
	*to = 0;
	memmove(text, from + 1, (size_t)(to - from));
}

/* A process of its own puts the settings back when this one has ended, killed or not. Returns what to close and wait for. */
static pid_t watch_settings(int *end)
{
	char found[KSM_FILES][64] = {{0}};
	int ends[2];
	for (int i = 0; i < KSM_FILES; i++)
		if (ksm_file(ksm_files[i], found[i], sizeof(found[i]), NULL))
			keep_choice(found[i]);
	if (!found[KSM_FILES - 1][0])
		return -1;
	if (pipe2(ends, O_CLOEXEC))
		die("pipe", errno);
	pid_t janitor = fork();
	if (janitor < 0)
		die("fork", errno);
	if (janitor == 0) {
		char byte;
		setsid();
		for (int signal_number = 1; signal_number < 32; signal_number++)
			signal(signal_number, SIG_IGN);
		close(ends[1]);
		while (read(ends[0], &byte, 1) < 0 && errno == EINTR)
			;
		for (int i = 1; i < KSM_FILES; i++)
			if (found[i][0])
				ksm_file(ksm_files[i], NULL, 0, found[i]);
		if (found[0][0])
			ksm_file(ksm_files[0], NULL, 0, found[0]);
		_exit(0);
	}
	close(ends[0]);
	*end = ends[1];
	return janitor;
}

static long merging_pages(void)
{
	char text[32] = "";
	int fd = open("/proc/self/ksm_merging_pages", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd >= 0 ? read(fd, text, sizeof(text) - 1) : -1;
	if (fd >= 0)
		close(fd);
	return n > 0 ? strtol(text, NULL, 10) : -1;
}

/* Two areas of equal pages, merged by ksmd; NULL, with a reason printed, if that cannot be had. */
static char *merge_by_ksmd(size_t pages, pid_t *janitor, int *end)
{
	*janitor = geteuid() == 0 ? watch_settings(end) : -1;
	if (*janitor < 0) {
		printf("kernel KSM is left out: %s\n",
		       geteuid() ? "it needs root" : "this kernel has none, or its settings cannot be read");
		return NULL;
	}
	char *a = make_pages(pages), *b = make_pages(pages);
	if (ksm_os_advise(a, pages << KSM_PAGE_SHIFT, MADV_MERGEABLE) ||
	    ksm_os_advise(b, pages << KSM_PAGE_SHIFT, MADV_MERGEABLE) || merging_pages() < 0) {
		printf("kernel KSM is left out: this kernel cannot merge, or does not say what it has merged\n");
		return NULL;
	}
	ksm_file("advisor_mode", NULL, 0, "none");
	ksm_file("smart_scan", NULL, 0, "0");
	ksm_file("pages_to_scan", NULL, 0, "20000");
	ksm_file("sleep_millisecs", NULL, 0, "5");
	ksm_file("run", NULL, 0, "1");
	for (int i = 0; i < 3000; i++) {
		if (merging_pages() >= (long)(2 * pages)) {
			ksm_file("run", NULL, 0, "0"); /* ksmd does not disturb what follows */
			return a;
		}
		ksm_os_sleep_ns(20000000);
	}
	printf("kernel KSM is left out: after 60 s only %ld of %zu pages were merged\n", merging_pages(), 2 * pages);
	return NULL;
}

/* ---- measuring ------------------------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

static uint64_t time_store(char *page)
{
	uint64_t start = ksm_os_now_ns();
	*(volatile uint64_t *)(page + 64) += 1;
	return ksm_os_now_ns() - start;
}

static void report(const char *name, uint64_t *ns, size_t n)
{
	qsort(ns, n, sizeof(*ns), compare);
	printf("%-24s %8zu %10.2f %10.2f %10.2f %10.2f\n", name, n, ns[n / 2] / 1e3, ns[n * 99 / 100] / 1e3,
	       ns[n * 999 / 1000] / 1e3, ns[n - 1] / 1e3);
}

int main(int argc, char **argv)
{
	size_t pages = argc > 1 ? strtoul(argv[1], NULL, 10) : 4000, page;
	char *at[WAYS] = {NULL};
	uint64_t *ns[WAYS], state = 1;
	struct ksm_guard *guard;
	pid_t janitor;
	int end = -1, r;

	if (pages < 10 || pages * 3 > ksm_os_max_map_count()) {
		fprintf(stderr, "usage: breaks [pages]; each copied page costs two mappings (vm.max_map_count)\n");
		return 2;
	}
	at[KSM] = merge_by_ksmd(pages, &janitor, &end);

	at[NOTHING] = make_pages(pages);
	int store = ksm_os_memfd("breaks");
	size_t nbytes = pages << KSM_PAGE_SHIFT;
	if (store < 0 || (r = ksm_os_truncate(store, nbytes)) || (r = ksm_os_pwrite(store, at[NOTHING], nbytes, 0)))
		die("store", store < 0 ? store : r);
	at[KERNEL] = make_pages(pages);
	at[SIGNAL] = make_pages(pages);
	if ((r = ksm_handler_install()) || (r = ksm_guard_create(at[SIGNAL], pages, &guard)))
		die("handler", r);
	ksm_guard_set(guard, 0, pages, KSM_GUARD_BUSY);
	if ((r = ksm_os_map_frames(at[KERNEL], nbytes, store, 0, true)) ||
	    (r = ksm_os_map_frames(at[SIGNAL], nbytes, store, 0, false)))
		die("frames", r);
	ksm_guard_set(guard, 0, pages, KSM_GUARD_MERGED);

	size_t *order = malloc(pages * sizeof(*order));
	for (int way = 0; way < WAYS; way++)
		ns[way] = malloc(pages * sizeof(*ns[way]));
	for (page = 0; page < pages; page++) {
		size_t other = random_of(&state) % (page + 1);
		order[page] = order[other];
		order[other] = page;
	}
	for (int way = 0; way < WAYS; way++) /* whoever stores has read before */
		for (page = 0; at[way] && page < pages; page++)
			(void)*(volatile char *)(at[way] + (page << KSM_PAGE_SHIFT));
	for (size_t i = 0; i < pages; i++)
		for (int way = 0; way < WAYS; way++)
			if (at[way])
				ns[way][i] = time_store(at[way] + (order[i] << KSM_PAGE_SHIFT));

	printf("%-24s %8s %10s %10s %10s %10s\n", "first store, us", "breaks", "median", "p99", "p99.9", "max");
	for (int way = 0; way < WAYS; way++)
		if (at[way])
			report(names[way], ns[way], pages);
	if (guard->breaks != pages) {
		fprintf(stderr, "breaks: %llu copies were counted, not %zu\n", (unsigned long long)guard->breaks,
			pages);
		return 1;
	}
	if (janitor > 0) {
		close(end);
		waitpid(janitor, NULL, 0);
	}
	return 0;
}
