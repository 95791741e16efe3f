/* SPDX-License-Identifier: MIT */
/*
 * One process of the crew: it does what its seed says until it is killed, told to leave, or has had enough. A second
 * thread writes and verifies beside it.
 */
#include "chaos.h"

#include "error.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define WRITER_US 1500
#define WRITER_PAUSE_US 400000
#define WRITER_PAUSES_IN 100
/* Where exec is what was planted: the moment in which it kills is short. */
#define EXEC_ONE_IN 100
#define EXEC_VARIABLES 15
#define ACTOR_US 400
#define MARK "KSMALLOC_TEST_SESSION=" /* by which the tests know what they have started */

static struct chaos_place *place;
static uint32_t seed;
static bool has_writer, depends; /* depends: on the master */

static void begin(enum chaos_doing doing)
{
	static double since;
	double now = chaos_now();
	if (since > 0 && chaos_get32(&place->doing) != CHAOS_REST)
		chaos_raise(&chaos->totals.longest_ms, (uint64_t)((now - since) * 1e3));
	since = now;
	chaos_set32(&place->doing, doing);
	chaos_add(&place->beats, 1);
	chaos_here.acts++;
}

static struct chaos_block *some_block(void)
{
	return &chaos_here.blocks[chaos_random(&seed) % CHAOS_BLOCKS];
}

static size_t some_size(void)
{
	uint32_t r = chaos_random(&seed);
	if (r % 8 == 0)
		return 1 + (r >> 3) % (CHAOS_PAGE - 1);
	if (r % 8 == 1)
		return CHAOS_PAGE + (r >> 3) % ((CHAOS_MOST_PAGES - 1) * CHAOS_PAGE);
	return (1 + (r >> 3) % CHAOS_MOST_PAGES) * CHAOS_PAGE;
}

static void lock_all(void)
{
	for (unsigned i = 0; i < CHAOS_BLOCKS; i++)
		pthread_mutex_lock(&chaos_here.blocks[i].lock);
}

static void unlock_all(void)
{
	for (unsigned i = 0; i < CHAOS_BLOCKS; i++)
		pthread_mutex_unlock(&chaos_here.blocks[i].lock);
}

/* All locks held. */
static void verify_all(const char *when)
{
	for (unsigned i = 0; i < CHAOS_BLOCKS; i++) {
		if (chaos_here.blocks[i].kind)
			chaos_block_verify(&chaos_here.blocks[i], when);
		chaos_add(&place->beats, 1);
	}
}

static void free_all(void)
{
	for (unsigned i = 0; i < CHAOS_BLOCKS; i++) {
		if (chaos_here.blocks[i].kind)
			chaos_block_free(&chaos_here.blocks[i]);
		chaos_add(&place->beats, 1);
	}
}

/* ---- beside it ---------------------------------------------------------------------------------------------- */

/* Now and then nothing is written for a while, and nothing while all are to come to rest: a scan ends when a pass finds
 * nothing more to do. */
static void *writer(void *nothing)
{
	uint32_t own = chaos_here.first_seed ^ 0x5bd1e995u;
	for (;;) {
		struct chaos_block *block = &chaos_here.blocks[chaos_random(&own) % CHAOS_BLOCKS];
		pthread_mutex_lock(&block->lock);
		if (block->kind && chaos_random(&own) % 2) {
			chaos_block_write(block, &own);
			chaos_add(&chaos->totals.writes, 1);
		} else if (block->kind) {
			chaos_block_verify(block, "beside");
		}
		pthread_mutex_unlock(&block->lock);
		usleep(chaos_random(&own) % (chaos_random(&own) % WRITER_PAUSES_IN ? WRITER_US : WRITER_PAUSE_US));
		while (chaos_get32(&chaos->rest) % 2)
			usleep(WRITER_US);
	}
	return nothing;
}

static void start_writer(void)
{
	pthread_t thread;
	has_writer = true;
	chaos_check(-pthread_create(&thread, NULL, writer, NULL), "thread");
	pthread_detach(thread);
}

/* ---- coming and going --------------------------------------------------------------------------------------- */

static void count(bool afresh)
{
	static struct ksm_stats before;
	struct ksm_stats now;
	struct chaos_totals *totals = &chaos->totals;
	if (afresh)
		memset(&before, 0, sizeof(before));
	chaos_check(ksm_domain_self_stats(chaos_here.domain, &now), "stats");
	if (!afresh) {
		chaos_add(&totals->merges, now.merges - before.merges);
		chaos_add(&totals->promotions, now.promotions - before.promotions);
		chaos_add(&totals->breaks, now.cow_breaks - before.cow_breaks);
		chaos_add(&totals->put_backs, now.put_backs - before.put_backs);
		chaos_add(&totals->give_backs, now.give_backs - before.give_backs);
	}
	before = now;
}

static void join(void)
{
	static const int barriers[] = {KSM_BARRIER_MOVE, KSM_BARRIER_MOVE, KSM_BARRIER_STOP,
				       KSM_BARRIER_STOP, KSM_BARRIER_AUTO, KSM_BARRIER_SEGV};
	begin(CHAOS_ATTACH);
	chaos_here.barrier = barriers[chaos_random(&seed) % (sizeof(barriers) / sizeof(*barriers))];
	chaos_attach(chaos_here.barrier, &chaos_here.domain);
	for (unsigned i = 0; i < CHAOS_ARENAS; i++)
		chaos_check(ksm_arena_create(chaos_here.domain, i == CHAOS_ARENAS - 1 ? KSM_ARENA_SIGSEGV : 0,
					     &chaos_here.arenas[i]),
			    "arena");
	count(true);
}

/* All locks held. */
static void leave(void)
{
	begin(CHAOS_LEAVE);
	free_all();
	count(false);
	for (unsigned i = 0; i < CHAOS_ARENAS; i++)
		ksm_arena_release(chaos_here.arenas[i]);
	ksm_domain_detach(chaos_here.domain);
	chaos_here.domain = NULL;
	chaos_add(&chaos->totals.leaves, 1);
}

static void leave_and_come_back(void)
{
	lock_all();
	leave();
	join();
	unlock_all();
}

static void end(bool politely)
{
	lock_all();
	begin(CHAOS_EXIT);
	verify_all("at the end");
	if (politely)
		leave();
	begin(CHAOS_EXIT);
	chaos_add(&chaos->totals.exits, 1);
	_exit(0);
}

/* For the kernel to copy, while our other threads still run. */
static char *a_long_string(void)
{
	static char string[100000];
	memset(string, 'x', sizeof(string) - 1);
	return string;
}

static void exec_anew(void)
{
	char file[16], number[16], name[] = "chaos", *variables[EXEC_VARIABLES + 2] = {NULL};
	unsigned n = 0;
	begin(CHAOS_EXEC);
	snprintf(file, sizeof(file), "%d", chaos_fd);
	snprintf(number, sizeof(number), "%u", chaos_here.place);
	char member[] = "--member", *arguments[] = {name, member, file, number, NULL};
	for (char **one = environ; *one && !n; one++)
		if (!strncmp(*one, MARK, strlen(MARK)))
			variables[n++] = *one;
	chaos_add(&chaos->totals.execs, 1);
	if (chaos->plant != CHAOS_PLANT_EXEC)
		ksm_process_before_exec();
	else
		for (unsigned i = 0; i < EXEC_VARIABLES; i++)
			variables[n++] = a_long_string();
	execve("/proc/self/exe", arguments, variables);
	chaos_die("exec", errno);
}

/* ---- children ----------------------------------------------------------------------------------------------- */

static struct chaos_place *child_place(void)
{
	uint32_t number = chaos_here.place + CHAOS_CREW;
	return number < CHAOS_PLACES ? &chaos->places[number] : NULL;
}

/* A pid is not given to anybody else as long as its place names it. */
static void reap(void)
{
	static int dead;
	static double since;
	siginfo_t info = {0};
	struct chaos_place *child = child_place();
	if (!child || waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) || !info.si_pid)
		return;
	if (info.si_pid != dead) {
		dead = info.si_pid;
		since = chaos_now();
	}
	if (chaos_now() - since < CHAOS_DEAD_FOR_S)
		return;
	dead = 0;
	int status, pid = info.si_pid;
	bool is_ours = chaos_pid(child) == pid;
	if (is_ours)
		chaos_set_pid(child, 0);
	if (waitpid(pid, &status, 0) != pid)
		chaos_die("waitpid", errno);
	chaos_judge(pid, is_ours ? (uint32_t)(child - chaos->places) : CHAOS_AUDITOR + 1, status);
	if (is_ours)
		chaos_set32(&child->state, CHAOS_EMPTY);
}

static void be_a_child(struct chaos_place *mine, uint32_t number)
{
	chaos_set_pid(mine, getpid());
	chaos_set32(&mine->state, CHAOS_LIVES);
	place = mine;
	chaos_here.place = number;
	chaos_here.first_seed = seed = chaos_seed(number);
	chaos_here.acts = 0;
	has_writer = depends = false;
	count(true);
	verify_all("in a new child");
}

static void fork_child(void)
{
	struct chaos_place *child = child_place();
	if (!child || chaos_get32(&child->state) != CHAOS_EMPTY)
		return;
	begin(CHAOS_FORK);
	lock_all();
	chaos_set32(&child->parent, chaos_get32(&place->incarnation));
	chaos_set32(&child->killed, 0);
	chaos_set32(&child->rested, 0);
	chaos_set32(&child->doing, CHAOS_FORK);
	chaos_set32(&child->state, CHAOS_TAKEN);
	pid_t pid = fork();
	if (pid < 0)
		chaos_die("fork", errno);
	if (pid == 0) {
		be_a_child(child, (uint32_t)(child - chaos->places));
	} else {
		chaos_set_pid(child, pid);
		chaos_set32(&child->state, CHAOS_LIVES);
		chaos_add(&chaos->totals.forks, 1);
		if (chaos_random(&seed) % 2)
			verify_all("right after a fork");
	}
	unlock_all();
	if (pid == 0 && chaos_random(&seed) % 4 == 0)
		exec_anew();
}

/* As long as the one who forked us lives, its death is not to be ours. */
static void depend_on_master(void)
{
	int parent = (int)getppid();
	if (!depends && parent == chaos->master) {
		depends = true;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	} else if (parent != chaos->master && kill(chaos->master, 0)) {
		_exit(0);
	}
}

/* ---- what it does ------------------------------------------------------------------------------------------- */

static void rest(uint32_t number)
{
	begin(CHAOS_REST);
	ksm_process_resume();
	lock_all();
	verify_all("before a rest");
	if (chaos_get32(&chaos->drop))
		free_all();
	count(false);
	chaos_set32(&place->rested, number);
	while (chaos_get32(&chaos->rest) == number) {
		usleep(2000);
		depend_on_master();
		reap();
	}
	verify_all("after a rest");
	unlock_all();
	if (chaos_get32(&chaos->drop) > 1)
		end(chaos_random(&seed) % 4);
}

/* Memory of all kinds. The block's lock held. */
static void act_on(struct chaos_block *block, uint32_t r)
{
	if (!block->kind) {
		begin(r % 8 ? CHAOS_ALLOC : CHAOS_REGISTER);
		if (r % 8)
			chaos_block_make(block, some_size(), &seed);
		else
			chaos_block_register(block, some_size(), &seed);
	} else if (r < 60) {
		begin(CHAOS_WRITE);
		for (unsigned i = 0; i <= r % 4; i++)
			chaos_block_write(block, &seed);
		chaos_add(&chaos->totals.writes, 1 + r % 4);
	} else if (r < 80) {
		begin(CHAOS_BREAK);
		for (unsigned i = 0; i <= r % 4; i++)
			chaos_block_break(block, &seed);
		chaos_add(&chaos->totals.writes, 1 + r % 4);
	} else if (r < 110) {
		begin(CHAOS_FREE);
		chaos_block_free(block);
		return;
	} else if (r < 125 && block->kind == CHAOS_ARENA) {
		begin(CHAOS_GROW);
		for (unsigned i = 0; i <= r % 4; i++)
			chaos_block_move(block, some_size());
	} else if (r < 140 && block->kind == CHAOS_ARENA) {
		begin(CHAOS_FREEZE);
		chaos_block_freeze(block, &seed);
	}
	begin(CHAOS_VERIFY);
	chaos_block_verify(block, "again");
}

/* May fail where that is no fault: a peer that comes or goes all the time, threads that cannot be held on a busy machine. */
static void check_but(int r, int may, const char *what)
{
	chaos_check(r == may ? 0 : r, what);
}

/* What concerns more than a block. Everything that has just merged is verified. */
static void act_on_all(uint32_t r)
{
	struct ksm_report report = {0};
	struct ksm_stats stats;
	uint64_t freed;
	struct chaos_totals *totals = &chaos->totals;
	struct ksm_arena *arena = chaos_here.arenas[r % CHAOS_ARENAS];
	if (r < 60) {
		begin(CHAOS_SCAN);
		chaos_check(r % 4 ? ksm_arena_scan(arena, &report) : ksm_domain_scan(chaos_here.domain, &report),
			    "scan");
		chaos_add(&totals->scans, 1);
		chaos_add(&totals->zero_pages, report.zero_pages);
	} else if (r < 68) {
		begin(CHAOS_SETTLE);
		chaos_check(ksm_domain_settle(chaos_here.domain, 5 + r % 40, 0, &report), "settle");
		chaos_add(&totals->settles, 1);
	} else if (r < 80) {
		begin(CHAOS_SWEEP);
		check_but(ksm_domain_sweep(chaos_here.domain, &freed), -EAGAIN, "sweep");
		chaos_add(&totals->sweeps, 1);
	} else if (r < 86) {
		begin(CHAOS_UNMERGE);
		check_but(ksm_arena_unmerge(arena, NULL, NULL), KSM_EUNSTOPPABLE, "unmerge");
		chaos_add(&totals->unmerges, 1);
	} else if (r < 90) {
		begin(CHAOS_STATS);
		chaos_check(ksm_domain_stats(chaos_here.domain, &stats), "stats of all");
	}
	lock_all();
	verify_all("after something that concerns all");
	unlock_all();
	count(false);
}

static void act(void)
{
	if (chaos->plant == CHAOS_PLANT_EXEC && chaos_random(&seed) % EXEC_ONE_IN == 0)
		exec_anew();
	uint32_t r = chaos_random(&seed) % 4000;
	if (r < 3500) {
		struct chaos_block *block = some_block();
		pthread_mutex_lock(&block->lock);
		act_on(block, chaos_random(&seed) % 200);
		pthread_mutex_unlock(&block->lock);
	} else if (r < 3800) {
		act_on_all(chaos_random(&seed) % 90);
	} else if (r < 3900) {
		fork_child();
	} else if (r < 3910) {
		leave_and_come_back();
	} else if (r < 3930) {
		exec_anew();
	} else if (r < 3950) {
		end(r % 2);
	} else if (r < 3980 && !has_writer) {
		start_writer();
	}
}

void chaos_peer(uint32_t number)
{
	place = &chaos->places[number];
	chaos_here.place = number;
	chaos_here.first_seed = seed = chaos_seed(number);
	for (unsigned i = 0; i < CHAOS_BLOCKS; i++)
		pthread_mutex_init(&chaos_here.blocks[i].lock, NULL);
	depend_on_master();
	join();
	start_writer();
	for (;;) {
		uint32_t number_of_rest = chaos_get32(&chaos->rest);
		depend_on_master();
		reap();
		if (number_of_rest % 2)
			rest(number_of_rest);
		else
			act();
		usleep(chaos_random(&seed) % ACTOR_US);
	}
}
