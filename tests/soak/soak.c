/* SPDX-License-Identifier: MIT */
/*
 * The lost-write soak: processes whose threads write into merging memory by stores and by system calls, and compare
 * with what they wrote before. This file starts the processes, kills some, and prints one line of figures.
 *
 *	soak --rendezvous DIRECTORY [--barrier NAME] [--cow NAME] [--seconds N] [--files DIRECTORY] [--seed N]
 *	     [--writes N] [--merges N] [--slow] [--until-lost] [--devices]
 *
 * --barrier move, stop, segv; none switches the windows off: a control that must lose writes. --cow kernel, sigsegv;
 * unclaimed is sigsegv without claims: another control. --writes, --merges: on a slow machine it goes on until there
 * were so many, up to LONGER times as long. --slow: with random pauses in the core (soak_slow.c). --until-lost ends at
 * the first loss. --devices is no soak, but shows that the barrier stop refuses a process that has an io_uring.
 * Status 0: every byte was right; 1: some were not, or something failed; 77: that does not work here.
 */
#include "soak.h"

#include "barrier.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_S 60.0 /* without a sign of life */
#define LONGER 4
#define BEATS (SOAK_PROCESSES * (1 + SOAK_WRITERS))

static struct soak_options options = {.direct = -1, .writer_us = 400, .actor_us = 4000};
static const char *barrier_name = "move", *cow_name = "kernel", *files = ".";
static double seconds = 60;
static uint64_t least_writes, least_merges;
static bool until_lost, devices;
static pid_t pids[SOAK_PROCESSES], hand;

void soak_die(const char *what, int error)
{
	if (error < 0)
		fprintf(stderr, "process %d: %s: %s\n", (int)getpid(), what, ksm_error_name(error));
	else
		fprintf(stderr, "process %d: %s: %s\n", (int)getpid(), what, strerror(error));
	_exit(1);
}

double soak_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void choose_barrier(void)
{
	if (!strcmp(barrier_name, "none")) {
		soak_switch_window_off();
		return;
	}
	for (size_t i = 0; ksm_barriers[i]; i++)
		if (!strcmp(barrier_name, ksm_barriers[i]->name))
			options.barrier = ksm_barriers[i]->kind;
	if (!options.barrier) {
		fprintf(stderr, "there is no barrier %s\n", barrier_name);
		exit(2);
	}
}

static void choose_cow(void)
{
	if (!strcmp(cow_name, "kernel"))
		return;
	options.flags = KSM_ARENA_SIGSEGV;
	if (!strcmp(cow_name, "unclaimed")) {
		soak_switch_claims_off();
	} else if (strcmp(cow_name, "sigsegv") != 0) {
		fprintf(stderr, "there is no copy-on-write %s\n", cow_name);
		exit(2);
	}
}

static void read_arguments(int argc, char **argv)
{
	static const struct option known[] = {
		{"rendezvous", required_argument, NULL, 'r'},
		{"barrier", required_argument, NULL, 'b'},
		{"cow", required_argument, NULL, 'c'},
		{"seconds", required_argument, NULL, 's'},
		{"files", required_argument, NULL, 'f'},
		{"seed", required_argument, NULL, 'n'},
		{"writes", required_argument, NULL, 'w'},
		{"merges", required_argument, NULL, 'm'},
		{"slow", no_argument, NULL, 'o'},
		{"until-lost", no_argument, NULL, 'u'},
		{"devices", no_argument, NULL, 'd'},
		{NULL, 0, NULL, 0},
	};
	options.seed = (unsigned)time(NULL);
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'r':
			options.rendezvous = optarg;
			break;
		case 'b':
			barrier_name = optarg;
			break;
		case 'c':
			cow_name = optarg;
			break;
		case 's':
			seconds = atof(optarg);
			break;
		case 'f':
			files = optarg;
			break;
		case 'n':
			options.seed = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 'w':
			least_writes = strtoull(optarg, NULL, 10);
			break;
		case 'm':
			least_merges = strtoull(optarg, NULL, 10);
			break;
		case 'o':
			soak_switch_slow();
			break;
		case 'u':
			until_lost = true;
			break;
		case 'd':
			devices = true;
			break;
		default:
			exit(2);
		}
	}
	if (!options.rendezvous || optind < argc) {
		fprintf(stderr, "usage: %s --rendezvous DIRECTORY [options]\n", argv[0]);
		exit(2);
	}
	choose_barrier();
	choose_cow();
}

/* What a barrier does not see is no part of its soak: other processes and io_uring are for "move" alone. */
static void choose_ways(void)
{
	struct soak_ring ring;
	bool moves = options.barrier == KSM_BARRIER_MOVE;
	options.may_refuse = options.flags & KSM_ARENA_SIGSEGV || options.barrier == KSM_BARRIER_SEGV;
	options.sees_pins = options.barrier != KSM_BARRIER_SEGV;
	for (enum soak_way way = 0; way < SOAK_WAYS; way++)
		options.has[way] = true;
	options.has[SOAK_DIRECT] = options.direct >= 0;
	options.has[SOAK_VM] = moves && (hand = soak_hand_start(&options)) > 0;
	options.has[SOAK_RING] = options.has[SOAK_FIXED] = moves && soak_ring_open(&ring);
	if (options.has[SOAK_RING])
		soak_ring_close(&ring);
}

static void prepare(void)
{
	struct ksm_domain_options domain = {.name = "soak", .path = options.rendezvous, .store_fd = -1};
	struct ksm_settings quick = {.run = 1,
				     .pages_to_scan = 1000,
				     .max_pages_to_merge = 1000,
				     .sleep_millisecs = 2,
				     .advisor_max_cpu = 20};
	void *shared =
		mmap(NULL, sizeof(struct soak_totals), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		soak_die("mmap", errno);
	options.totals = shared;
	soak_patterns_init();
	options.file = soak_file(files, &options.direct);
	choose_ways();
	int r = ksm_settings_write(&domain, &quick);
	if (r)
		soak_die("settings", r);
}

static void launch(unsigned place)
{
	fflush(NULL);
	pids[place] = fork();
	if (pids[place] < 0)
		soak_die("fork", errno);
	if (pids[place] == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		soak_peer(&options, place);
	}
}

/* Returns the exit status, 128 + signal, or -1: it still runs. */
static int reap(unsigned place, bool wait)
{
	int status;
	pid_t pid = waitpid(pids[place], &status, wait ? 0 : WNOHANG);
	if (pid == 0)
		return -1;
	if (pid < 0)
		soak_die("waitpid", errno);
	pids[place] = 0;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void kill_all(void)
{
	for (unsigned place = 0; place < SOAK_PROCESSES; place++) {
		if (!pids[place])
			continue;
		kill(pids[place], SIGKILL);
		reap(place, true);
	}
	if (hand > 0) {
		kill(hand, SIGKILL);
		waitpid(hand, NULL, 0);
	}
}

static void replace(unsigned place)
{
	kill(pids[place], SIGKILL);
	reap(place, true);
	soak_add(&options.totals->kills, 1);
	launch(place);
}

/* Has every thread done something lately? */
static bool is_alive(void)
{
	static uint64_t seen[BEATS];
	static double when[BEATS];
	for (unsigned i = 0; i < BEATS; i++) {
		uint64_t beats = soak_get(&options.totals->beats[i]);
		if (when[i] == 0 || beats != seen[i])
			when[i] = soak_now();
		seen[i] = beats;
		if (soak_now() - when[i] > PATIENCE_S) {
			fprintf(stderr, "process %d: thread %u is stuck\n", (int)pids[i / (1 + SOAK_WRITERS)],
				i % (1 + SOAK_WRITERS));
			return false;
		}
	}
	return true;
}

static bool is_enough(void)
{
	uint64_t writes = 0;
	for (enum soak_way way = 0; way < SOAK_WAYS; way++)
		writes += soak_get(&options.totals->writes[way]);
	return writes >= least_writes && soak_get(&options.totals->merges) >= least_merges;
}

/* 0, or the status to end with. */
static int run(double begin)
{
	uint32_t seed = options.seed | 1;
	double next_kill = soak_now() + 2;
	for (unsigned place = 0; place < SOAK_PROCESSES; place++)
		launch(place);
	while (soak_now() < begin + seconds || (!is_enough() && soak_now() < begin + seconds * LONGER)) {
		for (unsigned place = 0; place < SOAK_PROCESSES; place++) {
			int status = reap(place, false);
			if (status >= 0) {
				fprintf(stderr, "a process ended with status %d\n", status);
				return status == SOAK_NOT_HERE ? status : 1;
			}
		}
		if (!is_alive())
			return 1;
		if (until_lost && soak_get(&options.totals->lost))
			break;
		if (soak_now() > next_kill) {
			replace(soak_random(&seed) % SOAK_PROCESSES);
			next_kill = soak_now() + 0.5 + soak_random(&seed) % 1000 / 500.0;
		}
		usleep(20000);
	}
	return 0;
}

static int finish(void)
{
	int failed = 0;
	double end = soak_now() + PATIENCE_S;
	__atomic_store_n(&options.totals->stop, 1, __ATOMIC_RELAXED);
	for (unsigned place = 0; place < SOAK_PROCESSES; place++) {
		int status;
		while ((status = reap(place, false)) < 0 && soak_now() < end)
			usleep(5000);
		if (status != 0) {
			fprintf(stderr, "at the end a process %s %d\n", status < 0 ? "is stuck" : "had status", status);
			failed = 1;
		}
	}
	return failed;
}

static void print_figures(double took)
{
	const struct soak_totals *t = options.totals;
	printf("barrier=%s cow=%s seed=%u seconds=%.1f", barrier_name, cow_name, options.seed, took);
	for (enum soak_way way = 0; way < SOAK_WAYS; way++)
		if (options.has[way])
			printf(" %s=%lu", soak_way_names[way], t->writes[way]);
	printf(" prepared=%lu efaults=%lu torn=%lu", t->prepared, t->efaults, t->torn);
	printf(" freezes=%lu frozen_merged=%lu thaws=%lu", t->freezes, t->frozen_merged, t->thaws);
	printf(" merges=%lu breaks=%lu put_backs=%lu refused=%lu", t->merges, t->breaks, t->put_backs, t->refused);
	printf(" give_backs=%lu stops=%lu suspensions=%lu failures=%lu", t->give_backs, t->stops, t->suspensions,
	       t->failures);
	printf(" blocks=%lu scans=%lu sweeps=%lu settles=%lu unmerges=%lu", t->blocks, t->scans, t->sweeps, t->settles,
	       t->unmerges);
	printf(" visits=%lu forks=%lu kills=%lu wrong=%lu lost=%lu\n", t->visits, t->forks, t->kills, t->wrong,
	       t->lost);
}

int main(int argc, char **argv)
{
	double begin = soak_now();
	read_arguments(argc, argv);
	prepare();
	if (devices)
		return soak_devices(&options);
	int status = run(begin);
	if (!status)
		status = finish();
	kill_all();
	print_figures(soak_now() - begin);
	return status ? status : options.totals->lost + options.totals->wrong != 0;
}
