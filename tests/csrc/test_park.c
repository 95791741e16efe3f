/* SPDX-License-Identifier: MIT */
#include "parking.h"

#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>

#define EXECS 50

/* ---- whoever waits for something ------------------------------------------------------------------------------------ */

static int polls(struct parking_thread *self)
{
	char byte;
	struct pollfd set = {.fd = self->in, .events = POLLIN};
	if (poll(&set, 1, 5) == 1)
		CHECK_EQ(read(self->in, &byte, 1), 1);
	return 0;
}

static int reads(struct parking_thread *self)
{
	return read(self->in, self->more, 64) <= 0;
}

static int receives(struct parking_thread *self)
{
	return recv(self->in, self->more, 64, 0) <= 0;
}

static int locks(struct parking_thread *self)
{
	pthread_mutex_lock(self->more);
	nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
	pthread_mutex_unlock(self->more);
	return 0;
}

static int allocates(struct parking_thread *self)
{
	free(self->more);
	self->more = malloc(100000 + *self->count % 1000);
	return 0;
}

/* A process of its own writes into these, all the time, until the test ends. */
static void feed(const int *fds, size_t count)
{
	if (kit_fork())
		return;
	signal(SIGPIPE, SIG_DFL);
	for (char bytes[64];;) {
		memset(bytes, (int)random(), sizeof(bytes));
		for (size_t i = 0; i < count; i++)
			if (write(fds[i], bytes, sizeof(bytes)) < 0 && errno != EAGAIN)
				_exit(0);
		ksm_os_sleep_ns(100000);
	}
}

/* How many of 100 looks at the page, 300 µs apart, see it change; in a stop or without. */
static int changes(struct ksm_park *park, bool stop)
{
	char was[KSM_PAGE_SIZE];
	int n = 0;
	for (int i = 0; i < 100; i++) {
		if (stop)
			parking_stop(park);
		memcpy(was, parking_counts, KSM_PAGE_SIZE);
		ksm_os_sleep_ns(300000);
		n += memcmp(was, parking_counts, KSM_PAGE_SIZE) != 0;
		if (stop)
			ksm_park_end(park);
		ksm_os_sleep_ns(100000);
	}
	return n;
}

TEST(nothing_changes_in_a_stop)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	int pipes[2][2], sockets[2], far[3];
	CHECK_SYS(pipe(pipes[0]));
	CHECK_SYS(pipe(pipes[1]));
	CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
	for (int i = 0; i < 2; i++)
		fcntl(far[i] = pipes[i][1], F_SETFL, O_NONBLOCK);
	fcntl(far[2] = sockets[1], F_SETFL, O_NONBLOCK);
	feed(far, 3);
	struct ksm_park park = parking_lot();
	parking_start(parking_spin, -1, -1, NULL);
	char *page = (char *)parking_counts + 2048; /* what comes in is part of what must not change */
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	parking_start(polls, pipes[0][0], -1, NULL);
	parking_start(reads, pipes[1][0], -1, page);
	parking_start(receives, sockets[0], -1, page + 64);
	parking_start(locks, -1, -1, &lock);
	parking_start(locks, -1, -1, &lock);
	parking_start(allocates, -1, -1, NULL);
	parking_all_moved();
	CHECK_EQ(changes(&park, true), 0);
	CHECK_GT(changes(&park, false), 0); /* the test can tell */
	CHECK_EQ(park.stops, 100);
	parking_all_moved();
	parking_end();
	ksm_park_destroy(&park);
}

/* ---- threads that come and go -------------------------------------------------------------------------------------- */

static void *short_life(void *at)
{
	for (int i = 0; i < 20; i++)
		ksm_add_relaxed((uint64_t *)at, 1);
	return NULL;
}

static int makes_threads(struct parking_thread *self)
{
	pthread_t threads[4];
	for (int i = 0; i < 4; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, short_life, (void *)(self->count + 1 + i)), 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	return 0;
}

TEST(threads_that_come_and_go)
{
	struct ksm_park park = parking_lot();
	for (int i = 0; i < 3; i++)
		parking_start(makes_threads, -1, -1, NULL);
	parking_all_moved();
	uint64_t before = parking_sum();
	while (parking_sum() < before + 10000 * 20) /* ten thousand threads */
		CHECK_EQ(changes(&park, true), 0);
	CHECK_GT(changes(&park, false), 0);
	parking_all_moved();
	printf("%llu stops, %llu failed\n", (unsigned long long)park.stops, (unsigned long long)park.failures);
	parking_end();
	ksm_park_destroy(&park);
}

static void *wait_for_end(void *end)
{
	while (!ksm_load_acquire((uint32_t *)end))
		ksm_os_word_wait(end, 0, 1000000000);
	return NULL;
}

TEST(a_thousand_threads)
{
	static pthread_t threads[1000];
	static uint32_t end;
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 << 10);
	struct ksm_park park = parking_lot();
	for (size_t i = 0; i < KSM_COUNT(threads); i++)
		CHECK_EQ(pthread_create(&threads[i], &small, wait_for_end, &end), 0);
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	for (int i = 0; i < 10; i++) {
		double begin = harness_now();
		parking_stop(&park);
		double took = harness_now() - begin;
		uint64_t sum = parking_sum();
		kit_sleep_ms(2);
		CHECK_EQ(parking_sum(), sum);
		ksm_park_end(&park);
		printf("%.1f ms\n", took * 1e3);
	}
	ksm_store_release(&end, 1);
	ksm_os_word_wake_sigsafe(&end, INT32_MAX);
	for (size_t i = 0; i < KSM_COUNT(threads); i++)
		pthread_join(threads[i], NULL);
	parking_end();
	ksm_park_destroy(&park);
}

/* ---- who does not stop ------------------------------------------------------------------------------------------------ */

/* Blocks everything while *more is 1. */
static int blocks(struct parking_thread *self)
{
	sigset_t all, old;
	if (ksm_load_acquire((uint32_t *)self->more) == 1) {
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &old);
		ksm_store_release((uint32_t *)self->more, 2);
		while (ksm_load_acquire((uint32_t *)self->more) == 2)
			ksm_os_sleep_ns(100000);
		pthread_sigmask(SIG_SETMASK, &old, NULL);
	}
	ksm_os_sleep_ns(100000);
	return 0;
}

static void check_refusal(struct ksm_park *park, int code, int tid, const char *why)
{
	char number[32];
	snprintf(number, sizeof(number), "thread %d (", tid);
	CHECK_EQ(ksm_park_begin(park), code);
	if (!strstr(park->reason, number) || !strstr(park->reason, why))
		FAIL("reason: %s", park->reason);
}

TEST(a_thread_that_blocks_the_signal)
{
	uint32_t block = 1;
	struct ksm_park park = parking_lot();
	struct parking_thread *blocker = parking_start(blocks, -1, -1, &block);
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	KIT_WAIT(10, ksm_load_acquire(&block) == 2);
	check_refusal(&park, KSM_EUNSTOPPABLE, blocker->tid, "blocks the signal");
	CHECK_EQ(park.failures, 1);
	CHECK_GT(park.retry_at_ns, ksm_os_now_ns());
	for (size_t i = 1; i < parking_threads; i++) { /* the others run */
		uint64_t was = *parking_all[i].count;
		KIT_WAIT(10, *parking_all[i].count > was);
	}
	/* While it is known to block it nobody is sent anything. */
	ksm_os_fault_clear();
	for (int i = 0; i < 3; i++) {
		park.retry_at_ns = 0;
		check_refusal(&park, KSM_EUNSTOPPABLE, blocker->tid, "blocks the signal");
	}
	CHECK_EQ(ksm_os_fault_calls(KSM_OS_THREAD_SIGNAL), 0);
	ksm_store_release(&block, 0);
	KIT_WAIT(10, *blocker->count > 2);
	parking_stop(&park);
	CHECK_STR_EQ(park.reason, "");
	ksm_park_end(&park);
	CHECK_GT(ksm_os_fault_calls(KSM_OS_THREAD_SIGNAL), 0);
	CHECK_EQ(park.in_a_row, 0);
	parking_end();
	ksm_park_destroy(&park);
}

TEST(attempts_come_later_and_later)
{
	static const unsigned delays_ms[] = {10, 100, 1000, 1000, 1000}; /* nobody else is disturbed */
	uint32_t block = 1;
	struct ksm_park park = parking_lot();
	struct parking_thread *blocker = parking_start(blocks, -1, -1, &block);
	KIT_WAIT(10, ksm_load_acquire(&block) == 2);
	for (size_t i = 0; i < KSM_COUNT(delays_ms); i++) {
		uint64_t before = ksm_os_now_ns(), delay = delays_ms[i] * 1000000ull;
		check_refusal(&park, KSM_EUNSTOPPABLE, blocker->tid, "blocks");
		CHECK_EQ(park.in_a_row, i + 1);
		CHECK_GE(park.retry_at_ns, before + delay);
		CHECK_LE(park.retry_at_ns, ksm_os_now_ns() + delay);
		uint64_t failures = park.failures;
		if (i) /* in the meantime it only says it again */
			check_refusal(&park, KSM_EUNSTOPPABLE, blocker->tid, "blocks");
		CHECK_EQ(park.failures, failures);
		park.retry_at_ns = 0;
	}
	ksm_store_release(&block, 0);
	KIT_WAIT(10, *blocker->count > 2);
	parking_stop(&park);
	ksm_park_end(&park);
	parking_end();
	ksm_park_destroy(&park);
}

static int vforks(struct parking_thread *self)
{
	pid_t child = vfork();
	if (child == 0) {
		ksm_store_release((uint32_t *)self->more, 1);
		ksm_os_sleep_ns(400000000);
		ksm_store_release((uint32_t *)self->more, 2);
		_exit(0);
	}
	CHECK_CHILD(child);
	ksm_store_release((uint32_t *)self->more, 3);
	return 1;
}

TEST(a_child_of_vfork)
{
	uint32_t at = 0;
	struct ksm_park park = parking_lot();
	struct parking_thread *thread = parking_start(vforks, -1, -1, &at);
	KIT_WAIT(10, ksm_load_acquire(&at) == 1);
	check_refusal(&park, KSM_EUNSTOPPABLE, thread->tid, "vfork");
	while (ksm_load_acquire(&at) == 1) { /* never while the child could write */
		park.retry_at_ns = 0;
		if (!ksm_park_begin(&park)) {
			CHECK_GE(ksm_load_acquire(&at), 2);
			ksm_park_end(&park);
		}
	}
	parking_stop(&park);
	ksm_park_end(&park);
	parking_end();
	ksm_park_destroy(&park);
}

TEST(a_thread_under_a_debugger)
{
	struct ksm_park park = parking_lot();
	struct parking_thread *thread = parking_start(parking_nap, -1, -1, NULL);
	uint32_t *steps = kit_steps();
	pid_t debugger = kit_fork();
	if (debugger == 0) {
		CHECK_SYS(ptrace(PTRACE_SEIZE, thread->tid, NULL, NULL));
		CHECK_SYS(ptrace(PTRACE_INTERRUPT, thread->tid, NULL, NULL));
		CHECK_EQ(waitpid(thread->tid, NULL, __WALL), thread->tid);
		kit_reach(steps, 1);
		kit_await(steps, 2);
		CHECK_SYS(ptrace(PTRACE_DETACH, thread->tid, NULL, NULL));
		_exit(0);
	}
	kit_await(steps, 1);
	check_refusal(&park, KSM_EUNSTOPPABLE, thread->tid, "debugger");
	kit_reach(steps, 2);
	CHECK_CHILD(debugger);
	parking_stop(&park);
	ksm_park_end(&park);
	parking_end();
	ksm_park_destroy(&park);
}

/* A stop is under way while the whole process is stopped and goes on. */
TEST(a_stopped_process_goes_on)
{
	pid_t test = getpid();
	struct ksm_park park = parking_lot();
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	pid_t other = kit_fork();
	if (other == 0)
		for (;;) {
			kill(test, SIGSTOP);
			ksm_os_sleep_ns(3000000);
			kill(test, SIGCONT);
			ksm_os_sleep_ns(2000000);
		}
	for (int i = 0; i < 100; i++) {
		parking_stop(&park);
		uint64_t sum = parking_sum();
		ksm_os_sleep_ns(500000);
		CHECK_EQ(parking_sum(), sum);
		ksm_park_end(&park);
	}
	kit_kill(other);
	kill(test, SIGCONT);
	parking_end();
	ksm_park_destroy(&park);
}

TEST(no_room_for_signals)
{
	struct rlimit was, none = {0, 0};
	struct ksm_park park = parking_lot();
	parking_start(parking_nap, -1, -1, NULL);
	CHECK_SYS(getrlimit(RLIMIT_SIGPENDING, &was));
	none.rlim_max = was.rlim_max;
	CHECK_SYS(setrlimit(RLIMIT_SIGPENDING, &none));
	CHECK_EQ(ksm_park_begin(&park), KSM_EUNSTOPPABLE);
	CHECK(strstr(park.reason, "RLIMIT_SIGPENDING"));
	CHECK_SYS(setrlimit(RLIMIT_SIGPENDING, &was));
	parking_stop(&park);
	ksm_park_end(&park);
	parking_all_moved();
	parking_end();
	ksm_park_destroy(&park);
}

/* ---- the main thread has ended ----------------------------------------------------------------------------------------- */

static void *outlive(void *leader)
{
	char path[64], text[256] = "";
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", *(int *)leader);
	double until = harness_now() + 10;
	while (!strstr(text, ") Z") && harness_now() < until)
		ksm_os_read_file(AT_FDCWD, path, text, sizeof(text));
	CHECK(strstr(text, ") Z"));
	struct ksm_park park = parking_lot();
	ksm_os_fault_clear();
	for (int i = 0; i < 20; i++) {
		parking_stop(&park);
		uint64_t sum = parking_sum();
		ksm_os_sleep_ns(300000);
		CHECK_EQ(parking_sum(), sum);
		ksm_park_end(&park);
		ksm_os_sleep_ns(100000);
	}
	/* It is sent to once: signals would pile up in it. */
	CHECK_LE(ksm_os_fault_calls(KSM_OS_THREAD_SIGNAL), 2 * (park.stops + park.failures) + 1);
	ksm_park_destroy(&park);
	parking_end();
	exit(0);
}

TEST(a_main_thread_that_has_ended)
{
	pid_t child = kit_fork();
	if (child == 0) {
		static int leader;
		pthread_t thread;
		leader = ksm_os_tid();
		parking_start(parking_spin, -1, -1, NULL);
		parking_start(parking_nap, -1, -1, NULL);
		CHECK_EQ(pthread_create(&thread, NULL, outlive, &leader), 0);
		pthread_exit(NULL);
	}
	CHECK_CHILD(child);
}

/* ---- several scanners, forks ------------------------------------------------------------------------------------------------ */

struct scanner {
	pthread_t thread;
	uint32_t end;
	uint64_t stops, failures;
	uint64_t word; /* its own */
};

static void *scan(void *argument)
{
	struct scanner *self = argument;
	ksm_park_exempt(true);
	CHECK(ksm_park_is_exempt(ksm_os_tid()));
	struct ksm_park park = parking_lot();
	while (!ksm_load_acquire(&self->end)) {
		parking_stop(&park);
		uint64_t sum = parking_sum();
		ksm_os_sleep_ns(100000);
		CHECK_EQ(parking_sum(), sum);
		ksm_park_end(&park);
		ksm_os_sleep_ns(KSM_MIN(ksm_park_rest_ns(&park), 300000));
		ksm_add_relaxed(&self->word, 1);
	}
	self->stops = park.stops;
	self->failures = park.failures;
	ksm_park_destroy(&park);
	ksm_park_exempt(false);
	CHECK(!ksm_park_is_exempt(ksm_os_tid()));
	return NULL;
}

static void start_scanner(struct scanner *scanner)
{
	sigset_t all, old;
	*scanner = (struct scanner){0};
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	CHECK_EQ(pthread_create(&scanner->thread, NULL, scan, scanner), 0);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void end_scanner(struct scanner *scanner)
{
	ksm_store_release(&scanner->end, 1);
	pthread_join(scanner->thread, NULL);
}

TEST(scanners_take_turns)
{
	struct scanner scanners[3];
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	for (int round = 0; round < 10; round++) { /* they come and go, too */
		for (int i = 0; i < 3; i++)
			start_scanner(&scanners[i]);
		for (int i = 0; i < 3; i++)
			KIT_WAIT(20, ksm_load_relaxed(&scanners[i].word) > 5);
		for (int i = 0; i < 3; i++) {
			end_scanner(&scanners[i]);
			CHECK_GT(scanners[i].stops, 5);
		}
	}
	parking_all_moved();
	parking_end();
}

/* Whoever is held, and calls exec. */
static void *stop_all_the_time(void *nothing)
{
	ksm_park_exempt(true);
	struct ksm_park park = parking_lot();
	for (;;) {
		park.retry_at_ns = 0;
		if (!ksm_park_begin(&park))
			ksm_park_end(&park);
	}
	return nothing;
}

static void start_stopping(void)
{
	pthread_t thread;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	CHECK_EQ(pthread_create(&thread, NULL, stop_all_the_time, NULL), 0);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static int status_of_exec(bool announced, long ns)
{
	int status;
	pid_t child = kit_fork();
	if (child == 0) {
		start_stopping();
		ksm_os_sleep_ns(1000000 + (uint64_t)ns);
		if (announced)
			ksm_park_before_exec();
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	return status;
}

/* PARK-6, and that it is needed. */
TEST(exec_is_announced)
{
	int died = 0;
	for (int i = 0; i < EXECS; i++)
		CHECK_EQ(status_of_exec(true, random() % 1000000), 0);
	for (int i = 0; i < 20 * EXECS && !died; i++)
		died = status_of_exec(false, random() % 1000000);
	CHECK(WIFSIGNALED(died) && WTERMSIG(died) >= SIGRTMIN);
}

TEST(nobody_is_held_before_exec)
{
	struct ksm_park park = parking_lot();
	parking_start(parking_nap, -1, -1, NULL);
	parking_stop(&park);
	ksm_park_end(&park);
	ksm_park_before_exec();
	ksm_os_fault_clear();
	CHECK_EQ(ksm_park_begin(&park), KSM_EUNSTOPPABLE);
	CHECK(strstr(park.reason, "exec"));
	CHECK_EQ(ksm_os_fault_calls(KSM_OS_THREAD_SIGNAL), 0);
	ksm_park_fork_child(); /* as if in a child: that one is not about to call exec */
	park.retry_at_ns = 0;
	parking_stop(&park);
	ksm_park_end(&park);
	parking_end();
	ksm_park_destroy(&park);
}

TEST(forks_in_between)
{
	struct scanner scanner;
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	for (int round = 0; round < 10; round++) {
		start_scanner(&scanner);
		KIT_WAIT(20, ksm_load_relaxed(&scanner.word) > 3);
		end_scanner(&scanner); /* as before every fork */
		pid_t child = kit_fork();
		if (child == 0) {
			ksm_park_fork_child();
			parking_threads = 0;
			parking_start(parking_spin, -1, -1, NULL);
			start_scanner(&scanner);
			KIT_WAIT(20, ksm_load_relaxed(&scanner.word) > 3);
			end_scanner(&scanner);
			parking_end();
			_exit(0);
		}
		CHECK_CHILD(child);
	}
	parking_end();
}

/* ---- pace and failing calls --------------------------------------------------------------------------------------------------- */

TEST(the_program_runs_most_of_the_time)
{
	struct ksm_park park = parking_lot();
	parking_start(parking_nap, -1, -1, NULL);
	CHECK_EQ(ksm_park_rest_ns(&park), 0);
	parking_stop(&park);
	kit_sleep_ms(20);
	ksm_park_end(&park);
	CHECK_GT(ksm_park_rest_ns(&park), 60 * 1000000ull);
	CHECK_LE(ksm_park_rest_ns(&park), 4 * (ksm_os_now_ns() - park.begun_ns));
	parking_end();
	ksm_park_destroy(&park);
}

/* Two stops in a row owe the rest of both. */
TEST(what_is_owed_adds_up)
{
	struct ksm_park park = parking_lot();
	parking_start(parking_nap, -1, -1, NULL);
	for (int i = 0; i < 2; i++) {
		parking_stop(&park);
		kit_sleep_ms(i ? 1 : 50);
		ksm_park_end(&park);
	}
	CHECK_GT(ksm_park_rest_ns(&park), 4 * 40 * 1000000ull);
	parking_end();
	ksm_park_destroy(&park);
}

TEST(calls_that_fail)
{
	static const enum ksm_os_call calls[] = {KSM_OS_LIST,  KSM_OS_THREAD_SIGNAL, KSM_OS_WORD_WAIT, KSM_OS_READ_LINK,
						 KSM_OS_PREAD, KSM_OS_OPEN,          KSM_OS_STAT,      KSM_OS_COMPARE};
	struct ksm_park park = parking_lot();
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	for (size_t i = 0; i < KSM_COUNT(calls); i++)
		for (uint32_t skip = 0; skip < 40; skip++) {
			ksm_os_fault_clear();
			ksm_os_fault_set(calls[i], skip, 1, -ENOMEM);
			int r = ksm_park_begin(&park);
			uint64_t sum = parking_sum();
			ksm_os_fault_clear();
			if (!r) {
				ksm_os_sleep_ns(200000);
				CHECK_EQ(parking_sum(), sum);
				ksm_park_end(&park);
			}
			park.retry_at_ns = 0;
			parking_all_moved(); /* whatever failed, they run */
		}
	parking_stop(&park);
	ksm_park_end(&park);
	parking_end();
	ksm_park_destroy(&park);
}
