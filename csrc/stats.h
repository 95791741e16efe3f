/* SPDX-License-Identifier: MIT */
/*
 * stats.h: a peer's counters, in KSM's words. They lie in the peer's slot, so that everybody can read them;
 * only the owner writes, under its merge lock. GAUGE: how many now. TOTAL: how many ever.
 */
#ifndef KSM_STATS_H
#define KSM_STATS_H

#include "atomic.h"
#include "layout.h"

#define KSM_COUNTERS(X)                                                                                                \
	X(PAGES_MERGED)                                                                                                \
	X(PAGES_BROKEN)                                                                                                \
	X(PAGES_UNSHARED)                                                                                              \
	X(PAGES_VOLATILE)                                                                                              \
	X(PAGES_ZERO)                                                                                                  \
	X(FRAMES_REFERRED)                                                                                             \
	X(VMAS_USED)                                                                                                   \
	X(VMA_BUDGET)                                                                                                  \
	X(METADATA_BYTES)                                                                                              \
	X(PAGES_SCANNED)                                                                                               \
	X(PAGES_SKIPPED)                                                                                               \
	X(FULL_SCANS)                                                                                                  \
	X(MERGES)                                                                                                      \
	X(ZERO_MERGES)                                                                                                 \
	X(PROMOTIONS)                                                                                                  \
	X(COW_BREAKS)                                                                                                  \
	X(PUT_BACKS)                                                                                                   \
	X(FAILURES)                                                                                                    \
	X(GIVE_BACKS)                                                                                                  \
	X(STOPS)                                                                                                       \
	X(SUSPENSIONS)                                                                                                 \
	X(WITHHELD)

enum ksm_counter {
#define KSM_COUNTER_ENUM(name) KSM_##name,
	KSM_COUNTERS(KSM_COUNTER_ENUM)
#undef KSM_COUNTER_ENUM
	KSM_COUNTER_COUNT
};
_Static_assert(KSM_COUNTER_COUNT <= 32, "counters outgrew the slot");

static inline void ksm_count(struct ksm_slot *slot, enum ksm_counter counter, int64_t delta)
{
	ksm_store_relaxed(&slot->counters[counter], slot->counters[counter] + (uint64_t)delta);
}

static inline void ksm_count_set(struct ksm_slot *slot, enum ksm_counter counter, uint64_t value)
{
	ksm_store_relaxed(&slot->counters[counter], value);
}

static inline uint64_t ksm_counter_of(const struct ksm_slot *slot, enum ksm_counter counter)
{
	return ksm_load_relaxed(&slot->counters[counter]);
}

/* What one peer says of itself, in the public structure's words; fields of the whole domain are left alone. */
void ksm_stats_of_slot(const struct ksm_slot *slot, struct ksm_stats *out);
/* Add one peer to a sum over the domain. */
void ksm_stats_add(struct ksm_stats *sum, const struct ksm_stats *one);

#endif
