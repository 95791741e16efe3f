/* SPDX-License-Identifier: MIT */
/*
 * DOC: Guards
 *
 * A guard keeps one byte for every page of a region: may a store fault there because of us, and what is to be done if it
 * does. The byte is the only thing that a SIGSEGV handler and the holders of the merge lock share.
 *
 *                    claim                         set
 *    MERGED ───────────┐                      ┌──────────▶ OPEN       copied, or thawed
 *    READONLY ─────────┼────────▶ BUSY ───────┼──────────▶ MERGED     mapped to a frame
 *    OPEN, WRITABLE ───┘  (one owner at a     ├──────────▶ READONLY   frozen
 *       (merge lock only)      time)          └──────────▶ WRITABLE   the kernel's copy-on-write looks after it
 *
 * Whoever made a page BUSY owns its mapping until the page is something else. Without the merge lock (the handler, and
 * opening all) only MERGED and READONLY pages are claimed, by one exchange from exactly what was seen; the others are the
 * merge lock's, so its holder may set them without a claim.
 *
 * GUARD-1. A page is made read-only, and made writable again, while it is BUSY and by who made it so. So a store that
 *          faults finds BUSY (and waits), MERGED or READONLY (and does the work), or that the work has been done.
 * GUARD-2. `busy` is never less than the number of BUSY pages: it grows before a page becomes BUSY and shrinks after
 *          the page has become something else.
 * GUARD-3. A guard is taken down in this order: its sequence becomes odd, then nobody is BUSY in it, then it is
 *          forgotten. A handler claims first and looks at the sequence then, so one of the two sees the other.
 * GUARD-4. Tables are never unmapped. A handler that was interrupted between finding a guard and reading its table
 *          reads memory that exists, and GUARD-3 makes it let go.
 *
 * Entries are taken and given back by compare and swap on their sequence: there is no lock, so none can be held by a
 * thread that a fork has left behind. A thread ends inside a claim only together with its process, because every
 * signal is blocked there. In the child of a fork, what threads of the parent had claimed stays BUSY until
 * ksm_guards_fork_child() has made it writable; whether a copy had been made is not known, so it says WRITABLE.
 */
#include "guard.h"

#include "atomic.h"
#include "os.h"

#include <errno.h>
#include <sys/mman.h>

#define MOST 1024
#define ROOM_STEP ((size_t)4096) /* pages: the tables are whole pages themselves */

static struct ksm_guard guards[MOST];
static uint64_t destroyed;     /* guards, ever; atomic */
static uint32_t high;          /* entries [0, high) were used, ever; atomic */
static uint64_t protected_now; /* grows when some page has become read-only; atomic */
static uint64_t opened_at;     /* what protected_now was when the last opening of all was complete; atomic */

static bool cas_byte(uint8_t *at, uint8_t *expected, uint8_t desired)
{
	return __atomic_compare_exchange_n(at, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
}

static bool is_read_only(uint8_t byte)
{
	enum ksm_guard_state state = KSM_GUARD_STATE(byte);
	return state == KSM_GUARD_MERGED || state == KSM_GUARD_READONLY;
}

/* ---- coming and going -------------------------------------------------------------------------------------- */

/* An entry that nobody uses, its sequence odd now; rather one whose table is large enough. */
static struct ksm_guard *take_entry(size_t pages)
{
	for (int pass = 0; pass < 3; pass++) {
		for (uint32_t i = 0; i < MOST; i++) {
			struct ksm_guard *guard = &guards[i];
			uint32_t sequence = ksm_load_acquire(&guard->sequence);
			size_t room = ksm_load_relaxed(&guard->room);
			bool fits = room >= pages && room / 4 <= pages;
			if ((sequence & 1) || ksm_load_relaxed(&guard->pages) || !(fits || (pass && !room) || pass > 1))
				continue;
			if (ksm_cas32_seqcst(&guard->sequence, sequence, sequence + 1))
				return guard;
		}
	}
	return NULL;
}

static void raise_high(uint32_t to)
{
	uint32_t now = ksm_load_relaxed(&high);
	while (now < to && !ksm_cas32_seqcst(&high, now, to))
		now = ksm_load_relaxed(&high);
}

int ksm_guard_create(void *base, size_t pages, struct ksm_guard **out)
{
	struct ksm_guard *guard = take_entry(pages);
	void *table;
	if (!guard)
		return -ENOSPC;
	if (guard->room < pages) { /* the smaller one stays where it is: GUARD-4 */
		size_t room = (pages + ROOM_STEP - 1) / ROOM_STEP * ROOM_STEP;
		int r = ksm_os_map_table(room, &table);
		if (r) {
			ksm_store_release(&guard->sequence, ksm_load_relaxed(&guard->sequence) + 1);
			return r;
		}
		ksm_store_release(&guard->bytes, (uint8_t *)table);
		ksm_store_release(&guard->room, room);
	}
	ksm_store_relaxed(&guard->breaks, 0);
	ksm_store_relaxed(&guard->thaws, 0);
	ksm_store_relaxed(&guard->vmas_left, INT64_MAX / 2);
	ksm_store_relaxed(&guard->base, (char *)base);
	ksm_store_relaxed(&guard->pages, pages);
	raise_high((uint32_t)(guard - guards) + 1);
	ksm_store_release(&guard->sequence, ksm_load_relaxed(&guard->sequence) + 1);
	*out = guard;
	return 0;
}

void ksm_guard_destroy(struct ksm_guard *guard)
{
	ksm_add_seqcst(&destroyed, 1);                           /* before it cannot be found any more */
	uint32_t sequence = ksm_add_seqcst(&guard->sequence, 1); /* odd */
	ksm_ensure(!(sequence & 1));                             /* nobody else takes it down */
	ksm_fence_seqcst();
	while (ksm_load_seqcst(&guard->busy)) /* GUARD-3: a handler, for a few system calls */
		ksm_os_yield();
	if (ksm_os_advise(guard->bytes, guard->room, MADV_DONTNEED))
		for (size_t page = 0; page < guard->pages; page++)
			if (ksm_load_relaxed(&guard->bytes[page]))
				ksm_store_relaxed(&guard->bytes[page], KSM_GUARD_OPEN);
	ksm_store_relaxed(&guard->base, NULL);
	ksm_store_relaxed(&guard->pages, 0);
	ksm_store_release(&guard->sequence, sequence + 2);
}

struct ksm_guard *ksm_guard_find_sigsafe(const void *address, size_t *page)
{
	uint32_t count = ksm_load_acquire(&high);
	for (uint32_t i = 0; i < count; i++) {
		struct ksm_guard *guard = &guards[i];
		uint32_t sequence = ksm_load_acquire(&guard->sequence);
		uintptr_t base = (uintptr_t)ksm_load_relaxed(&guard->base);
		size_t pages = ksm_load_relaxed(&guard->pages);
		if ((sequence & 1) || (uintptr_t)address - base >= pages << KSM_PAGE_SHIFT)
			continue;
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (ksm_load_relaxed(&guard->sequence) != sequence)
			continue;
		*page = ((uintptr_t)address - base) >> KSM_PAGE_SHIFT;
		return guard;
	}
	return NULL;
}

uint64_t ksm_guards_destroyed_sigsafe(void)
{
	return ksm_load_seqcst(&destroyed);
}

/* ---- bytes --------------------------------------------------------------------------------------------------- */

uint8_t ksm_guard_get(const struct ksm_guard *guard, size_t page)
{
	return ksm_load_acquire(&guard->bytes[page]);
}

bool ksm_guard_claim_sigsafe(struct ksm_guard *guard, size_t page, uint8_t *was)
{
	uint8_t *at = &ksm_load_acquire(&guard->bytes)[page];
	*was = ksm_load_acquire(at);
	ksm_add_seqcst(&guard->busy, 1); /* GUARD-2 */
	while (KSM_GUARD_STATE(*was) != KSM_GUARD_BUSY)
		if (cas_byte(at, was, KSM_GUARD_BUSY | (*was & KSM_GUARD_FROZEN))) {
			ksm_fence_seqcst(); /* GUARD-3: who looks at the sequence next sees it as it is by now */
			return true;
		}
	__atomic_fetch_sub(&guard->busy, 1, __ATOMIC_RELEASE);
	return false;
}

bool ksm_guard_claim_from_sigsafe(struct ksm_guard *guard, size_t page, uint8_t byte)
{
	uint8_t *at = &ksm_load_acquire(&guard->bytes)[page];
	ksm_assert(KSM_GUARD_STATE(byte) != KSM_GUARD_BUSY);
	ksm_add_seqcst(&guard->busy, 1); /* GUARD-2 */
	if (cas_byte(at, &byte, KSM_GUARD_BUSY | (byte & KSM_GUARD_FROZEN))) {
		ksm_fence_seqcst(); /* GUARD-3 */
		return true;
	}
	__atomic_fetch_sub(&guard->busy, 1, __ATOMIC_RELEASE);
	return false;
}

void ksm_guard_set(struct ksm_guard *guard, size_t page, size_t count, uint8_t byte)
{
	bool busy = KSM_GUARD_STATE(byte) == KSM_GUARD_BUSY;
	uint32_t were = 0;
	if (!count)
		return;
	ksm_ensure(page < guard->pages && count <= guard->pages - page);
	if (busy)
		ksm_add_seqcst(&guard->busy, (uint32_t)count);
	for (size_t i = page; i < page + count; i++) {
		uint8_t was = ksm_load_relaxed(&guard->bytes[i]);
		were += KSM_GUARD_STATE(was) == KSM_GUARD_BUSY;
		if (was != byte) /* do not touch what is there already: the table is sparse */
			ksm_store_release(&guard->bytes[i], byte);
	}
	if (is_read_only(byte)) /* afterwards: who counts has seen these bytes, or counts again */
		ksm_add_seqcst(&protected_now, 1);
	if (were) {
		uint32_t before = __atomic_fetch_sub(&guard->busy, were, __ATOMIC_RELEASE);
		ksm_ensure(before >= were); /* GUARD-2 */
	}
}

/* ---- all of them ----------------------------------------------------------------------------------------------- */

/* The next page from `page` on whose byte is not OPEN; the number of pages if there is none. */
static size_t next_closed(const struct ksm_guard *guard, size_t page, size_t pages)
{
	const uint8_t *bytes = guard->bytes;
	while (page < pages) {
		if (page % 8 == 0 && page + 8 <= pages && !ksm_load_acquire((const uint64_t *)(bytes + page)))
			page += 8;
		else if (ksm_load_acquire(&bytes[page]) == KSM_GUARD_OPEN)
			page++;
		else
			break;
	}
	return page;
}

/* A page that its owner has left behind in another process. */
static void open_orphan(struct ksm_guard *guard, size_t page)
{
	char *at = guard->base + (page << KSM_PAGE_SHIFT);
	uint8_t byte = KSM_GUARD_WRITABLE;
	for (int attempt = 0; ksm_os_protect(at, KSM_PAGE_SIZE, true); attempt++) {
		/* Read-only it can be had without another mapping, or it is already: a store copies it then. */
		if (!ksm_os_protect(at, KSM_PAGE_SIZE, false)) {
			byte = KSM_GUARD_MERGED;
			break;
		}
		ksm_ensure(attempt < 1000);
		ksm_os_sleep_ns(100000);
	}
	ksm_guard_set(guard, page, 1, byte);
}

void ksm_guards_fork_child(void)
{
	for (uint32_t i = 0; i < high; i++) {
		struct ksm_guard *guard = &guards[i];
		if (guard->sequence & 1) { /* somebody was about to set it up, or to take it down */
			guard->pages = 0;
			guard->base = NULL;
			guard->sequence++;
		}
		if (guard->busy)
			for (size_t page = 0; (page = next_closed(guard, page, guard->pages)) < guard->pages; page++)
				if (KSM_GUARD_STATE(guard->bytes[page]) == KSM_GUARD_BUSY)
					open_orphan(guard, page);
		guard->busy = 0; /* some had counted themselves and had not claimed yet */
	}
}

/* Claim pages from `page` on that are in this state, at most `most`; was[]: what they said. */
static size_t claim_run(struct ksm_guard *guard, size_t page, size_t most, enum ksm_guard_state state, uint8_t *was)
{
	for (size_t n = 0; n < most; n++) {
		was[n] = ksm_guard_get(guard, page + n);
		if (KSM_GUARD_STATE(was[n]) != state || !ksm_guard_claim_from_sigsafe(guard, page + n, was[n]))
			return n;
	}
	return most;
}

/* All of a claimed run becomes writable, or none of it is; then the bytes say so. */
static bool open_run(struct ksm_guard *guard, size_t page, size_t n, uint8_t then, const uint8_t *was)
{
	char *at = guard->base + (page << KSM_PAGE_SHIFT);
	for (int attempt = 0; ksm_os_protect(at, n << KSM_PAGE_SHIFT, true); attempt++) {
		/* It may have done a part. The way back needs no memory that it has not got already. */
		if (ksm_os_protect(at, n << KSM_PAGE_SHIFT, false) && attempt < 1000) {
			ksm_os_sleep_ns(100000);
			continue;
		}
		for (size_t i = 0; i < n; i++)
			ksm_guard_set(guard, page + i, 1, was[i]);
		return false;
	}
	ksm_guard_set(guard, page, n, then);
	return true;
}

/* Returns pages changed; *left: pages that are still read-only, because the kernel refused. */
static size_t open_guard(struct ksm_guard *guard, size_t *left)
{
	uint8_t was[512];
	size_t changed = 0;
	uint32_t sequence = ksm_load_acquire(&guard->sequence);
	size_t pages = ksm_load_relaxed(&guard->pages);
	for (size_t page = 0, n; !(sequence & 1) && (page = next_closed(guard, page, pages)) < pages; page += n) {
		enum ksm_guard_state state = KSM_GUARD_STATE(ksm_guard_get(guard, page));
		n = 1;
		if (state != KSM_GUARD_MERGED && state != KSM_GUARD_READONLY)
			continue;
		size_t got = claim_run(guard, page, KSM_MIN(pages - page, sizeof(was)), state, was);
		if (!got)
			continue;
		n = got;
		if (ksm_load_seqcst(&guard->sequence) != sequence) { /* GUARD-3: it is being taken down */
			for (size_t i = 0; i < got; i++)
				ksm_guard_set(guard, page + i, 1, was[i]);
			break;
		}
		uint8_t then = state == KSM_GUARD_MERGED ? KSM_GUARD_WRITABLE : KSM_GUARD_OPEN;
		if (open_run(guard, page, got, then, was)) {
			changed += got;
			continue;
		}
		for (size_t i = 0; i < got; i++) { /* page by page some may do */
			if (claim_run(guard, page + i, 1, state, was) != 1)
				continue;
			bool opened = open_run(guard, page + i, 1, then, was);
			changed += opened;
			*left += !opened;
		}
	}
	return changed;
}

size_t ksm_guards_open_all(void)
{
	uint64_t now = ksm_load_seqcst(&protected_now);
	size_t changed = 0, left = 0;
	if (now == ksm_load_acquire(&opened_at))
		return 0;
	uint64_t mask = ksm_os_mask_sigsafe(UINT64_MAX); /* no signal handler meets a page its own thread has claimed */
	uint32_t count = ksm_load_acquire(&high);
	for (uint32_t i = 0; i < count; i++)
		changed += open_guard(&guards[i], &left);
	ksm_os_mask_sigsafe(mask);
	if (!left)
		ksm_store_release(&opened_at, now);
	return changed;
}
