/* SPDX-License-Identifier: MIT */
/*
 * The fault walk: every system call of the core fails in turn, at each call number, with each error that the kernel may
 * give, once and from then on, in every scenario and mode. Each time in a process of its own.
 *
 *	faults --rendezvous DIRECTORY [--seconds N] [--part K/N] [--seed N] [--jobs N] [--scenario NAME] [--mode NAME]
 *	       [--call NAME] [--number N --error N --count N] [--verbose]
 *
 * Without --seconds all of them, or the K-th of N parts; with it a sample. First each kind of call in each scenario,
 * then at random until all are done, or the time is over. --number, --error and --count (0: from now on) name one fault,
 * to see a failure again.
 * Whatever fails: bytes are right, in this process and in a neighbour; nothing hangs; what is not done is told of by an
 * error or a counter; the same works afterwards; and no descriptor, mapping, thread, file or frame is left.
 */
#include "faults.h"

#include "error.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT_S 240  /* a process that has not ended hangs */
#define RELIEF_S 2.0 /* "from now on" is so long: what waits for memory shall get it in the end */
#define JOBS_MOST 32
#define MORE_MOST 30     /* runs, for a kind that a sample has missed */
#define NUMBERS_MOST 400 /* of one kind, looked at */
#define OUTPUT_ROOM 4096

const char *const mode_names[MODES] = {"move", "stop", "segv", "cow"};

static struct {
	const char *directory, *scenario, *mode, *call;
	double seconds;
	uint64_t seed;
	unsigned jobs, part, parts;
	int number, error;
	uint32_t count;
	bool verbose;
} options = {.jobs = 3, .part = 1, .parts = 1, .seed = 1, .number = -1, .count = 1};

/* ---- one process ------------------------------------------------------------------------------------------------ */

/* What is left of us in this process: mappings, descriptors, threads. */
static size_t count_lines(const char *path, const char *with)
{
	char line[512];
	size_t n = 0;
	FILE *file = fopen(path, "re");
	MUST(file);
	while (fgets(line, sizeof(line), file))
		n += strstr(line, with) != NULL;
	fclose(file);
	return n;
}

static size_t count_entries(const char *path)
{
	size_t n = 0;
	DIR *directory = opendir(path);
	MUST(directory);
	while (readdir(directory))
		n++;
	closedir(directory);
	return n;
}

/* To standard error, which is shown with a failure. */
static void print_files(void)
{
	char path[64], target[256];
	for (int fd = 0; fd < 1024; fd++) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		ssize_t n = readlink(path, target, sizeof(target) - 1);
		if (n >= 0)
			fprintf(stderr, "%d: %.*s\n", fd, (int)n, target);
	}
}

static void check_nothing_left(const struct world *w, size_t files)
{
	struct ksm_domain_options domain = world_options(w);
	size_t threads = 0;
	for (int i = 0; i < 100 && (threads = count_entries("/proc/self/task")) != 3; i++)
		ksm_os_sleep_ns(10000000); /* joined, and not quite gone */
	MUST(threads == 3);
	/* A descriptor in the program's table that cannot be looked at is left open: it may be the program's by now. */
	bool unknown = w->fault.call == KSM_OS_STAT || w->fault.call == KSM_OS_READ_LINK;
	if (count_entries("/proc/self/fd") != files && !unknown)
		print_files();
	if (count_entries("/proc/self/fd") != files && !unknown)
		fail("%zu descriptors are open, not %zu", count_entries("/proc/self/fd"), files);
	MUST(count_lines("/proc/self/maps", "/memfd:ksmalloc") == 0);
	MUST(count_lines("/proc/self/maps", domain.name) == 0);
	int r = ksm_domain_clean(&domain);
	if (r && r != -ENOENT)
		fail("the domain cannot be cleaned away: %s", ksm_error_name(r));
}

/* Before the fault is set anew, which begins to count again. */
static void add_hits(struct shared *shared, enum ksm_os_call call)
{
	__atomic_add_fetch(&shared->hits, ksm_os_fault_hits(call), __ATOMIC_RELAXED);
}

static void run_world(const struct scenario *scenario, struct world *w)
{
	size_t files = count_entries("/proc/self/fd");
	w->alone = scenario->alone;
	if (!w->alone)
		neighbour_start(w);
	ksm_os_fault_share(w->shared->kinds);
	if (!scenario->bare)
		world_create(w);
	ksm_os_fault_clear();
	if (w->fault.count)
		ksm_os_fault_set(w->fault.call, w->fault.number, w->fault.count, w->fault.error);
	double armed = now();
	__atomic_store(&w->shared->armed, &armed, __ATOMIC_RELEASE);
	scenario->run(w);
	for (int call = 0; call < KSM_OS_CALL_COUNT; call++)
		w->shared->counts[call] = ksm_os_fault_calls((enum ksm_os_call)call);
	add_hits(w->shared, w->fault.call);
	ksm_os_fault_clear();
	w->strict = true;
	w->said = false;
	if (w->touching)
		world_check_awake(w);
	scenario->run(w);
	if (w->touching) {
		world_stop_toucher(w);
		world_check_fields(w);
	}
	if (!scenario->bare)
		world_destroy(w);
	if (!w->alone)
		neighbour_finish(w);
	check_nothing_left(w, files);
	fflush(NULL);
	_exit(0);
}

/* ---- processes side by side ----------------------------------------------------------------------------------------- */

struct job {
	pid_t pid;
	const struct scenario *scenario;
	enum mode mode;
	struct fault fault;
	struct shared *shared;
	int output;            /* a memory file */
	double started, ended; /* 0: not yet */
	char name[32];
};

static struct job jobs[JOBS_MOST];
static void *our_kinds; /* books in which no fault stands */
static struct {
	uint64_t runs, fired, said, ended, failed, merged, lost;
	uint64_t by_call[KSM_OS_CALL_COUNT];
} tally;
static unsigned names;

/* Errors from now on against which there is no way out: where the source says so, it ends the process with a message. */
static bool ended_as_documented(const struct job *job, int status, const char *text)
{
	static const char *const ends[] = {
		"the scratch area could not be mapped again",
		"a page taken out for comparing could not be put back",
		"a hole in the program's memory could not be filled",
		"a page whose mapping was lost could not be filled again",
		"anonymous memory could not take the place of a mapping",
		"no memory for a process that has no seat",
		"attempt < 10000",
	};
	bool aborted = (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) || strstr(text, "wait status 0x86") ||
		       strstr(text, "wait status 0x6\n");
	if (job->fault.count != FROM_NOW_ON || !aborted)
		return false;
	for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++)
		if (strstr(text, ends[i]))
			return true;
	return false;
}

static void describe(const struct job *job, FILE *to)
{
	if (!job->fault.count)
		fprintf(to, "--scenario %s --mode %s without a fault", job->scenario->name, mode_names[job->mode]);
	else
		fprintf(to, "--scenario %s --mode %s --call %s --number %u --error %d --count %u", job->scenario->name,
			mode_names[job->mode], ksm_os_call_name(job->fault.call), job->fault.number, -job->fault.error,
			job->fault.count == FROM_NOW_ON ? 0 : job->fault.count);
}

static void finish(struct job *job, int status)
{
	char text[OUTPUT_ROOM], path[80];
	named_path(job->name, path);
	unlink(path); /* who was killed has left it */
	ssize_t n = pread(job->output, text, sizeof(text) - 1, 0);
	text[n > 0 ? n : 0] = 0;
	job->pid = 0;
	tally.runs++;
	tally.fired += job->shared->hits > 0;
	tally.by_call[job->fault.call] += job->shared->hits > 0;
	tally.said += job->shared->said[0] != 0;
	tally.merged += job->shared->merged;
	tally.lost += job->shared->lost;
	if (status && ended_as_documented(job, status, text)) {
		tally.ended++;
	} else if (status) {
		tally.failed++;
		printf("FAILED  ");
		describe(job, stdout);
		printf(": wait status 0x%x\n%s\n", (unsigned)status, text);
	} else if (options.verbose) {
		describe(job, stdout);
		printf(": %.3f s, %u hits, %u merged, %s\n%s", now() - job->started, job->shared->hits,
		       job->shared->merged, job->shared->said, text);
	}
	fflush(stdout);
}

/* One of the jobs ends, or nothing happens for a moment. */
static void look_after(void)
{
	for (size_t i = 0; i < options.jobs; i++) {
		struct job *job = &jobs[i];
		if (!job->pid)
			continue;
		double age = now() - job->started;
		siginfo_t info = {0};
		if (!job->ended && !waitid(P_PID, (id_t)job->pid, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid) {
			kill(-job->pid, SIGKILL);
			job->ended = now();
		}
		if (job->ended) {
			if (now() - job->ended > CHILD_REST_NS / 1e9)
				finish(job, child_reap(job->pid));
			continue;
		}
		if (age > LIMIT_S) {
			dprintf(job->output, "it hangs\n");
			kill(-job->pid, SIGKILL);
		}
	}
}

/* A fault from now on comes to its end after all. */
static void relieve(void)
{
	for (size_t i = 0; i < options.jobs; i++) {
		struct job *job = &jobs[i];
		double armed;
		__atomic_load(&job->shared->armed, &armed, __ATOMIC_ACQUIRE);
		if (!job->pid || job->fault.count != FROM_NOW_ON || job->shared->relieved || !armed ||
		    now() - armed < RELIEF_S)
			continue;
		job->shared->relieved = 1;
		ksm_os_fault_share(job->shared->kinds);
		add_hits(job->shared, job->fault.call);
		ksm_os_fault_set(job->fault.call, 0, 0, 0);
		ksm_os_fault_share(our_kinds);
	}
}

static struct job *free_job(void)
{
	for (;;) {
		look_after();
		relieve();
		for (size_t i = 0; i < options.jobs; i++)
			if (!jobs[i].pid)
				return &jobs[i];
		ksm_os_sleep_ns(300000);
	}
}

static struct job *start(const struct scenario *scenario, enum mode mode, const struct fault *fault)
{
	struct job *job = free_job();
	size_t room = sizeof(struct shared) + ksm_os_fault_share(NULL);
	memset(job->shared, 0, room);
	MUST(!ftruncate(job->output, 0) && !lseek(job->output, 0, SEEK_SET));
	job->scenario = scenario;
	job->mode = mode;
	job->fault = *fault;
	job->started = now();
	job->ended = 0;
	snprintf(job->name, sizeof(job->name), "w%d-%u", (int)getpid(), names++);
	fflush(NULL);
	job->pid = fork();
	MUST(job->pid >= 0);
	if (!job->pid) {
		struct world w = {.mode = mode,
				  .directory = options.directory,
				  .domain_name = job->name,
				  .shared = job->shared,
				  .fault = *fault};
		setpgid(0, 0);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		dup2(job->output, STDOUT_FILENO);
		dup2(job->output, STDERR_FILENO);
		run_world(scenario, &w);
	}
	setpgid(job->pid, job->pid);
	return job;
}

static void await_all(void)
{
	for (bool any = true; any;) {
		any = false;
		look_after();
		relieve();
		for (size_t i = 0; i < options.jobs; i++)
			any |= jobs[i].pid != 0;
		ksm_os_sleep_ns(300000);
	}
}

/* ---- the walk ---------------------------------------------------------------------------------------------------------- */

static size_t count_scenarios(void)
{
	size_t n = 0;
	while (scenarios[n].name)
		n++;
	return n;
}

static bool is_wanted(const char *wanted, const char *name)
{
	return !wanted || !strcmp(wanted, name);
}

/* How often each call is made without faults. */
static uint32_t (*measure(void))[MODES][KSM_OS_CALL_COUNT]
{
	uint32_t(*counts)[MODES][KSM_OS_CALL_COUNT] = calloc(count_scenarios(), sizeof(*counts));
	unsigned together = options.jobs;
	MUST(counts);
	options.jobs = 1;
	for (size_t s = 0; scenarios[s].name; s++)
		for (enum mode mode = 0; mode < MODES; mode++) {
			struct fault none = {0};
			if (!is_wanted(options.scenario, scenarios[s].name) ||
			    !is_wanted(options.mode, mode_names[mode]))
				continue;
			struct job *job = start(&scenarios[s], mode, &none);
			await_all();
			memcpy(counts[s][mode], job->shared->counts, sizeof(counts[s][mode]));
		}
	options.jobs = together;
	return counts;
}

struct one {
	uint16_t scenario, mode;
	struct fault fault;
	bool first; /* of its call and scenario */
};

static uint64_t random_state;

static uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static uint64_t random_next(void)
{
	return mix(random_state += 0x9e3779b97f4a7c15ull);
}

/* By what it is, not by where it stands in the list: how often a call is made differs from run to run. */
static bool is_of_our_part(const struct one *one)
{
	const struct fault *fault = &one->fault;
	uint64_t z = mix((uint64_t)one->scenario << 32 | one->mode) + (uint64_t)fault->call;
	z = mix(z + ((uint64_t)fault->number << 32)) + (uint64_t)(uint32_t)fault->error;
	return mix(z + (uint64_t)fault->count) % options.parts == options.part - 1;
}

static size_t list_all(uint32_t (*counts)[MODES][KSM_OS_CALL_COUNT], struct one **out)
{
	size_t n = 0, room = 0;
	for (size_t s = 0; scenarios[s].name; s++)
		for (enum mode mode = 0; mode < MODES; mode++)
			for (enum ksm_os_call call = 0; call < KSM_OS_CALL_COUNT; call++) {
				size_t errors;
				const int *list = ksm_os_fault_errors(call, &errors);
				uint32_t calls =
					counts[s][mode][call] < NUMBERS_MOST ? counts[s][mode][call] : NUMBERS_MOST;
				if (!is_wanted(options.call, ksm_os_call_name(call)))
					continue;
				for (size_t i = 0; i < calls * errors * 2; i++) {
					if (n == room) {
						room = room ? 2 * room : 65536;
						*out = realloc(*out, room * sizeof(**out));
						MUST(*out);
					}
					uint32_t number = (uint32_t)(i / 2 / errors);
					(*out)[n] = (struct one){
						(uint16_t)s,
						(uint16_t)mode,
						{call, number, i % 2 ? FROM_NOW_ON : 1, list[i / 2 % errors]},
						false};
					n += is_of_our_part(&(*out)[n]);
				}
			}
	return n;
}

static void shuffle(struct one *all, size_t n)
{
	static bool seen[64][KSM_OS_CALL_COUNT];
	for (size_t i = n; i > 1; i--) {
		size_t j = random_next() % i;
		struct one swap = all[i - 1];
		all[i - 1] = all[j];
		all[j] = swap;
	}
	size_t front = 0;
	for (size_t i = 0; i < n; i++) {
		bool *at = &seen[all[i].scenario][all[i].fault.call];
		if (*at)
			continue;
		*at = true;
		struct one swap = all[front];
		all[i].first = true;
		all[front++] = all[i];
		if (front - 1 != i)
			all[i] = swap;
	}
}

/* The time is over, but this kind of call has not failed yet: some more of it. */
static bool is_wanting(enum ksm_os_call call)
{
	static unsigned more[KSM_OS_CALL_COUNT];
	return !tally.by_call[call] && more[call]++ < MORE_MOST;
}

static void walk(void)
{
	struct one *all = NULL;
	double begun = now();
	uint32_t(*counts)[MODES][KSM_OS_CALL_COUNT] = measure();
	size_t n = list_all(counts, &all), firsts = 0;
	random_state = options.seed;
	shuffle(all, n);
	for (size_t i = 0; i < n; i++) {
		bool over = options.seconds > 0 && !all[i].first && now() - begun > options.seconds;
		if (over && !is_wanting(all[i].fault.call))
			continue;
		firsts += all[i].first;
		start(&scenarios[all[i].scenario], (enum mode)all[i].mode, &all[i].fault);
		if (!options.seconds && i % 2000 == 1999)
			printf("%zu of %zu after %.0f s, %llu fired, %llu failed\n", i + 1, n, now() - begun,
			       (unsigned long long)tally.fired, (unsigned long long)tally.failed);
	}
	await_all();
	unsigned kinds = 0;
	for (int call = 0; call < KSM_OS_CALL_COUNT; call++)
		kinds += tally.by_call[call] > 0;
	printf("seed=%llu all=%zu firsts=%zu runs=%llu fired=%llu kinds=%u said=%llu ended=%llu lost=%llu merged=%llu "
	       "failed=%llu\n",
	       (unsigned long long)options.seed, n, firsts, (unsigned long long)tally.runs,
	       (unsigned long long)tally.fired, kinds, (unsigned long long)tally.said, (unsigned long long)tally.ended,
	       (unsigned long long)tally.lost, (unsigned long long)tally.merged, (unsigned long long)tally.failed);
	for (int call = 0; call < KSM_OS_CALL_COUNT; call++)
		if (!tally.by_call[call])
			printf("never failed: %s\n", ksm_os_call_name((unsigned)call));
	free(all);
	free(counts);
}

static void one_fault(void)
{
	struct fault fault = {.number = (uint32_t)options.number,
			      .count = options.count ? options.count : FROM_NOW_ON,
			      .error = -options.error};
	while (fault.call < KSM_OS_CALL_COUNT && strcmp(options.call, ksm_os_call_name(fault.call)))
		fault.call++;
	MUST(fault.call < KSM_OS_CALL_COUNT);
	for (size_t s = 0; scenarios[s].name; s++)
		for (enum mode mode = 0; mode < MODES; mode++)
			if (is_wanted(options.scenario, scenarios[s].name) && is_wanted(options.mode, mode_names[mode]))
				start(&scenarios[s], mode, &fault);
	await_all();
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{"rendezvous", 1, 0, 'r'},
		{"seconds", 1, 0, 's'},
		{"seed", 1, 0, 'S'},
		{"jobs", 1, 0, 'j'},
		{"scenario", 1, 0, 'c'},
		{"mode", 1, 0, 'm'},
		{"call", 1, 0, 'k'},
		{"number", 1, 0, 'n'},
		{"error", 1, 0, 'e'},
		{"count", 1, 0, 'C'},
		{"verbose", 0, 0, 'v'},
		{"part", 1, 0, 'p'},
		{0},
	};
	if (argc > 1 && !strcmp(argv[1], "--joiner"))
		return joiner(argc, argv);
	for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
		switch (c) {
		case 'r':
			options.directory = optarg;
			break;
		case 's':
			options.seconds = atof(optarg);
			break;
		case 'S':
			options.seed = strtoull(optarg, NULL, 10);
			break;
		case 'j':
			options.jobs = (unsigned)atoi(optarg);
			break;
		case 'c':
			options.scenario = optarg;
			break;
		case 'm':
			options.mode = optarg;
			break;
		case 'k':
			options.call = optarg;
			break;
		case 'n':
			options.number = atoi(optarg);
			break;
		case 'e':
			options.error = atoi(optarg);
			break;
		case 'C':
			options.count = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'v':
			options.verbose = true;
			break;
		case 'p':
			if (sscanf(optarg, "%u/%u", &options.part, &options.parts) != 2)
				return 2;
			break;
		default:
			return 2;
		}
	}
	if (!options.directory || options.jobs < 1 || options.jobs > JOBS_MOST)
		return 2;
	if (options.part < 1 || options.part > options.parts)
		return 2;
	size_t room = sizeof(struct shared) + ksm_os_fault_share(NULL);
	our_kinds = calloc(1, room);
	MUST(our_kinds);
	ksm_os_fault_share(our_kinds);
	for (size_t i = 0; i < options.jobs; i++) {
		jobs[i].shared = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		jobs[i].output = ksm_os_memfd("output");
		MUST(jobs[i].shared != MAP_FAILED && jobs[i].output >= 0);
	}
	if (options.number >= 0 && options.call)
		one_fault();
	else
		walk();
	return tally.failed > 0;
}
