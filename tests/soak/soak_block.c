/* SPDX-License-Identifier: MIT */
/*
 * The blocks of a process, and what must stand in them.
 *
 *    page  ┌──────────┬──────────┬──────────┬──────────┬──────────────────┬──────────┐
 *          │ sector 0 │ sector 1 │ sector 2 │ sector 3 │ words 0, 1, 2, 3 │ filling  │
 *          └──────────┴──────────┴──────────┴──────────┴──────────────────┴──────────┘
 *
 * Everything is in one of few states, so most pages have twins.
 */
#include "soak.h"

#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define WORDS_AT 2048
#define WORD_STEP 64
#define FILLING_AT 3072
#define FILLINGS 4
#define LEAST_PAGES 8
#define MESSAGES 20

struct soak_here soak_here = {.renewing = PTHREAD_MUTEX_INITIALIZER};

void soak_check(int r, const char *what)
{
	if (r)
		soak_die(what, r);
}

char *soak_page_at(const struct soak_block *block, size_t page)
{
	return (char *)block->memory.address + page * SOAK_PAGE;
}

char *soak_sector_at(const struct soak_block *block, size_t page, unsigned owner)
{
	return soak_page_at(block, page) + owner * SOAK_SECTOR;
}

char *soak_word_at(const struct soak_block *block, size_t page, unsigned owner)
{
	return soak_page_at(block, page) + WORDS_AT + owner * WORD_STEP;
}

void soak_complain(bool lost, const char *format, ...)
{
	char text[256];
	va_list arguments;
	soak_add(lost ? &soak_here.totals->lost : &soak_here.totals->wrong, 1);
	if (soak_get(&soak_here.totals->lost) + soak_get(&soak_here.totals->wrong) > MESSAGES)
		return;
	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	fprintf(stderr, "process %d, %s: %s\n", (int)getpid(), lost ? "lost" : "wrong", text);
}

/* ---- what must stand there ------------------------------------------------------------------------------- */

static bool is_of_some_state(const char *at, size_t nbytes)
{
	for (size_t i = 0; i < nbytes; i++)
		if ((unsigned char)at[i] != soak_patterns[0][i] && (unsigned char)at[i] != soak_patterns[1][i])
			return false;
	return true;
}

void soak_expect(const struct soak_block *block, char *at, size_t nbytes, unsigned state, enum soak_way by,
		 const char *when)
{
	if (!memcmp(at, soak_patterns[state], nbytes))
		return;
	size_t distance = (size_t)(at - soak_page_at(block, 0));
	soak_complain(is_of_some_state(at, nbytes), "%s: page %zu of %zu, byte %zu: not in state %u, written by %s",
		      when, distance / SOAK_PAGE, block->pages, distance % SOAK_PAGE, state, soak_way_names[by]);
	memcpy(at, soak_patterns[state], nbytes);
}

void soak_expect_refused(const struct soak_block *block, const struct soak_write *write, ssize_t got)
{
	size_t landed = 0, total = write->count * write->nbytes, said = got > 0 ? (size_t)got : 0;
	bool right = true, changed = false;
	for (size_t i = 0; i < total; i++) {
		const struct soak_piece *piece = &write->pieces[i / write->nbytes];
		size_t at = i % write->nbytes;
		unsigned char is = (unsigned char)piece->at[at];
		bool is_new = is == soak_patterns[!*piece->state][at], is_old = is == soak_patterns[*piece->state][at];
		right &= i < said ? is_new : is_old || (is_new && landed == i);
		landed += is_new && landed == i;
		changed |= is_new && !is_old;
	}
	soak_add(&soak_here.totals->efaults, 1);
	soak_add(&soak_here.totals->torn, changed);
	if (!right)
		soak_complain(true, "%s, refused after %zd of %zu bytes: page %zu: neither new nor old",
			      soak_way_names[write->way], got, total,
			      (size_t)(write->pieces[0].at - soak_page_at(block, 0)) / SOAK_PAGE);
}

static void expect_filling(const struct soak_block *block, size_t page, const char *when)
{
	const char *at = soak_page_at(block, page) + FILLING_AT;
	for (size_t i = 0; i < SOAK_PAGE - FILLING_AT; i++) {
		if (at[i] == block->filling[page])
			continue;
		soak_complain(false, "%s: filling of page %zu of %zu", when, page, block->pages);
		return;
	}
}

void soak_expect_block(const struct soak_block *block, const char *when)
{
	for (size_t page = 0; page < block->pages; page++) {
		expect_filling(block, page, when);
		for (unsigned owner = 0; owner < SOAK_OWNERS; owner++) {
			soak_expect(block, soak_sector_at(block, page, owner), SOAK_SECTOR, block->sectors[page][owner],
				    block->sectors_by[page][owner], when);
			soak_expect(block, soak_word_at(block, page, owner), SOAK_WORD, block->words[page][owner],
				    block->words_by[page][owner], when);
		}
	}
}

void soak_expect_legal(const struct soak_block *block, const char *when)
{
	for (size_t page = 0; page < block->pages; page++) {
		expect_filling(block, page, when);
		for (unsigned owner = 0; owner < SOAK_OWNERS; owner++)
			if (!is_of_some_state(soak_sector_at(block, page, owner), SOAK_SECTOR) ||
			    !is_of_some_state(soak_word_at(block, page, owner), SOAK_WORD))
				soak_complain(false, "%s: bytes in page %zu", when, page);
	}
}

/* ---- coming and going -------------------------------------------------------------------------------------- */

static void fill(struct soak_block *block, uint32_t *seed)
{
	for (size_t page = 0; page < block->pages; page++) {
		uint32_t r = soak_random(seed);
		block->filling[page] = (uint8_t)(r % FILLINGS * 0x15);
		memset(soak_page_at(block, page) + FILLING_AT, block->filling[page], SOAK_PAGE - FILLING_AT);
		for (unsigned owner = 0; owner < SOAK_OWNERS; owner++) {
			bool visitor = owner == SOAK_OWNERS - 1; /* few different pages, so that most have twins */
			block->sectors[page][owner] = !visitor && r >> (8 + owner) & 1;
			block->words[page][owner] = !visitor && r >> (16 + owner) & 1;
			memcpy(soak_sector_at(block, page, owner), soak_patterns[block->sectors[page][owner]],
			       SOAK_SECTOR);
			memcpy(soak_word_at(block, page, owner), soak_patterns[block->words[page][owner]], SOAK_WORD);
		}
	}
}

void soak_block_make(struct soak_block *block, uint32_t *seed)
{
	static const char zeros[SOAK_PAGE];
	block->pages = LEAST_PAGES + soak_random(seed) % (SOAK_MOST_PAGES - LEAST_PAGES + 1);
	block->arena = soak_here.arenas[soak_random(seed) % SOAK_ARENAS];
	block->frozen = false;
	memset(block->sectors_by, SOAK_STORE, sizeof(block->sectors_by));
	memset(block->words_by, SOAK_STORE, sizeof(block->words_by));
	soak_check(ksm_arena_alloc(block->arena, block->pages * SOAK_PAGE, 0, &block->memory), "alloc");
	for (size_t page = 0; page < block->pages; page++)
		if (memcmp(soak_page_at(block, page), zeros, SOAK_PAGE))
			soak_complain(false, "page %zu of a new block is not zero", page);
	fill(block, seed);
	soak_add(&soak_here.totals->blocks, 1);
}

void soak_block_renew(struct soak_block *block, uint32_t *seed)
{
	soak_expect_block(block, "before it was freed");
	soak_check(ksm_arena_free(block->arena, &block->memory), "free");
	soak_block_make(block, seed);
}
