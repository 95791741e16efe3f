/* SPDX-License-Identifier: MIT */
#include "guarded.h"

#include "park.h"

#include <setjmp.h>
#include <sys/resource.h>

/* What handlers of the program note: shared with children. */
static struct notes {
	uint32_t calls, others;
	int code, value;
	void *address;
	uint64_t blocked;
	uint32_t on_alternate;
} *notes;

static void notes_make(void)
{
	notes = mmap(NULL, KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(notes != MAP_FAILED);
}

static uint64_t blocked_now(void)
{
	uint64_t mask = 0;
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, sizeof(mask));
	return mask;
}

static sigjmp_buf way_out;
static struct sigaction reporters; /* what the reporter found when it was installed */

static void note(siginfo_t *info)
{
	stack_t stack;
	notes->calls++;
	notes->code = info->si_code;
	notes->address = info->si_addr;
	notes->value = info->si_code == SI_QUEUE ? info->si_value.sival_int : 0;
	notes->blocked = blocked_now();
	sigaltstack(NULL, &stack);
	notes->on_alternate = stack.ss_flags == SS_ONSTACK;
}

static void note_and_return(int signal, siginfo_t *info, void *context KSM_UNUSED)
{
	CHECK_EQ(signal, SIGSEGV);
	note(info);
}

static void note_and_leave(int signal, siginfo_t *info, void *context)
{
	note_and_return(signal, info, context);
	siglongjmp(way_out, 1);
}

static void only_a_number(int signal)
{
	notes->calls++;
	notes->blocked = blocked_now();
	CHECK_EQ(signal, SIGSEGV);
	siglongjmp(way_out, 1);
}

/* A crash reporter: it puts back what it found, and lets that have the signal. */
static void report_and_raise(int signal, siginfo_t *info, void *context KSM_UNUSED)
{
	note(info);
	if (notes->calls > 10)
		_exit(9); /* called again and again */
	sigaction(signal, &reporters, NULL);
	raise(signal);
}

static void report_and_return(int signal, siginfo_t *info, void *context KSM_UNUSED)
{
	note(info);
	if (notes->calls > 10)
		_exit(9);
	sigaction(signal, &reporters, NULL);
}

static void handle(void (*handler)(int, siginfo_t *, void *), int flags, struct sigaction *old)
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
	sigemptyset(&action.sa_mask);
	sigaddset(&action.sa_mask, SIGUSR1);
	CHECK_SYS(sigaction(SIGSEGV, &action, old));
}

/* A store that is nobody's of ours: it kills, or the program's handler sees it. */
static char *forbidden(void)
{
	static char *at;
	if (!at) {
		at = kit_map(1);
		CHECK_SYS(mprotect(at, KSM_PAGE_SIZE, PROT_READ));
	}
	return at;
}

static void store_forbidden(void)
{
	*(volatile char *)forbidden() = 1;
}

/* In a child: does this end it, and how? Returns the wait status. */
static int status_of(void (*body)(void))
{
	pid_t child = kit_fork();
	if (child == 0) {
		setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
		body();
		_exit(0);
	}
	return harness_wait(__FILE__, __LINE__, child);
}

#define CHECK_DIES(body)                                                                                               \
	do {                                                                                                           \
		int status = status_of(body);                                                                          \
		if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)                                               \
			FAIL("%s ended with wait status 0x%x", #body, (unsigned)status);                               \
	} while (0)

static void check_ours_work(struct guarded *g)
{
	guarded_merge(g, 0, 1, false);
	uint64_t breaks = g->guard->breaks;
	*guarded_word(g, 0, 0) ^= 0;
	CHECK_EQ(g->guard->breaks, breaks + 1);
	kit_check_filled(g->at, 1, 1);
}

static bool meets(void)
{
	uint32_t before = notes->calls;
	if (!sigsetjmp(way_out, 1))
		store_forbidden();
	return notes->calls == before + 1;
}

/* ---- who was there before -------------------------------------------------------------------------------------- */

TEST(a_handler_from_before_gets_what_is_not_ours)
{
	notes_make();
	handle(note_and_leave, 0, NULL);
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK(ksm_handler_is_installed());
	CHECK_EQ(ksm_handler_check(), 0);
	struct guarded g = guarded_make(2, 1);
	check_ours_work(&g);
	CHECK_EQ(notes->calls, 0);
	CHECK(meets());
	CHECK_EQ(notes->code, SEGV_ACCERR);
	CHECK(notes->address == forbidden());
	CHECK_EQ(notes->blocked, 1ull << (SIGSEGV - 1) | 1ull << (SIGUSR1 - 1));
	check_ours_work(&g);
	if (!sigsetjmp(way_out, 1)) /* nothing mapped there */
		*(volatile char *)16 = 1;
	CHECK_EQ(notes->calls, 2);
	CHECK_EQ(notes->code, SEGV_MAPERR);
	void *none = kit_map(1);
	CHECK_SYS(mprotect(none, KSM_PAGE_SIZE, PROT_NONE));
	if (!sigsetjmp(way_out, 1)) /* a load */
		(void)*(volatile char *)none;
	CHECK_EQ(notes->calls, 3);
	CHECK_EQ(ksm_handler_check(), 0);
	guarded_drop(&g);
}

TEST(a_handler_is_called_as_it_wished)
{
	notes_make();
	struct sigaction action = {.sa_handler = only_a_number, .sa_flags = SA_NODEFER};
	CHECK_SYS(sigaction(SIGSEGV, &action, NULL));
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK(meets());
	CHECK_EQ(notes->blocked, 0);
	sigset_t mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2); /* blocked already */
	pthread_sigmask(SIG_BLOCK, &mask, NULL);
	CHECK(meets());
	CHECK_EQ(notes->blocked, 1ull << (SIGUSR2 - 1));
	CHECK_EQ(blocked_now(), 1ull << (SIGUSR2 - 1));
}

static void twice(void)
{
	handle(note_and_leave, SA_RESETHAND, NULL);
	ksm_handler_install();
	struct guarded g = guarded_make(2, 1);
	CHECK(meets());
	check_ours_work(&g); /* that one is spent, ours is not */
	CHECK_EQ(ksm_handler_check(), 0);
	store_forbidden();
}

TEST(a_handler_for_once_is_called_once)
{
	notes_make();
	CHECK_DIES(twice);
	CHECK_EQ(notes->calls, 1);
	/* Installed once more, it is good for once more. */
	handle(note_and_leave, SA_RESETHAND, NULL);
	CHECK_EQ(ksm_handler_install(), 0);
	for (int i = 0; i < 100; i++) {
		CHECK(meets());
		handle(note_and_leave, SA_RESETHAND, NULL);
		CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
		CHECK_EQ(ksm_handler_reinstall(), 0);
		CHECK_EQ(ksm_handler_check(), 0);
	}
}

/* ---- dying as without us ----------------------------------------------------------------------------------------- */

static void fault_elsewhere(void)
{
	*(volatile char *)16 = 1;
}

static void program_protects_outside(void)
{
	struct guarded g = guarded_make(2, 1);
	check_ours_work(&g);
	store_forbidden();
}

static void program_protects_inside(void)
{
	struct guarded g = guarded_make(2, 1);
	check_ours_work(&g);
	CHECK_SYS(mprotect(kit_page(g.at, 1), KSM_PAGE_SIZE, PROT_READ));
	*guarded_word(&g, 1, 0) = 1;
}

static void program_forbids_all(void)
{
	struct guarded g = guarded_make(2, 1);
	CHECK_SYS(mprotect(g.at, KSM_PAGE_SIZE, PROT_NONE));
	(void)*guarded_word(&g, 0, 0);
}

static void jump_into_data(void)
{
	void (*function)(void);
	char *at = kit_map(1);
	memcpy(&function, &at, sizeof(function));
	function();
}

static void by_kill(void)
{
	kill(getpid(), SIGSEGV);
	pause();
}

static void by_raise(void)
{
	raise(SIGSEGV);
}

static void by_queue(void)
{
	sigqueue(getpid(), SIGSEGV, (union sigval){.sival_int = 5});
	pause();
}

static void *in_thread(void *argument)
{
	void (*body)(void) = *(void (**)(void))argument;
	body();
	return NULL;
}

static void (*const deaths[])(void) = {fault_elsewhere,
				       program_protects_outside,
				       program_protects_inside,
				       program_forbids_all,
				       jump_into_data,
				       by_kill,
				       by_raise,
				       by_queue};

TEST(what_kills_without_us_kills_with_us)
{
	CHECK_EQ(ksm_handler_install(), 0);
	for (size_t i = 0; i < KSM_COUNT(deaths); i++)
		CHECK_DIES(deaths[i]);
}

static void with_reports_ignored(void)
{
	signal(SIGSEGV, SIG_IGN);
	ksm_handler_install();
	kill(getpid(), SIGSEGV);
	raise(SIGSEGV);
	sigqueue(getpid(), SIGSEGV, (union sigval){.sival_int = 5});
	notes->others = 1;
	store_forbidden();
	notes->others = 2;
}

TEST(ignored_signals_are_ignored_and_ignored_faults_are_not)
{
	notes_make();
	CHECK_DIES(with_reports_ignored);
	CHECK_EQ(notes->others, 1);
}

TEST(sent_signals_reach_the_handler_from_before)
{
	notes_make();
	handle(note_and_return, 0, NULL);
	CHECK_EQ(ksm_handler_install(), 0);
	kill(getpid(), SIGSEGV);
	CHECK_EQ(notes->calls, 1);
	CHECK_EQ(notes->code, SI_USER);
	raise(SIGSEGV);
	CHECK_EQ(notes->code, SI_TKILL);
	sigqueue(getpid(), SIGSEGV, (union sigval){.sival_int = 5});
	CHECK_EQ(notes->calls, 3);
	CHECK_EQ(notes->code, SI_QUEUE);
	CHECK_EQ(notes->value, 5);
}

static void die_in_thread(void)
{
	void (*body)(void) = store_forbidden;
	pthread_t thread;
	pthread_create(&thread, NULL, in_thread, &body);
	pthread_join(thread, NULL);
}

TEST(any_thread_takes_all_with_it)
{
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_DIES(die_in_thread);
}

/* ---- who comes after us -------------------------------------------------------------------------------------------- */

TEST(one_who_takes_our_place)
{
	notes_make();
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(ksm_handler_check(), 0);
	struct guarded g = guarded_make(10, 1);
	guarded_merge(&g, 2, 5, false);
	guarded_freeze(&g, 8, 2);
	handle(note_and_leave, 0, NULL);
	CHECK_EQ(ksm_handler_suspensions(), 0);
	CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
	CHECK_EQ(ksm_handler_suspensions(), 1);
	CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
	CHECK_EQ(ksm_handler_suspensions(), 1);
	for (size_t page = 0; page < 10; page++) /* nobody answers, nobody is needed */
		*guarded_word(&g, page, 0) ^= 0;
	CHECK_EQ(notes->calls, 0);
	/* Somebody who had asked before has merged since. */
	guarded_merge(&g, 0, 2, false);
	CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
	*guarded_word(&g, 0, 0) ^= 0;
	CHECK_EQ(ksm_handler_reinstall(), 0);
	CHECK_EQ(ksm_handler_reinstall(), 0);
	CHECK_EQ(ksm_handler_check(), 0);
	guarded_freeze(&g, 9, 1);
	*guarded_word(&g, 9, 0) ^= 0;
	CHECK_EQ(g.guard->thaws, 1);
	CHECK_EQ(notes->calls, 0);
	CHECK(meets()); /* it is called after us now */
	CHECK_EQ(ksm_handler_suspensions(), 1);
	/* Put back by its number alone it would get no siginfo: that is not being in force. */
	struct sigaction ours;
	CHECK_SYS(sigaction(SIGSEGV, NULL, &ours));
	signal(SIGSEGV, ours.sa_handler);
	CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
	CHECK_EQ(ksm_handler_suspensions(), 2);
	sigaction(SIGSEGV, &ours, NULL);
	CHECK_EQ(ksm_handler_check(), 0);
	kit_check_filled(g.at, 10, 1);
}

static void displaced_and_unaware(void)
{
	struct guarded g = guarded_make(2, 1);
	guarded_merge(&g, 0, 2, false);
	handle(report_and_raise, 0, &reporters);
	reporters.sa_flags = 0;
	reporters.sa_handler = SIG_DFL;
	*guarded_word(&g, 0, 0) = 1;
}

TEST(without_the_check_a_store_kills)
{
	notes_make();
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_DIES(displaced_and_unaware);
	CHECK_EQ(notes->calls, 1);
}

/* ---- crash reporters -------------------------------------------------------------------------------------------------- */

static void (*reporter)(int, siginfo_t *, void *);
static int reporter_flags;
static bool reporter_first;
static void (*reported)(void);

static void crash_with_reporter(void)
{
	if (reporter_first)
		handle(reporter, reporter_flags, &reporters);
	CHECK_EQ(ksm_handler_install(), 0);
	if (!reporter_first) {
		handle(reporter, reporter_flags, &reporters);
		CHECK_EQ(ksm_handler_reinstall(), 0);
	}
	CHECK_EQ(ksm_handler_check(), 0);
	struct guarded g = guarded_make(2, 1);
	check_ours_work(&g);
	reported();
}

TEST(a_crash_reporter_reports_once)
{
	notes_make();
	for (int i = 0; i < 2 * 2 * 2; i++)
		for (size_t death = 0; death < KSM_COUNT(deaths); death++) {
			reporter = i & 1 ? report_and_raise : report_and_return;
			reporter_flags = i & 2 ? SA_NODEFER : 0;
			reporter_first = i & 4;
			reported = deaths[death];
			bool sent = reported == by_kill || reported == by_raise || reported == by_queue;
			if (sent && !(i & 1))
				continue; /* it would return, and that would be all */
			notes->calls = 0;
			CHECK_DIES(crash_with_reporter);
			CHECK_EQ(notes->calls, 1);
		}
}

TEST(reporters_come_and_go)
{
	notes_make();
	CHECK_EQ(ksm_handler_install(), 0);
	struct guarded g = guarded_make(2, 1);
	for (int i = 0; i < 1000; i++) {
		handle(note_and_leave, SA_NODEFER, &reporters);
		CHECK_EQ(ksm_handler_reinstall(), 0);
		CHECK_EQ(ksm_handler_check(), 0);
		CHECK(meets());
		check_ours_work(&g);
		CHECK_SYS(sigaction(SIGSEGV, &reporters, NULL)); /* it goes */
		if (i % 2)
			ksm_handler_popped();
		CHECK_EQ(ksm_handler_check(), 0);
		check_ours_work(&g);
	}
	CHECK_DIES(store_forbidden);
	CHECK_EQ(notes->calls, 1000);
	CHECK_EQ(ksm_handler_suspensions(), 0);
}

TEST(a_reporter_from_before_goes)
{
	notes_make();
	handle(note_and_leave, 0, &reporters);
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK(meets());
	CHECK_SYS(sigaction(SIGSEGV, &reporters, NULL)); /* and with it we */
	ksm_handler_popped();
	CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
	CHECK_EQ(ksm_handler_reinstall(), 0);
	ksm_handler_popped();
	CHECK_EQ(ksm_handler_check(), 0);
	CHECK_DIES(store_forbidden);
	CHECK_EQ(notes->calls, 1);
}

/* It is gone, and has left us in force: unloaded, say. */
TEST(a_reporter_is_forgotten)
{
	notes_make();
	handle(note_and_leave, 0, NULL);
	CHECK_EQ(ksm_handler_install(), 0);
	handle(report_and_raise, 0, NULL);
	CHECK_EQ(ksm_handler_reinstall(), 0);
	ksm_handler_popped();
	CHECK_EQ(ksm_handler_check(), 0);
	CHECK(meets());       /* the first one */
	ksm_handler_popped(); /* once more is once too often: that one is still there */
	CHECK(meets());
}

static void exit_seven(int signal KSM_UNUSED, siginfo_t *info KSM_UNUSED, void *context KSM_UNUSED)
{
	_exit(7);
}

/* The one in the middle goes, and what it had found with it: what came later is gone, what came before is not. */
TEST(a_reporter_in_the_middle_goes)
{
	struct sigaction middle;
	notes_make();
	for (int i = 0; i < 100; i++) {
		CHECK_EQ(ksm_handler_install(), 0);
		handle(note_and_leave, 0, NULL);
		if (i) /* the same again: it has replaced itself */
			ksm_handler_popped();
		CHECK_EQ(ksm_handler_reinstall(), 0);
		handle(exit_seven, 0, &middle);
		CHECK_EQ(ksm_handler_reinstall(), 0);
		handle(exit_seven, SA_NODEFER, NULL);
		CHECK_EQ(ksm_handler_reinstall(), 0);
		CHECK_SYS(sigaction(SIGSEGV, &middle, NULL));
		ksm_handler_popped();
		ksm_handler_popped();
		CHECK_EQ(ksm_handler_check(), 0);
		CHECK(meets());
	}
}

/* Not in the order in which they came: whoever is called, it ends. */
static void out_of_order(void)
{
	struct sigaction first, second;
	CHECK_EQ(ksm_handler_install(), 0);
	for (int i = 0; i < 20; i++) {
		handle(exit_seven, 0, &first);
		CHECK_EQ(ksm_handler_reinstall(), 0);
		handle(exit_seven, SA_NODEFER, &second);
		CHECK_EQ(ksm_handler_reinstall(), 0);
		CHECK_SYS(sigaction(SIGSEGV, &first, NULL));
		CHECK_EQ(ksm_handler_reinstall(), 0);
		CHECK_SYS(sigaction(SIGSEGV, &second, NULL));
		CHECK_EQ(ksm_handler_reinstall(), 0);
		ksm_handler_popped();
		CHECK_EQ(ksm_handler_check(), 0);
	}
	handle(report_and_raise, SA_NODEFER, &reporters);
	CHECK_EQ(ksm_handler_reinstall(), 0);
	store_forbidden();
}

TEST(handlers_that_go_out_of_order)
{
	notes_make();
	int status = status_of(out_of_order);
	CHECK(status == 7 << 8 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV));
	CHECK_EQ(notes->calls, 1);
}

TEST(there_is_an_end_of_entries)
{
	static struct sigaction action = {.sa_sigaction = note_and_return, .sa_flags = SA_SIGINFO};
	int r = 0, made;
	CHECK_EQ(ksm_handler_install(), 0);
	for (made = 0; made < 60 && !r; made++) {
		sigemptyset(&action.sa_mask);
		sigaddset(&action.sa_mask, 1 + made);
		CHECK_SYS(sigaction(SIGSEGV, &action, NULL));
		r = ksm_handler_reinstall();
	}
	CHECK_EQ(r, -ENOSPC);
	CHECK_GE(made, 32); /* some masks are the same: the kernel's and the C library's own signals are left out */
	CHECK_LT(made, 60);
	CHECK_EQ(ksm_handler_check(), KSM_EDISPLACED);
}

/* ---- stacks ------------------------------------------------------------------------------------------------------------- */

static void *with_alternate_stack(void *argument)
{
	struct guarded *g = argument;
	size_t nbytes = (size_t)sysconf(_SC_MINSIGSTKSZ) + 4096;
	char *memory = mmap(NULL, 2 * KSM_PAGE_SIZE + ksm_page_round_up(nbytes), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	CHECK_SYS(mprotect(memory, KSM_PAGE_SIZE, PROT_NONE)); /* who needs more dies */
	stack_t stack = {.ss_sp = memory + KSM_PAGE_SIZE, .ss_size = nbytes}, now;
	CHECK_SYS(sigaltstack(&stack, NULL));
	guarded_merge(g, 0, 2, false);
	*guarded_word(g, 0, 0) ^= 0;
	*guarded_word(g, 1, 0) ^= 0;
	CHECK(meets());
	CHECK_EQ(notes->on_alternate, 1);
	CHECK_SYS(sigaltstack(NULL, &now));
	CHECK(now.ss_sp == stack.ss_sp && now.ss_size == stack.ss_size && now.ss_flags == 0);
	size_t used = 0;
	while (used < nbytes && !memory[KSM_PAGE_SIZE + used])
		used++;
	printf("%zu of %zu bytes of an alternate stack were used\n", nbytes - used, nbytes);
	return NULL;
}

TEST(small_alternate_stacks_are_large_enough)
{
	pthread_t thread;
	struct guarded g = guarded_make(2, 1);
	notes_make();
	handle(note_and_leave, SA_ONSTACK, NULL);
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(pthread_create(&thread, NULL, with_alternate_stack, &g), 0);
	pthread_join(thread, NULL);
	CHECK_EQ(g.guard->breaks, 2);
	kit_check_filled(g.at, 2, 1);
}

/* ---- threads that block SIGSEGV ------------------------------------------------------------------------------------------- */

enum blocking {
	BLOCKS_ONE,
	BLOCKS_ALL, /* as the C library lets one */
	BLOCKS_RAW, /* all 64 */
	BLOCKS_AS_SCANNER,
};

static struct {
	pthread_t thread;
	enum blocking how;
	volatile uint64_t *store_to;
	uint32_t step;
} blocker;

static void *block(void *argument KSM_UNUSED)
{
	uint64_t all = UINT64_MAX;
	sigset_t mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGSEGV);
	if (blocker.how == BLOCKS_RAW)
		CHECK_SYS(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof(all)));
	if (blocker.how == BLOCKS_ALL || blocker.how == BLOCKS_AS_SCANNER)
		sigfillset(&mask);
	if (blocker.how != BLOCKS_RAW)
		pthread_sigmask(SIG_SETMASK, &mask, NULL);
	if (blocker.how == BLOCKS_AS_SCANNER)
		ksm_park_exempt(true);
	ksm_store_release(&blocker.step, 1);
	KIT_WAIT(20, ksm_load_acquire(&blocker.step) == 2);
	if (blocker.store_to)
		*blocker.store_to ^= 0;
	if (blocker.how == BLOCKS_AS_SCANNER)
		ksm_park_exempt(false);
	return NULL;
}

static void block_start(enum blocking how, volatile uint64_t *store_to)
{
	blocker.how = how;
	blocker.store_to = store_to;
	blocker.step = 0;
	CHECK_EQ(pthread_create(&blocker.thread, NULL, block, NULL), 0);
	KIT_WAIT(5, ksm_load_acquire(&blocker.step) == 1);
}

static void block_end(void)
{
	ksm_store_release(&blocker.step, 2);
	pthread_join(blocker.thread, NULL);
}

static void masked_and_unaware(void)
{
	struct guarded g = guarded_make(2, 1);
	guarded_merge(&g, 0, 1, false);
	block_start(BLOCKS_ONE, guarded_word(&g, 0, 0));
	block_end();
}

TEST_LIMIT(a_thread_that_blocks_the_signal, 40)
{
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(ksm_handler_check(), 0);
	CHECK_DIES(masked_and_unaware); /* so it is, if nobody looks */
	struct guarded g = guarded_make(8, 1);
	for (uint64_t i = 0; i < 3; i++) {
		guarded_merge(&g, i, 1, true);
		block_start((enum blocking)i, guarded_word(&g, i, 0));
		double start = harness_now();
		KIT_WAIT(i == BLOCKS_RAW ? 10 : 1, ksm_handler_check() == KSM_EMASKED);
		printf("found after %.3f s\n", harness_now() - start);
		CHECK_EQ(ksm_handler_check(), KSM_EMASKED);
		CHECK_EQ(ksm_handler_suspensions(), i + 1);
		block_end();
		KIT_WAIT(1, ksm_handler_check() == 0);
		*guarded_word(&g, i, 0) ^= 0;
	}
	kit_check_filled(g.at, 8, 1);
}

TEST_LIMIT(our_own_scanners_may_block_it, 20)
{
	CHECK_EQ(ksm_handler_install(), 0);
	block_start(BLOCKS_AS_SCANNER, NULL);
	for (double until = harness_now() + 0.7; harness_now() < until; kit_sleep_ms(10))
		CHECK_EQ(ksm_handler_check(), 0);
	block_end();
	CHECK_EQ(ksm_handler_suspensions(), 0);
}

static uint32_t storm_stop;

static void *come_and_go(void *argument KSM_UNUSED)
{
	return NULL;
}

static void *break_on(void *argument)
{
	struct guarded *g = argument;
	while (!ksm_load_relaxed(&storm_stop)) {
		for (size_t page = 0; page < g->pages; page++) {
			guarded_merge(g, page, 1, false);
			*guarded_word(g, page, 0) ^= 0;
		}
	}
	return NULL;
}

/* Threads are made, with everything blocked for a moment; and one is in our own handler most of the time. */
TEST_LIMIT(moments_are_not_taken_for_more, 30)
{
	struct guarded g = guarded_make(64, 1);
	pthread_t breaker, other;
	uint64_t made = 0, looks = 0;
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(pthread_create(&breaker, NULL, break_on, &g), 0);
	for (double until = harness_now() + 5; harness_now() < until; made++) {
		CHECK_EQ(pthread_create(&other, NULL, come_and_go, NULL), 0);
		if (made % 4 == 0) {
			CHECK_EQ(ksm_handler_check(), 0);
			looks++;
		}
		pthread_join(other, NULL);
	}
	ksm_store_release(&storm_stop, 1);
	pthread_join(breaker, NULL);
	CHECK_EQ(ksm_handler_suspensions(), 0);
	printf("%llu threads, %llu looks, %llu breaks\n", (unsigned long long)made, (unsigned long long)looks,
	       (unsigned long long)g.guard->breaks);
	/* A look costs something; how much? */
	double start = harness_now();
	for (int i = 0; i < 1000; i++)
		ksm_handler_check();
	printf("a check takes %.1f us\n", (harness_now() - start) * 1e3);
}

/* ---- fork ---------------------------------------------------------------------------------------------------------------- */

static void *reinstall_on(void *argument KSM_UNUSED)
{
	while (!ksm_load_relaxed(&storm_stop))
		ksm_handler_reinstall();
	return NULL;
}

TEST_LIMIT(a_child_has_a_handler_too, 30)
{
	struct guarded g = guarded_make(2, 1);
	pthread_t thread;
	CHECK_EQ(ksm_handler_install(), 0);
	CHECK_EQ(pthread_create(&thread, NULL, reinstall_on, NULL), 0);
	for (int i = 0; i < 300; i++) { /* sometimes the lock is held by a thread that the child has not */
		pid_t child = kit_fork();
		if (child == 0) {
			alarm((unsigned)harness_limit(10));
			CHECK_EQ(ksm_handler_reinstall(), 0);
			CHECK_EQ(ksm_handler_check(), 0);
			check_ours_work(&g);
			_exit(0);
		}
		CHECK_CHILD(child);
	}
	ksm_store_release(&storm_stop, 1);
	pthread_join(thread, NULL);
	CHECK_DIES(store_forbidden);
}

/* ---- cancelling ------------------------------------------------------------------------------------------------------------ */

static void *store_for_ever(void *argument)
{
	struct guarded *g = argument;
	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
	while (g->pages)
		for (size_t page = 0; page < g->pages; page++)
			*guarded_word(g, page, 0) ^= 0;
	return NULL;
}

/* Cancelled at any instant, a thread leaves nothing BUSY: HANDLER-4. */
TEST_LIMIT(threads_are_cancelled_anywhere, 30)
{
	struct guarded g = guarded_make(32, 1);
	uint64_t state = 1;
	CHECK_EQ(ksm_handler_install(), 0);
	for (int i = 0; i < 1500; i++) {
		pthread_t thread;
		for (size_t page = 0; page < g.pages; page++)
			if (guarded_state(&g, page) == KSM_GUARD_OPEN)
				guarded_merge(&g, page, 1, false);
		CHECK_EQ(pthread_create(&thread, NULL, store_for_ever, &g), 0);
		ksm_os_sleep_ns(kit_random(&state) % 300000);
		CHECK_EQ(pthread_cancel(thread), 0);
		pthread_join(thread, NULL);
		CHECK_EQ(g.guard->busy, 0);
	}
	kit_check_filled(g.at, 32, 1);
}

/* ---- calls that fail -------------------------------------------------------------------------------------------------------- */

TEST(installing_may_fail)
{
	CHECK_EQ(ksm_handler_reinstall(), 0); /* not installed: nothing to do */
	ksm_handler_popped();
	CHECK(!ksm_handler_is_installed());
	CHECK_NE(ksm_handler_check(), 0);
	CHECK_EQ(ksm_handler_suspensions(), 0);
	ksm_os_fault_set(KSM_OS_HANDLER, 0, 1, -EPERM);
	CHECK_EQ(ksm_handler_install(), -EPERM);
	ksm_os_fault_clear();
	CHECK(!ksm_handler_is_installed());
	CHECK_EQ(ksm_handler_install(), 0);
	/* No /proc, or none for us: nobody can be found. */
	ksm_os_fault_set(KSM_OS_OPEN, 0, UINT32_MAX, -EACCES);
	CHECK_EQ(ksm_handler_check(), 0);
	ksm_os_fault_clear();
	CHECK_EQ(ksm_handler_check(), 0);
}
