/* SPDX-License-Identifier: MIT */
/*
 * mad --rendezvous DIRECTORY [--seed N] [--seconds S] [--rounds N] [--ways a,b,…] [--barrier move|stop|auto]
 *
 * Rounds of honest processes with a mad one among them, then one without. Status: 0 nothing happened; 1 a wrong byte; 2 a
 * process died; 3 a call did not come back; 4 a system call was allowed that must be refused; 5 the test itself failed.
 */
#include "mad.h"

#include "error.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HANG_NS 120000000000ull /* calls wait for locks and answers, ten seconds at most each; a machine may be busy */

const char *const mad_way_names[MAD_WAYS] = {"words", "pages", "header",     "slots", "cells",  "index",
					     "races", "files", "rendezvous", "calls", "answers"};

static struct mad_totals *totals;
static pid_t honest[MAD_HONEST], mad = -1;
static unsigned rounds_done;
static uint64_t calm_merges; /* in the last round, in which nobody is mad */

uint64_t mad_now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void mad_die(const char *what, int error)
{
	fprintf(stderr, "process %d: %s: %s\n", (int)getpid(), what, ksm_error_name(error < 0 ? error : -error));
	_exit(5);
}

void mad_note(struct mad_totals *all, int code)
{
	for (unsigned i = 0; code && i < MAD_REASONS; i++) {
		int32_t none = 0;
		if (__atomic_compare_exchange_n(&all->reasons[i], &none, code, false, __ATOMIC_RELAXED,
						__ATOMIC_RELAXED) ||
		    none == code)
			return;
	}
}

/* ---- processes ---------------------------------------------------------------------------------------------- */

static pid_t start(const struct mad_options *options, int place)
{
	pid_t parent = getpid();
	fflush(NULL);
	pid_t pid = fork();
	if (pid < 0)
		mad_die("fork", errno);
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(5);
	if (place < 0)
		mad_peer(options);
	mad_honest(options, (unsigned)place, place == MAD_HONEST - 1);
}

static void finish(int status)
{
	for (int i = 0; i < MAD_HONEST; i++)
		if (honest[i] > 0)
			kill(honest[i], SIGKILL);
	if (mad > 0)
		kill(mad, SIGKILL);
	while (wait(NULL) > 0 || errno == EINTR)
		;
	printf("status=%d rounds=%u calm_merges=%llu slowest_ms=%llu slowest=%s pages=%llu wrong=%llu allowed=%llu "
	       "writes=%llu merges=%llu merged_outside=%llu "
	       "scans=%llu sweeps=%llu freed=%llu blocks=%llu settles=%llu unmerges=%llu forks=%llu joins=%llu "
	       "refused=%llu",
	       status, rounds_done, (unsigned long long)calm_merges, (unsigned long long)totals->slowest_ns / 1000000,
	       totals->slowest, (unsigned long long)totals->pages, (unsigned long long)totals->wrong,
	       (unsigned long long)totals->allowed, (unsigned long long)totals->writes,
	       (unsigned long long)totals->merges, (unsigned long long)totals->merged_outside,
	       (unsigned long long)totals->scans, (unsigned long long)totals->sweeps, (unsigned long long)totals->freed,
	       (unsigned long long)totals->blocks, (unsigned long long)totals->settles,
	       (unsigned long long)totals->unmerges, (unsigned long long)totals->forks,
	       (unsigned long long)totals->joins, (unsigned long long)totals->refused);
	for (int way = 0; way < MAD_WAYS; way++)
		printf(" way_%s=%llu", mad_way_names[way], (unsigned long long)totals->ways[way]);
	printf(" reasons=");
	for (unsigned i = 0; i < MAD_REASONS && totals->reasons[i]; i++)
		printf("%s%s", i ? "," : "", ksm_error_name(totals->reasons[i]));
	printf("\n");
	exit(status);
}

/* Whoever ends before its time, and however, has failed. `leaving`: the honest ones may end well. */
static unsigned watch(bool leaving)
{
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (leaving && status == 0) {
			for (int i = 0; i < MAD_HONEST; i++)
				honest[i] = honest[i] == pid ? 0 : honest[i];
			continue;
		}
		fprintf(stderr, "process %d (%s) ended with wait status 0x%x (%s)\n", (int)pid,
			pid == mad ? "the mad one" : "honest", (unsigned)status,
			WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "an exit");
		finish(WIFEXITED(status) && WEXITSTATUS(status) == 5 ? 5 : 2);
	}
	uint64_t now = mad_now_ns();
	unsigned left = 0;
	for (int i = 0; i < MAD_HONEST; i++) {
		uint64_t beat = mad_get(&totals->beats[i]);
		left += honest[i] > 0;
		if (honest[i] > 0 && beat && now > beat && now - beat > HANG_NS) {
			fprintf(stderr, "process %d: no call came back for %llu s\n", (int)honest[i],
				(unsigned long long)(now - beat) / 1000000000);
			finish(3);
		}
	}
	if (mad_get(&totals->wrong))
		finish(1);
	if (mad_get(&totals->allowed))
		finish(4);
	return left;
}

static void watch_for(double seconds)
{
	for (uint64_t until = mad_now_ns() + (uint64_t)(seconds * 1e9); mad_now_ns() < until;) {
		watch(false);
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	}
}

/* Pages of the store that a process has mapped, as the kernel counts them. */
static uint64_t mapped_outside(pid_t pid)
{
	char path[48], line[512];
	uint64_t kib = 0, sum = 0;
	bool inside = false;
	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
	FILE *file = fopen(path, "re");
	while (file && fgets(line, sizeof(line), file)) {
		if (strchr(line, '-') && strstr(line, " rw-p ") && strstr(line, "memfd:ksmalloc store"))
			inside = true;
		else if (sscanf(line, "Rss: %llu kB", (unsigned long long *)&kib) == 1 && inside)
			sum += kib / (MAD_PAGE / 1024), inside = false;
	}
	if (file)
		fclose(file);
	return sum;
}

/* ---- rounds ------------------------------------------------------------------------------------------------- */

static void wait_for(const uint32_t *number, uint32_t wanted, const char *what)
{
	for (uint64_t began = mad_now_ns(); mad_get32(number) < wanted;) {
		watch(false);
		if (mad_now_ns() - began > HANG_NS) {
			fprintf(stderr, "only %u %s\n", mad_get32(number), what);
			finish(3);
		}
		nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
	}
}

/* ways 0: nobody is mad. */
static void run_round(struct mad_options *options, unsigned number)
{
	__atomic_store_n(&totals->ready, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&totals->mad_joined, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&totals->mad, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&totals->stop, 0, __ATOMIC_RELAXED);
	memset(totals->beats, 0, sizeof(totals->beats));
	snprintf(options->name, sizeof(options->name), "mad-%u", number);
	bool first = options->ways && options->seed % 2; /* the mad one has the first slot, and is asked first */
	if (first) {
		mad = start(options, -1);
		wait_for(&totals->mad_joined, 1, "mad one has joined");
	}
	for (int i = 0; i < MAD_HONEST; i++)
		honest[i] = start(options, i);
	if (options->ways && !first)
		mad = start(options, -1);
	if (options->ways)
		wait_for(&totals->mad_joined, 1, "mad one has joined");
	/* A new domain works, whatever happened in the last one. */
	wait_for(&totals->ready, MAD_HONEST, "honest processes have merged anything");
	for (int i = 0; i < MAD_HONEST; i++) {
		uint64_t pages = mapped_outside(honest[i]);
		if (!pages) {
			fprintf(stderr, "process %d has merged nothing, says the kernel\n", (int)honest[i]);
			finish(5);
		}
		mad_add(&totals->merged_outside, pages);
	}
	__atomic_store_n(&totals->mad, 1, __ATOMIC_RELAXED);
	watch_for(options->seconds);
	if (mad > 0) {
		pid_t gone = mad;
		mad = -1;
		kill(gone, SIGKILL);
		waitpid(gone, NULL, 0);
		watch_for(0.3); /* it is gone: what it left behind hurts nobody either */
	}
	__atomic_store_n(&totals->stop, 1, __ATOMIC_RELAXED);
	while (watch(true))
		nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
	rounds_done++;
}

static uint32_t parse_ways(char *list)
{
	uint32_t ways = 0;
	for (char *word = strtok(list, ","); word; word = strtok(NULL, ",")) {
		uint32_t before = ways;
		for (int way = 0; way < MAD_WAYS; way++)
			if (!strcmp(word, mad_way_names[way]))
				ways |= 1u << way;
		if (ways == before)
			mad_die(word, EINVAL);
	}
	return ways;
}

int main(int argc, char **argv)
{
	struct mad_options options = {.seed = 1, .seconds = 2};
	uint32_t ways = 0;
	unsigned rounds = MAD_WAYS + 1, number = 0;
	for (int i = 1; i + 1 < argc; i += 2) {
		const char *name = argv[i];
		char *value = argv[i + 1];
		if (!strcmp(name, "--rendezvous"))
			options.rendezvous = value;
		else if (!strcmp(name, "--seed"))
			options.seed = strtoull(value, NULL, 0);
		else if (!strcmp(name, "--seconds"))
			options.seconds = strtod(value, NULL);
		else if (!strcmp(name, "--rounds"))
			rounds = (unsigned)strtoul(value, NULL, 0);
		else if (!strcmp(name, "--ways"))
			ways = parse_ways(value);
		else if (!strcmp(name, "--barrier"))
			options.barrier = !strcmp(value, "move")   ? KSM_BARRIER_MOVE
					  : !strcmp(value, "stop") ? KSM_BARRIER_STOP
								   : KSM_BARRIER_AUTO;
		else
			mad_die(name, EINVAL);
	}
	if (!options.rendezvous)
		mad_die("--rendezvous", EINVAL);
	options.totals = totals =
		mmap(NULL, sizeof(*totals), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (totals == MAP_FAILED)
		mad_die("mmap", errno);
	printf("seed %llu\n", (unsigned long long)options.seed);
	uint64_t random = options.seed;
	for (; number < rounds; number++) {
		/* Each way alone, then all of them, then some. */
		options.ways = ways;
		if (!ways && number < MAD_WAYS)
			options.ways = 1u << number;
		else if (!ways)
			options.ways = number == MAD_WAYS ? (1u << MAD_WAYS) - 1
							  : 1 + (uint32_t)mad_below(&random, (1u << MAD_WAYS) - 1);
		run_round(&options, number);
		options.seed++;
	}
	options.ways = 0;
	totals->calm = 1;
	uint64_t refused = mad_get(&totals->refused), merges = mad_get(&totals->merges);
	run_round(&options, number);
	calm_merges = mad_get(&totals->merges) - merges;
	if (mad_get(&totals->refused) != refused) {
		fprintf(stderr, "calls were refused where nobody was mad\n");
		finish(5);
	}
	finish(0);
}
