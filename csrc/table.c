/* SPDX-License-Identifier: MIT */
/*
 * DOC: Tables
 *
 * The index (digest to frame) and the candidates (digest to peer) are both tables of single 64-bit words in
 * the control memfd. A table has levels; level 0 has 4,096 words, each further one four times as many, and a
 * level is used only when a bucket overflows in all earlier ones, so that untouched levels take no memory.
 *
 *    digest ──┬─ low bits ──▶ bucket of 8 words (one cache line) in level 0
 *             ├─ low bits ──▶ bucket of 8 words in level 1
 *             └─ …
 *
 * Words are placed and replaced by compare-and-swap, never moved. There is no deletion order to respect:
 * whoever looks reads all eight words of every level in use.
 *
 * TABLE-1. A word is whole or absent, whoever dies when.
 * TABLE-2. A look-up reads at most levels × 8 words; a scribbled level count is cut to the room there is.
 * TABLE-3. Losing a word, or having one twice, or a stale one, costs time or a missed merge, never a byte:
 *          every user checks what the word promises.
 *
 * Any thread of any peer may call; no locks.
 */
#include "table.h"

#include "atomic.h"

unsigned ksm_table_levels(const struct ksm_table *table)
{
	uint32_t levels = ksm_load_acquire(table->levels_now);
	return levels < 1 ? 1 : KSM_MIN(levels, table->levels_max);
}

uint64_t *ksm_table_bucket(const struct ksm_table *table, unsigned level, uint64_t digest)
{
	uint64_t buckets = (1ull << (KSM_TABLE_FIRST_SHIFT + 2 * level)) / KSM_TABLE_BUCKET;
	return table->words + ksm_table_words(level) + (digest & (buckets - 1)) * KSM_TABLE_BUCKET;
}

void ksm_table_insert(struct ksm_table *table, uint64_t digest, uint64_t word,
		      bool (*is_stale)(void *context, uint64_t word), void *context)
{
	unsigned levels = ksm_table_levels(table);
	for (unsigned level = 0; level < table->levels_max; level++) {
		if (level == levels) {
			ksm_cas32_seqcst(table->levels_now, levels, levels + 1);
			levels = KSM_MAX(ksm_table_levels(table), level + 1);
		}
		uint64_t *bucket = ksm_table_bucket(table, level, digest);
		for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++) {
			uint64_t old = ksm_load_acquire(&bucket[i]);
			if (old == word)
				return;
			if ((old == 0 || is_stale(context, old)) && ksm_cas_seqcst(&bucket[i], old, word))
				return;
		}
	}
	uint64_t *bucket = ksm_table_bucket(table, table->levels_max - 1, digest);
	ksm_store_release(&bucket[(digest >> 40) % KSM_TABLE_BUCKET], word);
}
