/* SPDX-License-Identifier: MIT */
/*
 * What a program may do to memory that it has registered, and must not. Each act says in the field what is to be found
 * where afterwards.
 */
#include "hostile.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define RW (PROT_READ | PROT_WRITE)

static char *part(const struct hostile_field *f)
{
	return f->here.at + f->first * PAGE;
}

static size_t nbytes(const struct hostile_field *f)
{
	return f->n * PAGE;
}

static void expect(struct hostile_field *f, uint64_t seed, bool or_zero)
{
	for (size_t i = f->first; i < f->first + f->n; i++) {
		f->here.seeds[i] = seed;
		f->here.or_zero[i] = or_zero;
	}
}

/* New bytes, or the very ones that twins hold: then there is a frame that could be mistaken for them. */
static uint64_t some_seed(struct hostile_field *f)
{
	return hostile_random(&f->random) % 2 ? SEED_NEW + hostile_random(&f->random) % 1000
					      : 1 + hostile_random(&f->random) % TWINS;
}

static void nothing(struct hostile_field *f)
{
	(void)f;
}

static void write_some(struct hostile_field *f)
{
	for (size_t i = 0; i < f->n; i++) {
		f->here.seeds[f->first + i] = some_seed(f);
		hostile_fill(part(f) + i * PAGE, f->here.seeds[f->first + i]);
	}
}

/* ---- gone ------------------------------------------------------------------------------------------------------------ */

static void unmap(struct hostile_field *f)
{
	expect(f, SEED_NOTHING, false);
	hostile_replace_begin();
	if (munmap(part(f), nbytes(f)))
		hostile_fail("munmap: %s", strerror(errno));
	hostile_replace_end();
}

/* ---- something else in its place --------------------------------------------------------------------------------------- */

/* In one step, or into the hole that is there for a moment, which somebody else may have taken: false. */
static bool put(struct hostile_field *f, int protection, int flags, int fd)
{
	bool in_steps = hostile_random(&f->random) % 2;
	flags |= in_steps ? MAP_FIXED_NOREPLACE : MAP_FIXED;
	hostile_replace_begin();
	if (in_steps)
		munmap(part(f), nbytes(f));
	void *at = mmap(part(f), nbytes(f), protection, flags, fd, 0);
	hostile_replace_end();
	if (at != MAP_FAILED)
		return true;
	if (errno != EEXIST)
		hostile_fail("mmap: %s", strerror(errno));
	expect(f, SEED_NOTHING, false);
	return false;
}

static void put_anonymous(struct hostile_field *f)
{
	if (put(f, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1))
		write_some(f);
}

static int file_with(struct hostile_field *f)
{
	char page[PAGE];
	int fd = memfd_create("hostile", MFD_CLOEXEC);
	for (size_t i = 0; i < f->n; i++) {
		f->here.seeds[f->first + i] = some_seed(f);
		hostile_fill(page, f->here.seeds[f->first + i]);
		if (pwrite(fd, page, PAGE, (off_t)(i * PAGE)) != (ssize_t)PAGE)
			hostile_fail("pwrite: %s", strerror(errno));
	}
	return fd;
}

static void put_file(struct hostile_field *f)
{
	int fd = file_with(f);
	put(f, RW, MAP_PRIVATE, fd);
	close(fd);
}

static void put_readonly_file(struct hostile_field *f)
{
	int fd = file_with(f);
	put(f, PROT_READ, MAP_PRIVATE, fd);
	close(fd);
}

/* What one writes the other reads: a private copy in its place would be seen. */
static void put_shared(struct hostile_field *f)
{
	int fd = file_with(f);
	if (!put(f, RW, MAP_SHARED, fd)) {
		close(fd);
		return;
	}
	f->mirror.at = mmap(NULL, nbytes(f), RW, MAP_SHARED, fd, 0);
	f->mirror.pages = f->n;
	if (f->mirror.at == MAP_FAILED)
		hostile_fail("mmap: %s", strerror(errno));
	memcpy(f->mirror.seeds, f->here.seeds + f->first, f->n * sizeof(uint64_t));
	close(fd);
}

static void end_shared(struct hostile_field *f)
{
	for (size_t i = 0; i < f->mirror.pages; i++) {
		uint64_t seed = SEED_NEW + hostile_random(&f->random) % 1000;
		hostile_fill(f->mirror.at + i * PAGE, seed);
		if (!hostile_is(part(f) + i * PAGE, seed))
			hostile_fail("shared memory is not shared any more");
		f->mirror.seeds[i] = f->here.seeds[f->first + i] = seed;
	}
}

/* ---- moved ----------------------------------------------------------------------------------------------------------------- */

/* In one piece, or page by page: where there is more than one mapping Linux before 6.17 refuses, later ones stop half-way. */
static void move(char *from, char *to, size_t pages)
{
	if (mremap(from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to)
		return;
	for (size_t i = 0; i < pages; i++) {
		unsigned char resident;
		if (mincore(from + i * PAGE, PAGE, &resident))
			continue; /* is there already */
		if (mremap(from + i * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to + i * PAGE) == MAP_FAILED)
			hostile_fail("mremap: %s", strerror(errno));
	}
}

static void note_moved(struct hostile_field *f, char *to)
{
	f->moved.at = to;
	f->moved.pages = f->n;
	memcpy(f->moved.seeds, f->here.seeds + f->first, f->n * sizeof(uint64_t));
	memcpy(f->moved.or_zero, f->here.or_zero + f->first, f->n * sizeof(bool));
	expect(f, SEED_NOTHING, false);
}

static void move_away(struct hostile_field *f)
{
	move(part(f), f->aside, f->n);
	note_moved(f, f->aside);
}

static void move_away_and_put(struct hostile_field *f)
{
	size_t size = nbytes(f);
	move(part(f), f->aside, f->n);
	note_moved(f, f->aside);
	hostile_replace_begin();
	void *at = mmap(part(f), size, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	hostile_replace_end();
	if (at == part(f))
		write_some(f);
}

/* The old mapping stays meanwhile, empty, so that nobody takes its place. */
static void move_and_back(struct hostile_field *f)
{
	const int flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
	char *to = f->aside;
	for (size_t i = 0; i < f->n; i++) {
		char *from = part(f) + i * PAGE;
		if (mremap(from, PAGE, PAGE, flags, to) != to || mremap(to, PAGE, PAGE, flags, from) != from)
			hostile_fail("mremap: %s", strerror(errno));
	}
}

static void grow(struct hostile_field *f)
{
	char *to = mremap(part(f), nbytes(f), nbytes(f) + PAGE, MREMAP_MAYMOVE);
	if (to == MAP_FAILED)
		return; /* EFAULT: several mappings */
	if (munmap(to + nbytes(f), PAGE))
		hostile_fail("munmap: %s", strerror(errno));
	note_moved(f, to);
}

static void shrink(struct hostile_field *f)
{
	size_t keep = f->n / 2;
	if (!keep || mremap(part(f), nbytes(f), keep * PAGE, 0) == MAP_FAILED)
		return;
	for (size_t i = f->first + keep; i < f->first + f->n; i++)
		f->here.seeds[i] = SEED_NOTHING;
}

/* Merged memory of another registration comes here: `spare`, which is one, too. */
static void put_merged(struct hostile_field *f)
{
	struct ksm_report report;
	hostile_act_end();
	struct ksm_region *region = hostile_register(&f->spare, FIELD, 0);
	for (size_t i = 0; i < f->n; i++) {
		f->here.seeds[f->first + i] = 1 + hostile_random(&f->random) % TWINS;
		hostile_fill(f->spare + i * PAGE, f->here.seeds[f->first + i]);
	}
	ksm_domain_scan(hostile_domain, &report);
	hostile_act_begin();
	move(f->spare, part(f), f->n);
	f->spare_used = f->n;
	hostile_act_end();
	int r = ksm_region_unregister(region);
	if (r)
		hostile_fail("unregister what is gone: %s", ksm_error_name(r));
	hostile_act_begin();
}

/* ---- protected ----------------------------------------------------------------------------------------------------------- */

static void protect(struct hostile_field *f, int protection)
{
	if (mprotect(part(f), nbytes(f), protection))
		hostile_fail("mprotect: %s", strerror(errno));
	f->refused = protection != RW;
}

static void forbid(struct hostile_field *f)
{
	f->moved = f->here; /* its bytes come back */
	expect(f, SEED_NOTHING, false);
	protect(f, PROT_NONE);
}

static void allow(struct hostile_field *f)
{
	protect(f, RW);
	f->here = f->moved;
	f->moved = (struct hostile_view){.at = NULL};
}

static void only_read(struct hostile_field *f)
{
	protect(f, PROT_READ);
}

static void write_again(struct hostile_field *f)
{
	protect(f, RW);
}

static void flicker(struct hostile_field *f)
{
	for (int i = 0; i < 20; i++) {
		protect(f, PROT_READ);
		protect(f, RW);
	}
}

/* ---- advised, locked ---------------------------------------------------------------------------------------------------------- */

static void dont_need(struct hostile_field *f)
{
	for (size_t i = f->first; i < f->first + f->n; i++)
		f->here.or_zero[i] = true;
	madvise(part(f), nbytes(f), MADV_DONTNEED);
}

/* Which of the two: the frame's bytes or zeros; then it is written, and that stays. */
static void write_what_was_not_needed(struct hostile_field *f)
{
	write_some(f);
	for (size_t i = f->first; i < f->first + f->n; i++)
		f->here.or_zero[i] = false;
}

static void free_lazily(struct hostile_field *f)
{
	for (size_t i = f->first; i < f->first + f->n; i++)
		f->here.or_zero[i] = true;
	madvise(part(f), nbytes(f), MADV_FREE);
}

static void advise(struct hostile_field *f)
{
	static const int kinds[] = {MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_WIPEONFORK,  MADV_KEEPONFORK, MADV_DONTFORK,
				    MADV_DOFORK,   MADV_MERGEABLE,  MADV_UNMERGEABLE, MADV_DONTDUMP,   MADV_DODUMP,
				    MADV_COLD,     MADV_PAGEOUT,    MADV_WILLNEED,    MADV_SEQUENTIAL, MADV_COLLAPSE};
	for (int i = 0; i < 3; i++)
		madvise(part(f), nbytes(f), kinds[hostile_random(&f->random) % (sizeof(kinds) / sizeof(kinds[0]))]);
}

static void lock(struct hostile_field *f)
{
	mlock(part(f), nbytes(f));
}

static void unlock(struct hostile_field *f)
{
	munlock(part(f), nbytes(f));
}

static void lock_all(struct hostile_field *f)
{
	(void)f;
	mlockall(MCL_CURRENT);
}

static void unlock_all(struct hostile_field *f)
{
	(void)f;
	munlockall();
}

const struct hostile_act hostile_acts[] = {
	{"nothing", nothing, NULL},
	{"write", write_some, NULL},
	{"munmap", unmap, NULL},
	{"mmap_anonymous", put_anonymous, NULL},
	{"mmap_file", put_file, NULL},
	{"mmap_readonly_file", put_readonly_file, NULL},
	{"mmap_shared", put_shared, end_shared},
	{"mremap_merged_here", put_merged, NULL},
	{"mremap_away", move_away, NULL},
	{"mremap_away_mmap", move_away_and_put, NULL},
	{"mremap_and_back", move_and_back, NULL},
	{"mremap_grow", grow, NULL},
	{"mremap_shrink", shrink, NULL},
	{"mprotect_none", forbid, allow},
	{"mprotect_read", only_read, write_again},
	{"mprotect_flicker", flicker, NULL},
	{"madvise_dontneed", dont_need, write_what_was_not_needed},
	{"madvise_free", free_lazily, write_what_was_not_needed},
	{"madvise_others", advise, NULL},
	{"mlock", lock, unlock},
	{"mlockall", lock_all, unlock_all},
};
const size_t hostile_act_count = sizeof(hostile_acts) / sizeof(hostile_acts[0]);
