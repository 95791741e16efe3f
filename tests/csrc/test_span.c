/* SPDX-License-Identifier: MIT */
/* Runs of pages against a plain bitmap: SPAN-1 and 2. */
#include "kit.h"

#include "span.h"

#define PAGES 400

static bool taken[PAGES];

/* The lowest run of free pages, by looking at each. */
static size_t lowest(size_t pages)
{
	for (size_t at = 0, run = 0; at < PAGES; at++) {
		run = taken[at] ? 0 : run + 1;
		if (run == pages)
			return at + 1 - pages;
	}
	return SIZE_MAX;
}

static size_t free_pages(void)
{
	size_t n = 0;
	for (size_t at = 0; at < PAGES; at++)
		n += !taken[at];
	return n;
}

static void play(uint64_t seed, size_t most, unsigned bias)
{
	struct {
		size_t at, pages;
	} runs[PAGES];
	struct ksm_spans spans;
	size_t count = 0;
	uint64_t state = seed;
	memset(taken, 0, sizeof(taken));
	CHECK_EQ(ksm_spans_init(&spans, PAGES), 0);
	for (int step = 0; step < 3000; step++) {
		if (kit_random(&state) % 10 < bias && count < PAGES) {
			size_t pages = 1 + kit_random(&state) % most, expected = lowest(pages);
			ksm_pageno at;
			int r = ksm_span_alloc(&spans, pages, &at);
			CHECK_EQ(r, expected == SIZE_MAX ? -ENOMEM : 0);
			if (r)
				continue;
			CHECK_EQ(at, expected); /* SPAN-2 */
			memset(taken + at, 1, pages);
			runs[count].at = at;
			runs[count++].pages = pages;
		} else if (count) {
			size_t which = kit_random(&state) % count, at = runs[which].at, pages = runs[which].pages;
			size_t part = 1 + kit_random(&state) % pages; /* sometimes in pieces */
			CHECK_EQ(ksm_span_free(&spans, at, part), 0);
			memset(taken + at, 0, part);
			CHECK(ksm_spans_is_valid(&spans));
			runs[which].at += part;
			runs[which].pages -= part;
			if (!runs[which].pages)
				runs[which] = runs[--count];
		}
		CHECK(ksm_spans_is_valid(&spans));
		CHECK_EQ(ksm_spans_free_pages(&spans), free_pages());
	}
	while (count--)
		CHECK_EQ(ksm_span_free(&spans, runs[count].at, runs[count].pages), 0);
	ksm_pageno at;
	CHECK_EQ(ksm_span_alloc(&spans, PAGES, &at), 0); /* one run again */
	CHECK_EQ(at, 0);
	CHECK_EQ(ksm_span_alloc(&spans, 1, &at), -ENOMEM);
	ksm_spans_fini(&spans);
}

TEST(alloc_and_free_agree_with_a_bitmap)
{
	for (uint64_t seed = 1; seed <= 20; seed++)
		play(seed, 1 + seed * seed % 60, 4 + seed % 4);
}

TEST(the_worst_case_has_room)
{
	struct ksm_spans spans;
	ksm_pageno at;
	CHECK_EQ(ksm_spans_init(&spans, PAGES), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(ksm_span_alloc(&spans, 1, &at), 0);
	for (size_t i = 0; i < PAGES; i += 2) /* every other one: as many runs as there can be */
		CHECK_EQ(ksm_span_free(&spans, i, 1), 0);
	CHECK(ksm_spans_is_valid(&spans));
	CHECK_EQ(ksm_spans_free_pages(&spans), PAGES / 2);
	CHECK_EQ(ksm_span_alloc(&spans, 2, &at), -ENOMEM);
	for (size_t i = 1; i < PAGES; i += 2)
		CHECK_EQ(ksm_span_free(&spans, i, 1), 0);
	CHECK_EQ(ksm_span_alloc(&spans, PAGES, &at), 0);
	ksm_spans_fini(&spans);
}

TEST(nothing_is_allocated_for_nothing)
{
	struct ksm_spans spans;
	ksm_pageno at;
	CHECK_EQ(ksm_spans_init(&spans, 8), 0);
	CHECK_EQ(ksm_span_alloc(&spans, 0, &at), -ENOMEM);
	CHECK_EQ(ksm_span_alloc(&spans, 9, &at), -ENOMEM);
	CHECK_EQ(ksm_spans_free_pages(&spans), 8);
	ksm_spans_fini(&spans);
}

TEST(freeing_twice_ends_the_process)
{
	pid_t pid = kit_fork();
	if (pid == 0) {
		struct ksm_spans spans;
		ksm_pageno at;
		CHECK(freopen("/dev/null", "w", stderr));
		CHECK_EQ(ksm_spans_init(&spans, 8), 0);
		CHECK_EQ(ksm_span_alloc(&spans, 4, &at), 0);
		CHECK_EQ(ksm_span_free(&spans, 1, 2), 0);
		ksm_span_free(&spans, 2, 1);
		_exit(0);
	}
	CHECK_KILLED(pid, SIGABRT);
}
