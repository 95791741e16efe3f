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
 *
 * Needs Linux 6.8 and a userfaultfd that may handle faults of the kernel: /dev/userfaultfd, CAP_SYS_PTRACE or
 * vm.unprivileged_userfaultfd=1.
 */
#include "barrier.h"

#include "os.h"

#include <errno.h>
#include <sys/mman.h>

#define PROTECT_FEATURE 1ull /* UFFD_FEATURE_PAGEFAULT_FLAG_WP */

static size_t bytes(size_t pages)
{
	return pages << KSM_PAGE_SHIFT;
}

static int open_descriptor(void)
{
	return ksm_os_uffd_open(KSM_UFFD_FEATURE_MOVE | KSM_UFFD_FEATURE_PROTECT_FILES | PROTECT_FEATURE);
}

static int register_scratch(struct ksm_barrier *barrier)
{
	return ksm_os_uffd_register(barrier->uffd, barrier->scratch, bytes(KSM_WINDOW_PAGES), KSM_UFFD_PROTECT);
}

static void move_destroy(struct ksm_barrier *barrier)
{
	ksm_os_close(barrier->uffd);
	barrier->uffd = -1;
	if (barrier->scratch)
		munmap(barrier->scratch, bytes(KSM_WINDOW_PAGES));
	barrier->scratch = NULL;
}

static int move_create(struct ksm_barrier *barrier)
{
	void *scratch;
	int old = barrier->uffd;
	int fresh = open_descriptor();
	if (fresh >= 0) {
		ksm_os_close(old);
		barrier->uffd = fresh;
	} else if (old < 0) {
		return fresh;
	}
	int r = ksm_os_map_table(bytes(KSM_WINDOW_PAGES), &scratch);
	if (!r) {
		barrier->scratch = scratch;
		ksm_os_advise(scratch, bytes(KSM_WINDOW_PAGES), MADV_DONTFORK);
		r = register_scratch(barrier);
	}
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

/* Unregister [at, at + pages) and wake its sleepers. Returns how many calls failed. */
static unsigned unregister_and_wake(struct ksm_barrier *barrier, char *at, size_t pages, bool registered)
{
	unsigned failures = 0;
	if (registered && ksm_os_uffd_unregister(barrier->uffd, at, bytes(pages)) &&
	    ksm_os_uffd_unregister(barrier->uffd, at, bytes(pages))) {
		start_over(barrier);
		return 1;
	}
	if (ksm_os_uffd_wake(barrier->uffd, at, bytes(pages)) && ksm_os_uffd_wake(barrier->uffd, at, bytes(pages))) {
		start_over(barrier);
		failures++;
	}
	return failures;
}

/* Returns how many pages went back: the kernel says how far it came, and that is exact. */
static size_t move_back(struct ksm_barrier *barrier, size_t page, size_t count)
{
	char *to = barrier->at + bytes(page), *from = barrier->scratch + bytes(page);
	size_t done = 0;
	while (done < bytes(count)) {
		int64_t moved = ksm_os_uffd_move(barrier->uffd, to + done, from + done, bytes(count) - done);
		if (moved <= 0)
			break;
		done += (size_t)moved;
	}
	return done >> KSM_PAGE_SHIFT;
}

/* One page that is still out, by every means there is: MOVE-3. Returns the number of means that failed. */
static unsigned put_back_hard(struct ksm_barrier *barrier, size_t page)
{
	char *to = barrier->at + bytes(page), *from = barrier->scratch + bytes(page);
	unsigned failures = 1;
	for (int attempt = 0; attempt < 1000; attempt++) {
		if (ksm_os_uffd_move(barrier->uffd, to, from, KSM_PAGE_SIZE) == (int64_t)KSM_PAGE_SIZE)
			return failures;
		failures++;
		if (ksm_os_uffd_copy(barrier->uffd, to, from, KSM_PAGE_SIZE) == (int64_t)KSM_PAGE_SIZE)
			return failures;
		failures++;
		if (!ksm_os_remap(from, to, KSM_PAGE_SIZE)) {
			/* the scratch area has a hole now; MAP_FIXED gives it back */
			if (ksm_os_map_anon(from, KSM_PAGE_SIZE, true, false, NULL))
				ksm_panic(__FILE__, __LINE__, "the scratch area could not be mapped again");
			madvise(to, KSM_PAGE_SIZE, MADV_DOFORK);
			madvise(to, KSM_PAGE_SIZE, MADV_DODUMP);
			ksm_os_advise(from, KSM_PAGE_SIZE, MADV_NOHUGEPAGE);
			ksm_os_advise(from, KSM_PAGE_SIZE, MADV_DONTDUMP);
			ksm_os_advise(from, KSM_PAGE_SIZE, MADV_DONTFORK);
			barrier->tainted = true; /* not registered; not now, while other pages may be out */
			return failures;
		}
		failures++;
		ksm_os_sleep_ns(100000); /* out of memory may pass */
	}
	ksm_panic(__FILE__, __LINE__, "a page taken out for comparing could not be put back");
}

/* Everything that is neither mapped nor dropped goes back. Returns how many calls failed. */
static unsigned put_back_all(struct ksm_barrier *barrier)
{
	unsigned failures = 0;
	for (size_t page = 0; page < barrier->pages;) {
		size_t n = 1;
		while (page + n < barrier->pages && barrier->fate[page + n] == barrier->fate[page])
			n++;
		if (barrier->fate[page] == KSM_WINDOW_OUT)
			for (size_t i = move_back(barrier, page, n); i < n; i++)
				failures += put_back_hard(barrier, page + i);
		page += n;
	}
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
	if (!r)
		return 0;
	put_back_all(barrier);
	unregister_and_wake(barrier, barrier->at, pages, true);
	ksm_os_advise(barrier->scratch, bytes(barrier->pages), MADV_DONTNEED);
	if (barrier->tainted)
		start_over(barrier);
	barrier->at = NULL;
	barrier->view = NULL;
	barrier->pages = 0;
	return r;
}

static int move_open(struct ksm_barrier *barrier, char *at, size_t pages)
{
	if (barrier->uffd < 0)
		start_over(barrier);
	if (barrier->uffd < 0)
		return -EBADF;
	munlock(barrier->scratch, bytes(KSM_WINDOW_PAGES)); /* locked by mlockall(): then locked pages would move */
	int r = ksm_os_uffd_register(barrier->uffd, at, bytes(pages), KSM_UFFD_MISSING);
	if (r) { /* the mappings before the one that failed are registered */
		unregister_and_wake(barrier, at, pages, true);
		return r;
	}
	int64_t moved = ksm_os_uffd_move(barrier->uffd, barrier->scratch, at, bytes(pages));
	/* An earlier window could not empty the scratch area at its end? */
	if (moved == -EEXIST && !ksm_os_advise(barrier->scratch, bytes(KSM_WINDOW_PAGES), MADV_DONTNEED))
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
	return ksm_os_map_frames(barrier->at + bytes(page), bytes(count), store, offset, writable);
}

static unsigned move_close(struct ksm_barrier *barrier)
{
	bool anonymous = false;
	for (size_t page = 0; page < barrier->pages; page++)
		anonymous |= barrier->fate[page] != KSM_WINDOW_MAPPED;
	unsigned failures = put_back_all(barrier);
	failures += unregister_and_wake(barrier, barrier->at, barrier->pages, anonymous); /* MOVE-1 */
	while (ksm_os_advise(barrier->scratch, bytes(barrier->pages), MADV_DONTNEED) && ++failures < 1000)
		ksm_os_sleep_ns(100000); /* the next move into it would meet EEXIST */
	if (barrier->tainted)
		start_over(barrier);
	return failures;
}

static int move_hold(struct ksm_barrier *barrier, char *at, size_t pages)
{
	if (barrier->uffd < 0)
		start_over(barrier);
	if (barrier->uffd < 0)
		return -EBADF;
	int r = ksm_os_uffd_register(barrier->uffd, at, bytes(pages), KSM_UFFD_PROTECT);
	if (r) { /* the mappings before the one that failed are registered */
		unregister_and_wake(barrier, at, pages, true);
		return r;
	}
	r = ksm_os_uffd_protect(barrier->uffd, at, bytes(pages), true);
	if (r)
		unregister_and_wake(barrier, at, pages, true);
	return r;
}

static int move_release(struct ksm_barrier *barrier, char *at, size_t pages)
{
	return unregister_and_wake(barrier, at, pages, true) ? -EIO : 0; /* unregistering lifts the protection */
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
};
