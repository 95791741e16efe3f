/* SPDX-License-Identifier: MIT */
/*
 * The control: a barrier whose windows keep nobody out. The program is linked with
 * --wrap=ksm_barrier_create_from, so that every scanner asks here for its barrier, also after a fork.
 */
#include "soak.h"

#include "barrier.h"
#include "os.h"

#include <string.h>
#include <sys/mman.h>

static bool off;

static int none_create(struct ksm_barrier *barrier)
{
	barrier->uffd = -1;
	return 0;
}

static void none_destroy(struct ksm_barrier *barrier KSM_UNUSED)
{
}

static int none_open(struct ksm_barrier *barrier, char *at, size_t pages)
{
	barrier->at = at;
	barrier->pages = pages;
	barrier->view = at;
	return 0;
}

static int none_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset)
{
	return ksm_os_map_frames(barrier->at + (page << KSM_PAGE_SHIFT), count << KSM_PAGE_SHIFT, store, offset);
}

static void none_drop(struct ksm_barrier *barrier, size_t page, size_t count)
{
	ksm_os_advise(barrier->at + (page << KSM_PAGE_SHIFT), count << KSM_PAGE_SHIFT, MADV_DONTNEED);
}

static unsigned none_close(struct ksm_barrier *barrier KSM_UNUSED)
{
	return 0;
}

static int none_hold(struct ksm_barrier *barrier KSM_UNUSED, char *at KSM_UNUSED, size_t pages KSM_UNUSED)
{
	return 0;
}

static const struct ksm_barrier_ops none = {
	.name = "none",
	.kind = KSM_BARRIER_NONE,
	.create = none_create,
	.destroy = none_destroy,
	.open = none_open,
	.map = none_map,
	.drop = none_drop,
	.close = none_close,
	.hold = none_hold,
	.release = none_hold,
};

/* The linker's names. */
int __real_ksm_barrier_create_from(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, int uffd);
int __wrap_ksm_barrier_create_from(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, int uffd);

int __wrap_ksm_barrier_create_from(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, int uffd)
{
	if (!off)
		return __real_ksm_barrier_create_from(barrier, kind, uffd);
	ksm_os_close(uffd);
	memset(barrier, 0, sizeof(*barrier));
	barrier->ops = &none;
	return barrier->ops->create(barrier);
}

void soak_switch_window_off(void)
{
	off = true;
}
