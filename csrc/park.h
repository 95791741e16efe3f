/* SPDX-License-Identifier: MIT */
/*
 * park.h: every other thread of the process is held in a signal handler for a moment, and nothing else writes into its
 * memory either: what the barrier "stop" opens its windows with, and the way back of broken pages.
 *
 *     begin ─▶ look, compare, remap: no malloc, no lock, no stdio ─▶ end
 *
 * One at a time in a process; the scanners of several domains take turns.
 */
#ifndef KSM_PARK_H
#define KSM_PARK_H

#include "base.h"
#include "os.h"

#define KSM_REASON_MAX 128

/* A scanner's own: made, used and destroyed in its thread, its descriptors lie in that thread's table. */
struct ksm_park {
	bool ready;
	struct ksm_hazards *hazards;
	int tasks;                   /* /proc/self/task */
	uint64_t stops;              /* ever */
	uint64_t failures;           /* ever: given up because somebody did not stop, or refused */
	uint64_t begun_ns;           /* of the stop under way */
	uint64_t rest_until_ns;      /* the share of time spent stopped is bounded: better not to stop again before */
	uint64_t retry_at_ns;        /* back-off after failures: until then ksm_park_begin() repeats its last answer */
	uint32_t in_a_row;           /* failures without a success between */
	int why;                     /* the last answer, 0 or a code; not ready: why not */
	size_t patience;             /* how far the back-off may go, by what it was */
	int culprit;                 /* the thread that blocked the signal then; 0: none */
	char reason[KSM_REASON_MAX]; /* in words: which thread, which descriptor; "" */
};

/* Prepare: 0, or why it cannot work here: -ENOENT (no /proc), -EAGAIN (no free real-time signal), … */
int ksm_park_create(struct ksm_park *park);
void ksm_park_destroy(struct ksm_park *park);

/*
 * Hold every other thread (but our own scanners). 0: nothing in this process writes to memory until ksm_park_end().
 * KSM_EUNSTOPPABLE: a thread did not stop in time; KSM_EDEVICES: something else than threads may write (io_uring, AIO,
 * a device, AF_XDP, pinned memory); other errors of the kernel. After an error everybody runs, and reason says more.
 */
int ksm_park_begin(struct ksm_park *park);
void ksm_park_end(struct ksm_park *park);
/* 0, or the last answer while ksm_park_begin() would only repeat it. */
static inline int ksm_park_ready(const struct ksm_park *park)
{
	return park->why && ksm_os_now_ns() < park->retry_at_ns ? park->why : 0;
}
/* Nanoseconds that should pass before the next stop; 0: none. Sleep them without the merge lock. */
uint64_t ksm_park_rest_ns(const struct ksm_park *park);

/* The calling thread is a scanner of ours (or will not be any more): it needs no parking. Every signal is blocked in it. */
void ksm_park_exempt(bool on);
/* Is this thread one? */
bool ksm_park_is_exempt(int tid);
/* In the child of a fork: nobody else is there. */
void ksm_park_fork_child(void);
/* The calling thread is about to call exec: for some seconds nobody is held. */
void ksm_park_before_exec(void);

/* The signal in use; 0: not chosen yet. */
int ksm_park_signal(void);
/* Use this one, from the next ksm_park_create() on. -EINVAL: not a real-time signal. 0: the highest free one. */
int ksm_park_choose_signal(int signal);

#endif
