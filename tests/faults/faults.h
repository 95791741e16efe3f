/* SPDX-License-Identifier: MIT */
/*
 * faults.h: what the parts of the fault walk share. A scenario is a function over the public interface. It runs in a
 * process of its own in which one system call is told to fail, and after that once more without.
 */
#ifndef FAULTS_H
#define FAULTS_H

#include "ksmalloc.h"
#include "os.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE ((size_t)4096)
#define FIELD_PAGES 20 /* of each of two fields with equal pages; the last two are zeros */
#define FIELD_ZEROS 2
#define FIELD_HOT(page) ((page) == 3 || (page) == 11)      /* of the first field: written all the time */
#define FIELD_MERGES (2 * (FIELD_PAGES - FIELD_ZEROS) - 4) /* pages that can merge whatever is written */

enum mode {
	MODE_MOVE,
	MODE_STOP,
	MODE_SEGV,
	MODE_COW, /* move, and merged pages are read-only */
	MODES
};
extern const char *const mode_names[MODES];

struct fault {
	enum ksm_os_call call;
	uint32_t number, count; /* count 0: none */
	int error;
};

#define FROM_NOW_ON UINT32_MAX
#define CHILD_REST_NS 30000000

/* In memory shared by the driver, the process and its children. */
struct shared {
	uint32_t steps;    /* how far the neighbour shall go, or has gone */
	uint32_t lost;     /* a child found no seat: the domain sweeps no more */
	uint32_t relieved; /* the driver has ended the fault */
	double armed;      /* when it began; 0: not yet */
	uint32_t merged;   /* pages that were seen merged */
	uint32_t counts[KSM_OS_CALL_COUNT];
	uint32_t hits;
	char said[160];
	uint64_t kinds[]; /* of os_fault.c */
};

struct world {
	enum mode mode;
	const char *directory, *domain_name;
	struct shared *shared;
	struct fault fault;
	int refusal; /* what the kernel itself may say besides; 0: nothing */
	bool strict; /* no faults any more: everything works */
	bool alone;  /* there is no neighbour */
	bool said;   /* some call has said that something failed */
	pid_t neighbour;
	struct ksm_domain *domain;
	struct ksm_arena *arena;
	struct ksm_block fields[2];
	struct ksm_stats before;
	/* the thread that touches everything */
	pthread_t toucher;
	bool touching;
	uint32_t stop;
	uint64_t rounds, writes;
};

struct scenario {
	const char *name;
	void (*run)(struct world *);
	bool bare;  /* the domain is not joined before */
	bool alone; /* without a neighbour */
};
extern const struct scenario scenarios[];
/* The object that a world with a named store has, until it is gone. */
void named_path(const char *domain_name, char path[80]);

/* The result of a public call: 0, or one of the errors it may have. Strict: 0. Returns it. */
int may(struct world *w, int result, const char *what);
#define MAY(w, call) may((w), (call), #call)
/* End this process: the test has failed. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
#define MUST(condition)                                                                                                \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition);                                   \
	} while (0)

struct ksm_domain_options world_options(const struct world *w);
unsigned world_flags(const struct world *w);
void world_create(struct world *w);
void world_destroy(struct world *w);
void world_fill(char *at, size_t pages, uint64_t first);
void world_check(const char *at, size_t pages, uint64_t first);
/* Both fields, and what the toucher has written. */
void world_check_fields(struct world *w);
void world_start_toucher(struct world *w);
void world_stop_toucher(struct world *w);
/* Is it awake: has it been round twice since? */
void world_check_awake(struct world *w);
/* Make everything merge that can; strict: until it has. Else somebody must have said why it did not. */
void world_merge(struct world *w);
/* Has anything been said, or counted, since the world was made that tells of a failure? */
bool world_has_said(struct world *w);
/* The part of the other peer, in a process of its own. */
void neighbour_start(struct world *w);
void neighbour_finish(struct world *w);
/* A child of the test's own; killed with it. */
pid_t child_fork(void);
/* In the child: die with this parent. Who becomes another user says so again. */
void child_die_with(pid_t parent);
/* Until it has ended. Its wait status. */
int child_reap(pid_t pid);
void child_wait(struct world *w, pid_t pid);
uint64_t pages_merged(struct ksm_arena *arena);
double now(void);
/* The program, started anew as another peer: see main(). */
int joiner(int argc, char **argv);

#endif
