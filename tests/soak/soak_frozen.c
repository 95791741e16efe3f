/* SPDX-License-Identifier: MIT */
/*
 * Frozen pages: they merge like others; a store thaws its page; a system call that would write is refused, unless the
 * page was prepared or thawed.
 */
#include "soak.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PAGEMAP_FILE (1ull << 61)
#define PAGEMAP_PRESENT (1ull << 63)
#define SCANS 3

/* How many of the pages are mapped to frames: the kernel's word for it. */
static size_t count_merged(const struct soak_block *block, size_t first, size_t pages)
{
	uint64_t entries[SOAK_MOST_PAGES];
	size_t merged = 0;
	off_t at = (off_t)((uintptr_t)soak_page_at(block, first) / SOAK_PAGE * sizeof(*entries));
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t got = pread(fd, entries, pages * sizeof(*entries), at);
	close(fd);
	for (size_t i = 0; got == (ssize_t)(pages * sizeof(*entries)) && i < pages; i++)
		merged += (entries[i] & PAGEMAP_PRESENT) && (entries[i] & PAGEMAP_FILE);
	return merged;
}

static void wait_until_merged(const struct soak_block *block, size_t first, size_t pages)
{
	struct ksm_report report;
	for (unsigned i = 0; i < SCANS; i++) {
		soak_check(ksm_arena_scan(block->arena, &report), "scan of frozen memory");
		soak_add(&soak_here.totals->scans, 1);
		soak_expect_block(block, "frozen and scanned");
	}
	soak_add(&soak_here.totals->frozen_merged, count_merged(block, first, pages));
}

/* A system call that would write into a frozen page gets EFAULT; one into a prepared or thawed page succeeds. */
static void try_call(struct soak_block *block, size_t page, bool writable)
{
	unsigned state = !block->sectors[page][0];
	char *at = soak_sector_at(block, page, 0);
	ssize_t got = pread(soak_here.options->file, at, SOAK_SECTOR, soak_offset(state));
	if (writable && got == SOAK_SECTOR) {
		block->sectors[page][0] = (uint8_t)state;
		block->sectors_by[page][0] = SOAK_PREAD;
	} else if (writable) {
		soak_complain(false, "pread into a page that is not frozen any more: %zd, %s", got, strerror(errno));
	} else if (got >= 0 || errno != EFAULT) {
		soak_complain(false, "pread into a frozen page: %zd, not EFAULT", got);
	} else {
		soak_add(&soak_here.totals->efaults, 1);
	}
	soak_expect(block, at, SOAK_SECTOR, block->sectors[page][0], block->sectors_by[page][0],
		    writable ? "a call into a page not frozen any more" : "a call into a frozen page");
}

static void store_everywhere(struct soak_block *block, size_t first, size_t pages)
{
	for (size_t page = first; page < first + pages; page++) {
		for (unsigned owner = 0; owner < SOAK_OWNERS; owner++) {
			uint8_t *state = &block->words[page][owner];
			*state ^= 1;
			block->words_by[page][owner] = SOAK_STORE;
			memcpy(soak_word_at(block, page, owner), soak_patterns[*state], SOAK_WORD);
			soak_add(&soak_here.totals->writes[SOAK_STORE], 1);
		}
	}
}

static void prepare_and_call(struct soak_block *block, size_t page)
{
	char *at = soak_sector_at(block, page, 0);
	soak_check(ksm_arena_writable_begin(block->arena, at, SOAK_SECTOR), "writable");
	try_call(block, page, true);
	soak_check(ksm_arena_writable_end(block->arena, at, SOAK_SECTOR), "writable no more");
}

void soak_thaw(struct soak_block *block)
{
	soak_check(ksm_arena_thaw(block->arena, block->memory.address, block->memory.nbytes), "thaw");
	soak_add(&soak_here.totals->thaws, 1);
	block->frozen = false;
}

void soak_freeze(struct soak_block *block, uint32_t *seed)
{
	size_t frozen = 0, first = soak_random(seed) % block->pages;
	size_t pages = 1 + soak_random(seed) % (block->pages - first);
	size_t page = first + soak_random(seed) % pages;
	uint32_t how = soak_random(seed);
	soak_check(ksm_arena_freeze(block->arena, soak_page_at(block, first), pages * SOAK_PAGE, &frozen), "freeze");
	soak_add(&soak_here.totals->freezes, 1);
	if (frozen != pages)
		soak_complain(false, "%zu pages frozen, not %zu", frozen, pages);
	block->frozen = true;
	if (how & 1)
		wait_until_merged(block, first, pages);
	soak_expect_block(block, "frozen");
	try_call(block, page, false);
	switch (how >> 1 & 3) {
	case 0:
		soak_thaw(block);
		if (!soak_here.options->may_refuse)
			try_call(block, page, true);
		break;
	case 1:
		store_everywhere(block, first, pages);
		break;
	case 2:
		prepare_and_call(block, page);
		break;
	default: /* to the writers as it is */
		break;
	}
	soak_expect_block(block, "after it was frozen");
}
