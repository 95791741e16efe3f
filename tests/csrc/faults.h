/* SPDX-License-Identifier: MIT */
/*
 * faults.h: a piece of work is done over and over, each time in a process of its own in which one system call more
 * fails, while a thread of that process reads and writes the memory. Whatever fails: the bytes are right, nobody is left
 * asleep, and the next work without faults does all that is to be done and leaves nothing behind.
 */
#ifndef KSM_TESTS_FAULTS_H
#define KSM_TESTS_FAULTS_H

#include "members.h"

#define FIELD_PAGES 20 /* in each of two fields of equal pages; the last two are zeros */
#define FIELD_ZEROS 2
#define FIELD_HOT(page) ((page) == 3 || (page) == 11) /* written all the time, in the first field */

#define FAULT_ALWAYS UINT32_MAX

struct fault {
	enum ksm_os_call call;
	uint32_t skip, count; /* count 0: no fault */
	int error;
};

/* ---- the thread that touches everything ------------------------------------------------------------------------------ */

struct toucher {
	pthread_t thread;
	char *fields[2];
	uint32_t stop;
	uint64_t rounds; /* over all pages */
	uint64_t writes;
};

KIT uint64_t field_word(size_t page)
{
	uint64_t bytes[KSM_PAGE_SIZE / 8];
	kit_fill(bytes, page < FIELD_PAGES - FIELD_ZEROS ? 1 + page : 0);
	return bytes[100];
}

KIT void *touch(void *argument)
{
	struct toucher *t = argument;
	uint64_t expected[FIELD_PAGES];
	for (size_t page = 0; page < FIELD_PAGES; page++)
		expected[page] = field_word(page);
	while (!ksm_load_relaxed(&t->stop)) {
		for (size_t i = 0; i < 2 * FIELD_PAGES; i++) {
			size_t page = i % FIELD_PAGES;
			volatile uint64_t *at = (uint64_t *)kit_page(t->fields[i / FIELD_PAGES], page);
			if (at[100] != expected[page])
				FAIL("page %zu of field %zu read wrong", page, i / FIELD_PAGES);
			if (i / FIELD_PAGES == 0 && FIELD_HOT(page)) {
				if (at[0] != t->writes)
					FAIL("a write to page %zu was lost", page);
				at[0] = t->writes + 1;
			}
		}
		t->writes++;
		ksm_add_relaxed(&t->rounds, 1);
		ksm_os_sleep_ns(10000);
	}
	return NULL;
}

/* ---- one process's world ------------------------------------------------------------------------------------------------ */

struct world {
	struct ksm_member *member;
	struct ksm_region *regions[2];
	struct toucher toucher;
	int ring;       /* pins a page in the middle of both fields; -1: none */
	size_t pinned;  /* which */
	int files;      /* open before the work */
	int result;     /* of the work, as it says */
	uint64_t count; /* what the work did, as it says */
};

struct work {
	const char *name;
	void (*prepare)(struct world *); /* before the faults; may be NULL */
	void (*run)(struct world *);
	void (*judge)(
		struct world *); /* after the run with faults: has it owned up to what it did not do? May be NULL */
	void (*check)(struct world *); /* after a second run without faults */
	struct fault base[3];          /* these fail every time */
	enum ksm_barrier_kind barrier;
	bool few; /* errors: every call takes its time */
};

KIT void world_create(struct world *w, const char *domain, enum ksm_barrier_kind barrier)
{
	*w = (struct world){.member = members_join_with(domain, barrier), .ring = -1, .pinned = FIELD_PAGES};
	for (size_t i = 0; i < 2; i++) {
		char *field = w->toucher.fields[i] = kit_map(FIELD_PAGES);
		for (size_t page = 0; page < FIELD_PAGES; page++)
			kit_fill(kit_page(field, page), page < FIELD_PAGES - FIELD_ZEROS ? 1 + page : 0);
		for (size_t page = 0; page < FIELD_PAGES; page++)
			if (FIELD_HOT(page))
				((uint64_t *)kit_page(field, page))[0] = 0;
		w->regions[i] = members_region(w->member, field, FIELD_PAGES);
	}
	CHECK_EQ(members_know(w->member), 0);
}

/* Everything is as the toucher left it. */
KIT void world_check_bytes(const struct world *w)
{
	uint64_t expected[KSM_PAGE_SIZE / 8];
	for (size_t i = 0; i < 2 * FIELD_PAGES; i++) {
		size_t page = i % FIELD_PAGES, field = i / FIELD_PAGES;
		kit_fill(expected, page < FIELD_PAGES - FIELD_ZEROS ? 1 + page : 0);
		if (FIELD_HOT(page))
			expected[0] = field ? 0 : w->toucher.writes;
		if (memcmp(expected, kit_page(w->toucher.fields[field], page), KSM_PAGE_SIZE))
			FAIL("page %zu of field %zu does not hold what it should", page, field);
	}
}

KIT void world_start_toucher(struct world *w)
{
	CHECK_EQ(pthread_create(&w->toucher.thread, NULL, touch, &w->toucher), 0);
	KIT_WAIT(5, ksm_load_relaxed(&w->toucher.rounds) > 0);
}

/* Is it awake? It has been round everything twice since now. */
KIT void world_check_awake(struct world *w)
{
	uint64_t rounds = ksm_load_relaxed(&w->toucher.rounds);
	KIT_WAIT(5, ksm_load_relaxed(&w->toucher.rounds) >= rounds + 2);
}

KIT void world_stop_toucher(struct world *w)
{
	ksm_store_release(&w->toucher.stop, 1);
	pthread_join(w->toucher.thread, NULL);
}

/* No frame, no mapping, no open file more than before. */
KIT void world_check_nothing_left(struct world *w)
{
	struct ksm_member *m = w->member;
	for (size_t i = 0; i < 2; i++)
		members_unmap(m, w->regions[i]);
	int64_t swept = members_sweep(m);
	if (swept < 0)
		FAIL("the last sweep said %s", ksm_error_name((int)swept));
	CHECK_EQ(members_frames(m), 0);
	CHECK_EQ(kit_blocks(m->peer.fds.store), 0);
	CHECK_EQ(members_counter(m, KSM_FRAMES_REFERRED), 0);
	CHECK_EQ(members_counter(m, KSM_VMAS_USED), 0);
	CHECK_EQ(kit_open_files(), w->files);
	for (size_t frame = 0; frame < m->peer.layout.frames; frame++)
		CHECK_EQ(m->peer.counts[frame], 0);
}

/* Pages that could be on frames, or dropped, and are not. *first: one of them. */
KIT size_t world_unmerged(const struct world *w, size_t *first)
{
	size_t unmerged = 0;
	for (size_t i = 0; i < 2 * FIELD_PAGES; i++) {
		size_t page = i % FIELD_PAGES;
		enum ksm_page_state state = ksm_region_state(w->regions[i / FIELD_PAGES], page);
		enum ksm_page_state expected = page < FIELD_PAGES - FIELD_ZEROS ? KSM_PAGE_MERGED : KSM_PAGE_DROPPED;
		if (FIELD_HOT(page) || page == w->pinned || state == expected)
			continue;
		unmerged++;
		*first = i;
	}
	return unmerged;
}

/* What a scanner does, and what it says about it. */
KIT void world_merge(struct world *w)
{
	struct ksm_merge_counts counts = {0};
	uint64_t failures = members_counter(w->member, KSM_FAILURES);
	w->result = 0;
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(ksm_scan_pass(&w->member->scanner, NULL, KSM_SCAN_ALL, NULL, &counts), 0);
		w->result = counts.why_not ? counts.why_not : w->result;
	}
	w->count = members_counter(w->member, KSM_FAILURES) - failures + counts.skipped;
}

KIT void world_judge_merge(struct world *w)
{
	size_t page = 0;
	if (world_unmerged(w, &page) && !w->count && !w->result)
		FAIL("page %zu was not merged, and nobody says why", page);
}

KIT void world_check_merged(struct world *w)
{
	size_t page = 0;
	if (world_unmerged(w, &page))
		FAIL("page %zu is not merged in the end", page);
}

/* ---- the walk --------------------------------------------------------------------------------------------------------------- */

KIT void fault_set(const struct fault *fault)
{
	if (fault->count)
		ksm_os_fault_set(fault->call, fault->skip, fault->count, fault->error);
}

/* In a process of its own. counts: told how often each call was made. */
KIT void fault_run(const struct work *work, const struct fault *fault, uint32_t *counts)
{
	struct world w;
	char domain[32];
	snprintf(domain, sizeof(domain), "w%d", (int)getpid());
	members_forget();
	alarm((unsigned)harness_limit(20));
	world_create(&w, domain, work->barrier);
	if (work->prepare)
		work->prepare(&w);
	world_start_toucher(&w);
	w.files = kit_open_files();
	ksm_os_fault_clear();
	for (size_t i = 0; i < KSM_COUNT(work->base); i++)
		fault_set(&work->base[i]);
	fault_set(fault);
	work->run(&w);
	for (int call = 0; counts && call < KSM_OS_CALL_COUNT; call++)
		counts[call] = ksm_os_fault_calls((enum ksm_os_call)call);
	ksm_os_fault_clear();
	world_check_awake(&w);
	members_watch_anew(w.member);
	for (size_t i = 0; i < 2; i++)
		CHECK(!kit_is_registered(w.toucher.fields[i], FIELD_PAGES));
	if (work->judge)
		work->judge(&w);
	work->run(&w);
	world_check_awake(&w);
	world_stop_toucher(&w);
	world_check_bytes(&w);
	work->check(&w);
	world_check_nothing_left(&w);
	members_leave(w.member);
	struct ksm_domain_options options = kit_options(domain);
	CHECK_EQ(ksm_domain_clean(&options), 0);
	_exit(0);
}

KIT pid_t fault_fork(const struct work *work, const struct fault *fault, uint32_t *counts)
{
	pid_t pid = kit_fork();
	if (pid == 0)
		fault_run(work, fault, counts);
	return pid;
}

struct walk {
	const struct work *work;
	unsigned runs;
	struct {
		pid_t pid;
		struct fault fault;
	} under_way[2];
};

KIT void walk_finish(struct walk *walk, size_t place)
{
	const struct fault *fault = &walk->under_way[place].fault;
	int status;
	if (!walk->under_way[place].pid)
		return;
	CHECK_EQ(waitpid(walk->under_way[place].pid, &status, 0), walk->under_way[place].pid);
	walk->under_way[place].pid = 0;
	if (status)
		FAIL("%s: with %s number %u%s failing with %s: wait status 0x%x", walk->work->name,
		     ksm_os_call_name(fault->call), fault->skip,
		     fault->count == FAULT_ALWAYS ? " and all after it" : "", ksm_error_name(fault->error),
		     (unsigned)status);
}

KIT void walk_start(struct walk *walk, const struct fault *fault)
{
	size_t place = walk->runs++ % KSM_COUNT(walk->under_way);
	walk_finish(walk, place);
	walk->under_way[place].fault = *fault;
	walk->under_way[place].pid = fault_fork(walk->work, fault, NULL);
}

/* Which numbers of `calls` to let fail: all of a few; of many the first, the last and some between. */
KIT bool walk_takes(uint32_t number, uint32_t calls)
{
	return calls <= 8 || number < 4 || number + 2 >= calls || number % (calls / 3) == 0;
}

static const int fault_errors[] = {-ENOMEM, -EAGAIN, -EBUSY, -EEXIST, -EPERM, -ENOSPC, -EINTR, -EINVAL};

/* On a machine that is so many times slower only every so manieth is tried; an odd number, to see every error and number. */
KIT bool walk_samples(void)
{
	static unsigned tried;
	return tried++ % ((unsigned)harness_slower() | 1) == 0;
}

/* excluded(fault): is this one known to end the process, as its source says? */
KIT void walk_all(const struct work *work, bool (*excluded)(const struct fault *))
{
	struct walk walk = {.work = work};
	uint32_t *counts = kit_steps();
	struct fault none = {0};
	kit_directory();
	CHECK_CHILD(fault_fork(work, &none, counts));
	for (int call = 0; call < KSM_OS_CALL_COUNT; call++) {
		bool is_base = false;
		for (size_t i = 0; i < KSM_COUNT(work->base); i++)
			is_base |= work->base[i].count && work->base[i].call == (enum ksm_os_call)call;
		for (uint32_t number = 0; number < counts[call] && !is_base; number++) {
			if (!walk_takes(number, counts[call]))
				continue;
			for (size_t i = 0; i < 2 * KSM_COUNT(fault_errors); i += work->few && i % 2 ? 5 : 1) {
				struct fault fault = {(enum ksm_os_call)call, number, i % 2 ? FAULT_ALWAYS : 1,
						      fault_errors[i / 2]};
				/* It is tried again for a while, whatever the error: once is enough. */
				bool slow = fault.call == KSM_OS_ADVISE && i % 2 && (i / 2 || number);
				if (!slow && (!excluded || !excluded(&fault)) && walk_samples())
					walk_start(&walk, &fault);
			}
		}
	}
	for (size_t place = 0; place < KSM_COUNT(walk.under_way); place++)
		walk_finish(&walk, place);
	printf("%s: %u processes\n", work->name, walk.runs);
	munmap(counts, KSM_PAGE_SIZE);
}

#endif
