/* SPDX-License-Identifier: MIT */
/*
 * guarded.h: pages with a guard, and a small scanner's work on them: they are merged with a store, read-only, as
 * cow="sigsegv" and frozen memory have it.
 */
#ifndef KSM_TESTS_GUARDED_H
#define KSM_TESTS_GUARDED_H

#include "kit.h"

#include "cow.h"
#include "guard.h"
#include "handler.h"

/* A sanitizer has a handler of its own; here the kernel's default shall be what is found first. */
__attribute__((constructor)) static void guarded_begin(void)
{
	signal(SIGSEGV, SIG_DFL);
}

struct guarded {
	struct ksm_guard *guard;
	char *at;
	size_t pages;
	int store; /* frame i is page i's */
};

/* Page i holds seed first + i; all OPEN. */
KIT struct guarded guarded_make(size_t pages, uint64_t first)
{
	struct guarded g = {.at = kit_map_filled(pages, first), .pages = pages, .store = ksm_os_memfd("store")};
	CHECK_GE(g.store, 0);
	CHECK_EQ(ksm_os_truncate(g.store, pages * KSM_PAGE_SIZE), 0);
	CHECK_EQ(ksm_guard_create(g.at, pages, &g.guard), 0);
	return g;
}

KIT enum ksm_guard_state guarded_state(const struct guarded *g, size_t page)
{
	return KSM_GUARD_STATE(ksm_guard_get(g->guard, page));
}

/* Merge OPEN pages, each with its own frame; nobody can store into them meanwhile. */
KIT void guarded_merge(struct guarded *g, size_t page, size_t count, bool frozen)
{
	char *at = kit_page(g->at, page);
	uint64_t offset = page * KSM_PAGE_SIZE;
	uint8_t was;
	for (size_t i = page; i < page + count; i++) {
		CHECK(ksm_guard_claim_sigsafe(g->guard, i, &was));
		CHECK_EQ(was, KSM_GUARD_OPEN);
	}
	CHECK_EQ(ksm_os_protect(at, count * KSM_PAGE_SIZE, false), 0);
	CHECK_EQ(ksm_os_pwrite(g->store, at, count * KSM_PAGE_SIZE, offset), 0);
	CHECK_EQ(ksm_os_map_frames(at, count * KSM_PAGE_SIZE, g->store, offset, false), 0);
	ksm_guard_set(g->guard, page, count, KSM_GUARD_MERGED | (frozen ? KSM_GUARD_FROZEN : 0));
}

KIT void guarded_freeze(struct guarded *g, size_t page, size_t count)
{
	uint8_t was;
	for (size_t i = page; i < page + count; i++)
		CHECK(ksm_guard_claim_sigsafe(g->guard, i, &was));
	CHECK_EQ(ksm_os_protect(kit_page(g->at, page), count * KSM_PAGE_SIZE, false), 0);
	ksm_guard_set(g->guard, page, count, KSM_GUARD_READONLY | KSM_GUARD_FROZEN);
}

KIT void guarded_check_frame(const struct guarded *g, size_t page, uint64_t seed)
{
	char frame[KSM_PAGE_SIZE];
	CHECK_EQ(ksm_os_pread(g->store, frame, sizeof(frame), page * KSM_PAGE_SIZE), 0);
	CHECK(kit_is(frame, seed));
}

KIT void guarded_drop(struct guarded *g)
{
	ksm_guard_destroy(g->guard);
	munmap(g->at, g->pages * KSM_PAGE_SIZE);
	close(g->store);
}

/* A word of a page, as tests write it. */
KIT volatile uint64_t *guarded_word(const struct guarded *g, size_t page, size_t word)
{
	return (volatile uint64_t *)kit_page(g->at, page) + word;
}

KIT size_t guarded_mappings(const struct guarded *g)
{
	return kit_smaps(g->at, g->pages * KSM_PAGE_SIZE, NULL, NULL);
}

#endif
