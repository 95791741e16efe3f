/* SPDX-License-Identifier: MIT */
/*
 * DOC: The barrier "stop"
 *
 * Every other thread is held in a signal handler (park.c) while a window is open. Pages stay where they are: they are
 * looked at in place, and mapped over or emptied in place. What is not touched need not be put back.
 *
 * STOP-1. Nothing that could fail stands between open and close but map and drop, and neither loses a byte: a call that
 *         fails leaves the page as it was, or is made good before anybody runs.
 * STOP-2. mmap(MAP_FIXED) that fails can leave a hole. Then anonymous memory goes there, filled from the store, which
 *         holds the same bytes. If that fails for a long time, too, the process ends with a message.
 *
 * A page that was swapped out is read in when it is looked at, while everybody waits: slow, not wrong. Memory that a
 * userfaultfd of the program's provides would be waited for in vain; arenas have none, and registered memory with one is
 * refused.
 */
#include "barrier.h"

#include "os.h"
#include "park.h"

#include <errno.h>
#include <sys/mman.h>

static int stop_create(struct ksm_barrier *barrier)
{
	const struct ksm_park *park = barrier->park;
	if (park && park->ready)
		return 0;
	return park && park->why ? park->why : -ENOSYS;
}

static void stop_destroy(struct ksm_barrier *barrier)
{
	barrier->park = NULL;
}

static int stop_open(struct ksm_barrier *barrier, char *at, size_t pages)
{
	int r = ksm_park_begin(barrier->park);
	if (r)
		return r;
	barrier->at = at;
	barrier->pages = pages;
	barrier->view = at;
	return 0;
}

/* STOP-2 */
static void fill_hole(char *at, size_t nbytes, int store, uint64_t offset)
{
	for (int attempt = 0; attempt < 1000; attempt++) {
		if (!ksm_os_map_anon(at, nbytes, true, false, NULL) && !ksm_os_pread(store, at, nbytes, offset))
			return;
		ksm_os_sleep_ns(100000); /* out of memory may pass */
	}
	ksm_panic(__FILE__, __LINE__, "a page whose mapping was lost could not be filled again");
}

static int stop_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable)
{
	char *at = barrier->at + (page << KSM_PAGE_SHIFT);
	size_t nbytes = count << KSM_PAGE_SHIFT;
	int r = ksm_os_map_frames(at, nbytes, store, offset, writable);
	if (r && !ksm_os_is_mapped(at, nbytes))
		fill_hole(at, nbytes, store, offset);
	return r;
}

static int stop_drop(struct ksm_barrier *barrier, size_t page, size_t count)
{
	return ksm_os_advise(barrier->at + (page << KSM_PAGE_SHIFT), count << KSM_PAGE_SHIFT, MADV_DONTNEED);
}

static unsigned stop_close(struct ksm_barrier *barrier)
{
	ksm_park_end(barrier->park);
	return 0;
}

static int stop_hold(struct ksm_barrier *barrier, char *at KSM_UNUSED, size_t pages KSM_UNUSED)
{
	return ksm_park_begin(barrier->park);
}

static int stop_release(struct ksm_barrier *barrier, char *at KSM_UNUSED, size_t pages KSM_UNUSED)
{
	ksm_park_end(barrier->park);
	return 0;
}

const struct ksm_barrier_ops ksm_barrier_stop = {
	.name = "stop",
	.kind = KSM_BARRIER_STOP,
	.in_place = true,
	.shared = true,
	.create = stop_create,
	.destroy = stop_destroy,
	.open = stop_open,
	.map = stop_map,
	.drop = stop_drop,
	.close = stop_close,
	.hold = stop_hold,
	.release = stop_release,
};
