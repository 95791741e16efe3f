/* SPDX-License-Identifier: MIT */
/*
 * DOC: Barriers
 *
 * What opens a window is a barrier; this file chooses one and keeps the order of its verbs. The implementations
 * are barrier_*.c, and one conformance suite runs against each of them.
 *
 * BARRIER-1. While a window is open no store reaches its pages: of no thread, and of no system call. Stores that come
 *            meanwhile wait, and land in what the page has become.
 * BARRIER-2. Every page of a window is mapped, dropped or put back, whatever fails; nothing is lost and nobody is
 *            left asleep.
 * BARRIER-3. A page that a device may write by itself (pinned) is refused, by a barrier that can see it.
 * BARRIER-4. One window at a time, and it is closed before the merge lock is let go.
 */
#include "barrier.h"

#include <errno.h>
#include <string.h>

const struct ksm_barrier_ops *const ksm_barriers[] = {&ksm_barrier_move, &ksm_barrier_stop, &ksm_barrier_segv, NULL};

static void clear(struct ksm_barrier *barrier)
{
	memset(barrier, 0, sizeof(*barrier));
	barrier->uffd = -1;
}

int ksm_barrier_create(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, struct ksm_park *park, int uffd)
{
	int error = -ENOSYS;
	for (size_t i = 0; ksm_barriers[i]; i++) {
		enum ksm_barrier_kind this = ksm_barriers[i]->kind;
		if (kind == KSM_BARRIER_AUTO ? this == KSM_BARRIER_SEGV : this != kind)
			continue;
		clear(barrier);
		barrier->park = park;
		barrier->uffd = this == KSM_BARRIER_MOVE ? uffd : -1;
		int r = ksm_barriers[i]->create(barrier);
		if (!r) {
			barrier->ops = ksm_barriers[i];
			return 0;
		}
		if (error == -ENOSYS)
			error = r; /* the best one's reason */
	}
	clear(barrier);
	barrier->error = error;
	return error;
}

void ksm_barrier_destroy(struct ksm_barrier *barrier)
{
	if (barrier->ops)
		barrier->ops->destroy(barrier);
	barrier->ops = NULL;
}

void ksm_barrier_forget(struct ksm_barrier *barrier, bool mapped)
{
	barrier->uffd = -1; /* by now its number is somebody else's */
	if (mapped)
		ksm_barrier_destroy(barrier);
	clear(barrier);
}

int ksm_window_open(struct ksm_barrier *barrier, char *at, size_t pages)
{
	ksm_ensure(barrier->pages == 0 && pages > 0); /* BARRIER-4 */
	if (!barrier->ops)
		return barrier->error ? barrier->error : -ENOSYS;
	memset(barrier->fate, KSM_WINDOW_OUT, sizeof(barrier->fate));
	int r = barrier->ops->open(barrier, at, KSM_MIN(pages, (size_t)KSM_WINDOW_PAGES));
	ksm_ensure(r ? barrier->pages == 0 : barrier->pages > 0 && barrier->pages <= pages);
	return r;
}

/* Are these pages still in the window, and nothing decided about them? */
KSM_UNUSED static bool is_out(const struct ksm_barrier *barrier, size_t page, size_t count)
{
	for (size_t i = page; i < page + count; i++)
		if (barrier->fate[i] != KSM_WINDOW_OUT)
			return false;
	return true;
}

int ksm_window_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable)
{
	ksm_ensure(page < barrier->pages && count <= barrier->pages - page);
	ksm_assert(is_out(barrier, page, count));
	int r = barrier->ops->map(barrier, page, count, store, offset, writable);
	if (!r)
		memset(barrier->fate + page, KSM_WINDOW_MAPPED, count);
	return r;
}

int ksm_window_drop(struct ksm_barrier *barrier, size_t page, size_t count)
{
	ksm_ensure(page < barrier->pages && count <= barrier->pages - page);
	ksm_assert(is_out(barrier, page, count));
	int r = barrier->ops->drop ? barrier->ops->drop(barrier, page, count) : 0;
	if (!r)
		memset(barrier->fate + page, KSM_WINDOW_DROPPED, count);
	return r;
}

void ksm_window_give_up(struct ksm_barrier *barrier, size_t page)
{
	ksm_assert(page < barrier->pages && barrier->fate[page] == KSM_WINDOW_OUT);
	barrier->fate[page] = KSM_WINDOW_GONE;
}

unsigned ksm_window_close(struct ksm_barrier *barrier)
{
	ksm_ensure(barrier->pages > 0); /* BARRIER-4 */
	unsigned failures = barrier->ops->close(barrier);
	barrier->at = NULL;
	barrier->view = NULL;
	barrier->pages = 0;
	return failures;
}
