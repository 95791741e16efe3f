/* SPDX-License-Identifier: MIT */
/* Pages rest before they are given back: REST-1 to 4. */
#include "members.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#define PAGES 8
#define MS 1000000ull

/* Pages that were merged and then written, and worn: the next pass gives them back. */
static struct ksm_member *worn(char **at, struct ksm_region **region)
{
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_MOVE);
	*at = kit_map_filled(PAGES, 1);
	*region = members_region(a, *at, PAGES);
	members_region(a, kit_map_filled(PAGES, 1), PAGES);
	CHECK_EQ(members_merge(a), 2 * PAGES);
	for (size_t i = 0; i < PAGES; i++)
		kit_fill(kit_page(*at, i), 100 + i);
	members_pass(a);
	CHECK_EQ((*region)->states[KSM_PAGE_BROKEN], PAGES);
	return a;
}

/* ---- a process_vm_writev that is held up in the middle ------------------------------------------------------------ */

/*
 * The bytes to be written lie in a page that is missing, and userfaultfd keeps the copying waiting for it: the page it goes to
 * has been looked up, and is pinned. A process that lost its processor there would look the same.
 */
struct slow {
	char *from;
	int uffd;
	pid_t child;
	uint32_t *steps; /* 1: the copying waits for the page; 2: it may go on */
};

static void *provide(void *argument)
{
	struct slow *slow = argument;
	char bytes[KSM_PAGE_SIZE];
	struct ksm_os_uffd_event event;
	kit_fill(bytes, 999);
	CHECK_EQ(ksm_os_uffd_read(slow->uffd, UINT64_MAX, &event), KSM_OS_UFFD_SLEEPER);
	kit_reach(slow->steps, 1);
	kit_await(slow->steps, 2);
	struct uffdio_copy copy = {.dst = (uintptr_t)slow->from, .src = (uintptr_t)bytes, .len = KSM_PAGE_SIZE};
	CHECK_EQ(ioctl(slow->uffd, UFFDIO_COPY, &copy), 0);
	return NULL;
}

static void begin_slow_write(struct slow *slow, char *to)
{
	pid_t parent = getpid();
	slow->steps = kit_steps();
	slow->child = kit_fork();
	if (slow->child)
		return;
	pthread_t thread;
	slow->from = kit_map(1);
	slow->uffd = ksm_os_uffd_open(0);
	CHECK_EQ(ksm_os_uffd_register(slow->uffd, slow->from, KSM_PAGE_SIZE, KSM_UFFD_MISSING), 0);
	CHECK_EQ(ksm_os_thread(&thread, NULL, provide, slow), 0);
	struct iovec local = {slow->from, KSM_PAGE_SIZE}, remote = {to, KSM_PAGE_SIZE};
	ssize_t n = process_vm_writev(parent, &local, 1, &remote, 1, 0);
	_exit(n == (ssize_t)KSM_PAGE_SIZE ? 0 : 1);
}

static int call_nothing(void *context KSM_UNUSED)
{
	return 0;
}

/* The pages rest: only now does the copying go on. */
static int let_go_on(void *context)
{
	kit_reach(context, 2);
	return 0;
}

/* Returns whether the write is there when it has ended. Without a rest it goes on when the pages have been given back. */
static bool write_slowly(uint64_t rest_ns)
{
	struct ksm_merge_counts counts = {0};
	struct ksm_region *region;
	struct slow slow;
	char *at;
	struct ksm_member *a = worn(&at, &region);
	a->scanner.rest_ns = rest_ns;
	begin_slow_write(&slow, kit_page(at, 3));
	kit_await(slow.steps, 1);
	struct ksm_scan_between hook = {call_nothing, slow.steps, let_go_on};
	for (int pass = 0; pass < 20 && members_counter(a, KSM_GIVE_BACKS) < PAGES - 1; pass++)
		CHECK_EQ(ksm_scan_pass(&a->scanner, NULL, KSM_SCAN_ALL, &hook, &counts), 0);
	CHECK_GE(members_counter(a, KSM_GIVE_BACKS), PAGES - 1);
	CHECK_EQ(ksm_load_relaxed(slow.steps), rest_ns ? 2 : 1);
	kit_reach(slow.steps, 2);
	CHECK_EQ(harness_wait(__FILE__, __LINE__, slow.child), 0);
	bool there = kit_is(kit_page(at, 3), 999);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(at, i), i == 3 && there ? 999 : 100 + i));
	members_leave(a);
	return there;
}

TEST_LIMIT(a_write_by_another_process_is_over_after_a_rest, 60)
{
	if (!kit_can_move())
		return;
	CHECK(write_slowly(1000 * MS));
}

TEST_LIMIT(without_a_rest_it_is_lost, 60)
{
	if (!kit_can_move())
		return;
	CHECK(!write_slowly(0));
}

/* ---- the program goes on -------------------------------------------------------------------------------------------- */

struct writer {
	pthread_t thread;
	struct ksm_member *member;
	char *page;
	uint32_t locks; /* store with the merge lock held */
	uint32_t stop;
	uint64_t stores;
};

static void *write_on(void *argument)
{
	struct writer *w = argument;
	while (!ksm_load_relaxed(&w->stop)) {
		if (w->locks)
			ksm_merge_lock(&w->member->peer);
		*(volatile uint64_t *)w->page = 1 + w->stores;
		if (w->locks)
			ksm_merge_unlock(&w->member->peer);
		w->stores++;
		ksm_os_sleep_ns(3 * MS);
	}
	return NULL;
}

/* Whoever writes is let go, its page stays, the others go; and nobody waits for anybody for ever: REST-1, REST-2. */
static void writers_go_on(bool locks)
{
	struct ksm_region *region;
	struct writer w = {.locks = locks};
	char *at;
	if (!kit_can_move())
		return;
	w.member = worn(&at, &region);
	w.page = kit_page(at, 5);
	w.member->scanner.rest_ns = 100 * MS;
	CHECK_EQ(ksm_os_thread(&w.thread, NULL, write_on, &w), 0);
	uint64_t before = ksm_os_now_ns();
	for (int pass = 0; pass < 50 && members_counter(w.member, KSM_GIVE_BACKS) < PAGES - 1; pass++)
		members_pass(w.member);
	CHECK_GE(members_counter(w.member, KSM_GIVE_BACKS), PAGES - 1);
	printf("%llu stores in %llu ms\n", (unsigned long long)ksm_load_relaxed(&w.stores),
	       (unsigned long long)((ksm_os_now_ns() - before) / MS));
	ksm_store_relaxed(&w.stop, 1);
	pthread_join(w.thread, NULL);
	CHECK_EQ(*(uint64_t *)w.page, w.stores);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(i == 5 || kit_is(kit_page(at, i), 100 + i));
	CHECK(!kit_is_registered(at, PAGES));
	CHECK_EQ(members_counter(w.member, KSM_FAILURES), 0);
	members_leave(w.member);
}

TEST_LIMIT(who_writes_is_let_go, 60)
{
	writers_go_on(false);
}

TEST_LIMIT(who_writes_with_the_merge_lock_is_let_go, 60)
{
	writers_go_on(true);
}

/* ---- regions that go, and other wishes -------------------------------------------------------------------------------- */

struct guest {
	struct ksm_member *member;
	struct ksm_region *region;
	int calls;
	bool unmaps; /* else: wants the rest to end */
};

static int disturb(void *context)
{
	struct guest *guest = context;
	if (guest->calls++ || !guest->unmaps)
		return !guest->unmaps;
	members_unmap(guest->member, guest->region); /* REST-4: as another thread would */
	return 0;
}

static void disturbed(bool unmaps)
{
	struct ksm_merge_counts counts = {0};
	struct guest guest = {.unmaps = unmaps};
	struct ksm_scan_between hook = {call_nothing, &guest, disturb};
	char *at;
	if (!kit_can_move())
		return;
	guest.member = worn(&at, &guest.region);
	guest.member->scanner.rest_ns = 20 * MS;
	for (int pass = 0; pass < 4 && !guest.calls; pass++)
		CHECK_EQ(ksm_scan_pass(&guest.member->scanner, NULL, KSM_SCAN_ALL, &hook, &counts), 0);
	CHECK_GT(guest.calls, 0);
	CHECK_EQ(members_counter(guest.member, KSM_GIVE_BACKS), 0);
	CHECK(!guest.member->scanner.resting);
	CHECK(unmaps || !kit_is_registered(at, PAGES));
	for (size_t i = 0; i < PAGES && !unmaps; i++)
		CHECK(kit_is(kit_page(at, i), 100 + i));
	if (!unmaps)
		memset(at, 1, PAGES * KSM_PAGE_SIZE); /* nobody is kept waiting: REST-3 */
	members_leave(guest.member);
}

TEST(a_rest_ends_when_something_else_is_wanted)
{
	disturbed(false);
}

TEST(a_region_may_go_while_it_rests)
{
	disturbed(true);
}

/* ---- faults --------------------------------------------------------------------------------------------------------------- */

/* The look at the marks while all are held fails: a page let go since the first look would lose a write. REST-1 */
static int fail_second_look(void *context)
{
	if (!*(int *)context)
		ksm_os_fault_set(KSM_OS_PAGEMAP_SCAN, 1, 1, -EIO);
	*(int *)context = 1;
	return 0;
}

TEST(marks_that_cannot_be_read_replace_nothing)
{
	struct ksm_merge_counts counts = {0};
	struct ksm_region *region;
	int done = 0;
	struct ksm_scan_between hook = {call_nothing, &done, fail_second_look};
	char *at;
	if (!kit_can_move())
		return;
	struct ksm_member *a = worn(&at, &region);
	a->scanner.rest_ns = 5 * MS;
	for (int pass = 0; pass < 4 && !done; pass++)
		CHECK_EQ(ksm_scan_pass(&a->scanner, NULL, KSM_SCAN_ALL, &hook, &counts), 0);
	CHECK_EQ(ksm_os_fault_hits(KSM_OS_PAGEMAP_SCAN), 1);
	ksm_os_fault_clear();
	CHECK_EQ(counts.why_not, -EIO);
	CHECK_EQ(members_counter(a, KSM_GIVE_BACKS), 0);
	CHECK_EQ(region->states[KSM_PAGE_BROKEN], PAGES);
	for (int pass = 0; pass < 20 && members_counter(a, KSM_GIVE_BACKS) < PAGES; pass++)
		members_pass(a);
	CHECK_EQ(members_counter(a, KSM_GIVE_BACKS), PAGES);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(kit_is(kit_page(at, i), 100 + i));
	members_leave(a);
}

/* ---- a scan ends ------------------------------------------------------------------------------------------------------- */

static void *block_the_signal(void *argument)
{
	uint32_t *state = argument;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, ksm_park_signal());
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	ksm_store_release(state, 1);
	while (ksm_load_acquire(state) == 1)
		ksm_os_sleep_ns(MS);
	return NULL;
}

/* As if a stop had worked in between: on a busy machine some do. */
static int forget_failures(void *context)
{
	struct ksm_park *park = context;
	park->in_a_row = 0;
	park->retry_at_ns = 0;
	return 0;
}

TEST(a_scan_ends_though_threads_can_be_stopped_only_now_and_then)
{
	struct ksm_merge_counts counts = {0};
	pthread_t thread;
	uint32_t state = 0;
	uint64_t passes;
	struct ksm_member *a = members_join_with("d", KSM_BARRIER_STOP);
	struct ksm_scan_between hook = {forget_failures, &a->scanner.park, NULL};
	members_region(a, kit_map_filled(PAGES, 1), PAGES);
	members_region(a, kit_map_filled(PAGES, 1), PAGES);
	CHECK_EQ(pthread_create(&thread, NULL, block_the_signal, &state), 0);
	KIT_WAIT(10, ksm_load_acquire(&state));
	CHECK_EQ(ksm_scan_exhaust(&a->scanner, NULL, &hook, &counts, &passes), 0);
	CHECK_EQ(counts.why_not, KSM_EUNSTOPPABLE);
	CHECK_EQ(counts.merged, 0);
	CHECK_GT(passes, 2);
	ksm_store_release(&state, 2);
	pthread_join(thread, NULL);
	ksm_scan_exhaust(&a->scanner, NULL, &hook, &counts, &passes);
	CHECK_EQ(counts.merged, 2 * PAGES);
	members_leave(a);
}
