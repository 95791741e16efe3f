/* SPDX-License-Identifier: MIT */
/*
 * limits.c: a worker for tests at a real limit, small enough that what it does itself hardly counts there. It does what
 * the lines on its standard input say, one after the other, and answers each with one line:
 *
 *	enter DIRECTORY		into a control group
 *	join DIRECTORY NAME	a domain
 *	fill PAGES SEED		a block: page i holds bytes made from SEED + i
 *	write SEED		new bytes into every page of it
 *	verify			every byte of it
 *	scan | settle MS	merge
 *	stats			counters: of this process, then of the domain
 *	sweep | free
 *	reserve GIB		addresses, without memory
 *	release			them
 *
 * "ok", figures, or "error" and what kind. A wrong byte ends the process with status 3. It ends with its input.
 */
#include "error.h"
#include "ksmalloc.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / sizeof(uint64_t))
#define WRONG 3

static struct ksm_domain *domain;
static struct ksm_arena *arena;
static struct ksm_block block;
static void *reserved = MAP_FAILED;
static size_t reserved_bytes;
static uint64_t seed;

static void answer(int code)
{
	if (code < 0)
		printf("error %s\n", ksm_error_name(code));
	else
		printf("ok\n");
}

/* Word i of the page made from a seed: splitmix64, so that pages differ everywhere. */
static uint64_t word_of(uint64_t from, size_t i)
{
	uint64_t z = from * 0xd1342543de82ef95ull + i * 0x9e3779b97f4a7c15ull;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static void write_all(uint64_t from)
{
	uint64_t *words = block.address;
	for (size_t page = 0; page < block.nbytes / PAGE; page++)
		for (size_t i = 0; i < WORDS; i++)
			words[page * WORDS + i] = word_of(from + page, i);
	seed = from;
}

static void verify(void)
{
	const uint64_t *words = block.address;
	for (size_t page = 0; page < block.nbytes / PAGE; page++)
		for (size_t i = 0; i < WORDS; i++)
			if (words[page * WORDS + i] != word_of(seed + page, i)) {
				printf("page %zu, word %zu is wrong\n", page, i);
				exit(WRONG);
			}
	printf("ok %zu\n", block.nbytes);
}

static void enter(const char *group)
{
	char path[1024], pid[24];
	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	int n = snprintf(pid, sizeof(pid), "%d", (int)getpid());
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	answer(fd >= 0 && write(fd, pid, (size_t)n) == n ? 0 : -errno);
	close(fd);
}

static void join(const char *path, const char *name)
{
	struct ksm_domain_options options = {.name = name, .path = path, .store_fd = -1, .capacity_bytes = 1u << 30};
	int r = ksm_domain_attach(&options, &domain);
	answer(r ? r : ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena));
}

static void fill(size_t pages, uint64_t from)
{
	int r = ksm_arena_alloc(arena, pages * PAGE, 0, &block);
	if (!r)
		write_all(from);
	answer(r);
}

static void give_report(int r, const struct ksm_report *report)
{
	if (r)
		answer(r);
	else
		printf("ok merged=%" PRIu64 " written=%" PRIu64 " settled=%d why_not=%s\n", report->pages_merged,
		       report->frames_written, report->settled, ksm_error_name(report->why_not));
}

static void give_stats(void)
{
	struct ksm_stats self, all;
	int r = ksm_domain_self_stats(domain, &self);
	r = r ? r : ksm_domain_stats(domain, &all);
	if (r)
		answer(r);
	else
		printf("ok merged=%" PRIu64 " promotions=%" PRIu64 " withheld=%" PRIu64 " breaks=%" PRIu64
		       " failures=%" PRIu64 " why_not=%s shared=%" PRIu64 " sharing=%" PRIu64 " store=%" PRIu64
		       " peers=%u\n",
		       self.pages_merged, self.promotions, self.withheld, self.cow_breaks, self.failures,
		       ksm_error_name(self.why_not), all.pages_shared, all.pages_sharing, all.store_bytes, all.peers);
}

static void give_sweep(void)
{
	uint64_t freed = 0;
	int r = ksm_domain_sweep(domain, &freed);
	if (r)
		answer(r);
	else
		printf("ok freed=%" PRIu64 "\n", freed);
}

static void reserve(size_t nbytes)
{
	reserved = mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	reserved_bytes = nbytes;
	answer(reserved == MAP_FAILED ? -errno : 0);
}

static void obey(char *line)
{
	struct ksm_report report;
	char *rest = NULL, *command = strtok_r(line, " \n", &rest);
	char *first = strtok_r(NULL, " \n", &rest), *second = strtok_r(NULL, " \n", &rest);
	uint64_t number = first ? strtoull(first, NULL, 10) : 0;
	if (!command)
		printf("error EINVAL\n");
	else if (!strcmp(command, "enter") && first)
		enter(first);
	else if (!strcmp(command, "join") && second)
		join(first, second);
	else if (!strcmp(command, "fill") && second)
		fill(number, strtoull(second, NULL, 10));
	else if (!strcmp(command, "write") && first)
		write_all(number), answer(0);
	else if (!strcmp(command, "verify"))
		verify();
	else if (!strcmp(command, "scan"))
		give_report(ksm_arena_scan(arena, &report), &report);
	else if (!strcmp(command, "settle"))
		give_report(ksm_domain_settle(domain, (uint32_t)number, 0, &report), &report);
	else if (!strcmp(command, "stats"))
		give_stats();
	else if (!strcmp(command, "reserve"))
		reserve(number << 30);
	else if (!strcmp(command, "release"))
		answer(munmap(reserved, reserved_bytes) ? -errno : 0);
	else if (!strcmp(command, "sweep"))
		give_sweep();
	else if (!strcmp(command, "free"))
		answer(ksm_arena_free(arena, &block));
	else
		printf("error EINVAL\n");
}

int main(void)
{
	char line[2048];
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (fgets(line, sizeof(line), stdin)) {
		obey(line);
		fflush(stdout);
	}
	if (block.owner)
		ksm_arena_free(arena, &block);
	if (arena)
		ksm_arena_release(arena);
	if (domain)
		ksm_domain_detach(domain);
	return 0;
}
