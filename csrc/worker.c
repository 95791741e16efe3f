/* SPDX-License-Identifier: MIT */
/*
 * DOC: The scanner's thread
 *
 * One native thread for each domain a process is in. It has every signal blocked and a descriptor table of its own;
 * everything that needs one of our descriptors happens here, other threads hand it calls and wait.
 *
 *    loop   calls ▸ settings ▸ peers and sweeps (five times a second) ▸ a settle, if one is on, or a batch of the
 *           background pass ▸ sleep in poll: a peer's request, a wake, the end of the pause
 *
 * Other threads wake it with a real-time signal sent to it alone, which it has blocked and reads from a signalfd of
 * its own: no descriptor in the program's table is needed. It takes exactly as many as were sent: the kernel hands out
 * a thread's own first, so that the same signal sent to the program stays the program's.
 *
 * A background pass that found nothing to do doubles the pause before the next one, up to a second.
 *
 * WORK-1. The thread exists or not; memberships, regions and blocks do not depend on it. After a fork it is started
 *         again by the next call, by an allocation, or by ksm_process_resume().
 * WORK-2. Lock order: life, then merge lock; life, then queue. The thread itself never takes life.
 * WORK-3. A waiting call belongs to its caller, who takes it out of the queue only when it is done; after a fork the
 *         child's queue is empty, for its callers do not exist there.
 */
#include "worker.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define STACK_BYTES (256u << 10)
#define C_LIBRARYS_OWN (3ull << 31) /* signals 32 and 33: cancelling a thread, changing every thread's user */

static void init_locks(struct ksm_worker *worker)
{
	pthread_mutex_init(&worker->life, NULL);
	pthread_mutex_init(&worker->queue, NULL);
	pthread_condattr_t attributes;
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&worker->changed, &attributes);
	pthread_condattr_destroy(&attributes);
}

void ksm_worker_init(struct ksm_worker *worker, const struct ksm_domain_options *options)
{
	memset(worker, 0, sizeof(*worker));
	ksm_member_init(&worker->member, options);
	init_locks(worker);
	ksm_settings_default(&worker->settings);
	ksm_pace_init(&worker->pace); /* once: a fork is no reason for new credit */
	worker->signal = -1;
}

void ksm_worker_fini(struct ksm_worker *worker)
{
	pthread_mutex_destroy(&worker->life);
	pthread_mutex_destroy(&worker->queue);
	pthread_cond_destroy(&worker->changed);
}

static void note_own_memory(struct ksm_worker *worker)
{
	struct ksm_range *own = worker->member.peer.own;
	pthread_attr_t attributes;
	void *stack = NULL;
	size_t nbytes = 0;
	if (!pthread_getattr_np(pthread_self(), &attributes)) {
		pthread_attr_getstack(&attributes, &stack, &nbytes);
		pthread_attr_destroy(&attributes);
	}
	own[KSM_OWN_STACK] = (struct ksm_range){stack, nbytes};
	own[KSM_OWN_WORKER] = (struct ksm_range){worker, sizeof(*worker)};
}

static void *thread_main(void *argument)
{
	struct ksm_worker *worker = argument;
	struct ksm_member *member = &worker->member;
	pthread_setname_np(pthread_self(), "ksmalloc");
	ksm_park_exempt(true);
	ksm_os_mask_sigsafe(~C_LIBRARYS_OWN);
	note_own_memory(worker);
	int r = ksm_member_own_table(member);
	if (!r) {
		worker->signal = ksm_os_signalfd(KSM_WAKE_SIGNAL);
		r = worker->signal < 0 ? worker->signal : 0;
	}
	if (!r)
		r = member->joined ? ksm_member_resume(member) : ksm_member_join(member);
	pthread_mutex_lock(&worker->queue);
	worker->start_result = r;
	worker->started = true;
	pthread_cond_broadcast(&worker->changed);
	pthread_mutex_unlock(&worker->queue);
	if (!r)
		ksm_worker_loop(worker);
	ksm_park_destroy(&member->scanner.park); /* its descriptors end with this thread's table */
	ksm_park_exempt(false);
	return NULL;
}

/* ---- its life --------------------------------------------------------------------------------------------- */

static int create_thread(struct ksm_worker *worker)
{
	pthread_attr_t attributes;
	long least = sysconf(_SC_THREAD_STACK_MIN);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES + (least > 0 ? (size_t)least : 0));
	/* All 64: a mask without the C library's own would look like a thread of the program that blocks SIGSEGV. */
	uint64_t old = ksm_os_mask_sigsafe(UINT64_MAX);
	int r = ksm_os_thread(&worker->thread, &attributes, thread_main, worker);
	ksm_os_mask_sigsafe(old);
	pthread_attr_destroy(&attributes);
	return r;
}

static int start_locked(struct ksm_worker *worker)
{
	if (worker->running)
		return 0;
	if (worker->member.lost)
		return KSM_ELOST;
	bool resumes = worker->member.joined;
	worker->started = false;
	ksm_store_release(&worker->stop, 0);
	ksm_store_release(&worker->kicks, 0);
	int r = create_thread(worker);
	if (r)
		return r;
	pthread_mutex_lock(&worker->queue);
	while (!worker->started)
		pthread_cond_wait(&worker->changed, &worker->queue);
	pthread_mutex_unlock(&worker->queue);
	worker->running = true;
	if (worker->start_result) {
		pthread_join(worker->thread, NULL);
		worker->running = false;
	}
	ksm_member_started(&worker->member, resumes, worker->start_result);
	return worker->start_result;
}

int ksm_worker_start(struct ksm_worker *worker)
{
	pthread_mutex_lock(&worker->life);
	int r = start_locked(worker);
	pthread_mutex_unlock(&worker->life);
	return r;
}

/* The thread runs, life is held. */
static void kick(struct ksm_worker *worker)
{
	if (!ksm_exchange_acqrel(&worker->kicks, 1) && ksm_os_thread_kick(worker->thread, KSM_WAKE_SIGNAL))
		ksm_store_release(&worker->kicks, 0);
}

static void wake(struct ksm_worker *worker)
{
	pthread_mutex_lock(&worker->life);
	if (worker->running)
		kick(worker);
	pthread_mutex_unlock(&worker->life);
}

static void stop_locked(struct ksm_worker *worker)
{
	if (!worker->running)
		return;
	ksm_store_release(&worker->stop, 1);
	kick(worker);
	pthread_join(worker->thread, NULL);
	ksm_os_wait_thread_gone(worker->member.tid); /* Python counts them right after a fork */
	worker->running = false;
}

void ksm_worker_stop(struct ksm_worker *worker)
{
	pthread_mutex_lock(&worker->life);
	stop_locked(worker);
	pthread_mutex_unlock(&worker->life);
}

void ksm_worker_nudge(struct ksm_worker *worker)
{
	if (ksm_load_relaxed(&worker->resting) && ksm_exchange_acqrel(&worker->resting, 0))
		wake(worker);
}

/* The queue is locked for both. */
static void enqueue(struct ksm_worker *worker, struct ksm_call *call)
{
	struct ksm_call **last = &worker->calls;
	while (*last)
		last = &(*last)->next;
	*last = call;
	ksm_add_relaxed(&worker->waiting, 1);
}

static bool dequeue(struct ksm_worker *worker, const struct ksm_call *call)
{
	struct ksm_call **at = &worker->calls;
	while (*at && *at != call)
		at = &(*at)->next;
	if (!*at)
		return false;
	*at = call->next;
	ksm_sub_relaxed(&worker->waiting, 1);
	return true;
}

/* Sleep until something has changed, or for so long. The queue is locked. */
static bool await_change(struct ksm_worker *worker, uint64_t ns)
{
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	ns += (uint64_t)until.tv_nsec;
	until.tv_sec += (time_t)(ns / 1000000000u);
	until.tv_nsec = (long)(ns % 1000000000u);
	return pthread_cond_timedwait(&worker->changed, &worker->queue, &until) != ETIMEDOUT;
}

int ksm_worker_call(struct ksm_worker *worker, int (*function)(struct ksm_member *, void *), void *context)
{
	struct ksm_call call = {.function = function, .context = context};
	int r = ksm_worker_start(worker);
	if (r)
		return r;
	pthread_mutex_lock(&worker->queue);
	enqueue(worker, &call);
	pthread_mutex_unlock(&worker->queue);
	wake(worker);
	pthread_mutex_lock(&worker->queue);
	while (!call.done) {
		if (await_change(worker, 1000000000u) || call.done)
			continue;
		/* A fork in another thread may have ended the scanner before it came to us: WORK-1. */
		pthread_mutex_unlock(&worker->queue);
		r = ksm_worker_start(worker);
		wake(worker);
		pthread_mutex_lock(&worker->queue);
		if (r && !call.done && dequeue(worker, &call)) {
			pthread_mutex_unlock(&worker->queue);
			return r;
		}
	}
	pthread_mutex_unlock(&worker->queue);
	return call.result;
}

int ksm_worker_call_soon(struct ksm_worker *worker, int (*function)(struct ksm_member *, void *), void *context,
			 uint64_t ns)
{
	struct ksm_call call = {.function = function, .context = context};
	uint64_t until_ns = ksm_os_now_ns() + ns;
	bool taken = false;
	if (pthread_mutex_trylock(&worker->life))
		return -EBUSY;
	if (!worker->running) {
		pthread_mutex_unlock(&worker->life);
		return -EAGAIN;
	}
	pthread_mutex_lock(&worker->queue);
	enqueue(worker, &call);
	pthread_mutex_unlock(&worker->queue);
	kick(worker);
	pthread_mutex_unlock(&worker->life);
	pthread_mutex_lock(&worker->queue);
	while (!call.done) {
		uint64_t now = ksm_os_now_ns();
		if (!taken && now < until_ns) {
			await_change(worker, until_ns - now);
		} else if (!taken && dequeue(worker, &call)) {
			call.done = true;
			call.result = -EAGAIN;
		} else { /* it runs, and will be done */
			taken = true;
			pthread_cond_wait(&worker->changed, &worker->queue);
		}
	}
	pthread_mutex_unlock(&worker->queue);
	return call.result;
}

/* ---- fork ------------------------------------------------------------------------------------------------- */

static int prepare_child(struct ksm_member *member, void *context KSM_UNUSED)
{
	if (ksm_member_user_has_changed(member)) /* the child could not reach the old user's rendezvous */
		ksm_member_follow_user(member);  /* fails: then the child has what seeds it can be given */
	return ksm_member_prepare_child(member);
}

void ksm_worker_fork_prepare(struct ksm_worker *worker)
{
	struct ksm_call call = {.function = prepare_child};
	pthread_mutex_lock(&worker->life);
	worker->prepared = -1;
	if (worker->member.joined && !(worker->prepared = start_locked(worker))) {
		pthread_mutex_lock(&worker->queue);
		call.next = worker->calls; /* before everybody else */
		worker->calls = &call;
		ksm_add_relaxed(&worker->waiting, 1);
		kick(worker);
		while (!call.done)
			pthread_cond_wait(&worker->changed, &worker->queue);
		pthread_mutex_unlock(&worker->queue);
		worker->prepared = call.result;
		ksm_member_fetch_seeds(&worker->member); /* whatever became of the child's seat, the parent goes on */
		stop_locked(worker);
	}
	ksm_merge_lock(&worker->member.peer);
	ksm_member_fork_prepare(&worker->member);
}

void ksm_worker_fork_parent(struct ksm_worker *worker)
{
	if (worker->member.joined)
		ksm_member_fork_parent(&worker->member);
	ksm_merge_unlock(&worker->member.peer);
	pthread_mutex_unlock(&worker->life);
}

void ksm_worker_fork_child(struct ksm_worker *worker)
{
	if (worker->member.joined)
		ksm_member_fork_child(&worker->member);
	else
		ksm_merge_lock_renew(&worker->member.peer);
	pthread_mutex_unlock(&worker->life); /* this thread has held it since before the fork */
	init_locks(worker);
	worker->running = false;
	worker->calls = NULL;
	ksm_store_relaxed(&worker->waiting, 0);
	ksm_store_relaxed(&worker->resting, 0);
}
