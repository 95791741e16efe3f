/* SPDX-License-Identifier: MIT */
/*
 * arena.h: memory to allocate from, and registered memory; the functions are those of ksmalloc.h.
 */
#ifndef KSM_ARENA_H
#define KSM_ARENA_H

#include "domain.h"
#include "slab.h"
#include "span.h"

/* A reserved range of addresses, a region of it, and what of it is free. */
struct ksm_area {
	struct ksm_area *next;
	struct ksm_region region;
	struct ksm_spans spans;
	char *base;
	size_t room;      /* pages reserved */
	size_t committed; /* pages [0, committed) are readable and writable */
};

/* The two halves of an arena: what may be merged, and what never is. */
struct ksm_half {
	struct ksm_area *areas;
	struct ksm_slabs slabs;
	bool mergeable;
};

struct ksm_arena {
	struct ksm_domain *domain;
	uint64_t references;
	bool closed;
	bool background;
	bool sigsegv;
	bool excluded; /* unmerged by name: its areas too, and those to come */
	struct ksm_half halves[2];
	uint64_t blocks, bytes, pages;
};

/* A new area of at least so many pages, last in its half. Memory lock held. 0, or ENOMEM and what regions say. */
int ksm_area_create(struct ksm_arena *arena, struct ksm_half *half, size_t least, struct ksm_area **out);
/* No scanner knows its region any more. */
void ksm_area_destroy(struct ksm_area *area);
/* Make pages [0, pages) of it readable and writable. */
int ksm_area_commit(struct ksm_area *area, size_t pages);

/* Pages of a live area, or NULL: [at, at + nbytes) lies in no area's handed-out part. Memory lock held. */
struct ksm_area *ksm_arena_area_of(struct ksm_arena *arena, const void *at, size_t nbytes, bool *mergeable);

#endif
