/* SPDX-License-Identifier: MIT */
/*
 * harness.h: a C test is one program, test_<module>.c, of several cases. Each case runs in a process of its
 * own, because a case may fault, fork, kill itself or leave threads behind.
 *
 *	#include "harness.h"
 *
 *	TEST(two_and_two)
 *	{
 *		CHECK_EQ(2 + 2, 4);
 *	}
 *
 * test_x               runs every case, each in a child with a time limit, and reports
 * test_x --list        prints the names
 * test_x --run NAME    runs one case in this process (for a debugger, and for tests/test_csrc.py)
 *
 * A case passes when it returns. The first CHECK that fails prints where and ends the process it runs in with
 * status 1. So a case that forks looks at its child's end: CHECK_CHILD(pid), or CHECK_KILLED(pid, signal).
 *
 * A limit only keeps a test from hanging for ever; none measures anything. So each is HARNESS_PATIENCE times longer than it
 * says, because a machine may have other things to do; and KSMALLOC_TEST_SLOWER times longer still, which says how many
 * times slower than others this machine is (an emulated one, or under a sanitizer).
 */
#ifndef KSM_TESTS_HARNESS_H
#define KSM_TESTS_HARNESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HARNESS_LIMIT 60 /* seconds a case may take, unless TEST_LIMIT says otherwise */
#define HARNESS_PATIENCE 4

struct harness_case {
	const char *name;
	void (*run)(void);
	unsigned limit;
	struct harness_case *next;
};

__attribute__((unused)) static double harness_slower(void)
{
	const char *slower = getenv("KSMALLOC_TEST_SLOWER");
	return slower && atof(slower) > 1 ? atof(slower) : 1;
}

/* Seconds that are to be waited at most, on this machine. */
__attribute__((unused)) static double harness_limit(double seconds)
{
	return seconds * HARNESS_PATIENCE * harness_slower();
}

static struct harness_case *harness_cases, **harness_tail = &harness_cases;

#define TEST_LIMIT(name, seconds)                                                                                      \
	static void test_##name(void);                                                                                 \
	__attribute__((constructor)) static void harness_register_##name(void)                                         \
	{                                                                                                              \
		static struct harness_case one = {#name, test_##name, seconds, NULL};                                  \
		*harness_tail = &one;                                                                                  \
		harness_tail = &one.next;                                                                              \
	}                                                                                                              \
	static void test_##name(void)
#define TEST(name) TEST_LIMIT(name, HARNESS_LIMIT)

/* ---- checks -------------------------------------------------------------------------------------------------- */

__attribute__((format(printf, 3, 4), noreturn, cold, unused)) static void harness_fail(const char *file, int line,
										       const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fprintf(stderr, "%s:%d: ", file, line);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	fflush(NULL);
	_exit(1);
}

#define FAIL(...) harness_fail(__FILE__, __LINE__, __VA_ARGS__)

#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			FAIL("not true: %s", #condition);                                                              \
	} while (0)

/* Integers and enums, compared as numbers whatever their signs. CHECK_EQ(ksm_something(), 0) checks a return code. */
#define HARNESS_COMPARE(a, operator, b)                                                                                \
	do {                                                                                                           \
		__int128 harness_a = (a), harness_b = (b);                                                             \
		if (!(harness_a operator harness_b))                                                                   \
			FAIL("not true: %s %s %s (%lld, %lld)", #a, #operator, #b, (long long)harness_a,               \
			     (long long)harness_b);                                                                    \
	} while (0)
#define CHECK_EQ(a, b) HARNESS_COMPARE(a, ==, b)
#define CHECK_NE(a, b) HARNESS_COMPARE(a, !=, b)
#define CHECK_LT(a, b) HARNESS_COMPARE(a, <, b)
#define CHECK_LE(a, b) HARNESS_COMPARE(a, <=, b)
#define CHECK_GT(a, b) HARNESS_COMPARE(a, >, b)
#define CHECK_GE(a, b) HARNESS_COMPARE(a, >=, b)

#define CHECK_STR_EQ(a, b)                                                                                             \
	do {                                                                                                           \
		const char *harness_a = (a), *harness_b = (b);                                                         \
		if (strcmp(harness_a, harness_b) != 0)                                                                 \
			FAIL("%s is \"%s\", not \"%s\"", #a, harness_a, harness_b);                                    \
	} while (0)

/* A call of the C library that says -1 and errno. */
#define CHECK_SYS(call)                                                                                                \
	do {                                                                                                           \
		if ((call) < 0)                                                                                        \
			FAIL("%s: %s", #call, strerror(errno));                                                        \
	} while (0)

__attribute__((unused)) static int harness_wait(const char *file, int line, pid_t pid)
{
	int status;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			harness_fail(file, line, "waitpid: %s", strerror(errno));
	return status;
}

/* Wait for a child and insist that it exited with status 0, or was killed by this signal. */
#define CHECK_CHILD(pid)                                                                                               \
	do {                                                                                                           \
		int harness_status = harness_wait(__FILE__, __LINE__, (pid));                                          \
		if (harness_status != 0)                                                                               \
			FAIL("the child ended with wait status 0x%x", (unsigned)harness_status);                       \
	} while (0)
#define CHECK_KILLED(pid, signal)                                                                                      \
	do {                                                                                                           \
		int harness_status = harness_wait(__FILE__, __LINE__, (pid));                                          \
		if (!WIFSIGNALED(harness_status) || WTERMSIG(harness_status) != (signal))                              \
			FAIL("the child ended with wait status 0x%x, not by %s", (unsigned)harness_status, #signal);   \
	} while (0)

#ifdef __SANITIZE_ADDRESS__
/* A case ends with its process, and frees nothing it need not; and SIGSEGV is what many of them are about. */
const char *__asan_default_options(void);
__attribute__((no_sanitize_address)) const char *__asan_default_options(void)
{
	return "detect_leaks=0:handle_segv=0";
}
#endif

#ifdef __SANITIZE_THREAD__
#include <pthread.h>

/* The thread sanitizer makes a thread of its own together with the first other one, and it blocks every signal. Here it
 * is made, and sent away for good. */
void __sanitizer_sandbox_on_notify(void *);
static void *harness_nothing(void *argument)
{
	return argument;
}

__attribute__((constructor)) static void harness_alone(void)
{
	pthread_t thread;
	pthread_create(&thread, NULL, harness_nothing, NULL);
	pthread_join(thread, NULL);
	__sanitizer_sandbox_on_notify(NULL);
}
#endif

/* ---- the program --------------------------------------------------------------------------------------------- */

static double harness_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* One case in a child and a process group of its own; 0 when it passed. Whatever it leaves behind is killed. */
static int harness_run_child(const struct harness_case *one)
{
	double start = harness_now();
	pid_t parent = getpid(), pid;
	int status;

	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		setpgid(0, 0);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
		alarm((unsigned)harness_limit(one->limit));
		one->run();
		exit(0);
	}
	CHECK_SYS(pid);
	setpgid(pid, pid);
	/* The alarm ends a case; this deadline ends one that blocks or catches it. */
	while (waitpid(pid, &status, WNOHANG) == 0) {
		if (harness_now() - start > harness_limit(one->limit) + 5)
			kill(pid, SIGKILL);
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	kill(-pid, SIGKILL);
	if (status == 0)
		printf("ok      %s (%.2f s)\n", one->name, harness_now() - start);
	else if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
		printf("FAILED  %s: no end within %.0f s\n", one->name, harness_limit(one->limit));
	else if (WIFSIGNALED(status))
		printf("FAILED  %s: %s\n", one->name, strsignal(WTERMSIG(status)));
	else
		printf("FAILED  %s: status %d\n", one->name, WEXITSTATUS(status));
	return status != 0;
}

int main(int argc, char **argv)
{
	const struct harness_case *one;
	int failed = 0, run = 0;

	if (argc == 2 && strcmp(argv[1], "--list") == 0) {
		for (one = harness_cases; one; one = one->next)
			puts(one->name);
		return 0;
	}
	if (argc == 3 && strcmp(argv[1], "--run") == 0) {
		for (one = harness_cases; one; one = one->next) {
			if (strcmp(one->name, argv[2]) == 0) {
				alarm((unsigned)harness_limit(one->limit));
				one->run();
				return 0;
			}
		}
		fprintf(stderr, "%s: no case is called %s\n", argv[0], argv[2]);
		return 2;
	}
	if (argc != 1) {
		fprintf(stderr, "usage: %s [--list | --run NAME]\n", argv[0]);
		return 2;
	}
	for (one = harness_cases; one; one = one->next, run++)
		failed += harness_run_child(one);
	printf("%d cases, %d failed\n", run, failed);
	return failed != 0 || run == 0;
}

#endif
