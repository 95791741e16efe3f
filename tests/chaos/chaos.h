/* SPDX-License-Identifier: MIT */
/*
 * chaos.h: what the parts of the random-death test share.
 */
#ifndef CHAOS_H
#define CHAOS_H

#include "ksmalloc.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define CHAOS_PAGE 4096
#define CHAOS_SEGMENT 512 /* bytes that were written together, and the least that is remembered of them */
#define CHAOS_SEGMENTS (CHAOS_PAGE / CHAOS_SEGMENT)
#define CHAOS_KEYS 48 /* contents that everybody knows, so that most pages have twins; 0: zeros */
#define CHAOS_PATTERNS (CHAOS_KEYS * CHAOS_PAGE)
#define CHAOS_CREW 10                 /* processes that are kept alive */
#define CHAOS_PLACES (3 * CHAOS_CREW) /* these, their children, and theirs */
#define CHAOS_AUDITOR CHAOS_PLACES    /* the one who looks at everything while the others rest */
#define CHAOS_BLOCKS 20               /* of a process */
#define CHAOS_ARENAS 2
#define CHAOS_MOST_PAGES 48 /* of a block */
#define CHAOS_MOST_SEGMENTS (CHAOS_MOST_PAGES * CHAOS_SEGMENTS)
#define CHAOS_SETTLE_S 300 /* at most; a starved machine needs long */
#define CHAOS_DOMAIN "chaos"
#define CHAOS_RENDEZVOUS_ROOM 200

/* What a process is doing just now. */
#define CHAOS_DOINGS(X)                                                                                                \
	X(ATTACH)                                                                                                      \
	X(ALLOC)                                                                                                       \
	X(WRITE)                                                                                                       \
	X(VERIFY)                                                                                                      \
	X(SCAN)                                                                                                        \
	X(SETTLE)                                                                                                      \
	X(BREAK)                                                                                                       \
	X(FREE)                                                                                                        \
	X(GROW)                                                                                                        \
	X(FREEZE)                                                                                                      \
	X(UNMERGE)                                                                                                     \
	X(SWEEP)                                                                                                       \
	X(FORK)                                                                                                        \
	X(EXEC)                                                                                                        \
	X(LEAVE)                                                                                                       \
	X(REGISTER)                                                                                                    \
	X(STATS)                                                                                                       \
	X(REST)                                                                                                        \
	X(EXIT)

enum chaos_doing {
#define X(name) CHAOS_##name,
	CHAOS_DOINGS(X)
#undef X
	CHAOS_DOINGS_COUNT
};

/* What may be planted into the core, in this program only: each must be noticed. */
enum chaos_plant {
	CHAOS_PLANT_NONE,
	CHAOS_PLANT_PEER,   /* a sweep overlooks a living peer's bitmap */
	CHAOS_PLANT_WINDOW, /* windows keep nobody out */
	CHAOS_PLANT_FORK,   /* a child does not inherit its parent's bits */
	CHAOS_PLANT_DEAD,   /* whoever has died is taken for alive */
	CHAOS_PLANT_EXEC,   /* exec is not announced, so the new program may die of the signal that holds threads */
	CHAOS_PLANT_LOCK,   /* a lock is not always given back */
};

enum chaos_state {
	CHAOS_EMPTY,
	CHAOS_TAKEN, /* by a parent that is about to fork */
	CHAOS_LIVES,
};

struct chaos_place {
	int32_t pid; /* 0: nobody's, or not known yet */
	uint32_t state;
	uint32_t incarnation; /* raised by everyone who begins here */
	uint32_t parent;      /* the incarnation of the process that forked this one */
	uint32_t killed;      /* SIGKILL has been or is about to be sent */
	uint32_t doing;
	uint32_t rested; /* the rest that it has reached */
	uint64_t beats;  /* signs of life */
};

/* Of all processes together; atomic. */
struct chaos_totals {
	uint64_t kills, kills_while[CHAOS_DOINGS_COUNT], stops, massacres; /* kills: deaths, not signals */
	uint64_t forks, execs, leaves, exits, blocks, writes, verified;    /* verified: bytes */
	uint64_t merges, promotions, breaks, put_backs, give_backs, refusals, zero_pages, scans, settles, sweeps,
		freezes, unmerges, registers;
	uint64_t longest_ms;                       /* of an act, stops included */
	uint64_t audits, saved_most, members_most; /* saved: pages, as the kernel's tables say */
	uint64_t wrong, leaked, missing, invalid, unsettled, strays, hung, failed;
};

/* In a memory file that everybody inherits. */
struct chaos_shared {
	char rendezvous[CHAOS_RENDEZVOUS_ROOM];
	uint32_t seed, plant, slow, until_noticed;
	int32_t master;
	uint32_t rest; /* odd: everybody goes to rest */
	uint32_t drop; /* 1: free everything before the rest; 2: and leave after it */
	struct chaos_totals totals;
	struct chaos_place places[CHAOS_PLACES + 1];
	unsigned char patterns[CHAOS_PATTERNS] __attribute__((aligned(CHAOS_PAGE)));
};

extern struct chaos_shared *chaos;
extern int chaos_fd; /* its file */

static inline void chaos_add(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline uint64_t chaos_get(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static inline void chaos_raise(uint64_t *counter, uint64_t n)
{
	uint64_t old = chaos_get(counter);
	while (old < n && !__atomic_compare_exchange_n(counter, &old, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static inline uint32_t chaos_get32(const uint32_t *number)
{
	return __atomic_load_n(number, __ATOMIC_ACQUIRE);
}

static inline void chaos_set32(uint32_t *number, uint32_t value)
{
	__atomic_store_n(number, value, __ATOMIC_RELEASE);
}

static inline int32_t chaos_pid(const struct chaos_place *place)
{
	return __atomic_load_n(&place->pid, __ATOMIC_ACQUIRE);
}

static inline void chaos_set_pid(struct chaos_place *place, int32_t pid)
{
	__atomic_store_n(&place->pid, pid, __ATOMIC_RELEASE);
}

static inline uint32_t chaos_random(uint32_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 17;
	*seed ^= *seed << 5;
	return *seed;
}

/* Print a message about a failed call and end the process. */
void chaos_die(const char *what, int error) __attribute__((noreturn));
void chaos_check(int r, const char *what);
double chaos_now(void);
/* A process has ended that is nobody's but this one's to judge. */
void chaos_judge(int pid, uint32_t place, int status);
/* The name of what is done in a place. */
const char *chaos_doing_in(uint32_t place);
/* A new seed for whoever begins in a place. */
uint32_t chaos_seed(uint32_t place);
/* How everybody joins. */
void chaos_attach(int barrier, struct ksm_domain **domain);

/* ---- chaos_plant.c ------------------------------------------------------------------------------------------ */

/* What was planted is in force from now on, in this process and its children. */
void chaos_plant(void);

/* ---- chaos_block.c: memory, and what must stand there -------------------------------------------------------- */

enum chaos_kind {
	CHAOS_NONE,
	CHAOS_ARENA,
	CHAOS_REGISTERED
};

struct chaos_block {
	pthread_mutex_t lock;
	enum chaos_kind kind;
	unsigned arena;
	struct ksm_block memory;
	struct ksm_region *region;
	size_t nbytes;
	bool frozen;   /* some of it may be */
	bool prepares; /* a system call that writes needs prepared memory */
	uint32_t keys[CHAOS_MOST_SEGMENTS];
};

/*
 * Whoever is dead is left so for a moment. The kernel, where it reaps a process whose other threads are still ending, or whose
 * files in /proc somebody has open, keeps a processor busy until they have, and nothing else runs there: up to a minute.
 */
#define CHAOS_DEAD_FOR_S 0.1

/* This process. */
extern struct chaos_here {
	uint32_t place;
	uint32_t seed, first_seed;
	uint64_t acts;
	int barrier;
	struct ksm_domain *domain;
	struct ksm_arena *arenas[CHAOS_ARENAS]; /* the last one breaks pages in our handler */
	struct chaos_block blocks[CHAOS_BLOCKS];
} chaos_here;

void chaos_patterns_init(void);
/* The caller holds the block's lock in all of these, or is alone. */
void chaos_block_make(struct chaos_block *block, size_t nbytes, uint32_t *seed);
void chaos_block_register(struct chaos_block *block, size_t nbytes, uint32_t *seed);
void chaos_block_free(struct chaos_block *block);
/* Into a larger or smaller one. */
void chaos_block_move(struct chaos_block *block, size_t nbytes);
void chaos_block_write(struct chaos_block *block, uint32_t *seed);
void chaos_block_break(struct chaos_block *block, uint32_t *seed);
void chaos_block_freeze(struct chaos_block *block, uint32_t *seed);
void chaos_block_verify(struct chaos_block *block, const char *when);

/* ---- chaos_peer.c ------------------------------------------------------------------------------------------- */

/* A process that has been started or has called exec, in a place. */
void chaos_peer(uint32_t place) __attribute__((noreturn));

/* ---- chaos_audit.c ------------------------------------------------------------------------------------------ */

/* A newcomer that looks at the others while they rest: settled, nothing leaked, nothing missing, nobody invented. */
void chaos_audit(void) __attribute__((noreturn));
/* Pids of this process's children that no place knows: at most one is returned, or 0. */
int chaos_unknown_child(void);

/* ---- chaos_master.c ----------------------------------------------------------------------------------------- */

/* Returns the exit status. */
int chaos_master(double seconds, double every, double patience);

#endif
