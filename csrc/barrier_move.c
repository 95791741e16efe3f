/* SPDX-License-Identifier: MIT */
/*
 * DOC: The barrier "move"
 *
 * The run is registered with userfaultfd for missing pages, and UFFDIO_MOVE takes its pages out to a scratch area of
 * ours: the page tables' entries move, no byte is copied. From then on whoever touches the run, thread or
 * system call, sleeps in the kernel. The pages are looked at in the scratch area.
 *
 *      before              open                         mapped and closed
 *    ┌───┬───┬───┐    run  ┌╌╌╌┬╌╌╌┬╌╌╌┐ (sleep)        ┌───┬───┬───┐
 *    │ a │ b │ c │         ╎   ╎   ╎   ╎                │ F │ F'│ c │   F, F': frames; c was put back
 *    └───┴───┴───┘         └╌╌╌┴╌╌╌┴╌╌╌┘                └───┴───┴───┘
 *                 scratch  ┌───┬───┬───┐                ┌╌╌╌┬╌╌╌┬╌╌╌┐
 *                          │ a │ b │ c │                ╎   ╎   ╎   ╎
 *                          └───┴───┴───┘                └╌╌╌┴╌╌╌┴╌╌╌┘
 *
 * The kernel refuses (EBUSY) pages that are pinned for a device or a direct transfer, and pages still shared with
 * another process by fork; it stops at the first such page and says how far it came.
 *
 * MOVE-1. The epilogue, also after every error: map or put back every page, unregister what is still anonymous, wake
 *         the whole run; in this order. A page left registered and empty would be a thread asleep for ever.
 * MOVE-2. If the kernel refuses even that, the descriptor is closed, which unregisters and wakes everything, and a
 *         new one is made for the next window.
 * MOVE-3. Put-back that fails falls back to copying (UFFDIO_COPY), then to moving the mapping itself (mremap).
 *         If nothing works the process ends with a message: a page would be lost.
 * MOVE-4. The program may move or unmap the run while pages are out: barrier_follow.c.
 *
 * Needs Linux 6.8 and a userfaultfd that may handle faults of the kernel: /dev/userfaultfd, CAP_SYS_PTRACE or
 * vm.unprivileged_userfaultfd=1.
 */
#include "barrier.h"

#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define PROTECT_FEATURE 1ull /* UFFD_FEATURE_PAGEFAULT_FLAG_WP */

static size_t bytes(size_t pages)
{
	return pages << KSM_PAGE_SHIFT;
}

static int open_descriptor(void)
{
	return ksm_os_uffd_open(KSM_UFFD_FEATURE_MOVE | KSM_UFFD_FEATURE_PROTECT_FILES | KSM_UFFD_FEATURE_FOLLOW |
				PROTECT_FEATURE);
}

/* What pages are moved into; the rest of the area, as much again, nobody may read. */
static size_t scratch_bytes(void)
{
	return bytes(KSM_WINDOW_PAGES);
}

static int register_scratch(struct ksm_barrier *barrier)
{
	return ksm_os_uffd_register(barrier->uffd, barrier->scratch, scratch_bytes(), KSM_UFFD_PROTECT);
}

static void move_destroy(struct ksm_barrier *barrier)
{
	ksm_os_close(barrier->uffd);
	barrier->uffd = -1;
	if (barrier->scratch)
		ksm_os_unmap(barrier->scratch, KSM_SCRATCH_BYTES);
	barrier->scratch = NULL;
}

/* Its mapping; the address is ours. */
static int map_scratch(char *at, size_t nbytes)
{
	int r = ksm_os_map_anon(at, nbytes, true, false, NULL);
	if (r)
		return r;
	ksm_os_advise(at, nbytes, MADV_NOHUGEPAGE);
	ksm_os_advise(at, nbytes, MADV_DONTDUMP);
	ksm_os_advise(at, nbytes, MADV_DONTFORK);
	return 0;
}

static int make_scratch(struct ksm_barrier *barrier)
{
	void *scratch;
	int r = ksm_os_map_anon(NULL, KSM_SCRATCH_BYTES, false, true, &scratch);
	if (r)
		return r;
	barrier->scratch = scratch;
	ksm_os_name_memory(scratch, KSM_SCRATCH_BYTES, "ksmalloc tables");
	ksm_os_advise(scratch, KSM_SCRATCH_BYTES, MADV_DONTFORK);
	return map_scratch(scratch, scratch_bytes());
}

static int move_create(struct ksm_barrier *barrier)
{
	int old = barrier->uffd;
	int fresh = open_descriptor();
	if (fresh >= 0) {
		ksm_os_close(old);
		barrier->uffd = fresh;
	} else if (old < 0) {
		return fresh;
	}
	int r = make_scratch(barrier);
	if (!r)
		r = register_scratch(barrier);
	if (r)
		move_destroy(barrier);
	return r;
}

/* MOVE-2 */
static void start_over(struct ksm_barrier *barrier)
{
	ksm_os_close(barrier->uffd);
	barrier->tainted = false;
	barrier->uffd = open_descriptor();
	if (barrier->uffd >= 0 && register_scratch(barrier)) {
		ksm_os_close(barrier->uffd);
		barrier->uffd = -1;
	}
}

/* ---- the epilogue ------------------------------------------------------------------------------------------------- */

/* Unregister [at, at + pages) and wake its sleepers. Returns how many calls failed. */
static unsigned unregister_and_wake(struct ksm_barrier *barrier, char *at, size_t pages, bool registered)
{
	unsigned failures = 0;
	if (registered && ksm_os_uffd_unregister(barrier->uffd, at, bytes(pages)) &&
	    ksm_os_uffd_unregister(barrier->uffd, at, bytes(pages)) &&
	    (!barrier->foreign || ksm_follow_unregister(barrier, at, pages))) {
		start_over(barrier);
		return 1;
	}
	if (ksm_os_uffd_wake(barrier->uffd, at, bytes(pages)) && ksm_os_uffd_wake(barrier->uffd, at, bytes(pages))) {
		start_over(barrier);
		failures++;
	}
	ksm_follow(barrier);
	return failures;
}

/* Returns how many pages went back: the kernel says how far it came, and that is exact. */
static size_t move_back(struct ksm_barrier *barrier, size_t page, size_t count)
{
	char *to = barrier->at + bytes(page), *from = barrier->scratch + bytes(page);
	size_t done = 0;
	while (done < bytes(count) && !barrier->moved[page + (done >> KSM_PAGE_SHIFT)]) {
		int64_t moved = ksm_os_uffd_move(barrier->uffd, to + done, from + done, bytes(count) - done);
		if (moved <= 0)
			break;
		done += (size_t)moved;
	}
	return done >> KSM_PAGE_SHIFT;
}

/*
 * A page goes back with the mapping it is in, which is registered no more; but the whole run is woken. The scratch area's
 * registration is taken off before: whoever moves registered memory waits for us, MOVE-4. If that fails, a copy goes.
 */
static int remap_back(struct ksm_barrier *barrier, char *from, char *to)
{
	void *at = from;
	if (barrier->foreign && !ksm_follow_is_there(barrier, to, 1))
		return -EFAULT;
	barrier->tainted = true; /* not now, while other pages may be out */
	int r = ksm_os_uffd_unregister(barrier->uffd, from, KSM_PAGE_SIZE);
	bool copied = r && !ksm_os_map_anon(NULL, KSM_PAGE_SIZE, false, false, &at);
	if (r && !copied)
		return r;
	if (copied)
		memcpy(at, from, KSM_PAGE_SIZE);
	r = ksm_os_remap(at, to, KSM_PAGE_SIZE);
	if (r && copied)
		ksm_os_unmap(at, KSM_PAGE_SIZE);
	if (r || copied)
		return r;
	if (map_scratch(from, KSM_PAGE_SIZE)) /* there is a hole now */
		ksm_panic(__FILE__, __LINE__, "the scratch area could not be mapped again");
	madvise(to, KSM_PAGE_SIZE, MADV_DOFORK);
	madvise(to, KSM_PAGE_SIZE, MADV_DODUMP);
	return 0;
}

/* One page that is still out, by every means there is: MOVE-3. Returns the number of means that failed. */
static unsigned put_back_hard(struct ksm_barrier *barrier, size_t page)
{
	char *from = barrier->scratch + bytes(page);
	unsigned failures = 1;
	for (int attempt = 0; attempt < 1000; attempt++) {
		ksm_follow(barrier);
		char *to = ksm_follow_place(barrier, page);
		if (ksm_os_uffd_move(barrier->uffd, to, from, KSM_PAGE_SIZE) == (int64_t)KSM_PAGE_SIZE)
			return failures;
		failures++;
		if (ksm_os_uffd_copy(barrier->uffd, to, from, KSM_PAGE_SIZE) == (int64_t)KSM_PAGE_SIZE)
			return failures;
		failures++;
		if (barrier->foreign && ksm_follow_is_lost(barrier, page)) {
			barrier->fate[page] = KSM_WINDOW_GONE;
			return 0;
		}
		if (ksm_follow_place(barrier, page) == to && !remap_back(barrier, from, to))
			return failures;
		failures++;
		ksm_os_sleep_ns(100000); /* out of memory may pass */
	}
	ksm_panic(__FILE__, __LINE__, "a page taken out for comparing could not be put back");
}

/* Neither mapped nor dropped; or mapped where it is not any more: it was moved right before. */
static bool is_out(const struct ksm_barrier *barrier, size_t page)
{
	enum ksm_window_page fate = barrier->fate[page];
	return fate == KSM_WINDOW_OUT || fate == KSM_WINDOW_GONE || (fate == KSM_WINDOW_MAPPED && barrier->moved[page]);
}

/* Returns how many calls failed. */
static unsigned put_back_all(struct ksm_barrier *barrier)
{
	unsigned failures = 0;
	ksm_follow(barrier);
	for (size_t page = 0, n; page < barrier->pages;) {
		for (n = 0; page + n < barrier->pages && is_out(barrier, page + n);)
			n++;
		size_t done = n ? move_back(barrier, page, n) : 1;
		page += done;
		if (done < n)
			failures += put_back_hard(barrier, page++);
	}
	return failures;
}

/* Everything goes back or stays mapped, and nobody waits any more: MOVE-1. Returns how many calls failed. */
static unsigned finish(struct ksm_barrier *barrier, size_t registered)
{
	bool anonymous = registered > barrier->pages;
	for (size_t page = 0; page < barrier->pages; page++)
		anonymous |= barrier->fate[page] != KSM_WINDOW_MAPPED;
	unsigned failures = put_back_all(barrier);
	failures += unregister_and_wake(barrier, barrier->at, registered, anonymous);
	failures += ksm_follow_let_go(barrier);
	while (ksm_os_advise(barrier->scratch, bytes(barrier->pages), MADV_DONTNEED) && ++failures < 1000)
		ksm_os_sleep_ns(100000); /* the next move into it would meet EEXIST */
	if (barrier->tainted)
		start_over(barrier);
	return failures;
}

/*
 * The kernel took only the first pages out. The rest is untouched: unregister it, and let go whoever found a page of
 * it missing. While pages are out the descriptor must stay open, so a failure ends the window.
 */
static int let_tail_go(struct ksm_barrier *barrier, size_t pages)
{
	char *tail = barrier->at + bytes(barrier->pages);
	size_t nbytes = bytes(pages - barrier->pages);
	int r = ksm_os_uffd_unregister(barrier->uffd, tail, nbytes);
	if (!r)
		r = ksm_os_uffd_wake(barrier->uffd, tail, nbytes);
	if (!r) {
		ksm_follow(barrier);
		return 0;
	}
	finish(barrier, pages);
	barrier->at = NULL;
	barrier->view = NULL;
	barrier->pages = 0;
	return r;
}

/* Register, and nothing is left of it after an error: the mappings before the one that failed may be registered. */
static int begin(struct ksm_barrier *barrier, char *at, size_t pages, unsigned mode)
{
	if (barrier->uffd < 0)
		start_over(barrier);
	if (barrier->uffd < 0)
		return -EBADF;
	int r = ksm_os_uffd_register(barrier->uffd, at, bytes(pages), mode);
	if (r)
		unregister_and_wake(barrier, at, pages, true);
	return r;
}

static int move_open(struct ksm_barrier *barrier, char *at, size_t pages)
{
	munlock(barrier->scratch, scratch_bytes()); /* locked by mlockall(): then locked pages would move */
	int r = begin(barrier, at, pages, KSM_UFFD_MISSING);
	if (r)
		return r;
	int64_t moved = ksm_os_uffd_move(barrier->uffd, barrier->scratch, at, bytes(pages));
	/* An earlier window could not empty the scratch area at its end? */
	if (moved == -EEXIST && !ksm_os_advise(barrier->scratch, scratch_bytes(), MADV_DONTNEED))
		moved = ksm_os_uffd_move(barrier->uffd, barrier->scratch, at, bytes(pages));
	if (moved <= 0) {
		unregister_and_wake(barrier, at, pages, true);
		return moved == 0 ? -EBUSY : (int)moved;
	}
	size_t have = (size_t)moved >> KSM_PAGE_SHIFT;
	barrier->at = at;
	barrier->pages = have;
	barrier->view = barrier->scratch;
	return have < pages ? let_tail_go(barrier, pages) : 0;
}

static int move_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable)
{
	char *at = barrier->at + bytes(page);
	if (barrier->foreign && !ksm_follow_is_there(barrier, at, count)) /* FOLLOW-3 */
		return -EFAULT;
	return ksm_os_map_frames(at, bytes(count), store, offset, writable);
}

static unsigned move_close(struct ksm_barrier *barrier)
{
	return finish(barrier, barrier->pages);
}

/* ---- holding ---------------------------------------------------------------------------------------------------- */

static int move_hold(struct ksm_barrier *barrier, char *at, size_t pages)
{
	int r = begin(barrier, at, pages, KSM_UFFD_PROTECT);
	if (r)
		return r;
	r = ksm_os_uffd_protect(barrier->uffd, at, bytes(pages), true);
	if (r)
		unregister_and_wake(barrier, at, pages, true);
	return r;
}

static int move_release(struct ksm_barrier *barrier, char *at, size_t pages)
{
	return unregister_and_wake(barrier, at, pages, true) ? -EIO : 0; /* unregistering lifts the protection */
}

static bool move_holds(struct ksm_barrier *barrier, char *at, size_t pages)
{
	for (size_t i = 0; i < pages; i++) /* there may be many mappings */
		if (!ksm_follow_is_there(barrier, at + bytes(i), 1))
			return false;
	return true;
}

/*
 * Who waits has been told of once, and is told of again only if it is woken and still finds the page held. So it is woken
 * whatever else fails: the one who holds the merge lock may be among those who wait, and we wait for that lock (REST-2).
 */
static int let_page_go(struct ksm_barrier *barrier, char *page)
{
	int r = 0;
	for (int attempt = 0; attempt < 100; attempt++) {
		if (ksm_os_uffd_protect(barrier->uffd, page, KSM_PAGE_SIZE, false) == -EAGAIN)
			ksm_follow(barrier);
		r = ksm_os_uffd_wake(barrier->uffd, page, KSM_PAGE_SIZE);
		if (!r)
			break;
	}
	return r;
}

static int move_attend(struct ksm_barrier *barrier, uint64_t ns)
{
	uint64_t now = ksm_os_now_ns(), until = now + ns;
	for (;; now = KSM_MIN(ksm_os_now_ns(), until)) {
		struct ksm_os_uffd_event event;
		int r = ksm_os_uffd_read(barrier->uffd, until - now, &event);
		if (r < 0 && r != -EINTR)
			return r;
		if (r <= 0 && now >= until)
			return 0;
		if (r == KSM_OS_UFFD_MOVED)
			ksm_follow_note(barrier, &event);
		if (r != KSM_OS_UFFD_SLEEPER)
			continue;
		char *page = (char *)event.at - ((uintptr_t)event.at & (KSM_PAGE_SIZE - 1));
		r = let_page_go(barrier, page);
		if (r)
			return r;
	}
}

const struct ksm_barrier_ops ksm_barrier_move = {
	.name = "move",
	.kind = KSM_BARRIER_MOVE,
	.create = move_create,
	.destroy = move_destroy,
	.open = move_open,
	.map = move_map,
	.close = move_close,
	.hold = move_hold,
	.release = move_release,
	.holds = move_holds,
	.attend = move_attend,
};
