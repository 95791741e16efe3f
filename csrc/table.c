/* SPDX-License-Identifier: MIT */
/*
 * DOC: Tables
 *
 * The index (digest to frame) and the candidates (digest to peer) are both tables of single 64-bit words in
 * the control memfd. A table has levels; level 0 has 4,096 words, the next two twice as many as the one before, further ones
 * four times: few levels to look through, and little memory for little data. A level is used only when both of a digest's
 * buckets overflow in all earlier ones, so untouched levels take no memory. Reading would allocate them too: a bit for each
 * page says whether there ever was a word in it.
 *
 *    digest ──┬─ low bits ────▶ bucket of 8 words (one cache line) ─┐ level 0, both in one page
 *             ├─ other bits ──▶ bucket of 8 words ──────────────────┘
 *             ├─ …                                                    level 1
 *
 * A look-up of what is not there reads two cache lines of every level, and waits for none of them if they have been asked for
 * before, together with those of other pages: ksm_table_prefetch().
 *
 * Words are placed and replaced by compare-and-swap, never moved. There is no deletion order to respect:
 * whoever looks reads both buckets of every level in use.
 *
 * TABLE-1. A word is whole or absent, whoever dies when.
 * TABLE-2. A look-up reads at most levels × 16 words; a scribbled level count is cut to the room there is.
 * TABLE-3. Losing a word, or having one twice, or a stale one, costs time or a missed merge, never a byte:
 *          every user checks what the word promises.
 * TABLE-4. The page of a bucket is there (SPARSE-1) before its bit says that it was touched.
 *
 * Any thread of any peer may call; no locks.
 */
#include "table.h"

#include "atomic.h"

#include <errno.h>

#define PAGE_BUCKETS (KSM_PAGE_SIZE / sizeof(uint64_t) / KSM_TABLE_BUCKET)

unsigned ksm_table_levels(const struct ksm_table *table)
{
	uint32_t levels = ksm_load_acquire(table->levels_now);
	return levels < 1 ? 1 : KSM_MIN(levels, table->levels_max);
}

/* Both of a level's buckets lie in one page: there is one translation for the processor to look up, not two. */
static inline uint64_t *bucket_at(const struct ksm_table *table, unsigned level, unsigned choice, uint64_t digest)
{
	uint64_t buckets = 1ull << ksm_table_level_shift(level);
	buckets /= KSM_TABLE_BUCKET;
	uint64_t at = digest & (buckets - 1);
	if (choice) /* another one of the page's, and any of them */
		at ^= 1 + (digest >> 32) % (PAGE_BUCKETS - 1);
	return table->words + ksm_table_words(level) + at * KSM_TABLE_BUCKET;
}

static uint64_t page_of(const struct ksm_table *table, const uint64_t *bucket)
{
	return (uint64_t)(bucket - table->words) / (KSM_PAGE_SIZE / sizeof(uint64_t));
}

/* Was a word ever placed in the page of this bucket, and may it be read? */
static bool is_touched(const struct ksm_table *table, const uint64_t *bucket)
{
	uint64_t page = page_of(table, bucket);
	const uint64_t *touched = &table->touched[page / 64];
	return !ksm_sparse_reach(&table->touched_there, touched) && ksm_load_acquire(touched) >> (page % 64) & 1 &&
	       !ksm_sparse_reach(&table->words_there, bucket);
}

uint64_t *ksm_table_bucket(const struct ksm_table *table, unsigned level, unsigned choice, uint64_t digest)
{
	uint64_t *bucket = bucket_at(table, level, choice, digest);
	return is_touched(table, bucket) ? bucket : NULL;
}

const struct ksm_table_view *ksm_table_view(struct ksm_table *table, uint64_t digest)
{
	struct ksm_table_view *view = &table->view;
	unsigned levels = ksm_table_levels(table);
	if (view->digest == digest && view->levels == levels && view->count == levels * KSM_TABLE_CHOICES)
		return view; /* with nothing left out that somebody may have placed a word in since */
	view->digest = digest;
	view->levels = levels;
	view->count = 0;
	for (unsigned level = 0; level < levels; level++) {
		if (!is_touched(table, bucket_at(table, level, 0, digest)))
			continue; /* so are the others, for they are in the same page */
		for (unsigned choice = 0; choice < KSM_TABLE_CHOICES; choice++)
			view->buckets[view->count++] = bucket_at(table, level, choice, digest);
	}
	return view;
}

/* The same for writing. NULL: there is no memory for it. */
static uint64_t *touch_bucket(struct ksm_table *table, unsigned level, unsigned choice, uint64_t digest)
{
	uint64_t *bucket = bucket_at(table, level, choice, digest);
	uint64_t page = page_of(table, bucket), bit = 1ull << (page % 64);
	uint64_t *touched = &table->touched[page / 64];
	if (ksm_sparse_reach(&table->touched_there, touched) || ksm_sparse_reach(&table->words_there, bucket))
		return NULL; /* TABLE-4 */
	if (!(ksm_load_relaxed(touched) & bit)) {
		ksm_or_seqcst(touched, bit);
		table->view.levels = 0;
	}
	return bucket;
}

/* Into one bucket, over an empty word or, if is_stale is given, one that nobody needs. Word 0: only that there is such a place. */
static bool insert_here(uint64_t *bucket, uint64_t word, bool (*is_stale)(void *context, uint64_t word), void *context)
{
	for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++) {
		uint64_t old = ksm_load_acquire(&bucket[i]);
		if (old == word)
			return true;
		if ((old == 0 || (is_stale && is_stale(context, old))) && ksm_cas_seqcst(&bucket[i], old, word))
			return true;
	}
	return false;
}

static bool is_there(struct ksm_table *table, uint64_t digest, uint64_t word)
{
	const struct ksm_table_view *view = ksm_table_view(table, digest);
	for (unsigned n = 0; n < view->count; n++)
		for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++)
			if (ksm_load_acquire(&view->buckets[n][i]) == word)
				return true;
	return false;
}

/* Empty words of a bucket. */
static unsigned room_in(const struct ksm_table *table, unsigned level, unsigned choice, uint64_t digest)
{
	const uint64_t *bucket = ksm_table_bucket(table, level, choice, digest);
	unsigned room = bucket ? 0 : KSM_TABLE_BUCKET;
	for (unsigned i = 0; bucket && i < KSM_TABLE_BUCKET; i++)
		room += ksm_load_relaxed(&bucket[i]) == 0;
	return room;
}

/*
 * Into one level: the emptier bucket first, so that a level is nearly full before anything overflows; whether words are
 * stale, which is dear, is asked only where none is empty. 1: placed; 0: no room; -ENOMEM.
 */
static int insert_level(struct ksm_table *table, unsigned level, uint64_t digest, uint64_t word,
			bool (*is_stale)(void *context, uint64_t word), void *context)
{
	unsigned room[KSM_TABLE_CHOICES] = {room_in(table, level, 0, digest), room_in(table, level, 1, digest)};
	unsigned first = room[1] > room[0];
	for (unsigned n = 0; n < KSM_TABLE_CHOICES; n++) {
		uint64_t *bucket = touch_bucket(table, level, (first + n) % KSM_TABLE_CHOICES, digest);
		if (!bucket)
			return -ENOMEM; /* so is the other one, for it is in the same page */
		if (insert_here(bucket, word, room[first] ? NULL : is_stale, context))
			return 1;
	}
	return 0;
}

/* One level more than the `levels` there are; what a confused peer has written instead does not stand in the way. */
static void add_level(const struct ksm_table *table, unsigned levels)
{
	uint32_t now = ksm_load_acquire(table->levels_now);
	if (now <= levels)
		ksm_cas32_seqcst(table->levels_now, now, levels + 1);
}

/*
 * The last level has most of all words, so earlier ones are seldom asked. But first of all a place is looked for that takes
 * no memory: when a level has just been opened, most of its pages would be taken for a word each. 1, 0, or -ENOMEM.
 */
static int insert_somewhere(struct ksm_table *table, unsigned levels, uint64_t digest, uint64_t word,
			    bool (*is_stale)(void *context, uint64_t word), void *context)
{
	int r = 0;
	for (unsigned level = levels; level-- && !r;)
		if (is_touched(table, bucket_at(table, level, 0, digest)))
			r = insert_level(table, level, digest, word, is_stale, context);
	for (unsigned level = levels; level-- && !r;)
		if (!is_touched(table, bucket_at(table, level, 0, digest)))
			r = insert_level(table, level, digest, word, is_stale, context);
	return r;
}

int ksm_table_insert(struct ksm_table *table, uint64_t digest, uint64_t word,
		     bool (*is_stale)(void *context, uint64_t word), void *context)
{
	unsigned levels = ksm_table_levels(table);
	if (word && is_there(table, digest, word))
		return 0;
	int r = insert_somewhere(table, levels, digest, word, is_stale, context);
	while (!r && levels < table->levels_max) {
		add_level(table, levels);
		r = insert_level(table, levels, digest, word, is_stale, context);
		levels = KSM_MAX(ksm_table_levels(table), levels + 1);
	}
	if (r)
		return KSM_MIN(r, 0);
	uint64_t *bucket = touch_bucket(table, table->levels_max - 1, 0, digest);
	if (bucket && word)
		ksm_store_release(&bucket[(digest >> 40) % KSM_TABLE_BUCKET], word);
	return bucket ? 0 : -ENOMEM;
}

void ksm_table_prefetch(const struct ksm_table *table, uint64_t digest)
{
	unsigned levels = ksm_table_levels(table);
	for (unsigned level = 0; level < levels; level++)
		for (unsigned choice = 0; choice < KSM_TABLE_CHOICES; choice++)
			__builtin_prefetch(bucket_at(table, level, choice, digest));
}

int ksm_table_make_room(struct ksm_table *table, uint64_t digest, bool (*is_stale)(void *context, uint64_t word),
			void *context)
{
	return ksm_table_insert(table, digest, 0, is_stale, context);
}
