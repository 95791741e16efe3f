/* SPDX-License-Identifier: MIT */
/*
 * table.h: a lossy, lock-free table of 64-bit words in shared memory, found by digest.
 */
#ifndef KSM_TABLE_H
#define KSM_TABLE_H

#include "layout.h"
#include "sparse.h"

/* Where the words of one digest are, as of when that was looked up. */
struct ksm_table_view {
	uint64_t digest;
	unsigned levels; /* 0: of nothing */
	unsigned count;
	uint64_t *buckets[KSM_TABLE_LEVELS * KSM_TABLE_CHOICES];
};

struct ksm_table {
	uint64_t *words;      /* in shared memory, ksm_table_words(levels_max) of them */
	uint64_t *touched;    /* in shared memory: a bit for each page of words */
	uint32_t *levels_now; /* in shared memory: levels in use */
	unsigned levels_max;
	struct ksm_sparse words_there, touched_there;
	struct ksm_table_view view; /* the last one: one digest is looked up several times in a row */
};

/* Levels in use, at least one, never beyond the room there is, whatever a confused peer has written. */
unsigned ksm_table_levels(const struct ksm_table *table);

/* One of the KSM_TABLE_CHOICES buckets (KSM_TABLE_BUCKET words each) in which a digest may lie in one level; NULL: there
 * is nothing there, nor in the whole page of it, or its page cannot be had. */
uint64_t *ksm_table_bucket(const struct ksm_table *table, unsigned level, unsigned choice, uint64_t digest);

/* All buckets that a word with this digest may be in. Good until the next call; whoever has the table to itself. */
const struct ksm_table_view *ksm_table_view(struct ksm_table *table, uint64_t digest);

/* A digest will be looked up soon. */
void ksm_table_prefetch(const struct ksm_table *table, uint64_t digest);

/*
 * Place a word: over an empty one or one that is_stale() says nobody needs; else in a new level; in a full table
 * over some other word. A word already there in full is not placed again. Words are never 0. -ENOMEM: it has no place.
 */
int ksm_table_insert(struct ksm_table *table, uint64_t digest, uint64_t word,
		     bool (*is_stale)(void *context, uint64_t word), void *context);
/* Look for such a place, and leave it empty: the next one who inserts finds it without asking for memory. */
int ksm_table_make_room(struct ksm_table *table, uint64_t digest, bool (*is_stale)(void *context, uint64_t word),
			void *context);

#endif
