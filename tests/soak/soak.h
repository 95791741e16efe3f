/* SPDX-License-Identifier: MIT */
/*
 * soak.h: what the parts of the lost-write soak share.
 */
#ifndef SOAK_H
#define SOAK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SOAK_WRITERS 3   /* threads that write in a process; each owns a sector and a word of every page */
#define SOAK_PROCESSES 3 /* at a time */
#define SOAK_SECTOR 512  /* the least a direct transfer takes */
#define SOAK_WORD 8      /* what an eventfd gives */
#define SOAK_STATES 2    /* a sector or a word is all zero, or a fixed pattern */
#define SOAK_NO_BARRIER 77

/* The ways in which bytes come into a page. */
enum soak_way {
	SOAK_STORE,
	SOAK_PIPE,
	SOAK_TCP,
	SOAK_UDP,
	SOAK_UNIX,
	SOAK_READV,
	SOAK_PREAD,
	SOAK_DIRECT,
	SOAK_EVENTFD,
	SOAK_WAYS
};

/* Of all processes together; in shared memory, atomic. */
struct soak_totals {
	uint64_t writes[SOAK_WAYS];
	uint64_t merges, breaks, put_backs, refused;
	uint64_t blocks, scans, sweeps, settles, unmerges, forks, kills;
	uint64_t lost;                                       /* a write that is gone: the bytes before it are back */
	uint64_t wrong;                                      /* bytes that nobody ever wrote there */
	uint64_t beats[SOAK_PROCESSES * (1 + SOAK_WRITERS)]; /* signs of life, of each thread */
	uint32_t stop;
};

struct soak_options {
	const char *rendezvous;
	int barrier; /* enum ksm_barrier_kind */
	unsigned seed;
	int file;   /* one sector for each state */
	int direct; /* the same, for direct transfers; -1: the file system has none */
	struct soak_totals *totals;
};

static inline void soak_add(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline uint64_t soak_get(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static inline bool soak_stopped(const struct soak_totals *totals)
{
	return __atomic_load_n(&totals->stop, __ATOMIC_RELAXED);
}

static inline uint32_t soak_random(uint32_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 17;
	*seed ^= *seed << 5;
	return *seed;
}

/* Print a message about a failed call and end the process. */
void soak_die(const char *what, int error) __attribute__((noreturn));

/* ---- soak_ways.c ------------------------------------------------------------------------------------------- */

struct soak_ways {
	int in[SOAK_WAYS], out[SOAK_WAYS]; /* -1: none */
};

extern const char *const soak_way_names[SOAK_WAYS];
/* What a sector or word holds in each state. */
extern unsigned char soak_patterns[SOAK_STATES][SOAK_SECTOR];

void soak_patterns_init(void);
/* A file with one sector for each state in `directory`, removed at once; *direct: the same for direct transfers. */
int soak_file(const char *directory, int *direct);
void soak_ways_open(struct soak_ways *ways, const struct soak_options *options);
void soak_ways_close(struct soak_ways *ways);
/* Bring a sector or a word into a state. Returns the way it was done: not every way can do everything. */
enum soak_way soak_write(const struct soak_ways *ways, enum soak_way way, char *to, size_t nbytes, unsigned state);

/* ---- soak_none.c ------------------------------------------------------------------------------------------- */

/* From now on every scanner gets a barrier that keeps nobody out: writes must be lost, or the soak sees nothing. */
void soak_switch_window_off(void);

/* ---- soak_peer.c ------------------------------------------------------------------------------------------- */

/* One process of the soak, the one in place `place`, until it is told to stop. */
void soak_peer(const struct soak_options *options, unsigned place) __attribute__((noreturn));

#endif
