/* SPDX-License-Identifier: MIT */
/*
 * mad.h: what the parts of the mad peer share.
 *
 * Honest processes allocate, write, merge, break, fork, join and leave, and know every byte of their memory. A mad one
 * joins the same domain and scribbles over whatever it can reach. Rounds follow one another, each in a domain of its own.
 */
#ifndef MAD_H
#define MAD_H

#include "ksmalloc.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAD_PAGE 4096
#define MAD_HONEST 4    /* honest processes at a time; the last one leaves and joins again and again */
#define MAD_BLOCKS 5    /* of each */
#define MAD_PAGES 48    /* of a block */
#define MAD_CONTENTS 96 /* pages' contents that all of them draw from */
#define MAD_REASONS 64

/* What a mad process does; each is a bit of a set. */
enum mad_way {
	MAD_WORDS,      /* random words, bits and bytes anywhere in what is used of the control memory */
	MAD_PAGES_,     /* whole pages: garbage, zeros, others' pages, what they held a while ago; holes */
	MAD_HEADER,     /* the header's fields: counts, epochs, levels */
	MAD_SLOTS,      /* nonces, epochs, counters of peers */
	MAD_CELLS,      /* states, owners and generations of frames */
	MAD_INDEX,      /* index words that point to other frames, or beyond all; checks; candidates, claims */
	MAD_RACES,      /* DYING and ALLOC become PUBLISHED as soon as they are seen, PUBLISHED becomes FREE */
	MAD_FILES,      /* truncating, growing, sealing, mapping what came as descriptors: all must be refused */
	MAD_RENDEZVOUS, /* the domain file, names and modes in the rendezvous, the locks */
	MAD_CALLS,      /* sockets of others: garbage, halves, descriptors of all kinds, silence, floods */
	MAD_ANSWERS,    /* wrong answers to those who ask this peer */
	MAD_WAYS
};

extern const char *const mad_way_names[MAD_WAYS];

/* Of all processes together; in shared memory, atomic. */
struct mad_totals {
	uint64_t ways[MAD_WAYS]; /* what the mad ones did */
	uint64_t allowed;        /* calls that should have been refused, and were not */
	uint64_t wrong;          /* pages that did not hold what they must */
	uint64_t pages;          /* pages checked */
	uint64_t writes, merges, scans, sweeps, freed, blocks, settles, unmerges, forks, joins, refused;
	uint64_t merged_outside; /* pages of the store that the honest ones had mapped before anything happened */
	uint64_t slowest_ns;     /* the longest any call took */
	char slowest[64];        /* which; of two at the same time either */
	uint64_t beats[MAD_HONEST];
	int32_t reasons[MAD_REASONS]; /* codes that calls were refused with, or that kept pages from merging */
	uint32_t ready;               /* honest processes with merged pages */
	uint32_t mad_joined;          /* the mad one is a peer */
	uint32_t mad;                 /* it begins */
	uint32_t calm;                /* nobody is mad in this round: what is refused is told */
	uint32_t stop;
};

struct mad_options {
	const char *rendezvous;
	char name[32]; /* the domain of this round */
	uint64_t seed;
	uint32_t ways;  /* a set */
	int barrier;    /* enum ksm_barrier_kind */
	double seconds; /* of a round */
	struct mad_totals *totals;
};

static inline void mad_add(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline uint64_t mad_get(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static inline uint32_t mad_get32(const uint32_t *number)
{
	return __atomic_load_n(number, __ATOMIC_RELAXED);
}

static inline uint64_t mad_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static inline uint64_t mad_below(uint64_t *state, uint64_t n)
{
	return mad_random(state) % n;
}

uint64_t mad_now_ns(void);
/* Print a message about a failed call of the test's own and end the process. */
void mad_die(const char *what, int error) __attribute__((noreturn));
/* Remember a code that something was refused with. */
void mad_note(struct mad_totals *totals, int code);

/* ---- mad_honest.c ------------------------------------------------------------------------------------------- */

/* One honest process, until it is told to stop. `restless`: it leaves and joins again. */
void mad_honest(const struct mad_options *options, unsigned place, bool restless) __attribute__((noreturn));

/* ---- mad_peer.c --------------------------------------------------------------------------------------------- */

/* The mad process, until it is killed. */
void mad_peer(const struct mad_options *options) __attribute__((noreturn));

struct mad_state {
	const struct mad_options *options;
	struct mad_totals *totals;
	struct ksm_member *member;
	uint64_t random;
	uint64_t old_header[MAD_PAGE / 8], old_slots[4][MAD_PAGE / 8]; /* of a while ago */
	uint32_t active[4096];                                         /* frames in use, as of a while ago */
	size_t actives;
};

/* ---- mad_memory.c ------------------------------------------------------------------------------------------- */

/* Do some of it, for a few milliseconds at most. */
void mad_scribble(struct mad_state *mad, enum mad_way way);
/* Put the worst right again, so that there is something to scribble over. */
void mad_heal(struct mad_state *mad);
/* What is in use; what is there now. */
void mad_look(struct mad_state *mad);

/* ---- mad_files.c -------------------------------------------------------------------------------------------- */

void mad_try_files(struct mad_state *mad);
void mad_try_rendezvous(struct mad_state *mad);

/* ---- mad_calls.c -------------------------------------------------------------------------------------------- */

void mad_call(struct mad_state *mad);
/* Answer whoever waits at this peer's socket, wrongly. */
void mad_answer(struct mad_state *mad);

#endif
