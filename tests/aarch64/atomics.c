/* SPDX-License-Identifier: MIT */
/*
 * atomics: every operation of atomic.h by several threads at once. Nothing may be lost; what is published is whole; and of
 * "my bit is set, what does the cell say" and "the cell is dying, what do the bits say" at least one side sees the other
 * (the take and the sweep of frames). The control, built with -DWITHOUT_FENCE, has to find that neither does.
 */
#include "atomic.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef WITHOUT_FENCE
#undef ksm_fence_seqcst
#define ksm_fence_seqcst() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#endif

enum {
	THREADS = 4,
	TIMES = 100000
};

static struct {
	uint64_t relaxed, seqcst, cas, high, bits, cleared, sum, taken;
	uint32_t small;
	uint64_t box[16], full;                   /* a message */
	uint64_t bit, cell, saw[2][2], rounds[2]; /* saw: in even and in odd rounds; each side */
} at = {.cleared = UINT64_MAX};

static void check(int good, const char *what)
{
	if (good)
		return;
	printf("wrong: %s\n", what);
	exit(1);
}

static void *count(void *number)
{
	uint64_t self = (uint64_t)(uintptr_t)number, token = 0;
	for (uint64_t i = 1; i <= TIMES; i++) {
		ksm_add_relaxed(&at.relaxed, 3);
		ksm_sub_relaxed(&at.relaxed, 1);
		ksm_add_seqcst(&at.seqcst, 5);
		ksm_sub_seqcst(&at.seqcst, 1);
		for (uint64_t old = ksm_load_relaxed(&at.cas); !ksm_cas_seqcst(&at.cas, old, old + 1);)
			old = ksm_load_acquire(&at.cas);
		for (uint32_t old = ksm_load_relaxed(&at.small); !ksm_cas32_seqcst(&at.small, old, old + 1);)
			old = ksm_load_acquire(&at.small);
		ksm_raise_release(&at.high, self * TIMES + i);
		uint64_t mine = 1ull << (self * 16 + i % 16);
		(i & 16 ? ksm_or_release(&at.bits, mine) : ksm_or_seqcst(&at.bits, mine));
		check((ksm_load_relaxed(&at.bits) & mine) != 0, "a bit that was set is not there");
		(i & 16 ? ksm_and_release(&at.bits, ~mine) : ksm_and_seqcst(&at.bits, ~mine));
		check((ksm_load_relaxed(&at.bits) & mine) == 0, "a bit that was cleared is there");
		token = ksm_exchange_acqrel(&at.taken, token + 1); /* every token is in one place */
	}
	ksm_add_relaxed(&at.sum, token);
	return NULL;
}

/* Filled, then published; read, then given back. */
static void *message(void *number)
{
	uint64_t self = (uint64_t)(uintptr_t)number;
	for (uint64_t i = 1; i <= TIMES; i++) {
		while (ksm_load_acquire(&at.full) != (self ? 2 * i - 1 : 2 * i - 2))
			sched_yield();
		for (size_t word = 0; word < KSM_COUNT(at.box); word++) {
			check(!self || at.box[word] == i * (word + 1), "a message was not whole");
			at.box[word] = self ? 0 : i * (word + 1);
		}
		ksm_store_release(&at.full, self ? 2 * i : 2 * i - 1);
	}
	return NULL;
}

/* In a round nobody waits; between two rounds both meet. */
static void *take_or_sweep(void *number)
{
	uint64_t self = (uint64_t)(uintptr_t)number;
	for (uint64_t i = 1; i <= TIMES; i++) {
		ksm_store_relaxed(self ? &at.bit : &at.cell, i);
		ksm_fence_seqcst();
		uint64_t other = ksm_load_relaxed(self ? &at.cell : &at.bit);
		ksm_store_relaxed(&at.saw[i % 2][self], other == i);
		ksm_add_seqcst(&at.rounds[self], 1);
		for (unsigned spins = 0; ksm_load_seqcst(&at.rounds[!self]) < i; spins++)
			if (spins > 1000) /* the other one has no processor */
				sched_yield();
		const uint64_t *saw = at.saw[i % 2];
		check(ksm_load_relaxed(&saw[0]) || ksm_load_relaxed(&saw[1]), "neither saw the other");
	}
	return NULL;
}

static void run(void *(*body)(void *), size_t threads)
{
	pthread_t all[THREADS];
	for (size_t i = 0; i < threads; i++)
		check(!pthread_create(&all[i], NULL, body, (void *)(uintptr_t)i), "no thread");
	for (size_t i = 0; i < threads; i++)
		pthread_join(all[i], NULL);
}

int main(void)
{
	uint64_t all = (uint64_t)THREADS * TIMES;
	run(count, THREADS);
	check(at.relaxed == 2 * all, "relaxed sums");
	check(at.seqcst == 4 * all, "sums");
	check(at.cas == all && at.small == all, "compare and swap");
	check(at.high == all, "the highest");
	check(at.bits == 0, "bits");
	check(at.sum + at.taken == all, "tokens");
	run(message, 2);
	run(take_or_sweep, 2);
	printf("%llu operations of each kind, %llu messages, %llu rounds\n", (unsigned long long)all,
	       (unsigned long long)TIMES, (unsigned long long)TIMES);
	return 0;
}
