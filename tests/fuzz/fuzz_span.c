/* SPDX-License-Identifier: MIT */
/* The span allocator against one flag a page: SPAN-1 and 2 after every step. */
#include "fuzz.h"

#include "span.h"

#include <errno.h>

#define PAGES 300

static bool taken[PAGES];

/* The lowest run of free pages; PAGES: there is none. */
static size_t lowest(size_t pages)
{
	for (size_t at = 0, run = 0; at < PAGES; at++) {
		run = taken[at] ? 0 : run + 1;
		if (pages && run == pages)
			return at + 1 - pages;
	}
	return PAGES;
}

static size_t free_pages(void)
{
	size_t n = 0;
	for (size_t at = 0; at < PAGES; at++)
		n += !taken[at];
	return n;
}

static void step_alloc(struct ksm_spans *spans, struct fuzz_input *input)
{
	size_t pages = fuzz_below(input, 4) ? fuzz_below(input, 9) : fuzz_below(input, PAGES + 2);
	size_t expected = lowest(pages);
	ksm_pageno at = 0;
	int r = ksm_span_alloc(spans, pages, &at);
	FUZZ_CHECK(r == (expected == PAGES ? -ENOMEM : 0));
	if (r)
		return;
	FUZZ_CHECK(at == expected); /* SPAN-2 */
	memset(taken + at, 1, pages);
}

/* Some of a taken run, from anywhere in it. */
static void step_free(struct ksm_spans *spans, struct fuzz_input *input)
{
	size_t at = fuzz_below(input, PAGES), most = 1 + fuzz_below(input, 40), pages = 0;
	while (at < PAGES && !taken[at])
		at++;
	while (at + pages < PAGES && taken[at + pages] && pages < most)
		pages++;
	if (!pages)
		return;
	FUZZ_CHECK(ksm_span_free(spans, at, pages) == 0); /* there is room to note every run there can be */
	memset(taken + at, 0, pages);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input input = {data, size};
	struct ksm_spans spans;
	ksm_pageno at;
	memset(taken, 0, sizeof(taken));
	FUZZ_CHECK(ksm_spans_init(&spans, PAGES) == 0);
	while (input.left) {
		if (fuzz_byte(&input) % 2)
			step_alloc(&spans, &input);
		else
			step_free(&spans, &input);
		FUZZ_CHECK(ksm_spans_is_valid(&spans));
		FUZZ_CHECK(ksm_spans_free_pages(&spans) == free_pages());
	}
	for (size_t page = 0; page < PAGES; page++)
		if (taken[page])
			FUZZ_CHECK(ksm_span_free(&spans, page, 1) == 0);
	FUZZ_CHECK(ksm_span_alloc(&spans, PAGES, &at) == 0 && at == 0); /* one run again */
	ksm_spans_fini(&spans);
	return 0;
}
