/* SPDX-License-Identifier: MIT */
/*
 * A thread that writes into all blocks of its process, into its own bytes of every page, and knows what must stand
 * there. It frees blocks and makes new ones, and freezes some pages now and then.
 *
 * Under barriers and copy-on-write of the kernel's, every system call must succeed. Where merged pages are read-only,
 * one into a page that was not prepared may be refused, as a whole or after some bytes, but never say that it wrote what
 * is not there.
 */
#include "soak.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define BATCH 64 /* writes under one hold of the block's lock */
#define MOST_PREPARED 6
#define MOST_PINNED 4
#define RING_PHASE_S 0.4

/* What one batch has made ready: pages that are prepared for system calls, pages that are registered with the ring. */
struct ready {
	size_t prepared, nprepared;
	size_t pinned, npinned;
};

static bool is_in(size_t page, size_t first, size_t pages)
{
	return page >= first && page - first < pages;
}

static size_t some_pages(const struct soak_block *block, size_t most, uint32_t *seed, size_t *first)
{
	size_t pages = 1 + soak_random(seed) % most;
	*first = soak_random(seed) % block->pages;
	return pages < block->pages - *first ? pages : block->pages - *first;
}

static void prepare(struct soak_block *block, size_t first, size_t pages, bool on)
{
	char *at = soak_page_at(block, first) + 1; /* every page that it touches */
	size_t nbytes = pages * SOAK_PAGE - 2;
	if (on)
		soak_check(ksm_arena_writable_begin(block->arena, at, nbytes), "writable");
	else
		soak_check(ksm_arena_writable_end(block->arena, at, nbytes), "writable no more");
}

static enum soak_way choose_way(uint32_t r)
{
	enum soak_way way = r & 1 ? SOAK_STORE : (r >> 1) % SOAK_WAYS;
	if (!soak_here.options->has[way])
		return (r >> 8) % (SOAK_PREAD + 1);
	if (way == SOAK_DIRECT && (r >> 28) != 0)
		return SOAK_PREAD; /* it waits for the disk */
	return way;
}

static size_t choose_page(const struct soak_block *block, const struct ready *ready, enum soak_way way, uint32_t *seed)
{
	uint32_t r = soak_random(seed);
	if (way == SOAK_FIXED)
		return ready->pinned + (r >> 8) % ready->npinned;
	if ((r & 7) < 3)
		return soak_get32(&block->hot) % block->pages;
	if (ready->nprepared && way != SOAK_STORE && (r & 8))
		return ready->prepared + (r >> 8) % ready->nprepared;
	return (r >> 8) % block->pages;
}

/* Must a page be prepared for this call, or shall it be? */
static bool is_to_be_prepared(const struct soak_block *block, enum soak_way way, uint32_t r)
{
	if (way == SOAK_STORE)
		return r % 256 == 0;
	if (!soak_here.options->may_refuse)
		return block->frozen || r % 64 == 0;
	return (way == SOAK_DIRECT && !soak_here.options->sees_pins) || r % 2;
}

static bool must_prepare_pinned(const struct soak_block *block)
{
	return soak_here.options->may_refuse || block->frozen;
}

/* May this way write into several pages by one call? */
static bool is_wide(enum soak_way way)
{
	return way == SOAK_TCP || way == SOAK_UDP || way == SOAK_UNIX || way == SOAK_READV || way == SOAK_PREAD ||
	       way == SOAK_DIRECT || way == SOAK_VM;
}

static void plan(struct soak_write *write, struct soak_block *block, size_t page, unsigned owner, uint32_t r)
{
	bool word = write->way == SOAK_EVENTFD || (write->way != SOAK_DIRECT && r % 4 == 0);
	write->nbytes = word ? SOAK_WORD : SOAK_SECTOR;
	write->count = !word && is_wide(write->way) && r >> 8 & 1 ? 1 + (r >> 9) % SOAK_PIECES : 1;
	if (write->count > block->pages - page)
		write->count = (unsigned)(block->pages - page);
	for (unsigned i = 0; i < write->count; i++) {
		struct soak_piece *piece = &write->pieces[i];
		piece->at = word ? soak_word_at(block, page + i, owner) : soak_sector_at(block, page + i, owner);
		piece->state = word ? &block->words[page + i][owner] : &block->sectors[page + i][owner];
		piece->by = word ? &block->words_by[page + i][owner] : &block->sectors_by[page + i][owner];
	}
}

static void expect_pieces(const struct soak_block *block, const struct soak_write *write, const char *when)
{
	for (unsigned i = 0; i < write->count; i++)
		soak_expect(block, write->pieces[i].at, write->nbytes, *write->pieces[i].state, *write->pieces[i].by,
			    when);
}

static void note_states(const struct soak_write *write, enum soak_way by)
{
	for (unsigned i = 0; i < write->count; i++) {
		*write->pieces[i].state ^= 1;
		*write->pieces[i].by = (uint8_t)by;
	}
}

static void store_pieces(const struct soak_write *write)
{
	for (unsigned i = 0; i < write->count; i++)
		memcpy(write->pieces[i].at, soak_patterns[*write->pieces[i].state], write->nbytes);
}

static void do_one(struct soak_ways *ways, struct soak_block *block, struct soak_write *write, bool prepared)
{
	expect_pieces(block, write, "before a write");
	ssize_t got = soak_do(ways, write), all = (ssize_t)(write->count * write->nbytes);
	const char *name = soak_way_names[write->way];
	if (got == all) {
		note_states(write, write->way);
		expect_pieces(block, write, name);
		soak_add(&soak_here.totals->writes[write->way], 1);
		soak_add(&soak_here.totals->prepared, prepared);
		return;
	}
	if (prepared || !soak_here.options->may_refuse)
		soak_complain(false, "%s was refused: %zd of %zd bytes%s", name, got, all,
			      prepared ? ", in prepared memory" : "");
	else
		soak_expect_refused(block, write, got);
	note_states(write, SOAK_STORE);
	store_pieces(write);
	expect_pieces(block, write, "stores after a refused call");
}

static void write_one(struct soak_ways *ways, struct soak_block *block, const struct ready *ready, unsigned owner,
		      uint32_t *seed)
{
	struct soak_write write = {.way = choose_way(soak_random(seed))};
	uint32_t r = soak_random(seed);
	if (write.way == SOAK_FIXED && !ready->npinned)
		write.way = SOAK_RING;
	size_t page = choose_page(block, ready, write.way, seed);
	plan(&write, block, page, owner, r);
	bool prepared = is_in(page, ready->prepared, ready->nprepared) &&
			is_in(page + write.count - 1, ready->prepared, ready->nprepared);
	prepared |= write.way == SOAK_FIXED && must_prepare_pinned(block);
	bool alone = !prepared && is_to_be_prepared(block, write.way, r >> 16);
	if (alone)
		prepare(block, page, write.count, true);
	do_one(ways, block, &write, prepared || alone);
	if (alone)
		prepare(block, page, write.count, false);
}

/* ---- batches ---------------------------------------------------------------------------------------------- */

/* Rings come and go, because a process that has one cannot be held: broken pages are not given back meanwhile. */
static void open_or_close_ring(struct soak_ways *ways)
{
	bool wanted =
		soak_here.options->has[SOAK_RING] && soak_here.place > 0 && (unsigned)(soak_now() / RING_PHASE_S) % 2;
	if (wanted && ways->ring.fd < 0 && !soak_ring_open(&ways->ring))
		soak_die("io_uring_setup", ENOSYS);
	if (!wanted)
		soak_ring_close(&ways->ring);
}

static void make_ready(struct soak_ways *ways, struct soak_block *block, struct ready *ready, uint32_t *seed)
{
	uint32_t r = soak_random(seed);
	memset(ready, 0, sizeof(*ready));
	if (r % 16 == 0 || (soak_here.options->may_refuse && r % 4 == 0)) {
		ready->nprepared = some_pages(block, MOST_PREPARED, seed, &ready->prepared);
		prepare(block, ready->prepared, ready->nprepared, true);
	}
	if (ways->ring.fd < 0 || (r >> 8) % 2)
		return;
	ready->npinned = some_pages(block, MOST_PINNED, seed, &ready->pinned);
	if (must_prepare_pinned(block))
		prepare(block, ready->pinned, ready->npinned, true);
	soak_check(soak_ring_register(&ways->ring, soak_page_at(block, ready->pinned), ready->npinned * SOAK_PAGE),
		   "registering a buffer");
}

static void make_unready(struct soak_ways *ways, struct soak_block *block, struct ready *ready, uint32_t *seed)
{
	if (ready->npinned) {
		usleep(soak_random(seed) % 2000);
		soak_ring_unregister(&ways->ring);
		if (must_prepare_pinned(block))
			prepare(block, ready->pinned, ready->npinned, false);
	}
	if (ready->nprepared)
		prepare(block, ready->prepared, ready->nprepared, false);
}

void soak_write_some(struct soak_ways *ways, struct soak_block *block, unsigned owner, uint32_t *seed)
{
	struct ready ready;
	make_ready(ways, block, &ready, seed);
	for (unsigned i = 0; i < BATCH; i++)
		write_one(ways, block, &ready, owner, seed);
	make_unready(ways, block, &ready, seed);
}

static void renew_or_freeze(struct soak_block *block, uint32_t *seed)
{
	uint32_t r = soak_random(seed) % 16;
	pthread_mutex_lock(&soak_here.renewing);
	pthread_rwlock_wrlock(&block->lock);
	if (block->frozen && r < 8)
		soak_thaw(block);
	if (r)
		soak_block_renew(block, seed);
	pthread_mutex_unlock(&soak_here.renewing);
	if (!r)
		soak_freeze(block, seed);
	pthread_rwlock_unlock(&block->lock);
}

void *soak_writer(void *argument)
{
	unsigned owner = (unsigned)(uintptr_t)argument;
	const struct soak_options *options = soak_here.options;
	uint32_t seed = options->seed + ((unsigned)getpid() * SOAK_WRITERS + owner) * 7919 + 1;
	struct soak_ways ways;
	soak_ways_open(&ways, options, options->hands[soak_here.place][owner]);
	while (!soak_stopped(soak_here.totals)) {
		struct soak_block *block = &soak_here.blocks[soak_random(&seed) % SOAK_BLOCKS];
		open_or_close_ring(&ways);
		pthread_rwlock_rdlock(&block->lock);
		soak_write_some(&ways, block, owner, &seed);
		pthread_rwlock_unlock(&block->lock);
		if (soak_random(&seed) % 2)
			renew_or_freeze(block, &seed);
		soak_add(&soak_here.totals->beats[soak_here.place * (1 + SOAK_WRITERS) + 1 + owner], 1);
		usleep(soak_random(&seed) % options->writer_us);
	}
	soak_ways_close(&ways);
	return NULL;
}

void *soak_visitor(void *nothing)
{
	const unsigned owner = SOAK_OWNERS - 1;
	uint32_t seed = soak_here.options->seed + (uint32_t)(soak_now() * 1e6);
	struct soak_block *block = &soak_here.blocks[seed % SOAK_BLOCKS];
	struct soak_ways ways;
	soak_ways_open(&ways, soak_here.options, soak_here.options->hands[soak_here.place][owner]);
	pthread_rwlock_rdlock(&block->lock);
	soak_write_some(&ways, block, owner, &seed);
	pthread_rwlock_unlock(&block->lock);
	soak_ways_close(&ways);
	return nothing;
}
