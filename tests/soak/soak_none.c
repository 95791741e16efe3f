/* SPDX-License-Identifier: MIT */
/*
 * The controls: a barrier whose windows keep nobody out, and a claim on a page that claims nothing. The program is
 * linked with --wrap for these functions, so that every scanner asks here for its barrier, also after a fork.
 */
#include "soak.h"

#include "barrier.h"
#include "guard.h"
#include "os.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static bool windows_off, claims_off;

/* ---- windows ----------------------------------------------------------------------------------------------- */

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

static int none_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable)
{
	return ksm_os_map_frames(barrier->at + (page << KSM_PAGE_SHIFT), count << KSM_PAGE_SHIFT, store, offset,
				 writable);
}

static int none_drop(struct ksm_barrier *barrier, size_t page, size_t count)
{
	return ksm_os_advise(barrier->at + (page << KSM_PAGE_SHIFT), count << KSM_PAGE_SHIFT, MADV_DONTNEED);
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
	.in_place = true,
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
int __real_ksm_barrier_create(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, struct ksm_park *park, int uffd);
int __wrap_ksm_barrier_create(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, struct ksm_park *park, int uffd);

int __wrap_ksm_barrier_create(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, struct ksm_park *park, int uffd)
{
	if (!windows_off)
		return __real_ksm_barrier_create(barrier, kind, park, uffd);
	if (uffd >= 0)
		ksm_os_close(uffd);
	memset(barrier, 0, sizeof(*barrier));
	barrier->ops = &none;
	return barrier->ops->create(barrier);
}

void soak_switch_window_off(void)
{
	windows_off = true;
}

/* ---- claims ------------------------------------------------------------------------------------------------ */

bool __real_ksm_guard_claim_sigsafe(struct ksm_guard *guard, size_t page, uint8_t *was);
bool __wrap_ksm_guard_claim_sigsafe(struct ksm_guard *guard, size_t page, uint8_t *was);
bool __real_ksm_guard_claim_from_sigsafe(struct ksm_guard *guard, size_t page, uint8_t byte);
bool __wrap_ksm_guard_claim_from_sigsafe(struct ksm_guard *guard, size_t page, uint8_t byte);
int __real_ksm_os_remap_sigsafe(void *from, void *to, size_t nbytes);
int __wrap_ksm_os_remap_sigsafe(void *from, void *to, size_t nbytes);

bool __wrap_ksm_guard_claim_sigsafe(struct ksm_guard *guard, size_t page, uint8_t *was)
{
	if (!claims_off)
		return __real_ksm_guard_claim_sigsafe(guard, page, was);
	*was = ksm_guard_get(guard, page);
	return KSM_GUARD_STATE(*was) != KSM_GUARD_BUSY;
}

bool __wrap_ksm_guard_claim_from_sigsafe(struct ksm_guard *guard, size_t page, uint8_t byte)
{
	return claims_off ? ksm_guard_get(guard, page) == byte : __real_ksm_guard_claim_from_sigsafe(guard, page, byte);
}

/* Between the copy and the moment it takes the page's place, others come by. With a real claim that does not matter. */
int __wrap_ksm_os_remap_sigsafe(void *from, void *to, size_t nbytes)
{
	struct timespec moment = {.tv_nsec = 20000};
	if (claims_off)
		syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &moment, NULL);
	soak_linger();
	return __real_ksm_os_remap_sigsafe(from, to, nbytes);
}

void soak_switch_claims_off(void)
{
	claims_off = true;
}
