/* SPDX-License-Identifier: MIT */
/*
 * DOC: The barrier "segv"
 *
 * Guarded pages are made read-only for a moment, by protection alone. A thread that stores into one faults, finds BUSY in
 * its guard, waits and stores again when the window is closed. Nothing is moved: the pages are looked at where they are.
 *
 *      before                open                      one mapped, closed
 *    OPEN │ OPEN │ READONLY   BUSY │ BUSY │ BUSY       MERGED │ OPEN │ READONLY
 *     rw  │  rw  │    r         r  │  r   │  r            r   │  rw  │    r
 *
 * What it cannot hold is everything but threads: a system call that stores into such a page fails with EFAULT, and what
 * it had taken from a socket is gone; a device goes on writing. So it is for those who ask for it by name, and for
 * frozen pages, which are read-only anyway.
 *
 * SEGV-1. Pages are claimed before they are protected, and given back after their protection is as it was: GUARD-1.
 * SEGV-2. A page whose protection cannot be taken away again, because the kernel has no room for another mapping, says
 *         READONLY (or MERGED, if it may be mapped to a frame), never OPEN: a store into it tries once more.
 * SEGV-3. A mapping of frames that fails half-way can leave a hole. It is filled from the store, with the same bytes,
 *         before the window goes on; a thread that reads the hole in between is killed, and nothing can prevent that.
 * SEGV-4. Mapped pages are given to their guard at once: a store into one copies it while the rest is still compared.
 *
 * SEGV-5. Registered memory that is gone: the protection of what is there instead is not ours to change.
 *
 * Called as barrier.h says, by a scanner, in whose thread every signal is blocked: so no signal handler of the program
 * meets a page that its own thread holds.
 */
#include "barrier.h"

#include "guard.h"
#include "handler.h"
#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

static size_t bytes(size_t pages)
{
	return pages << KSM_PAGE_SHIFT;
}

static enum ksm_guard_state was_state(const struct ksm_barrier *barrier, size_t page)
{
	return KSM_GUARD_STATE(barrier->was[page]);
}

static bool was_writable(const struct ksm_barrier *barrier, size_t page)
{
	return was_state(barrier, page) != KSM_GUARD_READONLY;
}

static int segv_create(struct ksm_barrier *barrier)
{
	(void)barrier;
	int r = ksm_handler_install();
	return r ? r : ksm_handler_check();
}

static void segv_destroy(struct ksm_barrier *barrier)
{
	(void)barrier;
}

/* Claim pages up to the first that cannot be had. Returns how many. */
static size_t claim(struct ksm_barrier *barrier, struct ksm_guard *guard, size_t first, size_t pages)
{
	for (size_t n = 0; n < pages; n++) {
		uint8_t byte = ksm_guard_get(guard, first + n);
		enum ksm_guard_state state = KSM_GUARD_STATE(byte);
		if (state == KSM_GUARD_MERGED || state == KSM_GUARD_BUSY ||
		    (barrier->frozen_only && byte != (KSM_GUARD_READONLY | KSM_GUARD_FROZEN)) ||
		    !ksm_guard_claim_from_sigsafe(guard, first + n, byte))
			return n;
		barrier->was[n] = byte;
	}
	return pages;
}

/* What a page says when its protection is off again, or could not be taken off: SEGV-2. */
static uint8_t byte_after(const struct ksm_barrier *barrier, size_t page, bool writable)
{
	enum ksm_guard_state was = was_state(barrier, page);
	bool dropped = barrier->fate[page] == KSM_WINDOW_DROPPED;
	if (was == KSM_GUARD_READONLY)
		return barrier->was[page];
	if (was == KSM_GUARD_WRITABLE && !dropped)
		return writable ? KSM_GUARD_WRITABLE : KSM_GUARD_MERGED;
	return writable ? KSM_GUARD_OPEN : KSM_GUARD_READONLY;
}

/* Pages [page, page + n) of the window, which are all still claimed, as they were. Returns how many calls failed. */
static unsigned give_back(struct ksm_barrier *barrier, struct ksm_guard *guard, size_t first, size_t page, size_t n)
{
	char *at = barrier->at + bytes(page);
	unsigned failures = 0;
	if (barrier->fate[page] == KSM_WINDOW_GONE) { /* SEGV-5 */
		ksm_guard_set(guard, first + page, n, KSM_GUARD_OPEN);
		return 0;
	}
	if (was_writable(barrier, page) && ksm_os_protect(at, bytes(n), true)) {
		failures++;
		if (n > 1) { /* one by one: of one page the kernel does all or nothing */
			for (size_t i = page; i < page + n; i++)
				failures += give_back(barrier, guard, first, i, 1);
			return failures;
		}
	}
	for (size_t i = page; i < page + n; i++)
		ksm_guard_set(guard, first + i, 1, byte_after(barrier, i, !failures));
	return failures;
}

/* Everything that is not mapped. */
static unsigned give_back_all(struct ksm_barrier *barrier, struct ksm_guard *guard, size_t first)
{
	unsigned failures = 0;
	for (size_t page = 0, n; page < barrier->pages; page += n) {
		n = 1;
		if (barrier->fate[page] == KSM_WINDOW_MAPPED)
			continue;
		while (page + n < barrier->pages && barrier->fate[page + n] == barrier->fate[page] &&
		       was_writable(barrier, page + n) == was_writable(barrier, page))
			n++;
		failures += give_back(barrier, guard, first, page, n);
	}
	return failures;
}

static int protect(struct ksm_barrier *barrier)
{
	for (size_t page = 0, n; page < barrier->pages; page += n) {
		n = 1;
		if (!was_writable(barrier, page))
			continue;
		while (page + n < barrier->pages && was_writable(barrier, page + n))
			n++;
		int r = ksm_os_protect(barrier->at + bytes(page), bytes(n), false);
		if (r)
			return r;
	}
	return 0;
}

static void forget(struct ksm_barrier *barrier)
{
	barrier->at = NULL;
	barrier->view = NULL;
	barrier->pages = 0;
}

static int segv_open(struct ksm_barrier *barrier, char *at, size_t pages)
{
	size_t first;
	struct ksm_guard *guard = ksm_guard_find_sigsafe(at, &first);
	if (!guard)
		return -EINVAL;
	size_t n = claim(barrier, guard, first, KSM_MIN(pages, guard->pages - first));
	if (!n)
		return barrier->frozen_only ? -EAGAIN : -EBUSY; /* thawed since somebody looked */
	barrier->at = at;
	barrier->view = at;
	barrier->pages = n;
	int r = protect(barrier);
	if (r) {
		give_back_all(barrier, guard, first);
		forget(barrier);
	}
	return r;
}

/* SEGV-3 */
static int fill_hole(struct ksm_barrier *barrier, size_t page, int store, uint64_t offset)
{
	void *fresh, *at = barrier->at + bytes(page);
	int r = ksm_os_map_anon(NULL, KSM_PAGE_SIZE, false, false, &fresh);
	if (r)
		return r;
	ksm_os_advise(fresh, KSM_PAGE_SIZE, MADV_NOHUGEPAGE);
	r = ksm_os_pread(store, fresh, KSM_PAGE_SIZE, offset);
	if (!r)
		r = ksm_os_protect(fresh, KSM_PAGE_SIZE, false);
	if (!r && fresh != at) /* the kernel may have chosen the hole itself */
		r = ksm_os_remap(fresh, at, KSM_PAGE_SIZE);
	if (r)
		ksm_os_unmap(fresh, KSM_PAGE_SIZE);
	else if (was_state(barrier, page) == KSM_GUARD_WRITABLE)
		barrier->was[page] = KSM_GUARD_OPEN; /* anonymous from now on */
	return r;
}

static int segv_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable)
{
	size_t first;
	struct ksm_guard *guard = ksm_guard_find_sigsafe(barrier->at, &first);
	int r = ksm_os_map_frames(barrier->at + bytes(page), bytes(count), store, offset, writable);
	for (size_t i = 0; i < count && r; i++)
		for (int attempt = 0; !ksm_os_is_mapped(barrier->at + bytes(page + i), KSM_PAGE_SIZE); attempt++) {
			if (attempt == 1000)
				ksm_panic(__FILE__, __LINE__, "a hole in the program's memory could not be filled");
			if (fill_hole(barrier, page + i, store, offset + bytes(i)))
				ksm_os_sleep_ns(100000); /* out of memory may pass */
		}
	for (size_t i = page; i < page + count && !r; i++) { /* SEGV-4 */
		uint8_t frozen = barrier->was[i] & KSM_GUARD_FROZEN;
		ksm_guard_set(guard, first + i, 1, writable ? KSM_GUARD_WRITABLE : KSM_GUARD_MERGED | frozen);
	}
	return r;
}

static int segv_drop(struct ksm_barrier *barrier, size_t page, size_t count)
{
	for (size_t i = page, n; i < page + count; i += n) {
		char *at = barrier->at + bytes(i);
		bool framed = was_state(barrier, i) == KSM_GUARD_WRITABLE;
		for (n = 1; i + n < page + count && (was_state(barrier, i + n) == KSM_GUARD_WRITABLE) == framed;)
			n++;
		/* A mapping that may refer to frames would show them; so it is replaced. The bytes are zeros either way. */
		int r = framed ? ksm_os_map_anon(at, bytes(n), true, false, NULL)
			       : ksm_os_advise(at, bytes(n), MADV_DONTNEED);
		if (r)
			return r;
		if (framed) {
			ksm_os_advise(at, bytes(n), MADV_NOHUGEPAGE);
			memset(barrier->was + i, KSM_GUARD_OPEN, n);
		}
	}
	return 0;
}

static unsigned segv_close(struct ksm_barrier *barrier)
{
	size_t first;
	struct ksm_guard *guard = ksm_guard_find_sigsafe(barrier->at, &first);
	return give_back_all(barrier, guard, first);
}

const struct ksm_barrier_ops ksm_barrier_segv = {
	.name = "segv",
	.kind = KSM_BARRIER_SEGV,
	.shared = true,
	.create = segv_create,
	.destroy = segv_destroy,
	.open = segv_open,
	.map = segv_map,
	.drop = segv_drop,
	.close = segv_close,
};
