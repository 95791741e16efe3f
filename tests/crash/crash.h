/* SPDX-License-Identifier: MIT */
/*
 * crash.h: what the parts of the crash test share. One process, the tracer, is a peer that survives; it makes victims,
 * peers too, which do one operation each between two breakpoints; it steps them instruction by instruction, kills or
 * stops them somewhere, and looks at what is left.
 */
#ifndef CRASH_H
#define CRASH_H

#include "member.h"
#include "valid.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

#define CRASH_PAGES 8

__attribute__((format(printf, 3, 4), noreturn, cold)) void crash_fail(const char *file, int line, const char *format,
								      ...);
#define FAIL(...) crash_fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			FAIL("not true: %s", #condition);                                                              \
	} while (0)

/* ---- pages: crash_world.c ------------------------------------------------------------------------------- */

/* A page like no other with another seed. */
void crash_fill(void *page, uint64_t seed);
bool crash_is(const void *page, uint64_t seed);
uint64_t crash_digest(uint64_t seed);
char *crash_map(size_t pages);

/* ---- worlds ----------------------------------------------------------------------------------------------- */

/* Contents. */
enum {
	SEED_SHARED = 1, /* the survivor and the victim both have it */
	SEED_OURS,       /* the survivor alone */
	SEED_THEIRS,     /* the victim alone, before its operation */
	SEED_NEW,        /* what the operation brings; the survivor has announced it */
	SEED_LONELY,     /* nobody else has it */
	SEED_DEAD,       /* of one who died before */
	SEED_MARKED,     /* published, and nobody refers to it */
};

/* What the victim tells; in memory that both see. */
struct board {
	ksm_slotno slot, child_slot; /* KSM_NO_SLOT: none */
	struct ksm_seat *seat;       /* where the victim keeps what it has now: it may move */
	int bitmap_fd, child_bitmap_fd;
	pid_t child;
	uint32_t lenient; /* others meddle with what the operation wants: it may miss some of it */
	uint32_t done;    /* the operation, and its verification */
};

struct world {
	const struct operation *operation;
	struct ksm_domain_options options;
	char name[32];
	struct ksm_member *survivor; /* NULL: the operation wants nobody there */
	char *field;                 /* the survivor's pages: SEED_SHARED, SEED_OURS */
	ksm_frameno frames[2];
	ksm_frameno dead_frame, marked_frame; /* KSM_NO_FRAME: none */
	pid_t dead;                           /* 0: none, or dead already */
	int dead_bitmap;                      /* descriptor; -1: none */
	ksm_slotno dead_slot;
	struct board *board;
	pid_t victim;
	char *theirs; /* the victim's pages; at the same address there */
};

/* The victim's side. */
struct victim {
	struct world *world;
	struct ksm_member *member;
	struct ksm_region *region; /* NULL: the operation wants none */
	ksm_frameno shared, own;   /* what it holds before: pages 0 and 1 of its field */
	bool shared_mapped;
};

struct operation {
	const char *name;
	unsigned flags;
	void (*prepare)(struct world *world);  /* the survivor, before there is a victim */
	void (*settle)(struct victim *victim); /* the victim, before the first breakpoint */
	int (*run)(struct victim *victim);
	void (*verify)(struct victim *victim); /* the victim has not been killed: is all right? */
	void (*judge)(struct world *world);    /* the survivor, after the recovery */
};

enum {
	WANTS_NOBODY = 1,   /* no survivor: the victim creates the domain, or cleans up */
	WANTS_OUTSIDE = 2,  /* the victim is no peer before */
	WANTS_DEAD = 4,     /* somebody has died in the victim's slot, in the middle of an allocation */
	WANTS_DYING = 8,    /* the same, in another slot; the victim knew it */
	WANTS_MARKED = 16,  /* there are frames to sweep */
	WANTS_SCANNER = 32, /* the victim has a barrier, a merger, a socket and a region */
	WANTS_CHILD = 64,   /* the victim forks, and it is its child that is stepped */
	MAY_FORK = 128,
	WANTS_STOP = 256, /* barrier stop */
};

extern const struct operation crash_operations[];
extern const size_t crash_operation_count;

/* How many rounds have left what; in memory that all workers share. */
struct tally {
	uint64_t kills, stops, strays, steps;
	uint64_t mapped;       /* pages that stopped processes had mapped, each with its bit */
	uint64_t half_written; /* rounds that left an allocation, a half-made sweep, a claim, the join lock */
	uint64_t half_swept, claims, join_locks;
	uint64_t born;    /* children that lived on */
	uint64_t freed;   /* frames, by the survivor */
	uint64_t refused; /* what a stopped one kept others from: told so, not made to wait for ever */
	uint64_t detours; /* rounds that came to their boundary on another way */
};
extern struct tally *crash_tally;
extern const struct plant *crash_planted; /* NULL: the core is as it is */

void crash_world_begin(struct world *world, const struct operation *operation, const char *rendezvous);
/* The victim's whole life: does not return. */
void crash_victim(struct world *world) __attribute__((noreturn));
/* Breakpoints around the operation. */
static inline void crash_mark(void)
{
	__asm__ volatile("int3" ::: "memory");
}
/* The victim has stopped before its operation: the survivor gets to know it. */
void crash_world_meet(struct world *world);
/* Every page of the store that the victim, stopped, has mapped: its bit is set. */
void crash_world_look(struct world *world, pid_t pid);
/* The victim is dead: recover, check, do what it did, check, leave. */
void crash_world_recover(struct world *world);
/* The victim is stopped: the others go on. */
void crash_world_go_on(struct world *world);
/* Nobody is left: the directory goes. */
void crash_world_end(struct world *world);

/* A peer made from another one's descriptors, without a socket. */
struct ksm_member *crash_join_quick(struct world *world, const struct ksm_member *from);
void crash_leave(struct ksm_member *member);
ksm_frameno crash_publish(struct ksm_member *member, uint64_t seed, bool in_index);
void crash_check(struct world *world, enum ksm_valid_when when, const char *at);

/* While anybody asks, a thread answers for the survivor. */
void crash_serve_begin(struct ksm_member *member);
void crash_serve_end(void);

/* ---- steps: crash_step.c ------------------------------------------------------------------------------------ */

/* All of it lies in memory that all rounds share. */
struct trace {
	uint64_t *pcs; /* [boundary], before the instruction is executed */
	size_t *count; /* boundaries: those before each instruction, and the one after the last */
	size_t *states,
		*state_count; /* boundaries after a system call, or after a change to memory that processes share */
	size_t *chosen, *chosen_count; /* boundaries to meet, in ascending order */
	uint32_t *froms;               /* [boundary]: from which other one it is stepped or run to */
};

/* Empty. */
struct trace crash_trace_new(void);
/* It has been recorded: how to go where? */
void crash_find_ways(const struct trace *trace);
/* Where the tracee stands. Between its breakpoints. */
uint64_t crash_pc(pid_t pid);
/* The victim is started and stops at its first breakpoint; or its child's first. Returns who is to be stepped. */
pid_t crash_start(struct world *world);
/* Step to the second breakpoint and remember the way. */
void crash_record(struct world *world, pid_t pid, const struct trace *trace);
/* Go to a boundary of the trace. false: it has taken another way. */
bool crash_go(struct world *world, pid_t pid, const struct trace *trace, size_t boundary);
/* To the same instruction, executed for as many times, whatever lies before. false: it never came there. */
bool crash_go_anyhow(struct world *world, pid_t pid, const struct trace *trace, size_t boundary);
/* Let go of it, running or stopped, for good. */
void crash_detach(pid_t pid, const struct trace *trace, bool stopped);

/* ---- what outlives a process: crash_watch.c ------------------------------------------------------------------ */

void crash_watch_begin(void);
/* After a system call: there may be memory files more. */
void crash_watch_files(pid_t pid);
/* Is any memory that processes share not what it was at the last call? */
bool crash_watch_changed(void);
void crash_watch_end(void);

/* ---- bugs, for controls: crash_plants.c ------------------------------------------------------------------------ */

/* From now on time passes only as this process asks for it, and as it sleeps. */
void crash_stop_clock(void);
void crash_pass_time(uint64_t ns);
/* The join lock is waited for, but only for some milliseconds instead of many seconds; the same for an answer. */
extern bool crash_in_a_hurry, crash_expects_no_answer;

struct plant {
	const char *name;
	bool *on;
};
extern const struct plant crash_plants[];
extern const size_t crash_plant_count;

#endif
