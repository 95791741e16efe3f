/* SPDX-License-Identifier: MIT */
/*
 * One process of the soak. A few blocks; three threads that write into all of them, each into its own bytes of every
 * page, and know what must stand there; one thread that scans, sweeps, settles, unmerges and forks all the time.
 *
 *    page  ┌──────────┬──────────┬──────────┬─────┬─────────────────┬──────────┐
 *          │ sector 0 │ sector 1 │ sector 2 │ 0 … │ words 0, 1, 2 … │ filling  │
 *          └──────────┴──────────┴──────────┴─────┴─────────────────┴──────────┘
 *
 * Everything is in one of few states, so most pages have twins. A page that was merged and then written is not merged
 * again while it is in use, so the writers free their blocks after a while and fill new ones.
 */
#include "soak.h"

#include "error.h"
#include "ksmalloc.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS_AT 2048
#define WORD_STEP 64
#define FILLING_AT 3072
#define FILLINGS 4
#define BLOCKS 6
#define LEAST_PAGES 8
#define MOST_PAGES 64
#define ARENAS 2
#define MESSAGES 20
#define BATCH 64 /* writes under one hold of the block's lock */

struct block {
	pthread_rwlock_t lock; /* shared: writing; exclusive: freeing */
	struct ksm_arena *arena;
	struct ksm_block memory;
	size_t pages;
	/* what must stand there */
	uint8_t filling[MOST_PAGES];
	uint8_t sectors[MOST_PAGES][SOAK_WRITERS];
	uint8_t words[MOST_PAGES][SOAK_WRITERS];
};

static const struct soak_options *options;
static struct soak_totals *totals;
static unsigned place;
static struct ksm_domain *domain;
static struct ksm_arena *arenas[ARENAS];
static pthread_mutex_t renewing = PTHREAD_MUTEX_INITIALIZER; /* blocks and arenas come and go */
static struct block blocks[BLOCKS];

static void check(int r, const char *what)
{
	if (r)
		soak_die(what, r);
}

static void beat(unsigned thread)
{
	soak_add(&totals->beats[place * (1 + SOAK_WRITERS) + thread], 1);
}

/* ---- what must stand there ------------------------------------------------------------------------------- */

static char *page_at(const struct block *block, size_t page)
{
	return (char *)block->memory.address + page * PAGE;
}

static char *sector_at(const struct block *block, size_t page, unsigned owner)
{
	return page_at(block, page) + owner * SOAK_SECTOR;
}

static char *word_at(const struct block *block, size_t page, unsigned owner)
{
	return page_at(block, page) + WORDS_AT + owner * WORD_STEP;
}

static bool is_of_some_state(const char *at, size_t nbytes)
{
	for (size_t i = 0; i < nbytes; i++)
		if ((unsigned char)at[i] != soak_patterns[0][i] && (unsigned char)at[i] != soak_patterns[1][i])
			return false;
	return true;
}

/* Returns whether it is worth a message. */
static bool count_error(bool lost)
{
	soak_add(lost ? &totals->lost : &totals->wrong, 1);
	return soak_get(&totals->lost) + soak_get(&totals->wrong) <= MESSAGES;
}

/* Are these bytes in the state they were left in? If not: count, say so, and put them right. */
static void expect(const struct block *block, char *at, size_t nbytes, unsigned state, const char *when)
{
	if (!memcmp(at, soak_patterns[state], nbytes))
		return;
	bool lost = is_of_some_state(at, nbytes);
	if (count_error(lost))
		fprintf(stderr, "process %d, %s: %s, page %zu of %zu, byte %zu: not in state %u\n", (int)getpid(), when,
			lost ? "lost" : "wrong", (size_t)(at - page_at(block, 0)) / PAGE, block->pages,
			(size_t)(at - page_at(block, 0)) % PAGE, state);
	memcpy(at, soak_patterns[state], nbytes);
}

static void expect_filling(const struct block *block, size_t page, const char *when)
{
	const char *at = page_at(block, page) + FILLING_AT;
	for (size_t i = 0; i < PAGE - FILLING_AT; i++) {
		if (at[i] == block->filling[page])
			continue;
		if (count_error(false))
			fprintf(stderr, "process %d, %s: wrong filling of page %zu of %zu\n", (int)getpid(), when, page,
				block->pages);
		return;
	}
}

static void expect_block(const struct block *block, const char *when)
{
	for (size_t page = 0; page < block->pages; page++) {
		expect_filling(block, page, when);
		for (unsigned owner = 0; owner < SOAK_WRITERS; owner++) {
			expect(block, sector_at(block, page, owner), SOAK_SECTOR, block->sectors[page][owner], when);
			expect(block, word_at(block, page, owner), SOAK_WORD, block->words[page][owner], when);
		}
	}
}

/* While others write: every byte must belong to some state. */
static void expect_legal(const struct block *block, const char *when)
{
	for (size_t page = 0; page < block->pages; page++) {
		expect_filling(block, page, when);
		for (unsigned owner = 0; owner < SOAK_WRITERS; owner++) {
			if (is_of_some_state(sector_at(block, page, owner), SOAK_SECTOR) &&
			    is_of_some_state(word_at(block, page, owner), SOAK_WORD))
				continue;
			if (count_error(false))
				fprintf(stderr, "process %d, %s: wrong bytes in page %zu\n", (int)getpid(), when, page);
		}
	}
}

/* ---- blocks ---------------------------------------------------------------------------------------------- */

static void fill(struct block *block, uint32_t *seed)
{
	for (size_t page = 0; page < block->pages; page++) {
		uint32_t r = soak_random(seed);
		block->filling[page] = (uint8_t)(r % FILLINGS * 0x15);
		memset(page_at(block, page) + FILLING_AT, block->filling[page], PAGE - FILLING_AT);
		for (unsigned owner = 0; owner < SOAK_WRITERS; owner++) {
			block->sectors[page][owner] = r >> (8 + owner) & 1;
			block->words[page][owner] = r >> (16 + owner) & 1;
			memcpy(sector_at(block, page, owner), soak_patterns[block->sectors[page][owner]], SOAK_SECTOR);
			memcpy(word_at(block, page, owner), soak_patterns[block->words[page][owner]], SOAK_WORD);
		}
	}
}

/* Renewing lock held, or nobody else there. */
static void make_block(struct block *block, uint32_t *seed)
{
	static const char zeros[PAGE];
	block->pages = LEAST_PAGES + soak_random(seed) % (MOST_PAGES - LEAST_PAGES + 1);
	block->arena = arenas[soak_random(seed) % ARENAS];
	check(ksm_arena_alloc(block->arena, block->pages * PAGE, 0, &block->memory), "alloc");
	for (size_t page = 0; page < block->pages; page++) {
		if (memcmp(page_at(block, page), zeros, PAGE)) {
			if (count_error(false))
				fprintf(stderr, "process %d: page %zu of a new block is not zero\n", (int)getpid(),
					page);
		}
	}
	fill(block, seed);
	soak_add(&totals->blocks, 1);
}

/* Its lock and the renewing lock held, or nobody else there. */
static void renew_block(struct block *block, uint32_t *seed)
{
	expect_block(block, "before it was freed");
	check(ksm_arena_free(block->arena, &block->memory), "free");
	make_block(block, seed);
}

/* ---- writers --------------------------------------------------------------------------------------------- */

static void write_one(const struct soak_ways *ways, struct block *block, unsigned owner, uint32_t *seed)
{
	uint32_t r = soak_random(seed);
	size_t page = (r >> 8) % block->pages;
	enum soak_way way = r & 1 ? SOAK_STORE : (r >> 1) % SOAK_WAYS;
	bool word = way == SOAK_EVENTFD || (way != SOAK_DIRECT && (r >> 6 & 3) == 0);
	if (way == SOAK_DIRECT && (r >> 28) != 0)
		way = SOAK_PREAD; /* it waits for the disk */
	char *at = word ? word_at(block, page, owner) : sector_at(block, page, owner);
	uint8_t *state = word ? &block->words[page][owner] : &block->sectors[page][owner];
	size_t nbytes = word ? SOAK_WORD : SOAK_SECTOR;
	expect(block, at, nbytes, *state, "before a write");
	*state ^= 1;
	way = soak_write(ways, way, at, nbytes, *state);
	expect(block, at, nbytes, *state, soak_way_names[way]);
	soak_add(&totals->writes[way], 1);
}

static void *writer(void *argument)
{
	unsigned owner = (unsigned)(uintptr_t)argument;
	uint32_t seed = options->seed + ((unsigned)getpid() * SOAK_WRITERS + owner) * 7919 + 1;
	struct soak_ways ways;
	soak_ways_open(&ways, options);
	while (!soak_stopped(totals)) {
		struct block *block = &blocks[soak_random(&seed) % BLOCKS];
		pthread_rwlock_rdlock(&block->lock);
		for (unsigned i = 0; i < BATCH; i++)
			write_one(&ways, block, owner, &seed);
		pthread_rwlock_unlock(&block->lock);
		if (soak_random(&seed) % 4 == 0) {
			pthread_mutex_lock(&renewing);
			pthread_rwlock_wrlock(&block->lock);
			renew_block(block, &seed);
			pthread_rwlock_unlock(&block->lock);
			pthread_mutex_unlock(&renewing);
		}
		beat(1 + owner);
		usleep(soak_random(&seed) % 400);
	}
	soak_ways_close(&ways);
	return NULL;
}

/* ---- a child --------------------------------------------------------------------------------------------- */

static void child_works(uint32_t seed)
{
	struct soak_ways ways;
	struct ksm_report report;
	soak_ways_open(&ways, options);
	for (unsigned i = 0; i < BLOCKS; i++)
		expect_block(&blocks[i], "in a child");
	for (unsigned round = 0; round < 2; round++) {
		for (unsigned i = 0; i < BATCH; i++)
			for (unsigned owner = 0; owner < SOAK_WRITERS; owner++)
				write_one(&ways, &blocks[i % BLOCKS], owner, &seed);
		renew_block(&blocks[soak_random(&seed) % BLOCKS], &seed);
		check(ksm_arena_scan(arenas[round % ARENAS], &report), "scan in a child");
	}
	for (unsigned i = 0; i < BLOCKS; i++)
		expect_block(&blocks[i], "at a child's end");
}

/* exact: nobody is writing at the moment of the fork. */
static void fork_child(bool exact, uint32_t *seed)
{
	int status;
	pthread_mutex_lock(&renewing);
	for (unsigned i = 0; exact && i < BLOCKS; i++)
		pthread_rwlock_wrlock(&blocks[i].lock);
	pid_t pid = fork();
	if (pid < 0)
		soak_die("fork", errno);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(60);
		if (exact)
			child_works(*seed);
		for (unsigned i = 0; !exact && i < BLOCKS; i++)
			expect_legal(&blocks[i], "in a child of a busy process");
		_exit(0);
	}
	for (unsigned i = 0; exact && i < BLOCKS; i++)
		pthread_rwlock_unlock(&blocks[i].lock);
	pthread_mutex_unlock(&renewing);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			soak_die("waitpid", errno);
	if (status) {
		fprintf(stderr, "process %d: a child ended with wait status 0x%x\n", (int)getpid(), (unsigned)status);
		_exit(1);
	}
	soak_add(&totals->forks, 1);
}

/* ---- everything else ------------------------------------------------------------------------------------- */

static void new_arena(unsigned i)
{
	pthread_mutex_lock(&renewing);
	if (arenas[i])
		ksm_arena_release(arenas[i]); /* its blocks live on */
	check(ksm_arena_create(domain, 0, &arenas[i]), "arena");
	pthread_mutex_unlock(&renewing);
}

static void act(uint32_t *seed)
{
	struct ksm_report report;
	uint64_t freed;
	uint32_t r = soak_random(seed) % 200;
	struct ksm_arena *arena = arenas[soak_random(seed) % ARENAS];
	if (r < 160) {
		check(ksm_arena_scan(arena, &report), "scan");
		soak_add(&totals->scans, 1);
	} else if (r < 175) {
		int error = ksm_domain_sweep(domain, &freed);
		check(error == -EAGAIN ? 0 : error, "sweep"); /* a peer that is just coming or going */
		soak_add(&totals->sweeps, 1);
	} else if (r < 180) {
		check(ksm_domain_settle(domain, 20, 0, &report), "settle");
		soak_add(&totals->settles, 1);
	} else if (r < 190) {
		check(ksm_arena_unmerge(arena, NULL, NULL), "unmerge");
		soak_add(&totals->unmerges, 1);
	} else if (r < 198) {
		fork_child(r % 2, seed);
	} else {
		new_arena(soak_random(seed) % ARENAS);
	}
	usleep(soak_random(seed) % 4000);
}

static void count(struct ksm_stats *before)
{
	struct ksm_stats now;
	check(ksm_domain_self_stats(domain, &now), "stats");
	soak_add(&totals->merges, now.merges - before->merges);
	soak_add(&totals->breaks, now.cow_breaks - before->cow_breaks);
	soak_add(&totals->put_backs, now.put_backs - before->put_backs);
	soak_add(&totals->refused, now.pages_skipped - before->pages_skipped);
	*before = now;
}

static void start(uint32_t *seed)
{
	pthread_rwlockattr_t attributes;
	struct ksm_domain_options joining = {
		.name = "soak", .path = options->rendezvous, .barrier = options->barrier, .store_fd = -1};
	int r = ksm_domain_attach(&joining, &domain);
	if (r == KSM_EBARRIER)
		_exit(SOAK_NO_BARRIER);
	check(r, "attach");
	for (unsigned i = 0; i < ARENAS; i++)
		new_arena(i);
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	for (unsigned i = 0; i < BLOCKS; i++) {
		pthread_rwlock_init(&blocks[i].lock, &attributes);
		make_block(&blocks[i], seed);
	}
}

void soak_peer(const struct soak_options *given, unsigned where)
{
	pthread_t threads[SOAK_WRITERS];
	struct ksm_stats before = {0};
	uint32_t seed = given->seed + (unsigned)getpid() * 104729 + 1;
	options = given;
	totals = given->totals;
	place = where;
	start(&seed);
	for (uintptr_t owner = 0; owner < SOAK_WRITERS; owner++)
		check(-pthread_create(&threads[owner], NULL, writer, (void *)owner), "thread");
	while (!soak_stopped(totals)) {
		act(&seed);
		count(&before);
		beat(0);
	}
	for (unsigned owner = 0; owner < SOAK_WRITERS; owner++)
		pthread_join(threads[owner], NULL);
	for (unsigned i = 0; i < BLOCKS; i++) {
		expect_block(&blocks[i], "at the end");
		check(ksm_arena_free(blocks[i].arena, &blocks[i].memory), "free");
	}
	count(&before);
	for (unsigned i = 0; i < ARENAS; i++)
		ksm_arena_release(arenas[i]);
	ksm_domain_detach(domain);
	_exit(0);
}
