/* SPDX-License-Identifier: MIT */
/*
 * soak.h: what the parts of the lost-write soak share.
 */
#ifndef SOAK_H
#define SOAK_H

#include "ksmalloc.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define SOAK_WRITERS 3   /* threads that write in a process, all the time */
#define SOAK_OWNERS 4    /* each owns a sector and a word of every page; the last one comes and goes */
#define SOAK_HANDS 5     /* sockets of a process: one for each owner, one for a child */
#define SOAK_PROCESSES 3 /* at a time */
#define SOAK_PAGE 4096
#define SOAK_SECTOR 512 /* the least a direct transfer takes */
#define SOAK_WORD 8     /* what an eventfd gives */
#define SOAK_STATES 2   /* a sector or a word is all zero, or a fixed pattern */
#define SOAK_PIECES 4   /* at most, in one write: sectors of neighbouring pages */
#define SOAK_BLOCKS 6
#define SOAK_ARENAS 2
#define SOAK_MOST_PAGES 64 /* of a block */
#define SOAK_NOT_HERE 77   /* the exit status: what was asked for does not work on this machine */

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
	SOAK_VM,    /* process_vm_writev() by another process */
	SOAK_RING,  /* io_uring */
	SOAK_FIXED, /* io_uring, into a registered buffer: the page is pinned */
	SOAK_WAYS
};

/* Of all processes together; in shared memory, atomic. */
struct soak_totals {
	uint64_t writes[SOAK_WAYS];
	uint64_t prepared; /* of these, between ksm_arena_writable_begin() and _end() */
	uint64_t efaults;  /* system calls that were refused where they may be: the page was read-only */
	uint64_t torn;     /* of these, after some bytes had landed */
	uint64_t freezes, frozen_merged, thaws;
	uint64_t merges, breaks, put_backs, refused, give_backs, stops, suspensions, failures;
	uint64_t blocks, scans, sweeps, settles, unmerges, forks, kills, visits;
	uint64_t lost;                                       /* a write that is gone: the bytes before it are back */
	uint64_t wrong;                                      /* bytes that nobody ever wrote there, and refused calls */
	uint64_t beats[SOAK_PROCESSES * (1 + SOAK_WRITERS)]; /* signs of life, of each thread */
	uint32_t stop;
};

struct soak_options {
	const char *rendezvous;
	int barrier;        /* enum ksm_barrier_kind */
	unsigned flags;     /* of arenas */
	bool may_refuse;    /* a system call may get EFAULT unless the page was prepared or is known to be writable */
	bool sees_pins;     /* a direct transfer into a page that was not prepared is safe */
	unsigned writer_us; /* a writer sleeps up to so long after a batch */
	unsigned actor_us;  /* and whoever scans, after each step */
	unsigned seed;
	bool has[SOAK_WAYS];
	int file;                              /* one sector for each state */
	int direct;                            /* the same, for direct transfers; -1: the file system has none */
	int hands[SOAK_PROCESSES][SOAK_HANDS]; /* sockets to the process that writes into others */
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

static inline uint32_t soak_get32(const uint32_t *number)
{
	return __atomic_load_n(number, __ATOMIC_RELAXED);
}

static inline bool soak_stopped(const struct soak_totals *totals)
{
	return soak_get32(&totals->stop);
}

static inline uint32_t soak_random(uint32_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 17;
	*seed ^= *seed << 5;
	return *seed;
}

/* One call that writes: `nbytes` bytes into each piece, which thereby goes into its other state. */
struct soak_write {
	enum soak_way way;
	size_t nbytes;
	unsigned count;
	struct soak_piece {
		char *at;
		uint8_t *state; /* what it is in before */
		uint8_t *by;    /* how it is written: enum soak_way, for messages */
	} pieces[SOAK_PIECES];
};

static inline unsigned soak_new_state(const struct soak_write *write, unsigned piece)
{
	return !*write->pieces[piece].state;
}

/* Print a message about a failed call and end the process. */
void soak_die(const char *what, int error) __attribute__((noreturn));
double soak_now(void);

/* ---- soak_ring.c: io_uring without a library --------------------------------------------------------------- */

struct soak_ring {
	int fd; /* -1: closed */
	char *rings;
	size_t nbytes, nbytes_entries;
	uint32_t *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *entries;
	struct io_uring_cqe *completions;
};

/* false: there is no io_uring here. */
bool soak_ring_open(struct soak_ring *ring);
void soak_ring_close(struct soak_ring *ring);
/* Pin [at, at + nbytes) as buffer 0. */
int soak_ring_register(struct soak_ring *ring, void *at, size_t nbytes);
void soak_ring_unregister(struct soak_ring *ring);
/* Hand the kernel a read. fixed: into the registered buffer. async: by one of its own threads. offset -1: none. */
void soak_ring_submit(struct soak_ring *ring, int fd, void *to, size_t nbytes, int64_t offset, bool fixed, bool async);
/* Wait for it: bytes read, or -errno. */
ssize_t soak_ring_wait(struct soak_ring *ring);

/* ---- soak_hand.c: a process that writes into others -------------------------------------------------------- */

/* Start it, and fill in options->hands. Returns its pid; -1: process_vm_writev() is not allowed here. */
pid_t soak_hand_start(struct soak_options *options);
/* In a process that is to be written to. */
void soak_hand_allow(void);
/* Have it do that in this process: bytes written, or -errno. */
ssize_t soak_hand_write(int hand, const struct soak_write *write);

/* ---- soak_ways.c ------------------------------------------------------------------------------------------- */

struct soak_ways {
	int in[SOAK_WAYS], out[SOAK_WAYS]; /* -1: none */
	int hand;
	struct soak_ring ring;
	uint32_t turn; /* which kind of transfer comes next */
};

extern const char *const soak_way_names[SOAK_WAYS];
/* What a sector or word holds in each state. */
extern unsigned char soak_patterns[SOAK_STATES][SOAK_SECTOR];

void soak_patterns_init(void);
/* A file with all sequences of states in `directory`, removed at once; *direct: the same for direct transfers. */
int soak_file(const char *directory, int *direct);
/* Where in it a sequence begins whose first sector is in the state of bit 0, and so on. */
off_t soak_offset(unsigned states);
void soak_ways_open(struct soak_ways *ways, const struct soak_options *options, int hand);
void soak_ways_close(struct soak_ways *ways);
/*
 * Do it; write->way: how, and how it was done, for not every way can do everything. Returns how many bytes the call says
 * it wrote, or -EFAULT. What it then left in a pipe or stream has been read elsewhere, and was what ought to be there; a
 * message that was refused is gone. The states are the caller's to change.
 */
ssize_t soak_do(struct soak_ways *ways, struct soak_write *write);

/* ---- soak_block.c: memory, and what must stand there ------------------------------------------------------- */

struct soak_block {
	pthread_rwlock_t lock; /* shared: writing; exclusive: freeing, freezing */
	struct ksm_arena *arena;
	struct ksm_block memory;
	size_t pages;
	bool frozen;  /* some of it may be */
	uint32_t hot; /* a page that all writers like just now */
	/* what must stand there */
	uint8_t filling[SOAK_MOST_PAGES];
	uint8_t sectors[SOAK_MOST_PAGES][SOAK_OWNERS];
	uint8_t words[SOAK_MOST_PAGES][SOAK_OWNERS];
	/* how it came there last: enum soak_way */
	uint8_t sectors_by[SOAK_MOST_PAGES][SOAK_OWNERS];
	uint8_t words_by[SOAK_MOST_PAGES][SOAK_OWNERS];
};

/* This process. */
extern struct soak_here {
	const struct soak_options *options;
	struct soak_totals *totals;
	unsigned place;
	struct ksm_domain *domain;
	struct ksm_arena *arenas[SOAK_ARENAS];
	struct soak_block blocks[SOAK_BLOCKS];
	pthread_mutex_t renewing; /* blocks and arenas come and go */
} soak_here;

void soak_check(int r, const char *what);
char *soak_page_at(const struct soak_block *block, size_t page);
char *soak_sector_at(const struct soak_block *block, size_t page, unsigned owner);
char *soak_word_at(const struct soak_block *block, size_t page, unsigned owner);
/* Count something that is not as it must be, and say so if there is room for another message. */
void soak_complain(bool lost, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Are these bytes in the state they were left in, by the way `by`? If not: count, say so, and put them right. */
void soak_expect(const struct soak_block *block, char *at, size_t nbytes, unsigned state, enum soak_way by,
		 const char *when);
/* After a refused call that said it wrote `got` bytes: new bytes first, old ones behind them, nothing else. */
void soak_expect_refused(const struct soak_block *block, const struct soak_write *write, ssize_t got);
void soak_expect_block(const struct soak_block *block, const char *when);
/* While others write: every byte must belong to some state. */
void soak_expect_legal(const struct soak_block *block, const char *when);
/* Renewing lock held, or nobody else there. */
void soak_block_make(struct soak_block *block, uint32_t *seed);
/* Its lock and the renewing lock held, or nobody else there. */
void soak_block_renew(struct soak_block *block, uint32_t *seed);

/* ---- soak_frozen.c ----------------------------------------------------------------------------------------- */

/* Freeze some pages, look at them, and leave them so or not. Its lock held exclusively. */
void soak_freeze(struct soak_block *block, uint32_t *seed);
/* Nothing of it is frozen afterwards. Its lock held exclusively. */
void soak_thaw(struct soak_block *block);

/* ---- soak_writer.c ----------------------------------------------------------------------------------------- */

void *soak_writer(void *owner);
/* A thread that writes a little, as the last owner, and ends. */
void *soak_visitor(void *nothing);
/* Some writes into a block. Its lock held; others may write, too, but not for this owner. */
void soak_write_some(struct soak_ways *ways, struct soak_block *block, unsigned owner, uint32_t *seed);

/* ---- soak_none.c: controls --------------------------------------------------------------------------------- */

/* From now on every scanner gets a barrier that keeps nobody out: writes must be lost, or the soak sees nothing. */
void soak_switch_window_off(void);
/* From now on nobody claims a page before copying it: stores must be lost. */
void soak_switch_claims_off(void);

/* ---- soak_slow.c ------------------------------------------------------------------------------------------- */

/* From now on the core pauses now and then, where it hurts. */
void soak_switch_slow(void);
void soak_linger(void);

/* ---- soak_devices.c ---------------------------------------------------------------------------------------- */

/* The barrier "stop" merges nothing while an io_uring is open, and says so. Returns the exit status. */
int soak_devices(const struct soak_options *options);

/* ---- soak_peer.c ------------------------------------------------------------------------------------------- */

/* One process of the soak, the one in place `place`, until it is told to stop. */
void soak_peer(const struct soak_options *options, unsigned place) __attribute__((noreturn));

#endif
