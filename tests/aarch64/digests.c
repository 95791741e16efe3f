/* SPDX-License-Identifier: MIT */
/*
 * digests: what must be the same on every machine of one byte order, a line each: the digests of many pages, and where the
 * parts of shared memory lie. The program is built for two machines, and what it prints is compared.
 */
#include "layout.h"
#include "page.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static unsigned char page[KSM_PAGE_SIZE] __attribute__((aligned(64)));

static uint64_t next(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static void say(const char *what, uint64_t number)
{
	printf("%s %" PRIu64 " %015" PRIx64 " %d\n", what, number, ksm_page_digest(page), ksm_page_is_zero(page));
}

static void say_pages(void)
{
	for (uint64_t seed = 0; seed < 2000; seed++) { /* noise */
		uint64_t state = seed;
		for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++)
			((uint64_t *)page)[i] = next(&state);
		say("noise", seed);
	}
	for (unsigned byte = 0; byte < 256; byte++) {
		memset(page, (int)byte, sizeof(page));
		say("byte", byte);
	}
	memset(page, 0, sizeof(page));
	for (size_t bit = 0; bit < 8 * KSM_PAGE_SIZE; bit += 7) { /* one bit of a page of zeros */
		page[bit / 8] = (unsigned char)(1u << bit % 8);
		say("bit", bit);
		page[bit / 8] = 0;
	}
	for (size_t i = 0; i < KSM_PAGE_SIZE / 4; i++) /* numbers, as data has them */
		((float *)page)[i] = (float)i / 3;
	say("floats", 0);
}

static void say_layout(uint64_t frames)
{
	struct ksm_layout layout = {0};
	ksm_layout_compute(frames, &layout);
	printf("layout %" PRIu64, frames);
	for (size_t i = 0; i < sizeof(layout); i++)
		printf("%02x", ((unsigned char *)&layout)[i]);
	printf("\n");
}

int main(void)
{
	say_pages();
	for (uint64_t frames = 1; frames < (1ull << 31); frames *= 3)
		say_layout(frames);
	printf("hash %x\n", ksm_layout_hash());
	return 0;
}
