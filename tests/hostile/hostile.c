/* SPDX-License-Identifier: MIT */
/*
 * A program that does to its registered memory what it must not, while its scanner and another peer's are at work. What
 * it maps in the place keeps its bytes, as do the neighbours, the twins here and in the other process, and what was moved.
 *
 *	hostile --rendezvous DIRECTORY [--barrier NAME] [--seconds N] [--act NAME]… [--seed N]
 *	        [--blind] [--alternate]
 *
 * --blind, --alternate: see hostile_wraps.c. Each act once, then at random. Prints one line of figures. Status 0: every
 * byte was right; 1: damage, or a process was killed by a signal, or hung; 77: that barrier does not work here.
 */
#include "hostile.h"

#include "domain.h"
#include "error.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NOT_HERE 77
#define PATIENCE_S 20.0
#define ACTS_MOST 32

struct totals { /* shared by all processes, atomic */
	uint64_t begun, done[ACTS_MOST], refused, checked, merges, failures, scans;
	uint32_t attached, stop;
};

struct ksm_domain *hostile_domain;
static struct totals *totals;
static const char *rendezvous, *barrier_name = "stop";
static double seconds = 5;
static uint64_t seed = 1;
static bool wanted[ACTS_MOST], any_wanted;
static char *twins;

/* ---- what is used everywhere ----------------------------------------------------------------------------------------- */

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void add(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static bool is_over(void)
{
	return __atomic_load_n(&totals->stop, __ATOMIC_RELAXED);
}

void hostile_fail(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	_exit(1);
}

uint64_t hostile_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

void hostile_fill(char *page, uint64_t of)
{
	uint64_t state = of;
	for (size_t i = 0; i < PAGE / 8; i++)
		((uint64_t *)page)[i] = hostile_random(&state);
}

bool hostile_is(const char *page, uint64_t of)
{
	uint64_t state = of;
	for (size_t i = 0; i < PAGE / 8; i++)
		if (((const volatile uint64_t *)page)[i] != hostile_random(&state))
			return false;
	return true;
}

static bool is_zero(const char *page)
{
	static const char zeros[PAGE];
	return !memcmp(page, zeros, PAGE);
}

static char *map(size_t pages)
{
	char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		hostile_fail("mmap: %s", strerror(errno));
	return at;
}

static void nap(uint64_t us)
{
	nanosleep(&(struct timespec){.tv_nsec = (long)us * 1000}, NULL);
}

/* ---- those who are left alone ------------------------------------------------------------------------------------------- */

/* Twins are written now and then, with the same bytes: so there is always something to merge. */
static void *watch_twins(void *argument)
{
	(void)argument;
	while (!is_over()) {
		for (uint64_t i = 0; i < TWINS; i++)
			if (!hostile_is(twins + i * PAGE, 1 + i))
				hostile_fail("process %d: twin %llu holds other bytes", (int)getpid(),
					     (unsigned long long)i);
		uint64_t page = hostile_random(&seed) % TWINS;
		hostile_fill(twins + page * PAGE, 1 + page);
		add(&totals->checked, TWINS);
		nap(500);
	}
	return NULL;
}

static void register_twins(void)
{
	struct ksm_region *region;
	twins = map(TWINS);
	for (uint64_t i = 0; i < TWINS; i++)
		hostile_fill(twins + i * PAGE, 1 + i);
	int r = ksm_region_register(hostile_domain, twins, TWINS * PAGE, &region, NULL);
	if (r)
		hostile_fail("register: %s", ksm_error_name(r));
}

/* ---- one field, from its birth to its end ----------------------------------------------------------------------------- */

static void check_view(const struct hostile_view *view, const char *act, const char *what)
{
	for (size_t i = 0; i < view->pages; i++) {
		const char *page = view->at + i * PAGE;
		if (view->seeds[i] == SEED_NOTHING || (view->or_zero[i] && is_zero(page)))
			continue;
		if (!hostile_is(page, view->seeds[i]))
			hostile_fail("after %s: page %zu %s holds other bytes", act, i, what);
	}
	add(&totals->checked, view->pages);
}

static void check(const struct hostile_field *f, const char *act)
{
	check_view(&f->here, act, "of the field");
	if (f->moved.at != f->here.at) /* else it is put aside: what cannot be read now */
		check_view(&f->moved, act, "that was moved");
	check_view(&f->mirror, act, "of the shared memory");
	if (!hostile_is(f->here.at - PAGE, SEED_NEW) || !hostile_is(f->here.at + FIELD * PAGE, SEED_NEW))
		hostile_fail("after %s: a neighbour holds other bytes", act);
}

/* KSM_EMEMORY: somebody has locked everything. KSM_EOVERLAP: the address was a field's, unmapped, and is still registered. */
struct ksm_region *hostile_register(char **at, size_t pages, size_t around)
{
	struct ksm_region *region;
	for (double until = now() + PATIENCE_S;;) {
		int r = ksm_region_register(hostile_domain, *at, pages * PAGE, &region, NULL);
		if (!r)
			return region;
		if (now() > until || (r != KSM_EMEMORY && r != KSM_EOVERLAP))
			hostile_fail("register: %s", ksm_error_name(r));
		if (r == KSM_EOVERLAP)
			*at = map(pages + 2 * around) + around * PAGE;
		nap(1000);
	}
}

static void create(struct hostile_field *f)
{
	char *at = map(FIELD + 2) + PAGE;
	f->region = hostile_register(&at, FIELD, 1);
	f->here = (struct hostile_view){.at = at, .pages = FIELD};
	f->moved = f->mirror = (struct hostile_view){.at = NULL};
	f->aside = map(FIELD);
	f->spare = map(FIELD);
	f->refused = false;
	f->spare_used = 0;
	f->n = 1 + hostile_random(&f->random) % FIELD;
	f->first = hostile_random(&f->random) % (FIELD - f->n + 1);
	hostile_fill(f->here.at - PAGE, SEED_NEW);
	hostile_fill(f->here.at + FIELD * PAGE, SEED_NEW);
	for (uint64_t i = 0; i < FIELD; i++) {
		f->here.seeds[i] = 1 + (f->random + i) % TWINS;
		hostile_fill(f->here.at + i * PAGE, f->here.seeds[i]);
	}
}

/* KSM_EMEMORY: while it has another protection. Others may pass: a machine that is too busy to hold its threads. */
static bool unregister(struct hostile_field *f, const char *act)
{
	double until = now() + PATIENCE_S;
	int r = ksm_region_unregister(f->region);
	while (r && !f->refused && now() < until) {
		nap(1000);
		r = ksm_region_unregister(f->region);
	}
	if (r && !f->refused)
		hostile_fail("after %s: unregister: %s", act, ksm_error_name(r));
	add(&totals->refused, r != 0);
	return r == 0;
}

/* A hole may have been taken by somebody else meanwhile. */
static void destroy(struct hostile_field *f)
{
	for (size_t i = 0; i < FIELD; i++)
		if (f->here.seeds[i] != SEED_NOTHING)
			munmap(f->here.at + i * PAGE, PAGE);
	munmap(f->here.at - PAGE, PAGE);
	munmap(f->here.at + FIELD * PAGE, PAGE);
	munmap(f->aside, FIELD * PAGE);
	munmap(f->spare + f->spare_used * PAGE, (FIELD - f->spare_used) * PAGE);
	if (f->moved.at && f->moved.at != f->aside)
		munmap(f->moved.at, f->moved.pages * PAGE);
	if (f->mirror.at)
		munmap(f->mirror.at, f->mirror.pages * PAGE);
}

static void live(struct hostile_field *f, const struct hostile_act *act)
{
	create(f);
	nap(hostile_random(&f->random) % 4 ? hostile_random(&f->random) % 2000 : 0);
	check(f, "nothing yet");
	hostile_act_begin();
	act->act(f);
	hostile_act_end();
	for (uint64_t i = hostile_random(&f->random) % 4; i > 0; i--) {
		check(f, act->name);
		nap(hostile_random(&f->random) % 500);
	}
	bool done = f->refused && hostile_random(&f->random) % 2 && unregister(f, act->name);
	check(f, act->name);
	hostile_act_begin();
	if (act->undo)
		act->undo(f);
	hostile_act_end();
	check(f, act->name);
	if (!done)
		unregister(f, act->name);
	check(f, act->name);
	destroy(f);
}

static void *be_hostile(void *argument)
{
	struct hostile_field field = {.random = (uint64_t)(uintptr_t)argument * 1000 + seed};
	while (!is_over()) {
		uint64_t i = __atomic_fetch_add(&totals->begun, 1, __ATOMIC_RELAXED);
		if (i >= hostile_act_count)
			i = hostile_random(&field.random) % hostile_act_count;
		if (any_wanted && !wanted[i])
			continue;
		live(&field, &hostile_acts[i]);
		add(&totals->done[i], 1);
	}
	return NULL;
}

static void *scan_on(void *argument)
{
	struct ksm_report report;
	(void)argument;
	while (!is_over()) {
		ksm_domain_scan(hostile_domain, &report);
		add(&totals->scans, 1);
	}
	return NULL;
}

/* ---- processes --------------------------------------------------------------------------------------------------------- */

static void attach(void)
{
	struct ksm_domain_options options = {
		.name = "hostile", .path = rendezvous, .store_fd = -1, .capacity_bytes = 64u << 20};
	options.barrier = !strcmp(barrier_name, "move")   ? KSM_BARRIER_MOVE
			  : !strcmp(barrier_name, "stop") ? KSM_BARRIER_STOP
							  : KSM_BARRIER_SEGV;
	int r = ksm_domain_attach(&options, &hostile_domain);
	if (r == KSM_EBARRIER)
		_exit(NOT_HERE);
	if (r)
		hostile_fail("attach: %s", ksm_error_name(r));
	hostile_domain->worker.member.scanner.rest_ns =
		1000000; /* nobody here is in the middle of a process_vm_writev */
	register_twins();
}

/* hostile: else it only watches its twins. */
static pid_t start(bool hostile)
{
	pid_t parent = getpid(), pid = fork();
	pthread_t threads[ACTORS + 2];
	struct ksm_stats stats;
	size_t n = 0;
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	attach();
	__atomic_fetch_add(&totals->attached, 1, __ATOMIC_RELAXED);
	pthread_create(&threads[n++], NULL, watch_twins, NULL);
	if (hostile) {
		pthread_create(&threads[n++], NULL, scan_on, NULL);
		for (size_t i = 0; i < ACTORS; i++)
			pthread_create(&threads[n++], NULL, be_hostile, (void *)(i + 1));
	}
	while (n)
		pthread_join(threads[--n], NULL);
	ksm_domain_self_stats(hostile_domain, &stats);
	add(&totals->merges, stats.merges);
	add(&totals->failures, stats.failures);
	_exit(0);
}

static int end_of(pid_t pid, const char *who)
{
	int status;
	for (double until = now() + 2 * PATIENCE_S; now() < until; nap(1000)) {
		pid_t r = waitpid(pid, &status, WNOHANG);
		if (r == pid && WIFSIGNALED(status))
			fprintf(stderr, "the %s process was killed: %s\n", who, strsignal(WTERMSIG(status)));
		if (r == pid)
			return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	}
	fprintf(stderr, "the %s process does not end\n", who);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	return 1;
}

static void choose(const char *name)
{
	any_wanted = true;
	for (size_t i = 0; i < hostile_act_count; i++)
		if (!strcmp(name, hostile_acts[i].name)) {
			wanted[i] = true;
			return;
		}
	hostile_fail("no such act: %s", name);
}

static void read_options(int argc, char **argv)
{
	static const struct option names[] = {{"rendezvous", 1, NULL, 'r'}, {"barrier", 1, NULL, 'b'},
					      {"seconds", 1, NULL, 's'},    {"act", 1, NULL, 'a'},
					      {"seed", 1, NULL, 'x'},       {"blind", 0, NULL, 'B'},
					      {"alternate", 0, NULL, 'A'},  {NULL, 0, NULL, 0}};
	for (int c; (c = getopt_long(argc, argv, "", names, NULL)) >= 0;)
		switch (c) {
		case 'r':
			rendezvous = optarg;
			break;
		case 'b':
			barrier_name = optarg;
			break;
		case 's':
			seconds = atof(optarg);
			break;
		case 'a':
			choose(optarg);
			break;
		case 'x':
			seed = strtoull(optarg, NULL, 10);
			break;
		case 'B':
			hostile_blind = true;
			break;
		case 'A':
			hostile_alternate = true;
			break;
		default:
			exit(2);
		}
}

/* Then there is nothing to wait for. */
static bool has_anybody_ended(void)
{
	siginfo_t info = {.si_pid = 0};
	return !waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid;
}

int main(int argc, char **argv)
{
	read_options(argc, argv);
	totals = mmap(NULL, sizeof(*totals), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!rendezvous || totals == MAP_FAILED)
		return 2;
	pid_t peer = start(false), hostile = start(true);
	while (__atomic_load_n(&totals->attached, __ATOMIC_RELAXED) < 2 && !has_anybody_ended())
		nap(1000);
	for (double until = now() + seconds; now() < until && !has_anybody_ended();)
		nap(10000);
	__atomic_store_n(&totals->stop, 1, __ATOMIC_RELAXED);
	int hostiles_end = end_of(hostile, "hostile"), peers_end = end_of(peer, "other");
	int status = hostiles_end ? hostiles_end : peers_end;
	printf("barrier=%s checked=%llu merges=%llu scans=%llu refused=%llu failures=%llu", barrier_name,
	       (unsigned long long)totals->checked, (unsigned long long)totals->merges,
	       (unsigned long long)totals->scans, (unsigned long long)totals->refused,
	       (unsigned long long)totals->failures);
	for (size_t i = 0; i < hostile_act_count; i++)
		if (!any_wanted || wanted[i])
			printf(" %s=%llu", hostile_acts[i].name, (unsigned long long)totals->done[i]);
	printf("\n");
	return status;
}
