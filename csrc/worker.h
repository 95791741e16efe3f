/* SPDX-License-Identifier: MIT */
/*
 * worker.h: the scanner's thread of one membership: its life, its loop, and what others ask it to do.
 */
#ifndef KSM_WORKER_H
#define KSM_WORKER_H

#include "member.h"
#include "pace.h"

#include <pthread.h>
#include <signal.h>

#define KSM_WAKE_SIGNAL (SIGRTMAX - 5)

struct ksm_call {
	struct ksm_call *next;
	int (*function)(struct ksm_member *member, void *context);
	void *context;
	int result;
	bool done;
};

struct ksm_worker {
	struct ksm_member member;
	/* life: held across start, stop and fork */
	pthread_mutex_t life;
	pthread_t thread;
	bool running;
	bool started; /* the thread has said how its start went */
	int start_result;
	int prepared;     /* how the preparations for the last fork went */
	uint32_t stop;    /* atomic */
	uint32_t kicks;   /* atomic: 1 if a signal was sent and not taken yet */
	uint32_t resting; /* atomic: in a long sleep, which a new allocation should end */
	/* queue of calls */
	pthread_mutex_t queue;
	pthread_cond_t changed;
	struct ksm_call *calls;
	uint32_t waiting; /* atomic: calls in the queue */
	/* the thread's own */
	int signal;
	bool shy;
	uint64_t served_ns, looked_ns, counted_ns, settle_until_ns, hinted_ns, rest_ns, disturbed_ns;
	uint64_t settle_beats, hint_changes;
	struct ksm_settings settings;
	struct ksm_pace pace;
};

void ksm_worker_init(struct ksm_worker *worker, const struct ksm_domain_options *options);
void ksm_worker_fini(struct ksm_worker *worker);

/* Start the thread unless it runs; the first time it joins the domain. Returns its error. Any thread. */
int ksm_worker_start(struct ksm_worker *worker);
/* End it; the membership stays. */
void ksm_worker_stop(struct ksm_worker *worker);
/* Have function(member, context) run in the thread, wait for it. KSM_ELOST: there is no thread to be had. */
int ksm_worker_call(struct ksm_worker *worker, int (*function)(struct ksm_member *, void *), void *context);
/* The same, if the thread runs and comes to it within `ns`; it is not started. -EAGAIN: it does not, and the function
 * was not called; -EBUSY: nor was it, for it is being started, ended or told something just now. */
int ksm_worker_call_soon(struct ksm_worker *worker, int (*function)(struct ksm_member *, void *), void *context,
			 uint64_t ns);
/* Something new may be there: end a long sleep. Cheap when there is none. */
void ksm_worker_nudge(struct ksm_worker *worker);

/* For functions running in the thread: answers peers now and then; non-zero: stop what you are doing. */
struct ksm_scan_between ksm_worker_between(struct ksm_member *member);

/* Until it is told to stop, or has left the domain; the thread itself. */
void ksm_worker_loop(struct ksm_worker *worker);

void ksm_worker_fork_prepare(struct ksm_worker *worker);
void ksm_worker_fork_parent(struct ksm_worker *worker);
void ksm_worker_fork_child(struct ksm_worker *worker);

#endif
