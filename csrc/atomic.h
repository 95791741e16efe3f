/* SPDX-License-Identifier: MIT */
/*
 * atomic.h: atomic operations with the memory order in the name. Shared memory and threads alike: all words
 * are naturally aligned and lock-free on x86-64 and aarch64.
 */
#ifndef KSM_ATOMIC_H
#define KSM_ATOMIC_H

#include "base.h"

#define ksm_load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define ksm_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define ksm_load_seqcst(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define ksm_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define ksm_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define ksm_add_relaxed(p, v) __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
#define ksm_sub_relaxed(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_RELAXED)
#define ksm_add_seqcst(p, v) __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
#define ksm_or_release(p, v) __atomic_fetch_or((p), (v), __ATOMIC_RELEASE)
#define ksm_and_release(p, v) __atomic_fetch_and((p), (v), __ATOMIC_RELEASE)
#define ksm_sub_seqcst(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_SEQ_CST)
#define ksm_or_seqcst(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
#define ksm_and_seqcst(p, v) __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
#define ksm_exchange_acqrel(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)

/* The fence between "my bit is set" and "what does the cell say", and its counterpart in the sweep. */
#define ksm_fence_seqcst() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* Compare and swap; full barrier on success, acquire on failure. true: swapped. */
static inline bool ksm_cas_seqcst(uint64_t *p, uint64_t expected, uint64_t desired)
{
	return __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
}

static inline bool ksm_cas32_seqcst(uint32_t *p, uint32_t expected, uint32_t desired)
{
	return __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
}

/* Raise *p to at least v; release. Given up after many tries: a confused peer may write there all the time. A word that
 * nobody else writes is raised at the first. */
static inline void ksm_raise_release(uint64_t *p, uint64_t v)
{
	uint64_t old = ksm_load_relaxed(p);
	for (unsigned tries = 0; tries < 1000 && old < v; tries++)
		if (__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
			return;
}

#endif
