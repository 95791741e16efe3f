/* SPDX-License-Identifier: MIT */
/*
 * An io_uring writes into memory while every thread is held. So the barrier "stop" must refuse a process that has one,
 * must say so, and must go on once it is closed.
 */
#include "soak.h"

#include "error.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PAGES 64
#define PATIENCE_S 60 /* refusals are repeated from memory for a while */

static struct ksm_domain *domain;
static struct ksm_arena *arena;
static struct ksm_block memory;

static void fill(unsigned seed)
{
	for (size_t i = 0; i < memory.nbytes; i++)
		((unsigned char *)memory.address)[i] = (unsigned char)(i % SOAK_PAGE * 31 % 255 + seed);
}

static bool is_filled(unsigned seed)
{
	for (size_t i = 0; i < memory.nbytes; i++)
		if (((unsigned char *)memory.address)[i] != (unsigned char)(i % SOAK_PAGE * 31 % 255 + seed))
			return false;
	return true;
}

static int fail(const char *what, int64_t got)
{
	fprintf(stderr, "not true: %s (%ld)\n", what, (long)got);
	return 1;
}

static uint64_t merged(void)
{
	struct ksm_arena_stats stats;
	soak_check(ksm_arena_stats(arena, &stats), "stats");
	return stats.pages_merged;
}

static int with_and_without(struct soak_ring *ring)
{
	struct ksm_report report;
	struct ksm_capabilities can;
	fill(1);
	soak_check(ksm_arena_scan(arena, &report), "scan");
	if (merged() != 0 || report.pages_merged != 0)
		return fail("nothing merges beside an io_uring", (int64_t)merged());
	if (report.why_not != KSM_EDEVICES)
		return fail("the report names devices", report.why_not);
	soak_check(ksm_domain_capabilities(domain, &can), "capabilities");
	printf("stop: %s, reason: %s\n", ksm_error_name(can.stop), can.stop_reason);
	if (can.stop != KSM_EDEVICES || can.why_not != KSM_EDEVICES)
		return fail("the capabilities name devices", can.stop);
	if (!strstr(can.stop_reason, "io_uring"))
		return fail("the reason names the ring", 0);
	soak_ring_close(ring);
	for (double begin = soak_now(); merged() == 0;) {
		if (soak_now() - begin > PATIENCE_S)
			return fail("it merges once the ring is closed", 0);
		usleep(50000);
		soak_check(ksm_arena_scan(arena, &report), "scan");
	}
	soak_check(ksm_domain_capabilities(domain, &can), "capabilities");
	if (can.stop != 0 || can.why_not != 0)
		return fail("no reason is left", can.stop);
	return is_filled(1) ? 0 : fail("every byte is right", 0);
}

int soak_devices(const struct soak_options *options)
{
	struct soak_ring ring;
	struct ksm_domain_options joining = {
		.name = "soak", .path = options->rendezvous, .barrier = KSM_BARRIER_STOP, .store_fd = -1};
	if (!soak_ring_open(&ring))
		return SOAK_NOT_HERE;
	int r = ksm_domain_attach(&joining, &domain);
	if (r == KSM_EBARRIER)
		return SOAK_NOT_HERE;
	soak_check(r, "attach");
	soak_check(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), "arena");
	soak_check(ksm_arena_alloc(arena, (size_t)PAGES * SOAK_PAGE, 0, &memory), "alloc");
	int status = with_and_without(&ring);
	soak_check(ksm_arena_free(arena, &memory), "free");
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
	return status;
}
