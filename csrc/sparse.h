/* SPDX-License-Identifier: MIT */
/*
 * sparse.h: tables in sparse shared memory, whose pages are there before anybody touches them.
 */
#ifndef KSM_SPARSE_H
#define KSM_SPARSE_H

#include "atomic.h"

enum ksm_sparse_table { /* each has its bit in the book */
	KSM_SPARSE_SLOTS,
	KSM_SPARSE_CELLS,
	KSM_SPARSE_CHECKS,
	KSM_SPARSE_INDEX,
	KSM_SPARSE_CANDIDATES,
	KSM_SPARSE_TOUCHED,
};

#define KSM_SPARSE_NEAR 256 /* pages at the beginning of each table: all that a store of half a GiB needs */

/* What this process knows to be there: a byte for each page, a bit in it for each table. */
struct ksm_sparse_book {
	uint8_t near[KSM_SPARSE_NEAR];
	uint8_t *far; /* private memory, for the rest; a byte for every page, and only what is used takes memory */
	int error;    /* why a page could not be had; whoever reports it sets it back to 0 */
};

struct ksm_sparse {
	char *base; /* on a page boundary */
	struct ksm_sparse_book *book;
	enum ksm_sparse_table table;
};

/* Not known to be there. */
int ksm_sparse_populate(const struct ksm_sparse *sparse, uint64_t page);

static inline uint8_t *ksm_sparse_byte(const struct ksm_sparse *sparse, uint64_t page)
{
	return page < KSM_SPARSE_NEAR ? &sparse->book->near[page] : &sparse->book->far[page];
}

static inline bool ksm_sparse_knows(const struct ksm_sparse *sparse, const void *at)
{
	uint64_t page = (uint64_t)((const char *)at - sparse->base) >> KSM_PAGE_SHIFT;
	return ksm_load_relaxed(ksm_sparse_byte(sparse, page)) >> sparse->table & 1;
}

/* The word at `at` may be read and written from now on, by this process and its children. 0, or -ENOMEM. */
static inline int ksm_sparse_reach(const struct ksm_sparse *sparse, const void *at)
{
	if (!sparse->book || KSM_LIKELY(ksm_sparse_knows(sparse, at))) /* no book: memory of another kind */
		return 0;
	return ksm_sparse_populate(sparse, (uint64_t)((const char *)at - sparse->base) >> KSM_PAGE_SHIFT);
}

#endif
