/* SPDX-License-Identifier: MIT */
/*
 * What the levels of self-checking cost (base.h): a fixed amount of work, to be counted in instructions.
 *
 *	cc … -DKSM_ASSERT_LEVEL=1 tests/bench/levels.c csrc/… -o levels
 *	valgrind --tool=callgrind --callgrind-out-file=/dev/null levels small|pages|merge
 *
 * Without a tool the time is printed, which says little on a machine that does other things.
 */
#include "arena.h"
#include "domain.h"
#include "os.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MERGE_PAGES 2048
#define KEPT 256

static struct ksm_domain *domain;
static struct ksm_arena *arena;

static void check(int r, const char *what)
{
	if (r < 0) {
		fprintf(stderr, "%s: %d\n", what, r);
		exit(1);
	}
}

static struct ksm_block take(size_t nbytes)
{
	struct ksm_block block;
	check(ksm_arena_alloc(arena, nbytes, 0, &block), "alloc");
	return block;
}

static void give(struct ksm_block *block)
{
	check(ksm_arena_free(arena, block), "free");
}

/* Blocks come and go in no order. Only addresses: no page is touched but the first of each. */
static void churn(size_t nbytes, int rounds)
{
	struct ksm_block blocks[KEPT] = {{0}};
	unsigned seed = 1;
	for (int i = 0; i < rounds; i++) {
		seed = seed * 1664525u + 1013904223u;
		struct ksm_block *block = &blocks[seed >> 24];
		if (block->owner)
			give(block);
		else
			*block = take(nbytes * (1 + (seed >> 16 & 3)));
	}
	for (size_t i = 0; i < KEPT; i++)
		if (blocks[i].owner)
			give(&blocks[i]);
}

static void fill(struct ksm_block *block)
{
	for (uint64_t i = 0; i < MERGE_PAGES; i++)
		*(uint64_t *)((char *)block->address + (i << KSM_PAGE_SHIFT)) = 1 + i;
}

/* Merged, and given back. */
static void merge(int rounds)
{
	for (int i = 0; i < rounds; i++) {
		struct ksm_block one = take(MERGE_PAGES << KSM_PAGE_SHIFT), two = take(MERGE_PAGES << KSM_PAGE_SHIFT);
		struct ksm_report report;
		fill(&one);
		fill(&two);
		check(ksm_domain_scan(domain, &report), "scan");
		if (report.pages_merged < (uint64_t)2 * MERGE_PAGES)
			check(-1, "not all merged");
		give(&one);
		give(&two);
		check(ksm_domain_sweep(domain, NULL), "sweep");
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	char path[64];
	snprintf(path, sizeof(path), "/dev/shm/ksmalloc-levels-%d", (int)getpid());
	struct ksm_domain_options options = {
		.name = "levels", .path = path, .store_fd = -1, .capacity_bytes = 256u << 20};
	check(mkdir(path, 0700), "directory");
	check(ksm_domain_attach(&options, &domain), "domain");
	check(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), "arena");
	uint64_t start = ksm_os_now_ns();
	if (!strcmp(what, "small"))
		churn(48, 100000);
	else if (!strcmp(what, "pages"))
		churn(KSM_PAGE_SIZE, 20000);
	else if (!strcmp(what, "merge"))
		merge(4);
	else
		check(-1, "small, pages or merge");
	printf("%s at level %d: %.3f ms\n", what, KSM_ASSERT_LEVEL, (double)(ksm_os_now_ns() - start) / 1e6);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
	check(ksm_domain_clean(&options), "clean");
	rmdir(path);
	return 0;
}
