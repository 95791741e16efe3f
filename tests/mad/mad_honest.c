/* SPDX-License-Identifier: MIT */
/*
 * An honest process: blocks whose every byte it knows. Calls may be refused while the mad one rages; bytes may not
 * change, and no call may take for ever.
 */
#include "mad.h"

#include "error.h"
#include "os.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct block {
	struct ksm_block memory;
	uint64_t contents[MAD_PAGES]; /* what each page holds; 0: zeros */
};

static struct here {
	const struct mad_options *options;
	struct mad_totals *totals;
	unsigned place;
	uint64_t random;
	struct ksm_domain *domain;
	struct ksm_arena *arena;
	struct block blocks[MAD_BLOCKS];
} here;

/* ---- pages -------------------------------------------------------------------------------------------------- */

static void fill(uint64_t *page, uint64_t content)
{
	uint64_t state = content;
	for (size_t i = 0; i < MAD_PAGE / 8; i++)
		page[i] = content ? mad_random(&state) : 0;
}

static uint64_t *page_of(struct block *block, size_t page)
{
	return (uint64_t *)((char *)block->memory.address + page * MAD_PAGE);
}

static uint64_t some_content(void)
{
	uint64_t r = mad_below(&here.random, 20);
	if (r == 0)
		return 0;
	if (r == 1)
		return mad_random(&here.random) | 1; /* like no other */
	return 1000 + mad_below(&here.random, MAD_CONTENTS);
}

static void write_page(struct block *block, size_t page, uint64_t content)
{
	block->contents[page] = content;
	fill(page_of(block, page), content);
	mad_add(&here.totals->writes, 1);
}

static void complain(struct block *block, size_t page, const uint64_t *right)
{
	const uint64_t *is = page_of(block, page);
	size_t different = 0;
	for (size_t i = 0; i < MAD_PAGE / 8; i++)
		different += is[i] != right[i];
	uint64_t other[MAD_PAGE / 8], found = 0;
	for (uint64_t content = 0; content < 1000 + MAD_CONTENTS && !found; content++) {
		fill(other, content);
		if (!memcmp(other, is, MAD_PAGE))
			found = content + 1;
		if (content == 0)
			content = 999;
	}
	if (mad_get(&here.totals->wrong) < 20)
		fprintf(stderr, "process %d: page %zu: %zu of %d words are wrong; it holds %s (%llu, not %llu)\n",
			(int)getpid(), page, different, MAD_PAGE / 8,
			!found       ? "nothing known"
			: found == 1 ? "zeros"
				     : "another content",
			(unsigned long long)(found ? found - 1 : 0), (unsigned long long)block->contents[page]);
	mad_add(&here.totals->wrong, 1);
	memcpy(page_of(block, page), right, MAD_PAGE);
}

static void check_block(struct block *block)
{
	uint64_t right[MAD_PAGE / 8];
	for (size_t page = 0; block->memory.owner && page < MAD_PAGES; page++) {
		fill(right, block->contents[page]);
		if (memcmp(page_of(block, page), right, MAD_PAGE))
			complain(block, page, right);
		mad_add(&here.totals->pages, 1);
	}
}

static void check_all(void)
{
	for (size_t i = 0; i < MAD_BLOCKS; i++)
		check_block(&here.blocks[i]);
}

/*
 * The kernel may take its time to punch a hole, for others are writing: a frame that is being freed must not come to life
 * meanwhile.
 */
int __real_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int __wrap_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int __wrap_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes)
{
	if (here.options && here.options->ways & 1u << MAD_RACES)
		ksm_os_sleep_ns(mad_below(&here.random, 3000000));
	return __real_ksm_os_punch(fd, offset, nbytes);
}

/* ---- calls -------------------------------------------------------------------------------------------------- */

static void beat(void)
{
	__atomic_store_n(&here.totals->beats[here.place], mad_now_ns(), __ATOMIC_RELAXED);
}

/* A call of the library has come back: how long did it take, what did it say? */
static int came_back(const char *name, uint64_t since, int r)
{
	uint64_t took = mad_now_ns() - since, slowest = mad_get(&here.totals->slowest_ns);
	if (took > slowest) {
		__atomic_store_n(&here.totals->slowest_ns, took, __ATOMIC_RELAXED);
		const char *function = strstr(name, "ksm_") ? strstr(name, "ksm_") : name;
		snprintf(here.totals->slowest, sizeof(here.totals->slowest), "%.*s", (int)strcspn(function, "("),
			 function);
	}
	if (r < 0) {
		mad_add(&here.totals->refused, 1);
		mad_note(here.totals, r);
		if (mad_get32(&here.totals->calm))
			fprintf(stderr, "process %d: %s: %s\n", (int)getpid(), name, ksm_error_name(r));
	}
	beat();
	return r;
}

#define CALL(call)                                                                                                     \
	({                                                                                                             \
		uint64_t call_since = mad_now_ns();                                                                    \
		int call_result = (call);                                                                              \
		came_back(#call, call_since, call_result);                                                             \
	})

static void new_block(struct block *block)
{
	if (CALL(ksm_arena_alloc(here.arena, (size_t)MAD_PAGES * MAD_PAGE, 0, &block->memory)))
		return;
	memset(block->contents, 0, sizeof(block->contents));
	check_block(block); /* what is handed out is zero */
	uint64_t start = mad_below(&here.random, MAD_CONTENTS);
	for (size_t page = 0; page < MAD_PAGES; page++)
		write_page(block, page, 1000 + (start + page) % MAD_CONTENTS);
	mad_add(&here.totals->blocks, 1);
}

static void free_block(struct block *block)
{
	check_block(block);
	if (block->memory.owner)
		CALL(ksm_arena_free(here.arena, &block->memory));
	memset(block, 0, sizeof(*block));
}

static void join(void)
{
	struct ksm_domain_options options = {.name = here.options->name,
					     .path = here.options->rendezvous,
					     .capacity_bytes = 64u << 20,
					     .barrier = here.options->barrier,
					     .store_fd = -1};
	while (!mad_get32(&here.totals->stop)) {
		int r = CALL(ksm_domain_attach(&options, &here.domain));
		if (!r) {
			r = ksm_arena_create(here.domain, 0, &here.arena);
			if (r)
				mad_die("arena", r);
			mad_add(&here.totals->joins, 1);
			for (size_t i = 0; i < MAD_BLOCKS; i++)
				new_block(&here.blocks[i]);
			return;
		}
		nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	}
}

static void leave(void)
{
	if (!here.domain)
		return;
	for (size_t i = 0; i < MAD_BLOCKS; i++)
		free_block(&here.blocks[i]);
	ksm_arena_release(here.arena);
	ksm_domain_detach(here.domain);
	here.arena = NULL;
	here.domain = NULL;
	beat();
}

static void scan(void)
{
	struct ksm_report report = {0};
	int r = CALL(ksm_domain_scan(here.domain, &report));
	if (!r)
		mad_note(here.totals, report.why_not);
	mad_add(&here.totals->scans, 1);
	mad_add(&here.totals->merges, report.pages_merged);
}

/* -EAGAIN: somebody came or went each time it was tried, a child of a fork perhaps. */
static void sweep(void)
{
	uint64_t freed = 0;
	int r = -EAGAIN;
	if (!CALL((r = ksm_domain_sweep(here.domain, &freed)) == -EAGAIN ? 0 : r) && !r)
		mad_add(&here.totals->freed, freed);
	mad_add(&here.totals->sweeps, 1);
}

static void look_at_figures(void)
{
	struct ksm_stats stats;
	struct ksm_peer_info peers[8];
	struct ksm_capabilities capabilities;
	CALL(ksm_domain_stats(here.domain, &stats));
	CALL(ksm_domain_self_stats(here.domain, &stats));
	mad_note(here.totals, stats.why_not);
	CALL(ksm_domain_peers(here.domain, peers, 8));
	CALL(ksm_domain_capabilities(here.domain, &capabilities));
}

static void fork_child(void)
{
	int status;
	uint64_t start = mad_now_ns();
	pid_t pid = fork();
	if (pid < 0)
		mad_die("fork", errno);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		check_all();
		for (size_t i = 0; i < MAD_BLOCKS; i++)
			if (here.blocks[i].memory.owner)
				write_page(&here.blocks[i], i, some_content());
		if (mad_below(&here.random, 2)) {
			struct ksm_report report;
			CALL(ksm_domain_scan(here.domain, &report));
		}
		check_all();
		_exit(0);
	}
	came_back("fork", start, 0);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			mad_die("waitpid", errno);
	if (status) {
		fprintf(stderr, "process %d: a child ended with wait status 0x%x\n", (int)getpid(), (unsigned)status);
		_exit(1);
	}
	mad_add(&here.totals->forks, 1);
}

static void act(bool restless)
{
	uint64_t r = mad_below(&here.random, 100), unmerged = 0, broken = 0;
	struct block *block = &here.blocks[mad_below(&here.random, MAD_BLOCKS)];
	struct ksm_report report;
	if (r < 30) {
		for (size_t i = 0; block->memory.owner && i < 6; i++)
			write_page(block, mad_below(&here.random, MAD_PAGES), some_content());
	} else if (r < 65) {
		scan();
		check_block(block);
	} else if (r < 75) {
		sweep();
	} else if (r < 87) {
		free_block(block);
		new_block(block);
	} else if (r < 91) {
		look_at_figures();
	} else if (r < 93) {
		CALL(ksm_domain_settle(here.domain, 100, 0, &report));
		mad_add(&here.totals->settles, 1);
	} else if (r < 95) {
		CALL(ksm_arena_unmerge(here.arena, &unmerged, &broken));
		mad_add(&here.totals->unmerges, 1);
	} else if (r < 98) {
		fork_child();
	} else if (restless) {
		leave();
		join();
	} else {
		check_all();
	}
}

static void get_ready(void)
{
	struct ksm_stats stats = {0};
	while (!mad_get32(&here.totals->stop)) {
		scan();
		if (!ksm_domain_self_stats(here.domain, &stats) && stats.pages_merged >= MAD_BLOCKS * MAD_PAGES / 4)
			break;
		nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	}
	check_all(); /* what nobody has read is not there, to the kernel */
	__atomic_fetch_add(&here.totals->ready, 1, __ATOMIC_RELAXED);
	while (!mad_get32(&here.totals->mad) && !mad_get32(&here.totals->stop)) {
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
		beat();
	}
}

void mad_honest(const struct mad_options *options, unsigned place, bool restless)
{
	here = (struct here){.options = options, .totals = options->totals, .place = place};
	here.random = options->seed * 1000 + place;
	beat();
	join();
	if (here.domain)
		get_ready();
	while (here.domain && !mad_get32(&here.totals->stop)) {
		act(restless);
		if (mad_below(&here.random, 20) == 0)
			check_all();
		beat();
	}
	leave();
	_exit(0);
}
