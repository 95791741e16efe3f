/* SPDX-License-Identifier: MIT */
/*
 * DOC: Memory that goes its own way
 *
 * While a window of "move" is open, or pages are held, the program may move their memory (mremap), unmap it, or map
 * something else there: by mistake or not, and most of all where it was registered and is the program's own.
 *
 * FOLLOW-1. Whoever moves memory that is registered with our descriptor waits until we have read whereto, and the
 *           registration goes along. So after all that was registered has been let go, and before a page is put back, the
 *           descriptor is asked: it says EAGAIN as long as somebody waits. Pages that are out go where their mapping is.
 * FOLLOW-2. Memory that was unmapped while its pages were out: their bytes are dropped, which nobody can see any more.
 *           Whether it was unmapped or moved is never in doubt: a move is announced to the descriptor before it begins.
 * FOLLOW-3. Over registered memory a frame is mapped only right after the descriptor has said that what is there is what
 *           was there. A mapping that takes its place between the two calls, within a microsecond, is lost.
 *
 * A debugger that stops a thread inside mremap keeps the scanner waiting here, as it would the kernel's own.
 */
#include "barrier.h"

#include "os.h"

#include <errno.h>
#include <string.h>

#define TURN_NS 1000000u /* patience with a thread that has moved memory and has not come to say so */

static const char *unreadable(const struct ksm_barrier *barrier)
{
	return barrier->scratch + KSM_WINDOW_PAGES * KSM_PAGE_SIZE;
}

static int ask(struct ksm_barrier *barrier, char *at, size_t pages)
{
	return ksm_os_uffd_has(barrier->uffd, at, unreadable(barrier), pages << KSM_PAGE_SHIFT);
}

char *ksm_follow_place(const struct ksm_barrier *barrier, size_t page)
{
	return barrier->moved[page] ? barrier->moved[page] : barrier->at + (page << KSM_PAGE_SHIFT);
}

/* In one piece if possible: a mapping in two pieces is one that mremap refuses, or moves the half of. */
unsigned ksm_follow_unregister(struct ksm_barrier *barrier, char *at, size_t pages)
{
	unsigned failures = 0;
	if (!ksm_os_uffd_unregister(barrier->uffd, at, pages << KSM_PAGE_SHIFT))
		return 0;
	for (size_t i = 0; i < pages; i++) {
		int r = ksm_os_uffd_unregister(barrier->uffd, at + (i << KSM_PAGE_SHIFT), KSM_PAGE_SIZE);
		failures += r && r != -EINVAL; /* which says that there is nothing that could be registered */
	}
	return failures;
}

static unsigned let_go(struct ksm_barrier *barrier, char *at, size_t pages)
{
	unsigned failures = ksm_follow_unregister(barrier, at, pages);
	ksm_os_uffd_wake(barrier->uffd, at, pages << KSM_PAGE_SHIFT);
	return failures;
}

/* The page of the window that is at an address; barrier->pages: none. */
static size_t page_at(const struct ksm_barrier *barrier, const char *at)
{
	size_t page = 0;
	while (page < barrier->pages && ksm_follow_place(barrier, page) != at)
		page++;
	return page;
}

void ksm_follow_note(struct ksm_barrier *barrier, const struct ksm_os_uffd_event *event)
{
	char *from = event->at, *to = event->to;
	barrier->moves++;
	size_t pages = event->nbytes >> KSM_PAGE_SHIFT;
	for (size_t i = 0, n; i < pages; i += n) {
		size_t page = page_at(barrier, from + (i << KSM_PAGE_SHIFT));
		n = 1;
		if (page < barrier->pages) {
			barrier->moved[page] = to + (i << KSM_PAGE_SHIFT);
			continue;
		}
		while (i + n < pages && page_at(barrier, from + ((i + n) << KSM_PAGE_SHIFT)) == barrier->pages)
			n++;
		let_go(barrier, to + (i << KSM_PAGE_SHIFT), n); /* is not out, and was to be let go where it was */
	}
}

void ksm_follow(struct ksm_barrier *barrier)
{
	struct ksm_os_uffd_event event;
	while (ask(barrier, barrier->scratch, 1) == -EAGAIN)
		if (ksm_os_uffd_read(barrier->uffd, TURN_NS, &event) == KSM_OS_UFFD_MOVED)
			ksm_follow_note(barrier, &event);
}

bool ksm_follow_is_there(struct ksm_barrier *barrier, char *at, size_t pages)
{
	int r = ask(barrier, at, pages);
	if (r == -EAGAIN) {
		ksm_follow(barrier);
		r = ask(barrier, at, pages);
	}
	return !r;
}

bool ksm_follow_is_lost(struct ksm_barrier *barrier, size_t page)
{
	uint64_t before = barrier->moves;
	if (ask(barrier, ksm_follow_place(barrier, page), 1) != -ENOENT)
		return false;
	ksm_follow(barrier);             /* FOLLOW-2 */
	return barrier->moves == before; /* it may have been moved, and moved back */
}

/* Pages from `page` that have been moved together. */
static size_t run_at(const struct ksm_barrier *barrier, size_t page)
{
	char *at = barrier->moved[page];
	size_t n = 0;
	while (at && page + n < barrier->pages && barrier->moved[page + n] == at + (n << KSM_PAGE_SHIFT))
		n++;
	return n;
}

unsigned ksm_follow_let_go(struct ksm_barrier *barrier)
{
	unsigned failures = 0;
	for (size_t page = 0; page < barrier->pages;) {
		char *at = barrier->moved[page];
		size_t n = run_at(barrier, page);
		uint64_t before = barrier->moves;
		if (n)
			failures += let_go(barrier, at, n);
		if (n)
			ksm_follow(barrier);
		if (barrier->moves == before) { /* else again, wherever it is now */
			memset(&barrier->moved[page], 0, n * sizeof(barrier->moved[page]));
			page += KSM_MAX(n, (size_t)1);
		}
	}
	return failures;
}
