/* SPDX-License-Identifier: MIT */
#include "guarded.h"

TEST(one_byte_a_page)
{
	struct ksm_guard *guard;
	uint8_t was = 77;
	char *at = kit_map(8);
	CHECK_EQ(ksm_guard_create(at, 8, &guard), 0);
	for (size_t page = 0; page < 8; page++)
		CHECK_EQ(ksm_guard_get(guard, page), KSM_GUARD_OPEN);
	CHECK(ksm_guard_claim_sigsafe(guard, 3, &was));
	CHECK_EQ(was, KSM_GUARD_OPEN);
	CHECK_EQ(ksm_guard_get(guard, 3), KSM_GUARD_BUSY);
	CHECK(!ksm_guard_claim_sigsafe(guard, 3, &was));
	CHECK_EQ(was, KSM_GUARD_BUSY);
	CHECK_EQ(guard->busy, 1);
	ksm_guard_set(guard, 3, 1, KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
	CHECK_EQ(guard->busy, 0);
	CHECK(ksm_guard_claim_sigsafe(guard, 3, &was));
	CHECK_EQ(was, KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
	CHECK_EQ(ksm_guard_get(guard, 3), KSM_GUARD_BUSY | KSM_GUARD_FROZEN);
	ksm_guard_set(guard, 2, 3, KSM_GUARD_BUSY); /* under the merge lock without a claim */
	CHECK_EQ(guard->busy, 3);
	ksm_guard_set(guard, 2, 3, KSM_GUARD_READONLY);
	CHECK_EQ(guard->busy, 0);
	CHECK_EQ(ksm_guard_get(guard, 1), KSM_GUARD_OPEN);
	CHECK_EQ(ksm_guard_get(guard, 5), KSM_GUARD_OPEN);
	ksm_guard_destroy(guard);
}

TEST(addresses_are_found)
{
	struct ksm_guard *first, *second;
	size_t page = 99;
	char *at = kit_map(30);
	CHECK(!ksm_guard_find_sigsafe(at, &page));
	CHECK_EQ(ksm_guard_create(kit_page(at, 10), 10, &first), 0);
	CHECK_EQ(ksm_guard_create(kit_page(at, 20), 5, &second), 0);
	CHECK(!ksm_guard_find_sigsafe(kit_page(at, 10) - 1, &page));
	CHECK_EQ(page, 99);
	CHECK(ksm_guard_find_sigsafe(kit_page(at, 10), &page) == first);
	CHECK_EQ(page, 0);
	CHECK(ksm_guard_find_sigsafe(kit_page(at, 20) - 1, &page) == first);
	CHECK_EQ(page, 9);
	CHECK(ksm_guard_find_sigsafe(kit_page(at, 24) + 5, &page) == second);
	CHECK_EQ(page, 4);
	CHECK(!ksm_guard_find_sigsafe(kit_page(at, 25), &page));
	CHECK(!ksm_guard_find_sigsafe(NULL, &page));
	CHECK(!ksm_guard_find_sigsafe((void *)UINTPTR_MAX, &page));
	uint64_t destroyed = ksm_guards_destroyed_sigsafe();
	ksm_guard_destroy(first);
	CHECK_EQ(ksm_guards_destroyed_sigsafe(), destroyed + 1);
	CHECK(!ksm_guard_find_sigsafe(kit_page(at, 10), &page));
	CHECK(ksm_guard_find_sigsafe(kit_page(at, 20), &page) == second);
	ksm_guard_destroy(second);
}

TEST(there_is_an_end_and_entries_are_used_again)
{
	static struct ksm_guard *guards[2000];
	struct ksm_guard *one;
	size_t made = 0, page;
	char *at = kit_map(2000);
	for (int round = 0; round < 3; round++) {
		int r = 0;
		for (made = 0; made < 2000 && !r; made += !r)
			r = ksm_guard_create(kit_page(at, made), 1, &guards[made]);
		CHECK_EQ(r, -ENOSPC);
		CHECK_EQ(made, 1024);
		CHECK(ksm_guard_find_sigsafe(kit_page(at, 1023), &page) == guards[1023]);
		while (made > 0)
			ksm_guard_destroy(guards[--made]);
	}
	for (int i = 0; i < 10000; i++) {
		CHECK_EQ(ksm_guard_create(at, 1 + (size_t)i % 2000, &one), 0);
		ksm_guard_destroy(one);
	}
	/* No memory for a table: nothing happened, and the entry is not lost. */
	for (int i = 0; i < 2000; i++) {
		ksm_os_fault_set(KSM_OS_MAP_ANON, 0, 1, -ENOMEM);
		CHECK_EQ(ksm_guard_create(at, 1 << 20, &one), -ENOMEM);
	}
	ksm_os_fault_clear();
	CHECK_EQ(ksm_guard_create(at, 2000, &one), 0);
	ksm_guard_destroy(one);
}

TEST(tables_stay_and_are_clean)
{
	struct ksm_guard *guard, *next;
	char *at = kit_map(16);
	for (int fault = 0; fault < 2; fault++) {
		CHECK_EQ(ksm_guard_create(at, 1 << 20, &guard), 0);
		const uint8_t *stale = guard->bytes;
		ksm_guard_set(guard, 5, 3, KSM_GUARD_WRITABLE);
		ksm_guard_set(guard, (1 << 20) - 1, 1, KSM_GUARD_WRITABLE);
		guard->breaks = guard->thaws = 5;
		if (fault) /* the kernel does not empty it */
			ksm_os_fault_set(KSM_OS_ADVISE, 0, 1, -EINVAL);
		ksm_guard_destroy(guard);
		ksm_os_fault_clear();
		CHECK_EQ(*(volatile const uint8_t *)(stale + 5), 0);
		CHECK_EQ(ksm_guard_create(at, 1 << 20, &next), 0);
		CHECK(next == guard && next->bytes == stale);
		for (size_t page = 0; page < 1 << 20; page++)
			CHECK_EQ(ksm_guard_get(next, page), KSM_GUARD_OPEN);
		CHECK_EQ(next->breaks + next->thaws, 0);
		CHECK_GT(next->vmas_left, INT32_MAX);
		ksm_guard_destroy(next);
	}
	/* A table for 16 GiB costs what is used of it. */
	CHECK_EQ(ksm_guard_create(at, 4 << 20, &guard), 0);
	ksm_guard_set(guard, 1000, 1, KSM_GUARD_WRITABLE);
	ksm_guard_set(guard, 0, 4 << 20, KSM_GUARD_OPEN);
	CHECK_LE(kit_smaps_bytes(guard->bytes, 1, "Rss"), 8 << 20);
	ksm_guard_destroy(guard);
}

/* ---- while guards come and go ------------------------------------------------------------------------------------- */

struct finder {
	pthread_t thread;
	char *field;
	struct ksm_guard *fixed;
	uint32_t *stop;
	uint64_t found, rounds;
};

#define FIELD 64

static void *find_all(void *argument)
{
	struct finder *f = argument;
	size_t page;
	while (!ksm_load_relaxed(f->stop)) {
		for (size_t i = 0; i < FIELD; i++) {
			page = SIZE_MAX;
			struct ksm_guard *guard = ksm_guard_find_sigsafe(kit_page(f->field, i), &page);
			if (i >= FIELD - 4) { /* always there */
				CHECK(guard == f->fixed);
				CHECK_EQ(page, i - (FIELD - 4));
			} else if (i < 4) { /* never there */
				CHECK(!guard);
			} else if (guard) {
				CHECK_LT(page, FIELD);
				ksm_guard_get(guard, page); /* whatever it says, there is a table */
				ksm_add_relaxed(&f->found, 1);
			}
		}
		f->rounds++;
	}
	return NULL;
}

static void *make_and_destroy(void *argument)
{
	struct finder *f = argument;
	uint64_t state = (uintptr_t)&state;
	struct ksm_guard *guard;
	while (!ksm_load_relaxed(f->stop)) {
		size_t first = 4 + kit_random(&state) % 20, n = 1 + kit_random(&state) % 30;
		CHECK_EQ(ksm_guard_create(kit_page(f->field, first), n, &guard), 0);
		ksm_guard_set(guard, 0, n, KSM_GUARD_WRITABLE);
		f->rounds++;
		for (size_t page = 0; page < n; page++)
			CHECK_EQ(ksm_guard_get(guard, page), KSM_GUARD_WRITABLE);
		ksm_guard_destroy(guard);
	}
	return NULL;
}

TEST(finding_while_guards_come_and_go)
{
	static struct finder all[4];
	static uint32_t stop;
	char *field = kit_map(FIELD);
	struct ksm_guard *fixed;
	CHECK_EQ(ksm_guard_create(kit_page(field, FIELD - 4), 4, &fixed), 0);
	for (size_t i = 0; i < 4; i++) {
		all[i] = (struct finder){.field = field, .fixed = fixed, .stop = &stop};
		CHECK_EQ(pthread_create(&all[i].thread, NULL, i < 2 ? find_all : make_and_destroy, &all[i]), 0);
	}
	kit_sleep_ms(1500);
	KIT_WAIT(20, ksm_load_relaxed(&all[0].found) + ksm_load_relaxed(&all[1].found) > 0);
	ksm_store_release(&stop, 1);
	for (size_t i = 0; i < 4; i++)
		pthread_join(all[i].thread, NULL);
	CHECK_GT(all[0].found + all[1].found, 0);
	printf("%llu guards, %llu looks\n", (unsigned long long)(all[2].rounds + all[3].rounds),
	       (unsigned long long)(all[0].rounds + all[1].rounds) * FIELD);
}

static void *destroy(void *argument)
{
	struct ksm_guard **guard = argument;
	ksm_guard_destroy(*guard);
	ksm_store_release(guard, NULL);
	return NULL;
}

TEST(nobody_is_destroyed_under) /* GUARD-3 */
{
	struct ksm_guard *guard, *same;
	pthread_t thread;
	uint8_t was;
	size_t page;
	char *at = kit_map(4);
	CHECK_EQ(ksm_guard_create(at, 4, &guard), 0);
	same = guard;
	CHECK(ksm_guard_claim_sigsafe(guard, 2, &was));
	CHECK_EQ(pthread_create(&thread, NULL, destroy, &guard), 0);
	KIT_WAIT(5, !ksm_guard_find_sigsafe(at, &page));
	kit_sleep_ms(50);
	CHECK(ksm_load_acquire(&guard) == same);
	ksm_guard_set(same, 2, 1, was);
	pthread_join(thread, NULL);
	CHECK(!guard);
}

/* ---- fork -------------------------------------------------------------------------------------------------------- */

static void in_child(struct guarded *g, bool refused)
{
	struct ksm_guard *other;
	ksm_guards_fork_child(); /* the core's fork handler has called it already */
	ksm_os_fault_clear();
	CHECK_EQ(guarded_state(g, 1), refused ? KSM_GUARD_MERGED : KSM_GUARD_WRITABLE);
	CHECK_EQ(guarded_state(g, 2), KSM_GUARD_WRITABLE);
	CHECK_EQ(guarded_state(g, 4), KSM_GUARD_MERGED);
	CHECK_EQ(guarded_state(g, 5), KSM_GUARD_OPEN);
	kit_check_filled(g->at, 8, 1);
	for (size_t page = 0; page < 8; page++) {
		*guarded_word(g, page, 3) = page + 70;
		CHECK_EQ(*guarded_word(g, page, 3), page + 70);
	}
	CHECK_EQ(g->guard->breaks, refused ? 2 : 1);
	CHECK_EQ(g->guard->busy, 0);
	ksm_guard_destroy(g->guard);
	CHECK_EQ(ksm_guard_create(g->at, 8, &other), 0);
	_exit(0);
}

TEST(a_child_is_left_nothing_busy)
{
	struct guarded g = guarded_make(8, 1);
	uint8_t was;
	CHECK_EQ(ksm_handler_install(), 0);
	guarded_merge(&g, 1, 1, false);
	guarded_merge(&g, 4, 1, false);
	CHECK(ksm_guard_claim_sigsafe(g.guard, 1, &was)); /* as by a thread in its handler */
	CHECK(ksm_guard_claim_sigsafe(g.guard, 2, &was));
	CHECK_EQ(ksm_os_protect(kit_page(g.at, 2), KSM_PAGE_SIZE, false), 0);
	for (int refused = 0; refused < 2; refused++) {
		if (refused)
			ksm_os_fault_set(KSM_OS_PROTECT, 0, 1, -ENOMEM);
		pid_t child = kit_fork();
		if (child == 0)
			in_child(&g, refused);
		ksm_os_fault_clear();
		CHECK_CHILD(child);
	}
	/* Somebody was about to make one, or to destroy one. */
	g.guard->sequence++;
	pid_t child = kit_fork();
	if (child == 0) {
		size_t page;
		ksm_guards_fork_child();
		CHECK(!ksm_guard_find_sigsafe(g.at, &page));
		CHECK_EQ(ksm_guard_create(g.at, 8, &g.guard), 0);
		_exit(0);
	}
	CHECK_CHILD(child);
	g.guard->sequence--;
	CHECK_EQ(guarded_state(&g, 1), KSM_GUARD_BUSY); /* here it is still under way */
	CHECK_EQ(guarded_state(&g, 2), KSM_GUARD_BUSY);
	kit_check_filled(g.at, 8, 1);
}

/* ---- all at once ---------------------------------------------------------------------------------------------------- */

/* Nobody answers here: what is still read-only kills. */
static void check_deadly(const struct guarded *g, size_t page)
{
	pid_t child = kit_fork();
	if (child == 0) {
		*guarded_word(g, page, 0) = 1;
		_exit(0);
	}
	CHECK_KILLED(child, SIGSEGV);
}

TEST(all_are_opened)
{
	struct guarded g = guarded_make(1000, 1), h = guarded_make(10, 2000);
	uint8_t was;
	guarded_merge(&g, 0, 700, false);
	guarded_merge(&g, 720, 10, true);
	guarded_freeze(&g, 730, 20);
	guarded_merge(&h, 3, 2, false);
	CHECK(ksm_guard_claim_sigsafe(g.guard, 100, &was));
	check_deadly(&g, 99);
	check_deadly(&g, 735);
	check_deadly(&h, 4);
	ksm_os_fault_clear();
	CHECK_EQ(ksm_guards_open_all(), 731);
	printf("%u calls for 731 pages\n", ksm_os_fault_calls(KSM_OS_PROTECT));
	CHECK_LE(ksm_os_fault_calls(KSM_OS_PROTECT), 6);
	for (size_t page = 0; page < 1000; page++) {
		enum ksm_guard_state state = KSM_GUARD_OPEN;
		if (page < 700 || (page >= 720 && page < 730))
			state = KSM_GUARD_WRITABLE;
		CHECK_EQ(ksm_guard_get(g.guard, page), page == 100 ? KSM_GUARD_BUSY : state);
		CHECK(page == 100 || !!kit_is_file(kit_page(g.at, page)) == (state == KSM_GUARD_WRITABLE));
	}
	kit_check_filled(g.at, 1000, 1);
	kit_check_filled(h.at, 10, 2000);
	for (size_t page = 0; page < 1000; page++)
		if (page != 100)
			*guarded_word(&g, page, 0) = 5;
	*guarded_word(&h, 4, 0) = 5;
	guarded_check_frame(&g, 99, 100); /* the kernel's copy-on-write looks after it */
	ksm_os_fault_clear();
	CHECK_EQ(ksm_guards_open_all(), 0); /* nothing new: nobody looks */
	ksm_guard_set(g.guard, 100, 1, was);
	CHECK_EQ(ksm_guards_open_all(), 1);
	*guarded_word(&g, 100, 0) = 5;
}

TEST(what_cannot_be_opened_at_once_is_opened_by_pages)
{
	struct guarded g = guarded_make(20, 1);
	guarded_merge(&g, 5, 10, false);
	ksm_os_fault_set(KSM_OS_PROTECT, 0, 1, -ENOMEM);
	CHECK_EQ(ksm_guards_open_all(), 10);
	ksm_os_fault_clear();
	for (size_t page = 5; page < 15; page++) {
		CHECK_EQ(guarded_state(&g, page), KSM_GUARD_WRITABLE);
		CHECK(kit_is_file(kit_page(g.at, page)) == 1);
		*guarded_word(&g, page, 0) = page;
	}
	CHECK_EQ(ksm_guards_open_all(), 0);
}

TEST_LIMIT(what_cannot_be_opened_is_opened_later, 20)
{
	struct guarded g = guarded_make(20, 1);
	guarded_merge(&g, 5, 2, true);
	ksm_os_fault_set(KSM_OS_PROTECT, 0, UINT32_MAX, -ENOMEM);
	CHECK_EQ(ksm_guards_open_all(), 0);
	ksm_os_fault_clear();
	CHECK_EQ(ksm_guard_get(g.guard, 5), KSM_GUARD_MERGED | KSM_GUARD_FROZEN);
	CHECK_EQ(g.guard->busy, 0);
	check_deadly(&g, 5);
	CHECK_EQ(ksm_guards_open_all(), 2);
	CHECK_EQ(ksm_guard_get(g.guard, 5), KSM_GUARD_WRITABLE);
	*guarded_word(&g, 6, 0) = 5;
	kit_check_filled(g.at, 6, 1);
}
