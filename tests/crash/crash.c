/* SPDX-License-Identifier: MIT */
/*
 * Death at every instruction. For each boundary between two instructions of an operation a victim is made, in a domain of
 * its own, goes there and is killed; a surviving peer recovers; everything that processes share is checked; the survivor
 * does what the victim was about to do, sweeps, and leaves. Or the victim is stopped for a while, the others go on without
 * it, and then it goes on too.
 *
 *    crash --rendezvous DIRECTORY --operation NAME [--stop] [--every N | --sample N] [--from N] [--states] [--jobs N]
 *          [--plant BUG] [--patience SECONDS]
 *    crash --list
 *
 * --every N takes each N-th boundary only, from the one that --from names; --sample N about N of them. --states takes
 * (besides, if one of those is given) all boundaries at which what outlives a process is not just what it was one
 * instruction earlier: memory that processes share has changed, or there was a system call. --plant puts a bug into the
 * core: it must be found. A round may take so many seconds. The last line says what was done.
 */
#include "crash.h"

#include "os.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#define JOBS_MOST 16
#define PATIENCE 120     /* seconds for one round */
#define RECORDING 600    /* for the first one */
#define EXACT_ATTEMPTS 3 /* at a boundary, on the way that was recorded */
#define ATTEMPTS 6
#define STRAYED 99 /* exit status of a round */

struct tally *crash_tally;

static struct {
	const struct operation *operation;
	const char *rendezvous;
	bool stop, states;
	size_t every, sample, from;
	unsigned jobs, patience;
} asked = {.jobs = 2, .patience = PATIENCE};

const struct plant *crash_planted;

static size_t at_boundary;

void crash_fail(const char *file, int line, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fprintf(stderr, "%s:%d: boundary %zu: ", strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line, at_boundary);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	fflush(NULL);
	_exit(1);
}

static void begin(struct world *world)
{
	alarm(asked.patience);
	crash_world_begin(world, asked.operation, asked.rendezvous);
}

static void kill_it(pid_t pid)
{
	int status;
	CHECK(!kill(pid, SIGKILL));
	CHECK(waitpid(pid, &status, __WALL) == pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* It is alone with what it had: let it finish, and all is well. */
static void finish(struct world *world, pid_t pid)
{
	int status;
	if (world->operation->flags & WANTS_CHILD) { /* then it is ours */
		kill_it(world->victim);
		world->board->child = 0;
	}
	if (world->survivor)
		crash_serve_begin(world->survivor);
	CHECK(waitpid(pid, &status, __WALL) == pid);
	if (world->survivor)
		crash_serve_end();
	if (status || !world->board->done)
		FAIL("%s: the victim ended with wait status 0x%x", world->operation->name, (unsigned)status);
}

/* The whole way, and then to the victim's own end: it has done what it was to do. A planted bug is left to the steps. */
static void record(struct world *world, const struct trace *trace)
{
	begin(world);
	alarm(RECORDING);
	world->board->lenient = asked.stop;
	pid_t pid = crash_start(world);
	crash_record(world, pid, trace);
	if (crash_planted)
		return;
	crash_world_look(world, pid);
	crash_detach(pid, trace, false);
	finish(world, pid);
	crash_world_recover(world);
	crash_world_end(world);
}

/* The way that the first one took; if it has tried that often enough, another one to the same place. */
static bool go(struct world *world, pid_t pid, const struct trace *trace, size_t boundary, int attempt)
{
	if (attempt < EXACT_ATTEMPTS)
		return crash_go(world, pid, trace, boundary);
	bool there = crash_go_anyhow(world, pid, trace, boundary);
	ksm_add_relaxed(&crash_tally->detours, there);
	return there;
}

static bool kill_at(struct world *world, const struct trace *trace, size_t boundary, int attempt)
{
	begin(world);
	pid_t pid = crash_start(world);
	bool there = go(world, pid, trace, boundary, attempt);
	crash_world_look(world, pid);
	kill_it(pid);
	crash_world_recover(world);
	crash_world_end(world);
	ksm_add_relaxed(&crash_tally->kills, there);
	return there;
}

static bool stop_at(struct world *world, const struct trace *trace, size_t boundary, int attempt)
{
	int status;
	begin(world);
	world->board->lenient = 1;
	pid_t pid = crash_start(world);
	bool there = go(world, pid, trace, boundary, attempt);
	crash_detach(pid, trace, true);
	if (!(world->operation->flags & WANTS_CHILD)) {
		CHECK(waitpid(pid, &status, WUNTRACED) == pid);
		CHECK(WIFSTOPPED(status));
	}
	crash_world_go_on(world);
	crash_world_look(world, pid);
	CHECK(!kill(pid, SIGCONT));
	finish(world, pid);
	crash_world_recover(world);
	crash_world_end(world);
	ksm_add_relaxed(&crash_tally->stops, there);
	return there;
}

/* The boundaries that are to be met. */
static void choose(const struct trace *trace)
{
	size_t state = 0, states = asked.states ? *trace->state_count : 0;
	for (size_t k = 0; k < *trace->count; k++) {
		bool is_state = state < states && trace->states[state] == k;
		state += is_state;
		if (is_state || (asked.every && k >= asked.from && (k - asked.from) % asked.every == 0))
			trace->chosen[(*trace->chosen_count)++] = k;
	}
}

/*
 * Each round is a process's whole life, and all begin alike: what the core remembers for the sake of the process (that a
 * handler is installed, what a control group allows) would make the second way differ from the first.
 */
static pid_t begin_round(void)
{
	fflush(NULL);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		prctl(PR_SET_CHILD_SUBREAPER, 1);
		setpgid(0, 0); /* with all that it starts */
	}
	return pid;
}

static int end_round(pid_t pid)
{
	int status;
	CHECK(waitpid(pid, &status, 0) == pid);
	kill(-pid, SIGKILL); /* children of a victim outlive a round that has failed */
	if (WIFSIGNALED(status))
		FAIL("%s: the round was ended by signal %d%s", asked.operation->name, WTERMSIG(status),
		     WTERMSIG(status) == SIGALRM ? ": somebody waits for ever" : "");
	return WEXITSTATUS(status);
}

/* false: the victim went another way. */
static bool meet(const struct trace *trace, size_t boundary, int attempt)
{
	struct world world = {0};
	pid_t pid = begin_round();
	if (pid == 0)
		exit((asked.stop ? stop_at : kill_at)(&world, trace, boundary, attempt) ? 0 : STRAYED);
	int status = end_round(pid);
	if (status && status != STRAYED)
		exit(status);
	return !status;
}

static void work(const struct trace *trace, unsigned job)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (size_t n = job; n < *trace->chosen_count; n += asked.jobs) {
		at_boundary = trace->chosen[n];
		bool there = false;
		for (int attempt = 0; attempt < ATTEMPTS && !there; attempt++) {
			there = meet(trace, at_boundary, attempt);
			if (!there)
				ksm_add_relaxed(&crash_tally->strays, 1);
		}
		if (!there)
			FAIL("%s: the victim goes another way every time", asked.operation->name);
	}
}

static int run(void)
{
	struct trace trace = crash_trace_new();
	struct world world = {0};
	uint64_t began = ksm_os_now_ns();
	pid_t recorder = begin_round();
	if (recorder == 0) {
		record(&world, &trace);
		exit(0);
	}
	if (end_round(recorder))
		return 1;
	if (asked.sample) {
		asked.every = *trace.count / asked.sample | 1;
		asked.from %= asked.every;
	} else if (!asked.every && !asked.states) {
		asked.every = 1;
	}
	pid_t planner = begin_round(); /* takes much memory, and this process stays what it was */
	if (planner == 0) {
		crash_find_ways(&trace);
		choose(&trace);
		exit(0);
	}
	if (end_round(planner))
		return 1;
	double recorded = (double)(ksm_os_now_ns() - began) / 1e9;
	pid_t jobs[JOBS_MOST];
	fflush(NULL);
	for (unsigned job = 0; job < asked.jobs; job++) {
		jobs[job] = fork();
		CHECK(jobs[job] >= 0);
		if (jobs[job] == 0) {
			work(&trace, job);
			exit(0);
		}
	}
	int failed = 0, status;
	for (unsigned job = 0; job < asked.jobs; job++) {
		CHECK(waitpid(jobs[job], &status, 0) == jobs[job]);
		failed |= status;
	}
	const struct tally *t = crash_tally;
	printf("operation=%s boundaries=%zu states=%zu every=%zu from=%zu chosen=%zu kills=%llu stops=%llu strays=%llu "
	       "steps=%llu "
	       "mapped=%llu half_written=%llu "
	       "half_swept=%llu claims=%llu join_locks=%llu born=%llu freed=%llu refused=%llu detours=%llu "
	       "recorded=%.2f seconds=%.2f\n",
	       asked.operation->name, *trace.count, *trace.state_count, asked.every, asked.every ? asked.from : 0,
	       *trace.chosen_count, (unsigned long long)t->kills, (unsigned long long)t->stops,
	       (unsigned long long)t->strays, (unsigned long long)t->steps, (unsigned long long)t->mapped,
	       (unsigned long long)t->half_written, (unsigned long long)t->half_swept, (unsigned long long)t->claims,
	       (unsigned long long)t->join_locks, (unsigned long long)t->born, (unsigned long long)t->freed,
	       (unsigned long long)t->refused, (unsigned long long)t->detours, recorded,
	       (double)(ksm_os_now_ns() - began) / 1e9);
	return failed ? 1 : 0;
}

/*
 * The same instructions in every round: names of functions are looked up before the first one, and no instruction that
 * repeats itself fills memory, for it would be a boundary for each byte.
 */
static void begin_again(char **argv)
{
	if (getenv("LD_BIND_NOW"))
		return;
	CHECK(!setenv("LD_BIND_NOW", "1", 1));
	CHECK(!setenv("GLIBC_TUNABLES",
		      "glibc.cpu.x86_rep_stosb_threshold=0x40000000:glibc.cpu.x86_rep_movsb_threshold=0x40000000", 1));
	execv("/proc/self/exe", argv);
	FAIL("execv: %s", strerror(errno));
}

static int usage(void)
{
	fprintf(stderr,
		"usage: crash --rendezvous DIRECTORY --operation NAME [--stop] [--every N | --sample N] [--from N]\n"
		"             [--states] [--jobs N] [--plant BUG] [--patience SECONDS]\n"
		"       crash --list\n");
	return 2;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"rendezvous", required_argument, NULL, 'r'},
		{"operation", required_argument, NULL, 'o'},
		{"stop", no_argument, NULL, 's'},
		{"every", required_argument, NULL, 'e'},
		{"from", required_argument, NULL, 'f'},
		{"jobs", required_argument, NULL, 'j'},
		{"list", no_argument, NULL, 'l'},
		{"states", no_argument, NULL, 't'},
		{"sample", required_argument, NULL, 'S'},
		{"plant", required_argument, NULL, 'p'},
		{"patience", required_argument, NULL, 'P'},
		{0},
	};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		switch (option) {
		case 'r':
			asked.rendezvous = optarg;
			break;
		case 'o':
			for (size_t i = 0; i < crash_operation_count; i++)
				if (!strcmp(optarg, crash_operations[i].name))
					asked.operation = &crash_operations[i];
			break;
		case 's':
			asked.stop = true;
			break;
		case 'e':
			asked.every = strtoul(optarg, NULL, 10);
			break;
		case 'f':
			asked.from = strtoul(optarg, NULL, 10);
			break;
		case 'S':
			asked.sample = strtoul(optarg, NULL, 10);
			break;
		case 'j':
			asked.jobs = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 't':
			asked.states = true;
			break;
		case 'p':
			for (size_t i = 0; i < crash_plant_count; i++)
				if (!strcmp(optarg, crash_plants[i].name))
					crash_planted = &crash_plants[i];
			if (!crash_planted)
				return usage();
			*crash_planted->on = true;
			break;
		case 'P':
			asked.patience = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 'l':
			for (size_t i = 0; i < crash_operation_count; i++)
				puts(crash_operations[i].name);
			return 0;
		default:
			return usage();
		}
	}
	if (!asked.rendezvous || !asked.operation || !asked.jobs || asked.jobs > JOBS_MOST)
		return usage();
	begin_again(argv);
	crash_tally = mmap(NULL, KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(crash_tally != MAP_FAILED);
	return run();
}
