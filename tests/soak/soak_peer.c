/* SPDX-License-Identifier: MIT */
/*
 * One process of the soak: a few blocks, threads that write into all of them, and one that scans, sweeps, settles,
 * unmerges and forks all the time.
 */
#include "soak.h"

#include "error.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- a child --------------------------------------------------------------------------------------------- */

static void child_works(uint32_t seed)
{
	struct soak_ways ways;
	struct ksm_report report;
	struct soak_block *blocks = soak_here.blocks;
	soak_hand_allow();
	soak_ways_open(&ways, soak_here.options, soak_here.options->hands[soak_here.place][SOAK_OWNERS]);
	for (unsigned i = 0; i < SOAK_BLOCKS; i++)
		soak_expect_block(&blocks[i], "in a child");
	for (unsigned round = 0; round < 2; round++) {
		for (unsigned i = 0; i < SOAK_BLOCKS; i++)
			for (unsigned owner = 0; owner < SOAK_OWNERS; owner++)
				soak_write_some(&ways, &blocks[i], owner, &seed);
		soak_block_renew(&blocks[soak_random(&seed) % SOAK_BLOCKS], &seed);
		if (round)
			soak_freeze(&blocks[soak_random(&seed) % SOAK_BLOCKS], &seed);
		soak_check(ksm_arena_scan(soak_here.arenas[round % SOAK_ARENAS], &report), "scan in a child");
	}
	for (unsigned i = 0; i < SOAK_BLOCKS; i++)
		soak_expect_block(&blocks[i], "at a child's end");
}

/* exact: nobody is writing at the moment of the fork. */
static void fork_child(bool exact, uint32_t *seed)
{
	int status;
	struct soak_block *blocks = soak_here.blocks;
	pthread_mutex_lock(&soak_here.renewing);
	for (unsigned i = 0; exact && i < SOAK_BLOCKS; i++)
		pthread_rwlock_wrlock(&blocks[i].lock);
	pid_t pid = fork();
	if (pid < 0)
		soak_die("fork", errno);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(60);
		if (exact)
			child_works(*seed);
		for (unsigned i = 0; !exact && i < SOAK_BLOCKS; i++)
			soak_expect_legal(&blocks[i], "in a child of a busy process");
		_exit(0);
	}
	for (unsigned i = 0; exact && i < SOAK_BLOCKS; i++)
		pthread_rwlock_unlock(&blocks[i].lock);
	pthread_mutex_unlock(&soak_here.renewing);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			soak_die("waitpid", errno);
	if (status) {
		fprintf(stderr, "process %d: a child ended with wait status 0x%x\n", (int)getpid(), (unsigned)status);
		_exit(1);
	}
	soak_add(&soak_here.totals->forks, 1);
}

/* ---- everything else ------------------------------------------------------------------------------------- */

static void new_arena(unsigned i)
{
	pthread_mutex_lock(&soak_here.renewing);
	if (soak_here.arenas[i])
		ksm_arena_release(soak_here.arenas[i]); /* its blocks live on */
	soak_check(ksm_arena_create(soak_here.domain, soak_here.options->flags, &soak_here.arenas[i]), "arena");
	pthread_mutex_unlock(&soak_here.renewing);
}

/* One at a time, beside everything else. */
static void receive_visitor(bool another)
{
	static pthread_t visitor;
	static bool is_here;
	if (is_here)
		soak_check(-pthread_join(visitor, NULL), "join");
	is_here = another;
	if (!another)
		return;
	soak_check(-pthread_create(&visitor, NULL, soak_visitor, NULL), "thread");
	soak_add(&soak_here.totals->visits, 1);
}

static void act(uint32_t *seed)
{
	struct ksm_report report;
	uint64_t freed;
	struct soak_totals *totals = soak_here.totals;
	uint32_t r = soak_random(seed) % 200;
	struct ksm_arena *arena = soak_here.arenas[soak_random(seed) % SOAK_ARENAS];
	if (r < 20) {
		receive_visitor(true);
	} else if (r < 160) {
		soak_check(ksm_arena_scan(arena, &report), "scan");
		soak_add(&totals->scans, 1);
		for (unsigned i = 0; i < SOAK_BLOCKS; i++) /* what has just merged, all break at once */
			__atomic_store_n(&soak_here.blocks[i].hot, soak_random(seed), __ATOMIC_RELAXED);
	} else if (r < 175) {
		int error = ksm_domain_sweep(soak_here.domain, &freed);
		soak_check(error == -EAGAIN ? 0 : error, "sweep"); /* a peer that is just coming or going */
		soak_add(&totals->sweeps, 1);
	} else if (r < 180) {
		soak_check(ksm_domain_settle(soak_here.domain, 20, 0, &report), "settle");
		soak_add(&totals->settles, 1);
	} else if (r < 190) {
		int error = ksm_arena_unmerge(arena, NULL, NULL);
		soak_check(error == KSM_EUNSTOPPABLE ? 0 : error, "unmerge"); /* a busy machine */
		soak_add(&totals->unmerges, !error);
	} else if (r < 198) {
		fork_child(r % 2, seed);
	} else {
		new_arena(soak_random(seed) % SOAK_ARENAS);
	}
	usleep(soak_random(seed) % soak_here.options->actor_us);
}

static void count(struct ksm_stats *before)
{
	struct ksm_stats now;
	struct soak_totals *totals = soak_here.totals;
	soak_check(ksm_domain_self_stats(soak_here.domain, &now), "stats");
	soak_add(&totals->merges, now.merges - before->merges);
	soak_add(&totals->breaks, now.cow_breaks - before->cow_breaks);
	soak_add(&totals->put_backs, now.put_backs - before->put_backs);
	soak_add(&totals->refused, now.pages_skipped - before->pages_skipped);
	soak_add(&totals->give_backs, now.give_backs - before->give_backs);
	soak_add(&totals->stops, now.stops - before->stops);
	soak_add(&totals->suspensions, now.suspensions - before->suspensions);
	soak_add(&totals->failures, now.failures - before->failures);
	*before = now;
}

static void start(uint32_t *seed)
{
	const struct soak_options *options = soak_here.options;
	pthread_rwlockattr_t attributes;
	struct ksm_domain_options joining = {
		.name = "soak", .path = options->rendezvous, .barrier = options->barrier, .store_fd = -1};
	soak_hand_allow();
	int r = ksm_domain_attach(&joining, &soak_here.domain);
	if (r == KSM_EBARRIER)
		_exit(SOAK_NOT_HERE);
	soak_check(r, "attach");
	for (unsigned i = 0; i < SOAK_ARENAS; i++)
		new_arena(i);
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	for (unsigned i = 0; i < SOAK_BLOCKS; i++) {
		pthread_rwlock_init(&soak_here.blocks[i].lock, &attributes);
		soak_block_make(&soak_here.blocks[i], seed);
	}
}

void soak_peer(const struct soak_options *options, unsigned place)
{
	pthread_t threads[SOAK_WRITERS];
	struct ksm_stats before = {0};
	uint32_t seed = options->seed + (unsigned)getpid() * 104729 + 1;
	soak_here.options = options;
	soak_here.totals = options->totals;
	soak_here.place = place;
	start(&seed);
	for (uintptr_t owner = 0; owner < SOAK_WRITERS; owner++)
		soak_check(-pthread_create(&threads[owner], NULL, soak_writer, (void *)owner), "thread");
	while (!soak_stopped(soak_here.totals)) {
		act(&seed);
		count(&before);
		soak_add(&soak_here.totals->beats[place * (1 + SOAK_WRITERS)], 1);
	}
	for (unsigned owner = 0; owner < SOAK_WRITERS; owner++)
		pthread_join(threads[owner], NULL);
	receive_visitor(false);
	for (unsigned i = 0; i < SOAK_BLOCKS; i++) {
		soak_expect_block(&soak_here.blocks[i], "at the end");
		soak_check(ksm_arena_free(soak_here.blocks[i].arena, &soak_here.blocks[i].memory), "free");
	}
	count(&before);
	for (unsigned i = 0; i < SOAK_ARENAS; i++)
		ksm_arena_release(soak_here.arenas[i]);
	ksm_domain_detach(soak_here.domain);
	_exit(0);
}
