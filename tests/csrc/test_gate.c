/* SPDX-License-Identifier: MIT */
#include "parking.h"

#include "gate.h"

/* The kernel's struct sigaction. */
struct raw_action {
	void *handler;
	unsigned long flags;
	void *restorer;
	uint64_t mask;
};

static struct raw_action action_of(int signal)
{
	struct raw_action action;
	CHECK_SYS(syscall(SYS_rt_sigaction, signal, NULL, &action, 8));
	return action;
}

static void stop_and_check(struct ksm_park *park)
{
	parking_stop(park);
	uint64_t sum = parking_sum();
	ksm_os_sleep_ns(300000);
	CHECK_EQ(parking_sum(), sum);
	ksm_park_end(park);
}

/* ---- which signal ------------------------------------------------------------------------------------------------ */

static void on_something(int signal KSM_UNUSED)
{
}

TEST(the_highest_free_signal)
{
	signal(SIGRTMAX - 6, on_something);
	signal(SIGRTMAX - 7, SIG_IGN);
	struct ksm_park park = parking_lot();
	CHECK_EQ(ksm_park_signal(), SIGRTMAX - 8);
	struct raw_action action = action_of(SIGRTMAX - 8);
	CHECK_EQ(action.flags & (SA_SIGINFO | SA_RESTART | SA_ONSTACK), SA_SIGINFO | SA_RESTART | SA_ONSTACK);
	CHECK_EQ(~action.mask, 1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1)); /* GATE-4; the kernel takes those out */
	ksm_park_destroy(&park);
	park = parking_lot();
	CHECK_EQ(ksm_park_signal(), SIGRTMAX - 8);
	ksm_park_destroy(&park);
}

TEST(a_signal_asked_for)
{
	struct ksm_park park;
	CHECK_EQ(ksm_park_choose_signal(SIGUSR1), -EINVAL);
	CHECK_EQ(ksm_park_choose_signal(SIGRTMAX + 1), -EINVAL);
	CHECK_EQ(ksm_park_choose_signal(SIGRTMAX - 5), -EINVAL); /* wakes scanners */
	CHECK_EQ(ksm_park_choose_signal(SIGRTMIN + 3), 0);
	signal(SIGRTMIN + 3, on_something);
	CHECK_EQ(ksm_park_create(&park), -EAGAIN);
	CHECK(!park.ready);
	signal(SIGRTMIN + 3, SIG_DFL);
	park = parking_lot();
	CHECK_EQ(ksm_park_signal(), SIGRTMIN + 3);
	parking_start(parking_nap, -1, -1, NULL);
	stop_and_check(&park);
	signal(SIGRTMIN + 3, on_something); /* the program takes it; no other one was wanted */
	CHECK_EQ(ksm_park_begin(&park), -EAGAIN);
	CHECK_STR_EQ(park.reason, "no real-time signal is free");
	CHECK_EQ(ksm_park_choose_signal(0), 0);
	park.retry_at_ns = 0;
	stop_and_check(&park);
	CHECK_EQ(ksm_park_signal(), SIGRTMAX - 6);
	parking_end();
	ksm_park_destroy(&park);
}

static uint32_t taken;

static void count_taken(int signal KSM_UNUSED)
{
	ksm_add_seqcst(&taken, 1);
}

TEST(the_program_takes_the_signal)
{
	struct ksm_park park = parking_lot();
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	stop_and_check(&park);
	int was = ksm_park_signal();
	signal(was, count_taken);
	stop_and_check(&park);
	CHECK_EQ(ksm_park_signal(), was - 1);
	CHECK_EQ(taken, 0);       /* it was never sent to somebody else's handler */
	signal(was - 1, SIG_DFL); /* free again: ours again */
	stop_and_check(&park);
	CHECK_EQ(ksm_park_signal(), was - 1);
	parking_end();
	ksm_park_destroy(&park);
}

TEST(from_outside_it_does_what_it_would_without_us)
{
	for (int way = 0; way < 3; way++) {
		pid_t child = kit_fork();
		if (child == 0) {
			struct ksm_park park = parking_lot();
			parking_start(parking_nap, -1, -1, NULL);
			stop_and_check(&park);
			if (way == 0)
				kill(getpid(), ksm_park_signal());
			else if (way == 1)
				sigqueue(getpid(), ksm_park_signal(), (union sigval){.sival_int = 7});
			else
				pthread_kill(parking_all[0].thread, ksm_park_signal());
			kit_sleep_ms(2000);
			_exit(0);
		}
		CHECK_KILLED(child, SIGRTMAX - 6);
	}
}

/* ---- late, and again and again ------------------------------------------------------------------------------------- */

static int disturbs(struct parking_thread *self)
{
	errno = 12345;
	for (volatile int i = 0; i < 1000; i++)
		;
	CHECK_EQ(errno, 12345);
	(void)self;
	return 0;
}

static int mutes(struct parking_thread *self)
{
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	ksm_os_sleep_ns(*self->count % 8 * 100000);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	ksm_os_sleep_ns(100000);
	return 0;
}

/* Stops without a pause, given up at any moment: signals of earlier stops arrive in later ones. */
TEST(one_stop_after_the_other)
{
	struct ksm_park park = parking_lot();
	parking_start(disturbs, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	parking_start(mutes, -1, -1, NULL);
	parking_start(mutes, -1, -1, NULL);
	uint64_t given_up = 0, random = 1;
	double until = harness_now() + 4;
	while (harness_now() < until) {
		if (kit_random(&random) % 2) {
			ksm_gate_close(); /* as a stop that is given up */
			for (size_t i = 0; i < parking_threads; i++)
				CHECK_GE(ksm_gate_send(parking_all[i].tid), 0);
			ksm_os_sleep_ns(kit_random(&random) % 200000);
			given_up += ksm_gate_missing() > 0;
			ksm_gate_open();
		}
		park.culprit = 0;
		park.retry_at_ns = 0;
		if (ksm_park_begin(&park))
			continue;
		uint64_t sum = parking_sum();
		ksm_os_sleep_ns(kit_random(&random) % 50000);
		CHECK_EQ(parking_sum(), sum);
		ksm_park_end(&park);
	}
	CHECK_GT(park.stops, 20);
	CHECK_GT(given_up, 0);
	printf("%llu stops, %llu failed, %llu given up\n", (unsigned long long)park.stops,
	       (unsigned long long)park.failures, (unsigned long long)given_up);
	parking_all_moved();
	parking_end();
	ksm_park_destroy(&park);
}

/* ---- the C library's own signals ------------------------------------------------------------------------------------ */

static uint32_t unwound;

static void unwind(void *at)
{
	ksm_add_seqcst((uint32_t *)at, 1);
}

static void *wait_to_be_cancelled(void *ready)
{
	int old;
	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &old);
	pthread_cleanup_push(unwind, &unwound);
	ksm_store_release((uint32_t *)ready, 1);
	for (;;)
		__asm__ volatile("" ::: "memory");
	pthread_cleanup_pop(0);
	return NULL;
}

/* Cancel a thread that is held. Does it run, within some time? */
static bool runs_when_cancelled(struct ksm_park *park, double seconds)
{
	pthread_t thread;
	uint32_t ready = 0;
	unwound = 0;
	CHECK_EQ(pthread_create(&thread, NULL, wait_to_be_cancelled, &ready), 0);
	KIT_WAIT(10, ksm_load_acquire(&ready));
	parking_stop(park);
	pthread_cancel(thread);
	double until = harness_now() + seconds;
	while (!ksm_load_acquire(&unwound) && harness_now() < until)
		kit_sleep_ms(1);
	bool ran = ksm_load_acquire(&unwound);
	ksm_park_end(park);
	pthread_join(thread, NULL);
	CHECK_EQ(unwound, 1);
	return ran;
}

TEST(cancelled_while_held)
{
	struct ksm_park park = parking_lot();
	for (int i = 0; i < 10; i++)
		CHECK(!runs_when_cancelled(&park, 0.03));
	/* With the mask that the C library gives, it would: GATE-4 */
	struct raw_action action = action_of(ksm_park_signal());
	action.mask &= ~(3ull << 31);
	CHECK_SYS(syscall(SYS_rt_sigaction, ksm_park_signal(), &action, NULL, 8));
	CHECK(runs_when_cancelled(&park, 10));
	ksm_park_destroy(&park);
}

static int changes_user(struct parking_thread *self KSM_UNUSED)
{
	CHECK_SYS(setuid(getuid())); /* the C library interrupts every thread for that, with a signal of its own */
	return 0;
}

TEST(users_are_changed)
{
	struct ksm_park park = parking_lot();
	parking_start(changes_user, -1, -1, NULL);
	parking_start(changes_user, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
	for (int i = 0; i < 200; i++) {
		stop_and_check(&park);
		ksm_os_sleep_ns(200000);
	}
	parking_all_moved();
	parking_end();
	ksm_park_destroy(&park);
}

/* ---- stacks --------------------------------------------------------------------------------------------------------- */

static int on_small_stack(struct parking_thread *self)
{
	stack_t was, stack = {.ss_sp = self->more, .ss_size = (size_t)sysconf(_SC_MINSIGSTKSZ) + 1024};
	CHECK_SYS(sigaltstack(&stack, &was));
	for (int i = 0; i < 1000; i++)
		*self->count = *self->count + 1;
	CHECK_SYS(sigaltstack(&was, NULL));
	return 0;
}

TEST(a_small_stack_for_signals)
{
	struct ksm_park park = parking_lot();
	parking_start(on_small_stack, -1, -1, kit_map(8));
	parking_all_moved();
	for (int i = 0; i < 20; i++)
		stop_and_check(&park);
	parking_end();
	ksm_park_destroy(&park);
}
