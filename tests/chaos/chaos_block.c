/* SPDX-License-Identifier: MIT */
/*
 * The blocks of a process, and what must stand in them: every segment of 512 bytes has a key, from which its bytes can
 * be made again. Most keys are everybody's, so most pages have twins; a few are nobody else's.
 */
#include "chaos.h"

#include "error.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MESSAGES 40

struct chaos_here chaos_here;

/* ---- what must stand there ---------------------------------------------------------------------------------- */

static void generate(uint32_t key, size_t segment, unsigned char out[CHAOS_SEGMENT])
{
	uint64_t x = ((uint64_t)key << 8 | segment) * 0x9e3779b97f4a7c15ull;
	for (size_t i = 0; i < CHAOS_SEGMENT; i += 8) {
		x += 0x9e3779b97f4a7c15ull;
		uint64_t z = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
		z = (z ^ z >> 27) * 0x94d049bb133111ebull;
		z ^= z >> 31;
		memcpy(out + i, &z, 8);
	}
}

void chaos_patterns_init(void)
{
	for (uint32_t key = 1; key < CHAOS_KEYS; key++)
		for (size_t segment = 0; segment < CHAOS_SEGMENTS; segment++)
			generate(key, segment, chaos->patterns + key * CHAOS_PAGE + segment * CHAOS_SEGMENT);
}

/* The bytes of a segment: in the table, or made in `room`. */
static const unsigned char *bytes_of(uint32_t key, size_t segment, unsigned char room[CHAOS_SEGMENT])
{
	segment %= CHAOS_SEGMENTS;
	if (key < CHAOS_KEYS)
		return chaos->patterns + key * CHAOS_PAGE + segment * CHAOS_SEGMENT;
	generate(key, segment, room);
	return room;
}

static size_t segments_of(const struct chaos_block *block)
{
	return (block->nbytes + CHAOS_SEGMENT - 1) / CHAOS_SEGMENT;
}

static char *segment_at(const struct chaos_block *block, size_t segment)
{
	return (char *)block->memory.address + segment * CHAOS_SEGMENT;
}

static size_t segment_bytes(const struct chaos_block *block, size_t segment)
{
	size_t left = block->nbytes - segment * CHAOS_SEGMENT;
	return left < CHAOS_SEGMENT ? left : CHAOS_SEGMENT;
}

/* What do these bytes look like? */
static void describe(const char *at, size_t nbytes, size_t segment, char *out, size_t room)
{
	for (uint32_t key = 0; key < CHAOS_KEYS; key++)
		for (size_t s = 0; s < CHAOS_SEGMENTS; s++)
			if (!memcmp(at, chaos->patterns + key * CHAOS_PAGE + s * CHAOS_SEGMENT, nbytes)) {
				snprintf(out, room, "key %u, segment %zu", key, key ? s : segment % CHAOS_SEGMENTS);
				return;
			}
	snprintf(out, room, "unknown bytes");
}

static void complain(const struct chaos_block *block, size_t segment, const char *when)
{
	unsigned char room[CHAOS_SEGMENT];
	char is[64];
	uint64_t entry = 0;
	char *at = segment_at(block, segment);
	size_t nbytes = segment_bytes(block, segment), differ = 0;
	const unsigned char *right = bytes_of(block->keys[segment], segment, room);
	chaos_add(&chaos->totals.wrong, 1);
	if (chaos_get(&chaos->totals.wrong) > MESSAGES)
		return;
	for (size_t i = 0; i < nbytes; i++)
		differ += (unsigned char)at[i] != right[i];
	describe(at, nbytes, segment, is, sizeof(is));
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd >= 0 && pread(fd, &entry, 8, (off_t)((uintptr_t)at / CHAOS_PAGE * 8)) != 8)
		entry = 0;
	close(fd);
	fprintf(stderr,
		"wrong: process %d, place %u, seed %u, act %lu, barrier %d, %s: block of %zu bytes, kind %d, arena %u, "
		"page %zu, segment %zu: %zu bytes differ from key %u: %s; pagemap %016lx\n",
		(int)getpid(), chaos_here.place, chaos_here.first_seed, chaos_here.acts, chaos_here.barrier, when,
		block->nbytes, (int)block->kind, block->arena, segment / CHAOS_SEGMENTS, segment % CHAOS_SEGMENTS,
		differ, block->keys[segment], is, entry);
}

void chaos_block_verify(struct chaos_block *block, const char *when)
{
	unsigned char room[CHAOS_SEGMENT];
	for (size_t segment = 0; segment < segments_of(block); segment++) {
		size_t nbytes = segment_bytes(block, segment);
		const unsigned char *right = bytes_of(block->keys[segment], segment, room);
		if (memcmp(segment_at(block, segment), right, nbytes)) {
			complain(block, segment, when);
			memcpy(segment_at(block, segment), right, nbytes);
		}
	}
	chaos_add(&chaos->totals.verified, block->nbytes);
}

/* ---- writing ------------------------------------------------------------------------------------------------ */

static uint32_t some_key(uint32_t *seed)
{
	uint32_t r = chaos_random(seed);
	if (r % 16 == 0)
		return CHAOS_KEYS + (r >> 4) % (1u << 24);
	return (r >> 4) % CHAOS_KEYS;
}

static void store(struct chaos_block *block, size_t segment, uint32_t key)
{
	unsigned char room[CHAOS_SEGMENT];
	memcpy(segment_at(block, segment), bytes_of(key, segment, room), segment_bytes(block, segment));
	block->keys[segment] = key;
}

/* The kernel writes: from the file where the patterns are. */
static void read_into(struct chaos_block *block, size_t segment, uint32_t key)
{
	struct ksm_arena *arena = chaos_here.arenas[block->arena];
	size_t nbytes = segment_bytes(block, segment);
	char *at = segment_at(block, segment);
	off_t from = (off_t)(offsetof(struct chaos_shared, patterns) + key * CHAOS_PAGE +
			     segment % CHAOS_SEGMENTS * CHAOS_SEGMENT);
	bool prepares = block->prepares || block->frozen;
	if (prepares)
		chaos_check(ksm_arena_writable_begin(arena, at, nbytes), "writable");
	ssize_t got = pread(chaos_fd, at, nbytes, from);
	if (got != (ssize_t)nbytes)
		chaos_die("pread", got < 0 ? errno : EIO);
	if (prepares)
		chaos_check(ksm_arena_writable_end(arena, at, nbytes), "writable no more");
	block->keys[segment] = key;
}

static void write_segment(struct chaos_block *block, size_t segment, uint32_t key, bool by_call)
{
	bool may = block->kind == CHAOS_ARENA || chaos_here.barrier != KSM_BARRIER_SEGV;
	if (by_call && may && key < CHAOS_KEYS)
		read_into(block, segment, key);
	else
		store(block, segment, key);
}

static void write_page(struct chaos_block *block, size_t page, uint32_t *seed)
{
	uint32_t key = some_key(seed), how = chaos_random(seed);
	for (size_t i = 0; i < CHAOS_SEGMENTS; i++) {
		size_t segment = page * CHAOS_SEGMENTS + i;
		if (segment < segments_of(block) && (how % 4 || i == (how >> 8) % CHAOS_SEGMENTS))
			write_segment(block, segment, key, how >> 16 & 1);
	}
}

void chaos_block_write(struct chaos_block *block, uint32_t *seed)
{
	size_t pages = (block->nbytes + CHAOS_PAGE - 1) / CHAOS_PAGE;
	for (unsigned i = chaos_random(seed) % 8; i < 8; i++)
		write_page(block, chaos_random(seed) % pages, seed);
}

/* Something small into every page, the same into most. */
void chaos_block_break(struct chaos_block *block, uint32_t *seed)
{
	uint32_t key = some_key(seed) % CHAOS_KEYS, r = chaos_random(seed);
	for (size_t segment = r % CHAOS_SEGMENTS; segment < segments_of(block); segment += CHAOS_SEGMENTS)
		if (chaos_random(seed) % 8)
			write_segment(block, segment, key, r >> 8 & 1);
}

static void fill(struct chaos_block *block, uint32_t *seed)
{
	for (size_t first = 0; first < segments_of(block); first += CHAOS_SEGMENTS) {
		uint32_t key = some_key(seed), r = chaos_random(seed);
		if (r % 8 == 0)
			continue; /* never touched */
		for (size_t i = 0; i < CHAOS_SEGMENTS && first + i < segments_of(block); i++)
			store(block, first + i, r % 8 == 1 && i == r / 8 % CHAOS_SEGMENTS ? some_key(seed) : key);
	}
}

/* ---- coming and going --------------------------------------------------------------------------------------- */

static void expect_zero(struct chaos_block *block)
{
	memset(block->keys, 0, sizeof(block->keys));
	chaos_block_verify(block, "a new block must be zero");
	chaos_add(&chaos->totals.blocks, 1);
}

static void allocate(struct chaos_block *block, size_t nbytes, unsigned arena)
{
	unsigned flags = nbytes % 16 == 3 ? KSM_ALLOC_UNMERGEABLE : 0;
	chaos_check(ksm_arena_alloc(chaos_here.arenas[arena], nbytes, flags, &block->memory), "alloc");
	block->kind = CHAOS_ARENA;
	block->arena = arena;
	block->nbytes = nbytes;
	block->frozen = false;
	block->prepares = arena == CHAOS_ARENAS - 1 || chaos_here.barrier == KSM_BARRIER_SEGV;
	expect_zero(block);
}

void chaos_block_make(struct chaos_block *block, size_t nbytes, uint32_t *seed)
{
	allocate(block, nbytes, chaos_random(seed) % CHAOS_ARENAS);
	fill(block, seed);
}

void chaos_block_register(struct chaos_block *block, size_t nbytes, uint32_t *seed)
{
	size_t pages;
	nbytes = (nbytes + CHAOS_PAGE - 1) / CHAOS_PAGE * CHAOS_PAGE;
	void *at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		chaos_die("mmap", errno);
	block->kind = CHAOS_REGISTERED;
	block->memory = (struct ksm_block){.address = at, .nbytes = nbytes};
	block->nbytes = nbytes;
	block->frozen = block->prepares = false;
	expect_zero(block);
	fill(block, seed);
	chaos_check(ksm_region_register(chaos_here.domain, at, nbytes, &block->region, &pages), "register");
	chaos_add(&chaos->totals.registers, 1);
}

/* On a very busy machine threads may not stop in time; then it stays registered. Each try has its own patience. */
static void unregister(struct chaos_block *block)
{
	int r;
	while ((r = ksm_region_unregister(block->region)) == KSM_EUNSTOPPABLE) {
		chaos_add(&chaos->totals.refusals, 1);
		chaos_block_verify(block, "still registered");
	}
	chaos_check(r, "unregister");
}

void chaos_block_free(struct chaos_block *block)
{
	chaos_block_verify(block, "before it was freed");
	if (block->kind == CHAOS_REGISTERED) {
		unregister(block);
		chaos_block_verify(block, "unregistered");
		munmap(block->memory.address, block->nbytes);
	} else {
		chaos_check(ksm_arena_free(chaos_here.arenas[block->arena], &block->memory), "free");
	}
	block->kind = CHAOS_NONE;
}

void chaos_block_move(struct chaos_block *block, size_t nbytes)
{
	static struct chaos_block old;
	memcpy(&old.memory, &block->memory, sizeof(old.memory));
	memcpy(old.keys, block->keys, sizeof(old.keys));
	old.kind = block->kind;
	old.arena = block->arena;
	old.nbytes = block->nbytes;
	old.region = block->region;
	allocate(block, nbytes, old.arena);
	for (size_t segment = 0; segment < segments_of(block) && segment < segments_of(&old); segment++) {
		size_t least = segment_bytes(block, segment), other = segment_bytes(&old, segment);
		if (least <= other) {
			memcpy(segment_at(block, segment), segment_at(&old, segment), least);
			block->keys[segment] = old.keys[segment];
		} /* else: the old one ends within it, and it stays zero */
	}
	chaos_block_verify(block, "moved");
	chaos_block_free(&old);
}

/* Read-only for a while; a store thaws its page. */
void chaos_block_freeze(struct chaos_block *block, uint32_t *seed)
{
	struct ksm_report report;
	size_t pages;
	struct ksm_arena *arena = chaos_here.arenas[block->arena];
	if (block->frozen) {
		chaos_check(ksm_arena_thaw(arena, block->memory.address, block->nbytes), "thaw");
		block->frozen = false;
		chaos_block_verify(block, "thawed");
		return;
	}
	chaos_check(ksm_arena_freeze(arena, block->memory.address, block->nbytes, &pages), "freeze");
	block->frozen = true;
	chaos_add(&chaos->totals.freezes, 1);
	if (chaos_random(seed) % 2)
		chaos_check(ksm_arena_scan(arena, &report), "scan of frozen memory");
	chaos_block_verify(block, "frozen");
	for (size_t i = chaos_random(seed) % 4; i < 3; i++)
		store(block, chaos_random(seed) % segments_of(block), some_key(seed));
	chaos_block_verify(block, "frozen and written");
}
