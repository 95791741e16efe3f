/* SPDX-License-Identifier: MIT */
/*
 * DOC: Copy-on-write in user space
 *
 * A merged page that is mapped read-only is copied here when it is written, by the SIGSEGV handler, in the thread that
 * writes: what the kernel's do_wp_page() does for pages it shares.
 *
 *      1. claim the page: its guard says BUSY, every other store to it waits (and comes again)
 *      2. fresh anonymous memory elsewhere; the page's bytes are copied into it
 *      3. mremap moves it over the page, in one step: a reader sees the frame or the copy, never anything else
 *      4. the guard says OPEN; the handler returns, and the store happens again
 *
 * Beside do_wp_page() (Linux 6.18), case by case:
 *
 *    wp_page_copy          the ordinary case: the four steps above
 *    wp_page_copy, of the page of zeros: a fresh page, nothing to copy. Merged pages of zeros have no frame and
 *                          no protection here; the kernel's own page of zeros takes their first store
 *    wp_page_reuse         of an anonymous page that nobody shares any more: make the mapping writable, copy nothing.
 *                          A thawed page: it is private, and only the protection is taken away. Never done for a
 *                          frame: whether other processes map it is not known here, and frames are never written
 *    wp_page_shared, wp_pfn_shared   stores into a shared mapping, which the file system is told of. No page of ours
 *                          is mapped shared
 *    pages of KSM, of a swap cache, large folios   what decides between copy and reuse. Here the guard does
 *    userfaultfd-wp        reported to its descriptor before anything else; the kernel does that before it would
 *                          send a signal, so such a page never gets here
 *    mlocked pages         the copy is locked as the mapping was. Fresh memory is locked only under mlockall(); an
 *                          mlock() of merged memory has broken it, and it is not read-only any more
 *    FAULT_FLAG_UNSHARE, pinning for writing   an access of the kernel: it never becomes a signal. A system call that
 *                          stores into a read-only page fails with EFAULT
 *    out of memory         the kernel kills somebody, or the access fails. See COW-3
 *
 * COW-1. The bytes are copied while the page is BUSY and read-only, so no store can come between the copy and step 3.
 * COW-2. The range is complete at every instant: a mapping that could not be replaced is there unchanged, and if the
 *        kernel has already taken the old one away, the copy is put there before anything else happens.
 * COW-3. A store is never refused. When the budget of mappings is spent, or there is no memory for a copy, the whole
 *        neighbourhood of merged pages becomes writable instead, which splits no mapping as far as possible: the kernel's
 *        own copy-on-write takes over. If even that fails the thread comes again, until it succeeds.
 * COW-4. A fault that we did not cause is given up after a bounded number of tries (FOREIGN in a row in one thread at one
 *        address, without anybody at work on that page), so that it reaches whom it belongs to. A store that meets our
 *        work each time between its fault and our look would have to do so that often in a row.
 * COW-5. A waiting thread gives the processor away, and after a few times sleeps: a real-time thread must not keep the
 *        one it waits for from running.
 *
 * COW-6. A guard may be destroyed, with every page of it writable, while a fault is on its way here. So the first fault of
 *        a thread that finds no guard after one was destroyed is sent back once. If it is somebody else's it comes again.
 *
 * No locks and no allocation; in the handler every signal is blocked, elsewhere ksm_cow_break() blocks them, so that no
 * signal handler of the program meets a page its own thread has claimed. In a forked child see GUARD's last paragraph.
 */
#include "cow.h"

#include "atomic.h"
#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define FOREIGN 100   /* tries */
#define PATIENCE 16   /* tries before a waiting thread sleeps */
#define NAP_NS 50000u /* … so long */

static char *page_at(const struct ksm_guard *guard, size_t page)
{
	return guard->base + (page << KSM_PAGE_SHIFT);
}

/* ---- one copy ------------------------------------------------------------------------------------------------ */

static int replace(void *at, void *fresh, size_t nbytes)
{
	int r = ksm_os_remap_sigsafe(fresh, at, nbytes);
	for (int attempt = 0; r && !ksm_os_is_mapped_sigsafe(at, nbytes); attempt++) { /* COW-2 */
		ksm_ensure(attempt < 10000);
		ksm_os_sleep_sigsafe(NAP_NS);
		r = ksm_os_remap_sigsafe(fresh, at, nbytes);
	}
	return r;
}

int ksm_cow_copy_sigsafe(void *at, size_t pages, bool writable, bool like_arena)
{
	size_t nbytes = pages << KSM_PAGE_SHIFT;
	void *fresh;
	int r = ksm_os_map_anon_sigsafe(nbytes, &fresh);
	if (r)
		return -ENOMEM;
	if (like_arena)
		ksm_os_advise_sigsafe(fresh, nbytes, MADV_NOHUGEPAGE);
	memcpy(fresh, at, nbytes);
	if (!writable)
		r = ksm_os_protect_sigsafe(fresh, nbytes, false);
	if (!r)
		r = replace(at, fresh, nbytes);
	if (r)
		ksm_os_unmap_sigsafe(fresh, nbytes);
	return r ? -ENOMEM : 0;
}

/* ---- a page, or its neighbourhood ------------------------------------------------------------------------------- */

static bool spend(struct ksm_guard *guard)
{
	if (__atomic_sub_fetch(&guard->vmas_left, 2, __ATOMIC_RELAXED) >= 0)
		return true;
	ksm_add_relaxed(&guard->vmas_left, 2);
	return false;
}

static void set_back(struct ksm_guard *guard, size_t page, size_t n, enum ksm_guard_state state)
{
	for (size_t i = page; i < page + n; i++)
		ksm_guard_set(guard, i, 1, (uint8_t)state | (ksm_guard_get(guard, i) & KSM_GUARD_FROZEN));
}

/* Make claimed pages writable, all or none. */
static int protect_all(struct ksm_guard *guard, size_t page, size_t n)
{
	size_t nbytes = n << KSM_PAGE_SHIFT;
	int r = ksm_os_protect_sigsafe(page_at(guard, page), nbytes, true);
	if (!r || n == 1)
		return r; /* of one page the kernel does all or nothing */
	for (int attempt = 0; ksm_os_protect_sigsafe(page_at(guard, page), nbytes, false); attempt++) {
		ksm_ensure(attempt < 10000);
		ksm_os_sleep_sigsafe(NAP_NS);
		if (!ksm_os_protect_sigsafe(page_at(guard, page), nbytes, true))
			return 0;
	}
	return r;
}

static bool claim_state(struct ksm_guard *guard, size_t page, enum ksm_guard_state state)
{
	uint8_t byte = ksm_guard_get(guard, page);
	return KSM_GUARD_STATE(byte) == state && state != KSM_GUARD_BUSY &&
	       ksm_guard_claim_from_sigsafe(guard, page, byte);
}

/* Claimed pages are writable from now on. */
static void opened(struct ksm_guard *guard, size_t page, size_t n, enum ksm_guard_state then)
{
	uint64_t frozen = 0;
	for (size_t i = page; i < page + n; i++)
		frozen += (ksm_guard_get(guard, i) & KSM_GUARD_FROZEN) != 0;
	if (frozen)
		ksm_add_relaxed(&guard->thaws, frozen);
	ksm_guard_set(guard, page, n, (uint8_t)then);
}

/* COW-3: `page` is claimed and was in `state`; the neighbours that are like it, frozen too or not either, go with it. */
static int open_neighbourhood(struct ksm_guard *guard, size_t page, enum ksm_guard_state state)
{
	enum ksm_guard_state then = state == KSM_GUARD_MERGED ? KSM_GUARD_WRITABLE : KSM_GUARD_OPEN;
	uint8_t byte = (uint8_t)state | (ksm_guard_get(guard, page) & KSM_GUARD_FROZEN);
	size_t low = page, end = page + 1;
	while (low > 0 && ksm_guard_claim_from_sigsafe(guard, low - 1, byte))
		low--;
	while (end < guard->pages && ksm_guard_claim_from_sigsafe(guard, end, byte))
		end++;
	int r = protect_all(guard, low, end - low);
	if (!r) {
		opened(guard, low, end - low, then);
		return 0;
	}
	set_back(guard, low, page - low, state);
	set_back(guard, page + 1, end - page - 1, state);
	r = protect_all(guard, page, 1);
	if (r)
		set_back(guard, page, 1, state);
	else
		opened(guard, page, 1, then);
	return r ? -ENOMEM : 0;
}

/* `page` is claimed; what it was. 0: a store can be made. */
static int open_page(struct ksm_guard *guard, size_t page, enum ksm_guard_state state)
{
	bool merged = state == KSM_GUARD_MERGED;
	if (!spend(guard))
		return open_neighbourhood(guard, page, state);
	int r = merged ? ksm_cow_copy_sigsafe(page_at(guard, page), 1, true, false) : protect_all(guard, page, 1);
	if (r) {
		ksm_add_relaxed(&guard->vmas_left, 2);
		return open_neighbourhood(guard, page, state);
	}
	if (merged)
		ksm_add_relaxed(&guard->breaks, 1);
	opened(guard, page, 1, KSM_GUARD_OPEN);
	return 0;
}

/* ---- faults ---------------------------------------------------------------------------------------------------- */

/* How often a thread has come in vain, in a row. Lossy: who finds no room takes somebody's. */
#define THREADS 256
#define PROBES 16
static struct tries {
	int tid;
	uint32_t waits;   /* found BUSY */
	uint32_t foreign; /* found nothing to do, at this address: */
	uintptr_t address;
	uint64_t destroyed; /* guards, when it last found none */
} tries[THREADS];

static struct tries *tries_of(int tid)
{
	size_t home = (uint32_t)tid * 2654435761u / (UINT32_MAX / THREADS + 1);
	struct tries *mine = NULL;
	for (size_t i = 0; i < PROBES; i++)
		if (ksm_load_relaxed(&tries[(home + i) % THREADS].tid) == tid)
			return &tries[(home + i) % THREADS];
	for (size_t i = 0; i < PROBES && !mine; i++) {
		int nobody = 0;
		struct tries *one = &tries[(home + i) % THREADS];
		if (__atomic_compare_exchange_n(&one->tid, &nobody, tid, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
			mine = one;
	}
	if (!mine)
		mine = &tries[home];
	ksm_store_relaxed(&mine->tid, tid);
	ksm_store_relaxed(&mine->waits, 0);
	ksm_store_relaxed(&mine->foreign, 0);
	return mine;
}

static struct tries *tries_at(int tid, const void *address)
{
	struct tries *mine = tries_of(tid);
	if (ksm_load_relaxed(&mine->address) != (uintptr_t)address) {
		ksm_store_relaxed(&mine->address, (uintptr_t)address);
		ksm_store_relaxed(&mine->waits, 0);
		ksm_store_relaxed(&mine->foreign, 0);
	}
	return mine;
}

static void wait_a_moment(struct tries *mine)
{
	ksm_store_relaxed(&mine->foreign, 0);
	if (ksm_add_relaxed(&mine->waits, 1) < PATIENCE)
		ksm_os_yield_sigsafe();
	else
		ksm_os_sleep_sigsafe(NAP_NS); /* COW-5 */
}

/* No guard has this address. But one may have had it at the instant of the fault: COW-6. */
static bool was_ours(int tid)
{
	struct tries *mine = tries_of(tid);
	uint64_t destroyed = ksm_guards_destroyed_sigsafe();
	bool changed = ksm_load_relaxed(&mine->destroyed) != destroyed;
	ksm_store_relaxed(&mine->destroyed, destroyed);
	return changed;
}

enum ksm_cow_answer ksm_cow_fault_sigsafe(void *address, int tid)
{
	size_t page, again;
	struct ksm_guard *guard = ksm_guard_find_sigsafe(address, &page);
	if (!guard)
		return was_ours(tid) ? KSM_COW_RETRY : KSM_COW_NOT_OURS;
	struct tries *mine = tries_at(tid, address);
	enum ksm_guard_state state = KSM_GUARD_STATE(ksm_guard_get(guard, page));
	if (state == KSM_GUARD_OPEN ||
	    state == KSM_GUARD_WRITABLE) { /* somebody was quicker, or it is not ours: COW-4 */
		if (ksm_add_relaxed(&mine->foreign, 1) + 1 < FOREIGN)
			return KSM_COW_RETRY;
		ksm_store_relaxed(&mine->foreign, 0);
		return KSM_COW_NOT_OURS;
	}
	if (!claim_state(guard, page, state)) {
		wait_a_moment(mine);
		return KSM_COW_RETRY;
	}
	if (ksm_guard_find_sigsafe(address, &again) != guard || again != page) { /* GUARD-3 */
		set_back(guard, page, 1, state);
		return KSM_COW_RETRY;
	}
	if (open_page(guard, page, state)) {
		wait_a_moment(mine);
		return KSM_COW_RETRY;
	}
	ksm_store_relaxed(&mine->waits, 0);
	ksm_store_relaxed(&mine->foreign, 0);
	return KSM_COW_RETRY;
}

/* ---- under the merge lock ---------------------------------------------------------------------------------------- */

int ksm_cow_break(struct ksm_guard *guard, size_t page)
{
	uint64_t mask = ksm_os_mask_sigsafe(UINT64_MAX);
	int r = 0;
	for (;;) {
		enum ksm_guard_state state = KSM_GUARD_STATE(ksm_guard_get(guard, page));
		if (state == KSM_GUARD_OPEN || state == KSM_GUARD_WRITABLE)
			break;
		if (claim_state(guard, page, state)) {
			r = open_page(guard, page, state);
			break;
		}
		ksm_os_yield_sigsafe(); /* a handler holds it, for a few system calls */
	}
	ksm_os_mask_sigsafe(mask);
	return r;
}
