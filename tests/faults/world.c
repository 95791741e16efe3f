/* SPDX-License-Identifier: MIT */
/*
 * The world of a scenario: a domain with a neighbour in it, an arena with two fields of equal pages, and a thread that
 * reads all of it and writes some of it all the time.
 */
#include "faults.h"

#include "error.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_S 60 /* on a machine that is ten times as slow */

void fail(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	fflush(NULL);
	_exit(1);
}

double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* What any call may answer when there is not enough of something; anything else must be the very error that was made. */
static bool is_documented(const struct world *w, int result)
{
	static const int any[] = {-ENOMEM, -EAGAIN, -EBUSY};
	for (size_t i = 0; i < sizeof(any) / sizeof(any[0]); i++)
		if (result == any[i])
			return true;
	if (result && result == w->refusal)
		return true;
	if (w->fault.call == KSM_OS_STAT && result == -EIO)
		return true; /* nobody can say which file it is */
	if (w->fault.call == KSM_OS_MKDIR && result == -ENOENT)
		return true; /* it was said to exist */
	if (w->fault.call == KSM_OS_UNLINK && result == -ENOTEMPTY)
		return true; /* it was said to be gone */
	return result == w->fault.error || (result <= -5001 && strcmp(ksm_error_name(result), "UNKNOWN"));
}

int may(struct world *w, int result, const char *what)
{
	if (result >= 0)
		return result;
	if (w->strict)
		fail("%s: %s, without any fault", what, ksm_error_name(result));
	if (!is_documented(w, result))
		fail("%s: %s", what, ksm_error_name(result));
	w->said = true;
	if (!w->shared->said[0])
		snprintf(w->shared->said, sizeof(w->shared->said), "%.100s: %s", what, ksm_error_name(result));
	return result;
}

/* ---- bytes ------------------------------------------------------------------------------------------------- */

static uint64_t word_of(uint64_t seed, size_t i)
{
	uint64_t z = seed * 0x9e3779b97f4a7c15ull + i * 0xd1342543de82ef95ull;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return seed ? z ^ (z >> 31) : 0;
}

static void fill_page(void *at, uint64_t seed)
{
	for (size_t i = 0; i < PAGE / 8; i++)
		((uint64_t *)at)[i] = word_of(seed, i);
}

void world_fill(char *at, size_t pages, uint64_t first)
{
	for (size_t page = 0; page < pages; page++)
		fill_page(at + page * PAGE, first + page);
}

static void check_page(const char *at, uint64_t seed, uint64_t word0, const char *what, size_t page)
{
	const uint64_t *words = (const uint64_t *)at;
	for (size_t i = 0; i < PAGE / 8; i++) {
		uint64_t expected = i ? word_of(seed, i) : word0;
		if (words[i] != expected)
			fail("%s: page %zu, word %zu is %llx, not %llx", what, page, i, (unsigned long long)words[i],
			     (unsigned long long)expected);
	}
}

void world_check(const char *at, size_t pages, uint64_t first)
{
	for (size_t page = 0; page < pages; page++)
		check_page(at + page * PAGE, first + page, word_of(first + page, 0), "bytes", page);
}

static uint64_t seed_of(size_t page)
{
	return page < FIELD_PAGES - FIELD_ZEROS ? 1 + page : 0;
}

static void fill_field(char *at)
{
	for (size_t page = 0; page < FIELD_PAGES; page++)
		fill_page(at + page * PAGE, seed_of(page));
}

/* hot: what word 0 of hot pages holds. */
static void check_field(const char *at, bool is_hot, uint64_t hot)
{
	for (size_t page = 0; page < FIELD_PAGES; page++) {
		uint64_t word0 = is_hot && FIELD_HOT(page) ? hot : word_of(seed_of(page), 0);
		check_page(at + page * PAGE, seed_of(page), word0, "field", page);
	}
}

void world_check_fields(struct world *w)
{
	MUST(!w->touching);
	check_field(w->fields[0].address, true, w->writes);
	check_field(w->fields[1].address, false, 0);
}

/* ---- the thread that touches everything ----------------------------------------------------------------------- */

static void *touch(void *argument)
{
	struct world *w = argument;
	while (!__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) {
		for (size_t i = 0; i < 2 * FIELD_PAGES; i++) {
			size_t page = i % FIELD_PAGES;
			bool is_hot = i < FIELD_PAGES && FIELD_HOT(page);
			volatile uint64_t *at = (uint64_t *)((char *)w->fields[i / FIELD_PAGES].address + page * PAGE);
			uint64_t expected = word_of(seed_of(page), 100);
			if (at[100] != expected)
				fail("page %zu of field %zu read wrong", page, i / FIELD_PAGES);
			if (!is_hot)
				continue;
			if (at[0] != w->writes)
				fail("a write to page %zu was lost", page);
			at[0] = w->writes + 1;
		}
		w->writes++;
		__atomic_add_fetch(&w->rounds, 1, __ATOMIC_RELEASE);
		ksm_os_sleep_ns(20000);
	}
	return NULL;
}

void world_start_toucher(struct world *w)
{
	w->stop = 0;
	MUST(!pthread_create(&w->toucher, NULL, touch, w));
	w->touching = true;
	world_check_awake(w);
}

void world_stop_toucher(struct world *w)
{
	if (!w->touching)
		return;
	__atomic_store_n(&w->stop, 1, __ATOMIC_RELEASE);
	pthread_join(w->toucher, NULL);
	w->touching = false;
}

void world_check_awake(struct world *w)
{
	uint64_t rounds = __atomic_load_n(&w->rounds, __ATOMIC_ACQUIRE);
	for (double until = now() + PATIENCE_S; __atomic_load_n(&w->rounds, __ATOMIC_ACQUIRE) < rounds + 2;) {
		if (now() > until)
			fail("the thread that touches everything sleeps");
		ksm_os_sleep_ns(50000);
	}
}

/* ---- processes -------------------------------------------------------------------------------------------------- */

pid_t child_fork(void)
{
	pid_t parent = getpid(), pid;
	fflush(NULL);
	pid = fork();
	MUST(pid >= 0);
	if (pid == 0)
		child_die_with(parent);
	return pid;
}

void child_die_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
}

/* The kernel spins while what a dead process had open is still on its way out: the dead are left alone for a moment. */
int child_reap(pid_t pid)
{
	siginfo_t info;
	int status;
	while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT))
		MUST(errno == EINTR);
	ksm_os_sleep_ns(CHILD_REST_NS);
	MUST(waitpid(pid, &status, 0) == pid);
	return status;
}

void child_wait(struct world *w, pid_t pid)
{
	int status = child_reap(pid);
	(void)w;
	if (status)
		fail("the child ended with wait status 0x%x", (unsigned)status);
}

struct ksm_domain_options world_options(const struct world *w)
{
	static const int kinds[MODES] = {KSM_BARRIER_MOVE, KSM_BARRIER_STOP, KSM_BARRIER_SEGV, KSM_BARRIER_MOVE};
	return (struct ksm_domain_options){.name = w->domain_name,
					   .path = w->directory,
					   .store_fd = -1,
					   .capacity_bytes = 64u << 20,
					   .barrier = kinds[w->mode]};
}

unsigned world_flags(const struct world *w)
{
	return w->mode == MODE_COW ? KSM_ARENA_SIGSEGV : 0;
}

static void reach(struct world *w, uint32_t step)
{
	__atomic_store_n(&w->shared->steps, step, __ATOMIC_RELEASE);
}

/* Until the other side has come so far, or ended. */
static void await(struct world *w, uint32_t step, pid_t other)
{
	for (double until = now() + PATIENCE_S; __atomic_load_n(&w->shared->steps, __ATOMIC_ACQUIRE) < step;) {
		int status;
		if (other > 0 && waitpid(other, &status, WNOHANG) == other)
			fail("the neighbour ended with wait status 0x%x", (unsigned)status);
		if (now() > until)
			fail("the other process did not come to step %u", step);
		ksm_os_sleep_ns(200000);
	}
}

enum {
	STEP_NONE,
	STEP_JOINED,
	STEP_CHECK,
	STEP_FREED
};

/* Nobody refers to a frame any more: sweeps free every one. */
static void check_swept(struct world *w, struct ksm_domain *domain)
{
	struct ksm_stats stats;
	if (w->shared->lost)
		return;
	for (double until = now() + PATIENCE_S;;) {
		uint64_t freed;
		MUST(!ksm_domain_sweep(domain, &freed) || now() < until);
		MUST(!ksm_domain_stats(domain, &stats));
		if (!stats.store_bytes && !stats.pages_shared)
			return;
		if (now() > until)
			fail("%llu frames and %llu bytes of the store are left", (unsigned long long)stats.pages_shared,
			     (unsigned long long)stats.store_bytes);
		ksm_os_sleep_ns(2000000);
	}
}

static void neighbour(struct world *w)
{
	struct ksm_domain_options options = world_options(w);
	struct ksm_domain *domain;
	struct ksm_arena *arena;
	struct ksm_block field;
	struct ksm_report report;
	options.barrier = KSM_BARRIER_AUTO;
	MUST(!ksm_domain_attach(&options, &domain));
	MUST(!ksm_arena_create(domain, 0, &arena));
	MUST(!ksm_arena_alloc(arena, FIELD_PAGES * PAGE, 0, &field));
	fill_field(field.address);
	MUST(!ksm_arena_scan(arena, &report));
	reach(w, STEP_JOINED);
	while (__atomic_load_n(&w->shared->steps, __ATOMIC_ACQUIRE) < STEP_CHECK) {
		check_field(field.address, false, 0);
		ksm_os_sleep_ns(3000000);
	}
	check_field(field.address, false, 0);
	MUST(!ksm_arena_scan(arena, &report));
	check_field(field.address, false, 0);
	MUST(!ksm_arena_free(arena, &field));
	check_swept(w, domain);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
	_exit(0);
}

void neighbour_start(struct world *w)
{
	w->neighbour = child_fork();
	if (!w->neighbour)
		neighbour(w);
	await(w, STEP_JOINED, w->neighbour);
}

/* It looks at its bytes a last time, gives everything back, and finds that no frame is left. */
void neighbour_finish(struct world *w)
{
	reach(w, STEP_CHECK);
	child_wait(w, w->neighbour);
}

/* ---- the world ----------------------------------------------------------------------------------------------------- */

void world_create(struct world *w)
{
	struct ksm_domain_options options = world_options(w);
	MUST(!ksm_domain_attach(&options, &w->domain));
	MUST(!ksm_arena_create(w->domain, world_flags(w), &w->arena));
	for (size_t i = 0; i < 2; i++) {
		MUST(!ksm_arena_alloc(w->arena, FIELD_PAGES * PAGE, 0, &w->fields[i]));
		fill_field(w->fields[i].address);
	}
	for (size_t page = 0; page < FIELD_PAGES; page++)
		if (FIELD_HOT(page))
			*(uint64_t *)((char *)w->fields[0].address + page * PAGE) = 0;
	MUST(!ksm_domain_self_stats(w->domain, &w->before));
	world_start_toucher(w);
}

void world_destroy(struct world *w)
{
	world_stop_toucher(w);
	for (size_t i = 0; i < 2; i++)
		MUST(!ksm_arena_free(w->arena, &w->fields[i]));
	ksm_arena_release(w->arena);
	if (w->alone)
		check_swept(w, w->domain);
	ksm_domain_detach(w->domain);
	w->domain = NULL;
}

uint64_t pages_merged(struct ksm_arena *arena)
{
	struct ksm_arena_stats stats;
	MUST(!ksm_arena_stats(arena, &stats));
	return stats.pages_merged;
}

bool world_has_said(struct world *w)
{
	struct ksm_stats s;
	if (w->said)
		return true;
	MUST(!ksm_domain_self_stats(w->domain, &s));
	return s.failures != w->before.failures || s.put_backs != w->before.put_backs || s.why_not ||
	       s.pages_skipped != w->before.pages_skipped;
}

void world_merge(struct world *w)
{
	struct ksm_report report = {0};
	uint64_t merged = 0;
	double until = now() + (w->strict ? PATIENCE_S : 0);
	do {
		if (!MAY(w, ksm_domain_scan(w->domain, &report)) && report.why_not)
			w->said = true;
		merged = pages_merged(w->arena);
		if (merged < FIELD_MERGES)
			ksm_os_sleep_ns(1000000);
	} while (merged < FIELD_MERGES && now() < until);
	if (merged > w->shared->merged)
		w->shared->merged = (uint32_t)merged;
	if (merged < FIELD_MERGES && w->strict)
		fail("%llu pages of %d are merged in the end (%s)", (unsigned long long)merged, FIELD_MERGES,
		     ksm_error_name(report.why_not));
	if (merged < FIELD_MERGES && !world_has_said(w))
		fail("%llu pages of %d are merged, and nobody says why", (unsigned long long)merged, FIELD_MERGES);
	if (w->touching)
		world_check_awake(w);
}
