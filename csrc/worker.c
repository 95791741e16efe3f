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
 * Other threads wake it with SIGURG, which it has blocked and reads from a signalfd of its own: no descriptor in the
 * program's table is needed, and a signal that went astray would be ignored by default.
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
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000ull
#define WAKE_SIGNAL SIGURG
#define STACK_BYTES (256u << 10)
#define SERVE_EVERY_NS (2 * MS)
#define LOOK_EVERY_NS (200 * MS)
#define HINT_EVERY_NS (50 * MS)
#define SETTLE_FOR_NS (3000 * MS)
#define LONGEST_REST_NS (1000 * MS)

static struct ksm_worker *worker_of(struct ksm_member *member)
{
	return (struct ksm_worker *)((char *)member - offsetof(struct ksm_worker, member));
}

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
	worker->signal = -1;
}

void ksm_worker_fini(struct ksm_worker *worker)
{
	pthread_mutex_destroy(&worker->life);
	pthread_mutex_destroy(&worker->queue);
	pthread_cond_destroy(&worker->changed);
}

/* ---- between stretches ------------------------------------------------------------------------------------ */

static int between(void *context)
{
	struct ksm_worker *worker = context;
	uint64_t now = ksm_os_now_ns();
	if (now - worker->served_ns > SERVE_EVERY_NS) {
		worker->served_ns = now;
		ksm_exchange_serve(&worker->member.exchange, &worker->member.peer);
	}
	return (int)ksm_load_relaxed(&worker->stop);
}

struct ksm_scan_between ksm_worker_between(struct ksm_member *member)
{
	return (struct ksm_scan_between){between, worker_of(member)};
}

/* Between the stretches of the background pass: calls go first. */
static int between_background(void *context)
{
	struct ksm_worker *worker = context;
	return between(context) || ksm_load_relaxed(&worker->waiting);
}

/* ---- the loop --------------------------------------------------------------------------------------------- */

static void run_calls(struct ksm_worker *worker)
{
	pthread_mutex_lock(&worker->queue);
	while (worker->calls && !ksm_load_relaxed(&worker->stop)) {
		struct ksm_call *call = worker->calls;
		worker->calls = call->next;
		ksm_sub_relaxed(&worker->waiting, 1);
		pthread_mutex_unlock(&worker->queue);
		int result = call->function(&worker->member, call->context);
		pthread_mutex_lock(&worker->queue);
		call->result = result;
		call->done = true;
		pthread_cond_broadcast(&worker->changed);
		worker->rest_ns = 0;
	}
	pthread_mutex_unlock(&worker->queue);
}

/* Who has come, who has died, what can be freed. */
static void look_around(struct ksm_worker *worker, uint64_t now)
{
	struct ksm_scanner *scanner = &worker->member.scanner;
	if (now - worker->looked_ns < LOOK_EVERY_NS)
		return;
	worker->looked_ns = now;
	struct ksm_scan_between hook = {between, worker};
	if (!ksm_scan_know_peers(scanner) && ksm_chunks_any(&worker->member.peer))
		ksm_scan_sweep(scanner, false, &hook);
	ksm_count_set(worker->member.peer.self, KSM_METADATA_BYTES, ksm_scan_metadata(scanner));
}

/* Tell sleeping peers that there are new frames or candidates. */
static void give_hints(struct ksm_worker *worker, uint64_t now)
{
	struct ksm_peer *peer = &worker->member.peer;
	uint64_t changes = ksm_load_relaxed(&peer->control->changes);
	if (changes == worker->hint_changes || now - worker->hinted_ns < HINT_EVERY_NS)
		return;
	worker->hint_changes = changes;
	worker->hinted_ns = now;
	for (size_t i = 0; i < peer->living_count; i++) {
		ksm_slotno slot = peer->living[i];
		if (slot != peer->seat.slot && ksm_load_relaxed(&ksm_peer_slot(peer, slot)->sleeping))
			ksm_exchange_wake(peer, slot);
	}
}

static bool is_quiet(const struct ksm_peer *peer)
{
	return ksm_load_acquire(&peer->self->quiet_at) == ksm_load_seqcst(&peer->control->changes) &&
	       ksm_load_acquire(&peer->self->settled_seq) == ksm_load_seqcst(&peer->control->settle_seq);
}

/* Is somebody settling? Then passes are made at once, ignoring age, until this peer is quiet. */
static bool settle(struct ksm_worker *worker, uint64_t now)
{
	struct ksm_peer *peer = &worker->member.peer;
	uint64_t seq = ksm_load_seqcst(&peer->control->settle_seq);
	if (seq != worker->settle_seq || (worker->member.exchange.woken && seq > 1)) {
		if (seq != worker->settle_seq || now < worker->settle_until_ns + SETTLE_FOR_NS)
			worker->settle_until_ns = now + SETTLE_FOR_NS;
		worker->settle_seq = seq;
	}
	worker->member.exchange.woken = false;
	if (now >= worker->settle_until_ns)
		return false;
	if (!is_quiet(peer)) {
		struct ksm_merge_counts counts = {0};
		struct ksm_scan_between hook = {between_background, worker};
		ksm_scan_pass(&worker->member.scanner, NULL, KSM_SCAN_ALL, &hook, &counts);
		worker->looked_ns = 0;
	}
	return true;
}

static void rest_longer(struct ksm_worker *worker, const struct ksm_merge_counts *pass)
{
	uint64_t changes = ksm_load_seqcst(&worker->member.peer.control->changes);
	bool idle = pass->merged + pass->dropped + pass->promoted + pass->written == 0 &&
		    changes == worker->member.scanner.pass_changes;
	uint64_t pause = KSM_MAX(worker->settings.sleep_millisecs * MS, MS);
	worker->rest_ns = idle ? KSM_MIN(KSM_MAX(worker->rest_ns * 2, pause), LONGEST_REST_NS) : 0;
	if (idle)
		ksm_merger_rest(&worker->member.scanner.merger);
}

/* A batch of the background pass. Returns how long to sleep. */
static uint64_t work(struct ksm_worker *worker)
{
	struct ksm_scanner *scanner = &worker->member.scanner;
	struct ksm_scan_between hook = {between_background, worker};
	uint64_t pause = worker->settings.sleep_millisecs * MS;
	if (!worker->settings.run || !scanner->barrier.ops)
		return LOOK_EVERY_NS;
	bool over = ksm_scan_batch(scanner, worker->settings.pages_to_scan, worker->settings.max_pages_to_merge, &hook);
	if (!over)
		return pause;
	rest_longer(worker, &scanner->pass);
	return KSM_MAX(pause, worker->rest_ns);
}

static void nap(struct ksm_worker *worker, uint64_t ns)
{
	struct pollfd set[KSM_EXCHANGE_POLL + 1];
	struct ksm_slot *self = worker->member.peer.self;
	bool resting = ns > 2 * worker->settings.sleep_millisecs * MS;
	if (resting) {
		ksm_store_relaxed(&worker->resting, 1);
		ksm_store_relaxed(&self->sleeping, 1);
	}
	set[0] = (struct pollfd){.fd = worker->signal, .events = POLLIN};
	size_t count = 1 + ksm_exchange_poll_set(&worker->member.exchange, set + 1);
	if (!ksm_load_acquire(&worker->waiting) && !ksm_load_acquire(&worker->stop))
		ksm_os_poll(set, count, KSM_MIN(ns, LOOK_EVERY_NS));
	ksm_os_signalfd_drain(worker->signal);
	if (resting) {
		ksm_store_relaxed(&self->sleeping, 0);
		if (!ksm_exchange_acqrel(&worker->resting, 0) || worker->member.exchange.woken)
			worker->rest_ns = 0; /* somebody ended it */
	}
	worker->served_ns = ksm_os_now_ns();
	ksm_exchange_serve(&worker->member.exchange, &worker->member.peer);
}

static void loop(struct ksm_worker *worker)
{
	uint64_t resume_at = 0;
	worker->settle_seq =
		ksm_load_seqcst(&worker->member.peer.control->settle_seq); /* what was asked before we came */
	while (!ksm_load_acquire(&worker->stop)) {
		run_calls(worker);
		if (ksm_load_acquire(&worker->stop) || !worker->member.joined)
			return;
		uint64_t now = ksm_os_now_ns();
		ksm_rendezvous_settings(worker->member.peer.fds.file, &worker->settings);
		look_around(worker, now);
		if (worker->settings.run && settle(worker, now)) {
			resume_at = 0;
			if (is_quiet(&worker->member.peer))
				nap(worker, 2 * MS);
			continue;
		}
		if (worker->rest_ns == 0 || now >= resume_at)
			resume_at = now + work(worker);
		give_hints(worker, ksm_os_now_ns());
		now = ksm_os_now_ns();
		nap(worker, resume_at > now ? resume_at - now : 0);
	}
}

static void *thread_main(void *argument)
{
	struct ksm_worker *worker = argument;
	struct ksm_member *member = &worker->member;
	pthread_setname_np(pthread_self(), "ksmalloc");
	int r = ksm_member_own_table(member);
	if (!r) {
		worker->signal = ksm_os_signalfd(WAKE_SIGNAL);
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
		loop(worker);
	return NULL;
}

/* ---- its life --------------------------------------------------------------------------------------------- */

static int create_thread(struct ksm_worker *worker)
{
	sigset_t all, old;
	pthread_attr_t attributes;
	long least = sysconf(_SC_THREAD_STACK_MIN);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES + (least > 0 ? (size_t)least : 0));
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = ksm_os_thread(&worker->thread, &attributes, thread_main, worker);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
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
	int r = create_thread(worker);
	if (r)
		return r;
	pthread_mutex_lock(&worker->queue);
	while (!worker->started)
		pthread_cond_wait(&worker->changed, &worker->queue);
	pthread_mutex_unlock(&worker->queue);
	worker->running = true;
	ksm_member_drop_seeds(&worker->member, resumes);
	if (worker->start_result) {
		pthread_join(worker->thread, NULL);
		worker->running = false;
		worker->member.lost = worker->member.joined;
	}
	return worker->start_result;
}

int ksm_worker_start(struct ksm_worker *worker)
{
	pthread_mutex_lock(&worker->life);
	int r = start_locked(worker);
	pthread_mutex_unlock(&worker->life);
	return r;
}

static void wake(struct ksm_worker *worker)
{
	pthread_mutex_lock(&worker->life);
	if (worker->running)
		pthread_kill(worker->thread, WAKE_SIGNAL);
	pthread_mutex_unlock(&worker->life);
}

static void stop_locked(struct ksm_worker *worker)
{
	if (!worker->running)
		return;
	ksm_store_release(&worker->stop, 1);
	pthread_kill(worker->thread, WAKE_SIGNAL);
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

int ksm_worker_call(struct ksm_worker *worker, int (*function)(struct ksm_member *, void *), void *context)
{
	struct ksm_call call = {.function = function, .context = context};
	int r = ksm_worker_start(worker);
	if (r)
		return r;
	pthread_mutex_lock(&worker->queue);
	struct ksm_call **last = &worker->calls;
	while (*last)
		last = &(*last)->next;
	*last = &call;
	ksm_add_relaxed(&worker->waiting, 1);
	pthread_mutex_unlock(&worker->queue);
	wake(worker);
	pthread_mutex_lock(&worker->queue);
	while (!call.done) {
		struct timespec until;
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += 1;
		if (pthread_cond_timedwait(&worker->changed, &worker->queue, &until) != ETIMEDOUT || call.done)
			continue;
		/* A fork in another thread may have ended the scanner before it came to us: WORK-1. */
		pthread_mutex_unlock(&worker->queue);
		r = ksm_worker_start(worker);
		wake(worker);
		pthread_mutex_lock(&worker->queue);
		if (!r || call.done)
			continue;
		for (last = &worker->calls; *last; last = &(*last)->next) {
			if (*last != &call)
				continue;
			*last = call.next;
			ksm_sub_relaxed(&worker->waiting, 1);
			pthread_mutex_unlock(&worker->queue);
			return r;
		}
	}
	pthread_mutex_unlock(&worker->queue);
	return call.result;
}

/* ---- fork ------------------------------------------------------------------------------------------------- */

static int prepare_child(struct ksm_member *member, void *context KSM_UNUSED)
{
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
		pthread_kill(worker->thread, WAKE_SIGNAL);
		while (!call.done)
			pthread_cond_wait(&worker->changed, &worker->queue);
		pthread_mutex_unlock(&worker->queue);
		worker->prepared = call.result;
		if (!call.result)
			ksm_member_fetch_seeds(&worker->member);
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
	init_locks(worker);
	worker->running = false;
	worker->calls = NULL;
	ksm_store_relaxed(&worker->waiting, 0);
	ksm_store_relaxed(&worker->resting, 0);
}
