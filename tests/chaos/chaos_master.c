/* SPDX-License-Identifier: MIT */
/*
 * The master is no member. It keeps the crew complete, kills and stops at random, now and then lets everybody rest for
 * an audit, sometimes kills everybody at once, and looks for processes that make no progress.
 */
#include "chaos.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define TICK_US 4000 /* on average between two kills or stops */
#define LONGEST_STOP_MS 200
#define AIM_S 0.008
#define MODESTY 4
#define ONE_MASSACRE_IN 3 /* audits */

static uint32_t seed;
static double patience;
static struct watch {
	int pid;
	double until; /* stopped until then; 0: not */
	double since; /* the last sign of life */
	uint64_t beats;
	double died; /* when it was found dead; 0: it lives */
} watches[CHAOS_PLACES + 1];

/* ---- living and dying --------------------------------------------------------------------------------------- */

static void launch(uint32_t number)
{
	struct chaos_place *place = &chaos->places[number];
	chaos_set32(&place->killed, 0);
	chaos_set32(&place->rested, 0);
	chaos_set32(&place->doing, CHAOS_ATTACH);
	fflush(NULL);
	pid_t pid = fork();
	if (pid < 0)
		chaos_die("fork", errno);
	if (pid == 0 && number == CHAOS_AUDITOR)
		chaos_audit();
	if (pid == 0) {
		if (nice(MODESTY) < 0) /* the master is to be on time */
			chaos_die("nice", errno);
		chaos_peer(number);
	}
	chaos_set_pid(place, pid);
	chaos_set32(&place->state, CHAOS_LIVES);
}

static bool is_dead(idtype_t which, int pid, siginfo_t *info)
{
	info->si_pid = 0;
	return !waitid(which, (id_t)pid, info, WEXITED | WNOHANG | WNOWAIT) && info->si_pid;
}

static void bury(int pid, uint32_t number)
{
	int status;
	if (waitpid(pid, &status, 0) != pid)
		chaos_die("waitpid", errno);
	chaos_judge(pid, number, status);
	if (number > CHAOS_PLACES)
		return;
	chaos_set_pid(&chaos->places[number], 0);
	chaos_set32(&chaos->places[number].state, CHAOS_EMPTY);
	watches[number].died = 0;
}

/*
 * Our children are the crew, the auditor, and everybody whose parent has died.
 */
static void reap(void)
{
	siginfo_t info;
	double now = chaos_now();
	for (uint32_t number = 0; number <= CHAOS_PLACES; number++) {
		int pid = chaos_pid(&chaos->places[number]);
		double *died = &watches[number].died;
		if (!pid || !is_dead(P_PID, pid, &info))
			continue; /* or it is somebody else's */
		if (!*died)
			*died = now;
		else if (now - *died > CHAOS_DEAD_FOR_S)
			bury(pid, number);
	}
	if (!is_dead(P_ALL, 0, &info))
		return;
	for (uint32_t number = 0; number <= CHAOS_PLACES; number++)
		if (chaos_pid(&chaos->places[number]) == info.si_pid)
			return;
	bury(info.si_pid, CHAOS_PLACES + 1); /* it had given up its place, or had not got it yet */
}

/* Parents that were killed while they forked: is there a child? */
static void find_orphans(void)
{
	for (uint32_t number = CHAOS_CREW; number < CHAOS_PLACES; number++) {
		struct chaos_place *place = &chaos->places[number], *parent = place - CHAOS_CREW;
		if (chaos_get32(&place->state) == CHAOS_EMPTY || chaos_pid(place))
			continue;
		if (chaos_pid(parent) && chaos_get32(&parent->incarnation) == chaos_get32(&place->parent))
			continue; /* it is just forking or reaping */
		int pid = chaos_unknown_child();
		if (pid) {
			chaos_set_pid(place, pid);
			chaos_set32(&place->state, CHAOS_LIVES);
		} else if (!chaos_pid(place)) {
			chaos_set32(&place->state, CHAOS_EMPTY);
		}
	}
}

static void tend(bool replace)
{
	reap();
	find_orphans();
	for (uint32_t number = 0; replace && number < CHAOS_CREW; number++)
		if (!chaos_pid(&chaos->places[number]))
			launch(number);
}

/* The process in a place is what its pid says: it cannot have been reaped before we had a handle on it. */
static bool signal_place(uint32_t number, int signal)
{
	struct chaos_place *place = &chaos->places[number];
	int pid = chaos_pid(place);
	int handle = pid ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
	if (handle < 0)
		return false;
	bool same = chaos_pid(place) == pid;
	if (same && signal == SIGKILL)
		chaos_set32(&place->killed, 1);
	bool sent = same && !syscall(SYS_pidfd_send_signal, handle, signal, NULL, 0);
	close(handle);
	return sent;
}

static void stop_place(uint32_t number)
{
	uint32_t r = chaos_random(&seed);
	unsigned ms = r % 4 ? 1 + (r >> 8) % 20 : 1 + (r >> 8) % LONGEST_STOP_MS;
	if (watches[number].until || !signal_place(number, SIGSTOP))
		return;
	watches[number].until = chaos_now() + ms / 1e3;
	chaos_add(&chaos->totals.stops, 1);
}

static void let_go(bool all)
{
	double now = chaos_now();
	for (uint32_t number = 0; number < CHAOS_PLACES; number++) {
		struct watch *watch = &watches[number];
		if (!watch->until || (!all && now < watch->until))
			continue;
		signal_place(number, SIGCONT);
		watch->until = 0;
		watch->since = now;
	}
}

static uint32_t anybody(void)
{
	uint32_t number = chaos_random(&seed) % CHAOS_PLACES;
	for (unsigned i = 0; i < CHAOS_PLACES && !chaos_pid(&chaos->places[number]); i++)
		number = (number + 1) % CHAOS_PLACES;
	return number;
}

/* Wait a moment for somebody who is doing that, and is not stopped in it. */
static uint32_t aim(enum chaos_doing doing)
{
	double end = chaos_now() + AIM_S;
	do {
		uint32_t number = chaos_random(&seed) % CHAOS_PLACES;
		for (unsigned i = 0; i < CHAOS_PLACES; i++, number = (number + 1) % CHAOS_PLACES)
			if (chaos_pid(&chaos->places[number]) && !watches[number].until &&
			    chaos_get32(&chaos->places[number].doing) == doing)
				return number;
		usleep(50);
	} while (chaos_now() < end);
	return anybody();
}

/* Of a few, what fewest have died in. */
static enum chaos_doing something_rare(void)
{
	uint32_t rarest = chaos_random(&seed) % CHAOS_DOINGS_COUNT;
	for (unsigned i = 0; i < 3; i++) {
		uint32_t other = chaos_random(&seed) % CHAOS_DOINGS_COUNT;
		if (chaos_get(&chaos->totals.kills_while[other]) < chaos_get(&chaos->totals.kills_while[rarest]))
			rarest = other;
	}
	return (enum chaos_doing)rarest;
}

static void strike(void)
{
	uint32_t r = chaos_random(&seed), number = anybody();
	if (r % 4 == 0) { /* in what is rare or over soon */
		signal_place(aim(something_rare()), SIGKILL);
		return;
	}
	if (r % 8 == 2) {
		number = aim((enum chaos_doing)((r >> 8) % CHAOS_DOINGS_COUNT));
		usleep((r >> 16) % 300);
	}
	if (number % 3 == 0 && r >> 4 & 7)
		return stop_place(number); /* some live longer */
	if (r >> 7 & 1)
		signal_place(number, SIGKILL);
	else
		stop_place(number);
}

/* ---- no progress -------------------------------------------------------------------------------------------- */

static void print_stacks(int pid)
{
	char command[160];
	snprintf(command, sizeof(command),
		 "gdb -p %d -batch -ex 'thread apply all backtrace' 2>&1 || cat /proc/%d/task/*/stack", pid, pid);
	fflush(NULL);
	if (system(command))
		fprintf(stderr, "no stacks of process %d\n", pid);
}

static bool is_at_rest(uint32_t number)
{
	uint32_t rest = chaos_get32(&chaos->rest);
	return rest % 2 && chaos_get32(&chaos->places[number].rested) == rest;
}

static void say_who_stands_still(void)
{
	double now = chaos_now();
	for (uint32_t number = 0; number < CHAOS_PLACES; number++)
		if (watches[number].pid && !is_at_rest(number) && now - watches[number].since > patience / 2)
			fprintf(stderr, "process %d in place %u has stood still for %.0f s, doing %s\n",
				watches[number].pid, number, now - watches[number].since, chaos_doing_in(number));
}

static bool anybody_hangs(void)
{
	double now = chaos_now();
	for (uint32_t number = 0; number < CHAOS_PLACES; number++) {
		struct watch *watch = &watches[number];
		int pid = chaos_pid(&chaos->places[number]);
		uint64_t beats = chaos_get(&chaos->places[number].beats);
		if (!pid || pid != watch->pid || beats != watch->beats || watch->until || is_at_rest(number)) {
			watch->pid = pid;
			watch->beats = beats;
			watch->since = now;
		} else if (now - watch->since > patience) {
			say_who_stands_still();
			chaos_add(&chaos->totals.hung, 1);
			print_stacks(pid);
			return true;
		}
	}
	return false;
}

static uint64_t noticed(void)
{
	const struct chaos_totals *totals = &chaos->totals;
	return chaos_get(&totals->wrong) + chaos_get(&totals->leaked) + chaos_get(&totals->missing) +
	       chaos_get(&totals->strays) + chaos_get(&totals->hung) + chaos_get(&totals->failed) +
	       chaos_get(&totals->unsettled) + chaos_get(&totals->invalid);
}

/* ---- rests -------------------------------------------------------------------------------------------------- */

static bool all_rest(uint32_t number)
{
	for (unsigned i = 0; i < CHAOS_PLACES; i++)
		if (chaos_get32(&chaos->places[i].state) != CHAOS_EMPTY &&
		    (!chaos_pid(&chaos->places[i]) || chaos_get32(&chaos->places[i].rested) != number))
			return false;
	return true;
}

/* Who begins while somebody else is already resting is seen the second time. */
static bool wait_for_rest(uint32_t number)
{
	double end = chaos_now() + patience;
	while (!all_rest(number) || !all_rest(number)) {
		tend(false);
		if (chaos_now() > end || anybody_hangs()) {
			fprintf(stderr, "not everybody comes to rest\n");
			say_who_stands_still();
			for (unsigned i = 0; i < CHAOS_PLACES; i++)
				if (chaos_get32(&chaos->places[i].state) != CHAOS_EMPTY &&
				    chaos_get32(&chaos->places[i].rested) != number)
					fprintf(stderr, "place %u: process %d, state %u, doing %s\n", i,
						chaos_pid(&chaos->places[i]), chaos_get32(&chaos->places[i].state),
						chaos_doing_in(i));
			chaos_add(&chaos->totals.hung, 1);
			return false;
		}
		usleep(1000);
	}
	return true;
}

static bool wait_for_auditor(void)
{
	double end = chaos_now() + CHAOS_SETTLE_S + patience;
	launch(CHAOS_AUDITOR);
	while (chaos_pid(&chaos->places[CHAOS_AUDITOR])) {
		reap();
		if (chaos_now() > end) {
			fprintf(stderr, "the audit does not end\n");
			chaos_add(&chaos->totals.hung, 1);
			print_stacks(chaos_pid(&chaos->places[CHAOS_AUDITOR]));
			return false;
		}
		usleep(1000);
	}
	return true;
}

/* Everybody rests, and is looked at. Returns whether that worked. */
static bool rest(void)
{
	uint32_t number = chaos_get32(&chaos->rest) + 1;
	chaos_set32(&chaos->rest, number);
	let_go(true);
	bool done = wait_for_rest(number) && wait_for_auditor();
	for (unsigned i = 0; i < CHAOS_PLACES; i++)
		watches[i].pid = 0;
	return done;
}

static void kill_all(void)
{
	for (bool any = true; any;) {
		any = false;
		for (uint32_t number = 0; number <= CHAOS_PLACES; number++)
			any |= signal_place(number, SIGKILL);
		tend(false);
		usleep(500);
	}
}

/* ---- from beginning to end ---------------------------------------------------------------------------------- */

static void go_on(void)
{
	chaos_set32(&chaos->rest, chaos_get32(&chaos->rest) + 1);
}

static bool wait_for_nobody(void)
{
	double end = chaos_now() + patience;
	for (;;) {
		bool any = false;
		tend(false);
		for (unsigned i = 0; i < CHAOS_PLACES; i++)
			any |= chaos_get32(&chaos->places[i].state) != CHAOS_EMPTY;
		if (!any)
			return true;
		if (chaos_now() > end) {
			fprintf(stderr, "not everybody leaves\n");
			chaos_add(&chaos->totals.hung, 1);
			return false;
		}
		usleep(1000);
	}
}

/* Everybody frees everything and is looked at once more; then they go. */
static void finish(void)
{
	struct ksm_domain_options options = {.name = CHAOS_DOMAIN, .path = chaos->rendezvous, .store_fd = -1};
	struct ksm_settings settings;
	uint32_t peers;
	tend(true);
	chaos_set32(&chaos->drop, 1);
	if (!rest())
		return;
	chaos_set32(&chaos->drop, 2);
	go_on();
	if (!wait_for_nobody())
		return;
	chaos_check(ksm_settings_read(&options, &settings, &peers), "settings at the end");
	if (peers) {
		fprintf(stderr, "%u peers after everybody left\n", peers);
		chaos_add(&chaos->totals.strays, peers);
	}
	chaos_check(ksm_domain_clean(&options), "clean");
}

static void do_chaos(double end, double every)
{
	double next = chaos_now() + every;
	for (uint32_t audits = 0; chaos_now() < end;) {
		tend(true);
		let_go(false);
		if ((chaos->until_noticed && noticed()) || anybody_hangs())
			return;
		if (chaos_now() > next) {
			if (!rest())
				return;
			if (++audits % ONE_MASSACRE_IN == 0) {
				kill_all();
				chaos_add(&chaos->totals.massacres, 1);
			}
			go_on();
			next = chaos_now() + every;
		}
		strike();
		usleep(1 + chaos_random(&seed) % (2 * TICK_US));
	}
}

int chaos_master(double seconds, double every, double patience_s)
{
	seed = chaos->seed | 1;
	patience = patience_s;
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	setpgid(0, 0); /* if we are killed, the kernel ends who is stopped; all others see it themselves */
	do_chaos(chaos_now() + seconds, every);
	if (!noticed())
		finish();
	kill_all();
	return noticed() != 0;
}
