/* SPDX-License-Identifier: MIT */
/*
 * Random death: a crew of processes that allocate, write, merge, break, free, fork and call exec at random, while a
 * master kills or stops one every few milliseconds. The survivors verify every byte; now and then all rest, and an
 * auditor compares the store with what the kernel says is mapped. One line of figures at the end.
 *
 *	chaos --rendezvous DIRECTORY [--seconds N] [--every N] [--patience N] [--seed N] [--slow]
 *	      [--plant peer|window|fork|dead|exec|lock] [--until-noticed]
 *
 * --every: seconds between two audits. --patience: seconds without a sign of life after which a process that is not
 * stopped has hung. --seed: of everything but time: who does what, who is struck, and for how long. --slow: random pauses
 * in the core (the lost-write soak's). --plant: a bug; --until-noticed ends when it has been. Status 0: every byte was
 * right, nothing leaked, nobody hung.
 */
#include "chaos.h"

#include "error.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct chaos_shared *chaos;
int chaos_fd;

static double seconds = 60, every = 5, patience = 60;
static const char *const plants[] = {"none", "peer", "window", "fork", "dead", "exec", "lock"};
static const char *const doings[] = {
#define X(name) [CHAOS_##name] = #name,
	CHAOS_DOINGS(X)
#undef X
};

/* ---- what all use ------------------------------------------------------------------------------------------- */

void chaos_die(const char *what, int error)
{
	const char *name = error < 0 ? ksm_error_name(error) : strerror(error);
	fprintf(stderr, "failed: process %d, place %u, seed %u, act %lu, barrier %d: %s: %s\n", (int)getpid(),
		chaos_here.place, chaos_here.first_seed, chaos_here.acts, chaos_here.barrier, what, name);
	_exit(1);
}

void chaos_check(int r, const char *what)
{
	if (r)
		chaos_die(what, r);
}

double chaos_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

uint32_t chaos_seed(uint32_t place)
{
	uint32_t n = __atomic_add_fetch(&chaos->places[place].incarnation, 1, __ATOMIC_ACQ_REL);
	uint64_t x = ((uint64_t)chaos->seed << 32 | place << 24) + n * 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return (uint32_t)(x >> 32) | 1;
}

const char *chaos_doing_in(uint32_t place)
{
	return doings[chaos_get32(&chaos->places[place].doing) % CHAOS_DOINGS_COUNT];
}

void chaos_judge(int pid, uint32_t place, int status)
{
	bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
	bool meant = killed && (place > CHAOS_PLACES || chaos_get32(&chaos->places[place].killed));
	if (meant)
		chaos_add(&chaos->totals.kills, 1);
	if (meant && place < CHAOS_PLACES)
		chaos_add(&chaos->totals.kills_while[chaos_get32(&chaos->places[place].doing) % CHAOS_DOINGS_COUNT], 1);
	if (status == 0 || meant)
		return;
	fprintf(stderr, "process %d in place %u ended with wait status 0x%x, doing %s\n", pid, place, (unsigned)status,
		place <= CHAOS_PLACES ? chaos_doing_in(place) : "nobody knows what");
	chaos_add(&chaos->totals.failed, 1);
}

void chaos_attach(int barrier, struct ksm_domain **domain)
{
	struct ksm_domain_options options = {
		.name = CHAOS_DOMAIN,
		.path = chaos->rendezvous,
		.capacity_bytes = 1ull << 30,
		.barrier = barrier,
		.store_fd = -1,
	};
	int r;
	while ((r = ksm_domain_attach(&options, domain)) == KSM_ENOPEER) /* ten seconds were not enough */
		chaos_add(&chaos->totals.refusals, 1);
	chaos_check(r, "attach");
}

/* ---- beginning ---------------------------------------------------------------------------------------------- */

static void map_shared(void)
{
	chaos = mmap(NULL, sizeof(*chaos), PROT_READ | PROT_WRITE, MAP_SHARED, chaos_fd, 0);
	if (chaos == MAP_FAILED)
		chaos_die("mmap", errno);
}

static void make_shared(void)
{
	chaos_fd = memfd_create("chaos", 0); /* it survives exec */
	if (chaos_fd < 0 || ftruncate(chaos_fd, sizeof(*chaos)))
		chaos_die("memfd", errno);
	map_shared();
	chaos->master = getpid();
	chaos->seed = (uint32_t)time(NULL);
	chaos_patterns_init();
	if (mprotect(chaos->patterns, sizeof(chaos->patterns), PROT_READ))
		chaos_die("mprotect", errno);
}

static void choose_plant(const char *name)
{
	for (uint32_t i = 0; i < sizeof(plants) / sizeof(*plants); i++)
		if (!strcmp(plants[i], name)) {
			chaos->plant = i;
			return;
		}
	fprintf(stderr, "there is no plant %s\n", name);
	exit(2);
}

static void read_arguments(int argc, char **argv)
{
	static const struct option known[] = {
		{"rendezvous", required_argument, NULL, 'r'},
		{"seconds", required_argument, NULL, 's'},
		{"every", required_argument, NULL, 'e'},
		{"patience", required_argument, NULL, 'p'},
		{"seed", required_argument, NULL, 'n'},
		{"plant", required_argument, NULL, 'b'},
		{"slow", no_argument, NULL, 'o'},
		{"until-noticed", no_argument, NULL, 'u'},
		{NULL, 0, NULL, 0},
	};
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'r':
			snprintf(chaos->rendezvous, sizeof(chaos->rendezvous), "%s", optarg);
			break;
		case 's':
			seconds = atof(optarg);
			break;
		case 'e':
			every = atof(optarg);
			break;
		case 'p':
			patience = atof(optarg);
			break;
		case 'n':
			chaos->seed = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'b':
			choose_plant(optarg);
			break;
		case 'o':
			chaos->slow = 1;
			break;
		case 'u':
			chaos->until_noticed = 1;
			break;
		default:
			exit(2);
		}
	}
	if (!chaos->rendezvous[0] || optind < argc) {
		fprintf(stderr, "usage: %s --rendezvous DIRECTORY [options]\n", argv[0]);
		exit(2);
	}
}

static void print_figures(uint32_t given, double took)
{
	const struct chaos_totals *t = &chaos->totals;
	printf("seed=%u seconds=%.1f plant=%s", given, took, plants[chaos->plant]);
	for (unsigned i = 0; i < CHAOS_DOINGS_COUNT; i++)
		printf(" killed_in_%s=%lu", doings[i], t->kills_while[i]);
	printf(" kills=%lu stops=%lu massacres=%lu forks=%lu execs=%lu leaves=%lu exits=%lu", t->kills, t->stops,
	       t->massacres, t->forks, t->execs, t->leaves, t->exits);
	printf(" blocks=%lu writes=%lu merges=%lu promotions=%lu zero_pages=%lu breaks=%lu put_backs=%lu "
	       "give_backs=%lu",
	       t->blocks, t->writes, t->merges, t->promotions, t->zero_pages, t->breaks, t->put_backs, t->give_backs);
	printf(" scans=%lu settles=%lu sweeps=%lu freezes=%lu unmerges=%lu registers=%lu refusals=%lu", t->scans,
	       t->settles, t->sweeps, t->freezes, t->unmerges, t->registers, t->refusals);
	printf(" audits=%lu saved_most=%lu members_most=%lu verified=%lu longest_ms=%lu", t->audits, t->saved_most,
	       t->members_most, t->verified, t->longest_ms);
	printf(" wrong=%lu leaked=%lu missing=%lu invalid=%lu unsettled=%lu strays=%lu hung=%lu failed=%lu\n", t->wrong,
	       t->leaked, t->missing, t->invalid, t->unsettled, t->strays, t->hung, t->failed);
}

int main(int argc, char **argv)
{
	double begin = chaos_now();
	if (argc == 4 && !strcmp(argv[1], "--member")) {
		chaos_fd = atoi(argv[2]);
		map_shared();
		mprotect(chaos->patterns, sizeof(chaos->patterns), PROT_READ);
		chaos_plant();
		chaos_peer((uint32_t)atoi(argv[3]));
	}
	make_shared();
	read_arguments(argc, argv);
	uint32_t given = chaos->seed;
	chaos->seed = chaos_seed(CHAOS_AUDITOR); /* two seeds that are near each other are to have nothing in common */
	chaos_plant();
	struct ksm_domain_options options = {.name = CHAOS_DOMAIN, .path = chaos->rendezvous, .store_fd = -1};
	struct ksm_settings quick = {
		.run = 1, .pages_to_scan = 500, .max_pages_to_merge = 500, .sleep_millisecs = 2, .advisor_max_cpu = 20};
	chaos_check(ksm_settings_write(&options, &quick), "settings");
	int status = chaos_master(seconds, every, patience);
	print_figures(given, chaos_now() - begin);
	return status;
}
