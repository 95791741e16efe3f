/* SPDX-License-Identifier: MIT */
/*
 * DOC: The loop of the scanner's thread
 *
 * What the thread does between its start and its end: see worker.c. All of this runs in it.
 */
#include "worker.h"

#include "atomic.h"
#include "handler.h"
#include "os.h"

#include <poll.h>
#include <sys/mman.h>

#define MS 1000000ull
#define SERVE_EVERY_NS (2 * MS)
#define LOOK_EVERY_NS (200 * MS)
#define HINT_EVERY_NS (50 * MS)
#define SETTLE_FOR_NS (3000 * MS)
#define LONGEST_REST_NS (1000 * MS)
#define SHY_NAP_NS (20 * MS)
#define HANDLER_EVERY_NS (50 * MS)
#define FOLLOW_AGAIN_NS (2000 * MS)
#define DISTURB_EVERY_NS (1000 * MS)
#define ADVISED_MS 20      /* what counts as a pause between batches then */
#define PASS_NS (100 * MS) /* a pass takes at least so long, if the advisor paces it */

static struct ksm_worker *worker_of(struct ksm_member *member)
{
	return (struct ksm_worker *)((char *)member - offsetof(struct ksm_worker, member));
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
	return (struct ksm_scan_between){between, worker_of(member), between};
}

/* Between the stretches of the background pass: calls go first. */
static int between_background(void *context)
{
	struct ksm_worker *worker = context;
	return between(context) || ksm_load_relaxed(&worker->waiting);
}

/* While pages rest, in the background: a call ends that at once, but not again and again, or none would ever be given back. */
static int between_rest(void *context)
{
	struct ksm_worker *worker = context;
	uint64_t now = ksm_os_now_ns();
	if (between(context))
		return 1;
	if (!ksm_load_relaxed(&worker->waiting) || now - worker->disturbed_ns < DISTURB_EVERY_NS)
		return 0;
	worker->disturbed_ns = now;
	return 1;
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

/* Between the stretches of a pass for a settle, which must come to its end: calls are run here. */
static int between_settle(void *context)
{
	struct ksm_worker *worker = context;
	if (ksm_load_relaxed(&worker->waiting))
		run_calls(worker);
	return !worker->member.joined || between(context);
}

/* Who has come, who has died, what can be freed. */
static void look_around(struct ksm_worker *worker, uint64_t now)
{
	struct ksm_scanner *scanner = &worker->member.scanner;
	if (now - worker->looked_ns < LOOK_EVERY_NS)
		return;
	worker->looked_ns = now;
	struct ksm_scan_between hook = {between, worker, between};
	if (!ksm_scan_know_peers(scanner) && ksm_chunks_any(&worker->member.peer))
		ksm_scan_sweep(scanner, false, &hook);
	ksm_count_set(worker->member.peer.self, KSM_METADATA_BYTES, ksm_scan_metadata(scanner));
	if (now - worker->counted_ns > 5 * LOOK_EVERY_NS) {
		worker->counted_ns = now;
		ksm_member_retry_barrier(&worker->member);
		ksm_merger_set_budget(&scanner->merger);
	}
}

/* What the program may have done to us since: taken our handler's place, changed its user. */
static void look_at_program(struct ksm_worker *worker, uint64_t now)
{
	struct ksm_member *member = &worker->member;
	if (ksm_handler_is_installed()) {
		ksm_handler_check();
		ksm_count_set(member->peer.self, KSM_SUSPENSIONS, ksm_handler_suspensions());
	}
	ksm_scan_try_park(&member->scanner);
	if (now >= member->follow_at_ns && ksm_member_user_has_changed(member) && ksm_member_follow_user(member))
		member->follow_at_ns = now + FOLLOW_AGAIN_NS;
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
		const struct ksm_slot *other = slot == peer->seat.slot ? NULL : ksm_peer_slot(peer, slot);
		if (other && ksm_load_relaxed(&other->sleeping))
			ksm_exchange_wake(peer, slot);
	}
}

/* Take as many signals as were sent to us. */
static bool hear_kicks(struct ksm_worker *worker)
{
	uint32_t kicks = ksm_exchange_acqrel(&worker->kicks, 0);
	ksm_os_signalfd_take(worker->signal, kicks);
	return kicks > 0;
}

static void nap(struct ksm_worker *worker, uint64_t ns)
{
	struct pollfd set[KSM_EXCHANGE_POLL + 1];
	struct ksm_slot *self = worker->member.peer.self;
	/* not in the pause between two passes: or each of many allocations would end one */
	bool resting = worker->rest_ns > 0 && ns > 2 * ADVISED_MS * MS;
	if (resting) {
		ksm_store_relaxed(&worker->resting, 1);
		ksm_store_relaxed(&self->sleeping, 1);
	}
	/* shy: the program has the same signal pending for itself; do not spin on it */
	uint64_t most = KSM_MIN(ns, worker->shy ? SHY_NAP_NS : LOOK_EVERY_NS);
	if (ksm_handler_is_installed())
		most = KSM_MIN(most, HANDLER_EVERY_NS);
	set[0] = (struct pollfd){.fd = worker->shy ? -1 : worker->signal, .events = POLLIN};
	size_t count = 1 + ksm_exchange_poll_set(&worker->member.exchange, set + 1);
	if (!ksm_load_acquire(&worker->waiting) && !ksm_load_acquire(&worker->stop))
		if (ksm_os_poll(set, count, most) < 0)
			ksm_os_sleep_ns(most);
	worker->shy = !hear_kicks(worker) && (set[0].revents & POLLIN);
	if (resting) {
		ksm_store_relaxed(&self->sleeping, 0);
		if (!ksm_exchange_acqrel(&worker->resting, 0) || worker->member.exchange.woken)
			worker->rest_ns = 0; /* somebody ended it */
	}
	worker->served_ns = ksm_os_now_ns();
	ksm_exchange_serve(&worker->member.exchange, &worker->member.peer);
}

static bool is_quiet(const struct ksm_peer *peer)
{
	return ksm_load_acquire(&peer->self->quiet_at) == ksm_load_seqcst(&peer->control->changes) &&
	       ksm_load_acquire(&peer->self->settled_seq) == ksm_load_seqcst(&peer->control->settle_seq);
}

#define STACK_KEPT KSM_PAGE_SIZE /* below this frame: of whoever is called from here */

/* Nothing is to be done for a while: give memory back that only passes need. The deepest of them is over, and what lies in
 * our stack below here means nothing any more. */
static void rest(struct ksm_worker *worker)
{
	const struct ksm_range *stack = &worker->member.peer.own[KSM_OWN_STACK];
	uintptr_t from = ksm_page_round_up((uintptr_t)stack->at), here = (uintptr_t)__builtin_frame_address(0);
	uintptr_t to = (here - STACK_KEPT) & ~(uintptr_t)(KSM_PAGE_SIZE - 1);
	ksm_merger_rest(&worker->member.scanner.merger);
	if (stack->at && here < (uintptr_t)stack->at + stack->nbytes && to > from)
		ksm_os_advise((void *)from, to - from, MADV_DONTNEED);
}

/* Is somebody settling? Then passes are made at once, ignoring age, until this peer is quiet. */
static bool settle(struct ksm_worker *worker, uint64_t now)
{
	struct ksm_peer *peer = &worker->member.peer;
	uint64_t beats = ksm_load_relaxed(&peer->control->settle_beats);
	if (beats != worker->settle_beats)
		worker->settle_until_ns = now + SETTLE_FOR_NS;
	worker->settle_beats = beats;
	worker->member.exchange.woken = false;
	if (now >= worker->settle_until_ns)
		return false;
	if (!is_quiet(peer)) {
		struct ksm_merge_counts counts = {0};
		struct ksm_scan_between hook = {between_settle, worker,
						between}; /* whoever settles calls all the time */
		ksm_scan_pass(&worker->member.scanner, NULL, KSM_SCAN_ALL, &hook, &counts);
		worker->looked_ns = 0;
		if (worker->member.joined && is_quiet(peer))
			rest(worker);
		else if (ksm_park_ready(&worker->member.scanner.park)) /* threads could not be held; soon again */
			nap(worker, 2 * MS);
	}
	return true;
}

static void rest_longer(struct ksm_worker *worker, const struct ksm_merge_counts *pass)
{
	uint64_t changes = ksm_load_seqcst(&worker->member.peer.control->changes);
	bool idle = pass->merged + pass->dropped + pass->promoted + pass->written + pass->given_back == 0 &&
		    changes == worker->member.scanner.pass_changes;
	uint64_t sleep = worker->settings.advisor_mode ? ADVISED_MS : worker->settings.sleep_millisecs;
	uint64_t pause = KSM_MAX(sleep * MS, MS);
	worker->rest_ns = idle ? KSM_MIN(KSM_MAX(worker->rest_ns * 2, pause), LONGEST_REST_NS) : 0;
	if (idle)
		rest(worker);
}

/* What has not been written since the last pass is cold: since a moment at least, or what is in use would be merged. */
static uint64_t until_next_pass(const struct ksm_scanner *scanner, uint64_t now)
{
	uint64_t passed = now - scanner->pass_began_ns;
	return scanner->cursor ? 0 : PASS_NS - KSM_MIN(passed, (uint64_t)PASS_NS);
}

/* A batch of the background pass, as the advisor would have it. Returns whether the pass is over; *pause: how long to sleep. */
static bool advised_batch(struct ksm_worker *worker, const struct ksm_scan_between *hook, uint64_t *pause)
{
	struct ksm_scanner *scanner = &worker->member.scanner;
	uint64_t now = ksm_os_now_ns();
	ksm_pace_limit(&worker->pace, now, worker->settings.advisor_max_cpu);
	*pause = KSM_MAX(ksm_pace_rest_ns(&worker->pace), until_next_pass(scanner, now));
	if (*pause)
		return false;
	uint64_t before = ksm_os_thread_cpu_ns();
	bool over = ksm_scan_batch(scanner, ksm_pace_pages(&worker->pace), UINT64_MAX, hook);
	ksm_pace_spent(&worker->pace, scanner->looked, ksm_os_thread_cpu_ns() - before);
	*pause = over ? until_next_pass(scanner, ksm_os_now_ns()) : 0;
	return over;
}

/* A batch of the background pass. Returns how long to sleep. */
static uint64_t work(struct ksm_worker *worker)
{
	struct ksm_scanner *scanner = &worker->member.scanner;
	struct ksm_scan_between hook = {between_background, worker, between_rest};
	uint64_t pause = worker->settings.sleep_millisecs * MS;
	bool over;
	if (!worker->settings.run || !ksm_scanner_has_work(scanner))
		return LOOK_EVERY_NS;
	if (worker->settings.advisor_mode)
		over = advised_batch(worker, &hook, &pause);
	else
		over = ksm_scan_batch(scanner, worker->settings.pages_to_scan, worker->settings.max_pages_to_merge,
				      &hook);
	if (!over)
		return pause;
	rest_longer(worker, &scanner->pass);
	return KSM_MAX(pause, worker->rest_ns);
}

void ksm_worker_loop(struct ksm_worker *worker)
{
	uint64_t resume_at = 0;
	worker->settle_beats = ksm_load_relaxed(&worker->member.peer.control->settle_beats);
	while (!ksm_load_acquire(&worker->stop)) {
		run_calls(worker);
		if (ksm_load_acquire(&worker->stop) || !worker->member.joined)
			return;
		uint64_t now = ksm_os_now_ns();
		look_at_program(worker, now);
		ksm_rendezvous_settings(worker->member.peer.fds.file, &worker->settings);
		look_around(worker, now);
		if (worker->settings.run && settle(worker, now)) {
			if (!worker->member.joined)
				return;
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
