/* SPDX-License-Identifier: MIT */
/* What a process is told about what it may do here, and what it gets when it asks by name. */
#include "kit.h"

#include "arena.h"

static struct ksm_domain *attach(enum ksm_barrier_kind kind)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_domain *domain = NULL;
	options.barrier = kind;
	int r = ksm_domain_attach(&options, &domain);
	if (r)
		FAIL("attach: %s", ksm_error_name(r));
	return domain;
}

static struct ksm_capabilities look(struct ksm_domain *domain)
{
	struct ksm_capabilities caps;
	CHECK_EQ(ksm_domain_capabilities(domain, &caps), 0);
	return caps;
}

/* Two blocks of equal pages, one page of which is written, scanned until that one has been given back, or refused. */
static void have_a_broken_page(struct ksm_domain *domain, struct ksm_arena *arena)
{
	struct ksm_block blocks[2];
	struct ksm_report report;
	for (size_t i = 0; i < 2; i++) {
		CHECK_EQ(ksm_arena_alloc(arena, 10 * KSM_PAGE_SIZE, 0, &blocks[i]), 0);
		for (size_t page = 0; page < 10; page++)
			kit_fill(kit_page(blocks[i].address, page), 1 + page);
	}
	CHECK_EQ(ksm_domain_scan(domain, &report), 0);
	kit_fill(blocks[0].address, 50);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(ksm_domain_scan(domain, &report), 0);
}

TEST(what_works_here)
{
	CHECK_EQ(ksm_process_stop_signal(SIGRTMAX + 1), -EINVAL);
	CHECK_EQ(ksm_process_stop_signal(SIGUSR1), -EINVAL);
	CHECK_EQ(ksm_process_stop_signal(SIGRTMAX - 5), -EINVAL); /* wakes scanners */
	CHECK_EQ(ksm_process_stop_signal(SIGRTMIN + 3), 0);
	struct ksm_domain *domain = attach(KSM_BARRIER_AUTO);
	struct ksm_capabilities caps = look(domain);
	CHECK_EQ(caps.barrier, kit_can_move() ? KSM_BARRIER_MOVE : KSM_BARRIER_STOP);
	CHECK_EQ(caps.move, kit_can_move() ? 0 : caps.move);
	CHECK(caps.move || !caps.uffd_device || !caps.uffd_call);
	CHECK_EQ(caps.tracking, caps.writes ? KSM_TRACKING_PAGEMAP : KSM_TRACKING_WRITES);
	CHECK_EQ(caps.pagemap, 0);
	CHECK_EQ(caps.dumpable, 1);
	CHECK_EQ(caps.stop, 0);
	CHECK_EQ(caps.stop_signal, SIGRTMIN + 3);
	CHECK_STR_EQ(caps.stop_reason, "");
	CHECK_EQ(caps.segv, 0);
	CHECK_EQ(caps.handler, 0); /* nobody has needed it */
	CHECK_EQ(caps.suspensions, 0);
	CHECK_EQ(caps.why_not, 0);
	struct sigaction action;
	CHECK_SYS(sigaction(SIGSEGV, NULL, &action));
	CHECK(action.sa_handler == SIG_DFL);
	struct ksm_arena *arena;
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_SIGSEGV, &arena), 0);
	CHECK_EQ(look(domain).handler, 1);
	CHECK_EQ(look(domain).segv, 0);
	signal(SIGSEGV, SIG_DFL);
	caps = look(domain);
	CHECK_EQ(caps.segv, KSM_EDISPLACED);
	CHECK_GE(caps.suspensions, 1);
	CHECK_EQ(ksm_process_handler_reinstall(), 0);
	CHECK_EQ(look(domain).segv, 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

TEST(a_ring_is_named)
{
	struct io_uring_params params = {0};
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0) {
		printf("no io_uring here: %s\n", strerror(errno));
		return;
	}
	struct ksm_domain *domain = attach(KSM_BARRIER_STOP);
	struct ksm_arena *arena;
	struct ksm_stats self;
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
	have_a_broken_page(domain, arena);
	struct ksm_capabilities caps = look(domain);
	CHECK_EQ(caps.barrier, KSM_BARRIER_STOP);
	CHECK_EQ(caps.stop, KSM_EDEVICES);
	CHECK_GT(caps.stops_failed, 0);
	CHECK_EQ(caps.stops, 0);
	char expected[32];
	snprintf(expected, sizeof(expected), "descriptor %d", ring);
	if (!strstr(caps.stop_reason, "io_uring") || !strstr(caps.stop_reason, expected))
		FAIL("the reason is \"%s\"", caps.stop_reason);
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	CHECK_EQ(self.pages_merged, 0);
	close(ring);
	KIT_WAIT(20, (have_a_broken_page(domain, arena), look(domain).stop == 0));
	CHECK_STR_EQ(look(domain).stop_reason, "");
	CHECK_GT(look(domain).stops, 0);
	/* Not every attempt to stop succeeds on a busy machine. */
	KIT_WAIT(20,
		 (have_a_broken_page(domain, arena), !ksm_domain_self_stats(domain, &self) && self.pages_merged > 0));
}

static void *block_everything(void *argument)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	pthread_setname_np(pthread_self(), "stubborn");
	ksm_store_release((uint32_t *)argument, 1);
	while (ksm_load_acquire((uint32_t *)argument) == 1)
		kit_sleep_ms(1);
	return NULL;
}

TEST(a_thread_that_does_not_stop_is_named)
{
	pthread_t thread;
	uint32_t step = 0;
	CHECK_EQ(pthread_create(&thread, NULL, block_everything, &step), 0);
	kit_await(&step, 1);
	struct ksm_domain *domain = attach(KSM_BARRIER_STOP);
	struct ksm_arena *arena;
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
	have_a_broken_page(domain, arena);
	struct ksm_capabilities caps = look(domain);
	CHECK_EQ(caps.stop, KSM_EUNSTOPPABLE);
	if (!strstr(caps.stop_reason, "stubborn") || !strstr(caps.stop_reason, "blocks the signal"))
		FAIL("the reason is \"%s\"", caps.stop_reason);
	CHECK_EQ(caps.why_not, KSM_EUNSTOPPABLE);
	ksm_store_release(&step, 2);
	pthread_join(thread, NULL);
	KIT_WAIT(30, (have_a_broken_page(domain, arena), look(domain).stop == 0));
}

TEST(where_nothing_works)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_domain *domain = NULL;
	struct ksm_capabilities caps;
	ksm_os_fault_set(KSM_OS_UFFD_OPEN, 0, UINT32_MAX, -EPERM);
	ksm_os_fault_set(KSM_OS_HANDLER, 0, UINT32_MAX, -EAGAIN);
	options.barrier = KSM_BARRIER_STOP;
	CHECK_EQ(ksm_domain_attach(&options, &domain), KSM_EBARRIER);
	options.barrier = KSM_BARRIER_SEGV;
	CHECK_EQ(ksm_domain_attach(&options, &domain), KSM_EBARRIER);
	options.barrier = KSM_BARRIER_AUTO; /* none is no error, and the best one's reason is told */
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	caps = look(domain);
	CHECK_EQ(caps.barrier, KSM_BARRIER_NONE);
	CHECK_EQ(caps.move, -EPERM);
	CHECK_EQ(caps.stop, -EAGAIN);
	CHECK_EQ(caps.why_not, -EPERM);
	ksm_os_fault_clear();
	ksm_domain_detach(domain);
}

TEST(what_was_asked_for_by_name_or_the_reason)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_domain *domain = NULL;
	options.barrier = KSM_BARRIER_MOVE;
	ksm_os_fault_set(KSM_OS_UFFD_OPEN, 0, UINT32_MAX, -EPERM);
	CHECK_EQ(ksm_domain_attach(&options, &domain), KSM_EBARRIER);
	options.barrier = KSM_BARRIER_AUTO; /* the next best */
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	struct ksm_capabilities caps = look(domain);
	CHECK_EQ(caps.barrier, KSM_BARRIER_STOP);
	CHECK_EQ(caps.move, -EPERM);
	CHECK_EQ(caps.why_not, 0);
	ksm_domain_detach(domain);
	ksm_os_fault_clear();
	static const enum ksm_barrier_kind kinds[] = {KSM_BARRIER_MOVE, KSM_BARRIER_STOP, KSM_BARRIER_SEGV};
	for (size_t i = 0; i < KSM_COUNT(kinds); i++) {
		if (!kit_has_barrier(kinds[i]))
			continue;
		domain = attach(kinds[i]);
		CHECK_EQ(look(domain).barrier, kinds[i]);
		options.barrier = kinds[(i + 1) % KSM_COUNT(kinds)]; /* in force already: another one cannot be had */
		struct ksm_domain *again;
		CHECK_EQ(ksm_domain_attach(&options, &again), KSM_EBARRIER);
		ksm_domain_detach(domain);
	}
}

TEST(who_changed_its_user)
{
	if (!kit_is_root())
		return;
	kit_name("d");
	struct ksm_domain_options options = kit_options(kit_name("d"));
	struct ksm_domain *domain = NULL;
	options.path = NULL;
	kit_become_nobody();
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	struct ksm_capabilities caps = look(domain);
	printf("nobody: barrier %d, move %s, device %s, call %s, stop %s\n", caps.barrier, ksm_error_name(caps.move),
	       ksm_error_name(caps.uffd_device), ksm_error_name(caps.uffd_call), ksm_error_name(caps.stop));
	CHECK_EQ(caps.dumpable, 0);
	CHECK_NE(caps.pagemap, 0);
	CHECK_EQ(caps.tracking, KSM_TRACKING_DIGEST);
	CHECK_EQ(caps.barrier, caps.move ? KSM_BARRIER_STOP : KSM_BARRIER_MOVE);
	ksm_domain_detach(domain);
}
