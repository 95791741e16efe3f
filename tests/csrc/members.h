/* SPDX-License-Identifier: MIT */
/*
 * members.h: peers without scanners' threads, several in one process: the test does what a scanner would, step by step.
 * While one of them asks the others for descriptors, a thread of the test's answers for those.
 */
#ifndef KSM_TESTS_MEMBERS_H
#define KSM_TESTS_MEMBERS_H

#include "kit.h"

#include "member.h"

#define MEMBERS_MOST 8

static struct ksm_member *members_all[MEMBERS_MOST];
static pthread_t members_thread;
static uint32_t members_stop;

KIT void *members_serve(void *busy)
{
	while (!ksm_load_acquire(&members_stop)) {
		for (size_t i = 0; i < MEMBERS_MOST; i++)
			if (members_all[i] && members_all[i] != busy)
				ksm_exchange_serve(&members_all[i]->exchange, &members_all[i]->peer);
		ksm_os_sleep_ns(50000);
	}
	return NULL;
}

/* All of this process but `busy` (NULL: none) answer until members_end(). */
KIT void members_begin(struct ksm_member *busy)
{
	ksm_store_release(&members_stop, 0);
	CHECK_EQ(pthread_create(&members_thread, NULL, members_serve, busy), 0);
}

KIT void members_end(void)
{
	ksm_store_release(&members_stop, 1);
	pthread_join(members_thread, NULL);
}

KIT int members_try_join(const struct ksm_domain_options *options, struct ksm_member **out)
{
	struct ksm_member *member = calloc(1, sizeof(*member));
	ksm_member_init(member, options);
	members_begin(NULL);
	int r = ksm_member_join(member);
	members_end();
	if (r) {
		free(member);
		return r;
	}
	for (size_t i = 0; i < MEMBERS_MOST; i++) {
		if (!members_all[i]) {
			members_all[i] = *out = member;
			return 0;
		}
	}
	FAIL("too many members");
}

/* With a barrier asked for by name. */
KIT struct ksm_member *members_join_with(const char *name, enum ksm_barrier_kind barrier)
{
	struct ksm_domain_options options = kit_options(name);
	struct ksm_member *member = NULL;
	options.barrier = barrier;
	CHECK_EQ(members_try_join(&options, &member), 0);
	member->scanner.rest_ns = 1000000; /* nobody here is in the middle of a process_vm_writev */
	return member;
}

KIT struct ksm_member *members_join(const char *name)
{
	return members_join_with(name, KSM_BARRIER_AUTO);
}

/* Each barrier that works here, in a child of its own, in which the case runs as if it were alone. */
KIT void members_on_each_barrier(void (*body)(enum ksm_barrier_kind kind))
{
	kit_directory();
	for (size_t i = 0; ksm_barriers[i]; i++) {
		if (!kit_has_barrier(ksm_barriers[i]->kind))
			continue;
		pid_t child = kit_fork();
		if (child == 0) {
			body(ksm_barriers[i]->kind);
			fflush(NULL);
			_exit(0);
		}
		int status = harness_wait(__FILE__, __LINE__, child);
		if (status)
			FAIL("%s: wait status 0x%x", ksm_barriers[i]->name, (unsigned)status);
		printf("%s: as it should be\n", ksm_barriers[i]->name);
	}
}

KIT void members_leave(struct ksm_member *member)
{
	for (size_t i = 0; i < MEMBERS_MOST; i++)
		if (members_all[i] == member)
			members_all[i] = NULL;
	ksm_member_leave(member);
	free(member);
}

/* In the child of a fork: the parent's members are not ours. Seats are not inherited. */
KIT void members_forget(void)
{
	memset(members_all, 0, sizeof(members_all));
}

KIT int members_know(struct ksm_member *member)
{
	int r = -EAGAIN; /* they have 50 ms to answer, which is not much on a busy machine */
	members_begin(member);
	for (int attempt = 0; attempt < 20 && r == -EAGAIN; attempt++)
		r = ksm_scan_know_peers(&member->scanner);
	members_end();
	return r;
}

KIT int64_t members_sweep(struct ksm_member *member)
{
	int64_t r = -EAGAIN;
	members_begin(member);
	for (int attempt = 0; attempt < 20 && r == -EAGAIN; attempt++)
		r = ksm_scan_sweep(&member->scanner, true, NULL);
	members_end();
	return r;
}

/* Nothing is watched, for the moment, so that what is registered still is somebody else's. */
KIT void members_watch_anew(struct ksm_member *member)
{
	ksm_tracker_fini(&member->scanner.tracker);
	ksm_scan_track(&member->scanner);
}

/* ---- regions ------------------------------------------------------------------------------------------------------ */

KIT struct ksm_region *members_region(struct ksm_member *member, void *base, size_t pages)
{
	struct ksm_region *region = calloc(1, sizeof(*region));
	CHECK_EQ(ksm_region_init(region, &member->peer, &member->index, base, pages, KSM_NO_FRAME), 0);
	region->used = pages;
	ksm_merge_lock(&member->peer);
	ksm_scanner_add(&member->scanner, region);
	ksm_merge_unlock(&member->peer);
	return region;
}

/* Fresh memory for all of it, and forgotten. */
KIT void members_unmap(struct ksm_member *member, struct ksm_region *region)
{
	ksm_merge_lock(&member->peer);
	ksm_scanner_remove(&member->scanner, region);
	CHECK_EQ(ksm_os_map_anon(region->base, region->room * KSM_PAGE_SIZE, true, false, NULL), 0);
	ksm_region_forget(region, 0, region->room);
	ksm_merge_unlock(&member->peer);
	ksm_region_fini(region);
	free(region);
}

KIT struct ksm_merge_counts members_pass(struct ksm_member *member)
{
	struct ksm_merge_counts counts = {0};
	if (!member->peer.living_known)
		members_know(member);
	CHECK_EQ(ksm_scan_pass(&member->scanner, NULL, KSM_SCAN_ALL, NULL, &counts), 0);
	return counts;
}

/* Until nothing more merges. Returns pages merged. */
KIT uint64_t members_merge(struct ksm_member *member)
{
	struct ksm_merge_counts counts = {0};
	uint64_t passes;
	if (!member->peer.living_known)
		members_know(member);
	CHECK_EQ(ksm_scan_exhaust(&member->scanner, NULL, NULL, &counts, &passes), 0);
	return counts.merged;
}

KIT uint64_t members_counter(const struct ksm_member *member, enum ksm_counter counter)
{
	return ksm_counter_of(member->peer.self, counter);
}

/* ---- frames ------------------------------------------------------------------------------------------------------- */

KIT enum ksm_cell_state members_cell(const struct ksm_member *member, ksm_frameno frame)
{
	return ksm_cell_state(ksm_load_acquire(&member->peer.cells[frame]));
}

KIT uint32_t members_generation(const struct ksm_member *member, ksm_frameno frame)
{
	return ksm_cell_generation(ksm_load_acquire(&member->peer.cells[frame]));
}

/* Frames that are not FREE. */
KIT uint64_t members_frames(const struct ksm_member *member)
{
	uint64_t count = 0;
	for (uint64_t frame = 0; frame < member->peer.layout.frames; frame++)
		count += members_cell(member, (ksm_frameno)frame) != KSM_CELL_FREE;
	return count;
}

/* A frame with the bytes of `seed`, published, with one reference of this member's. */
KIT ksm_frameno members_publish(struct ksm_member *member, uint64_t seed)
{
	uint64_t page[KSM_PAGE_SIZE / 8];
	ksm_frameno frame;
	kit_fill(page, seed);
	ksm_merge_lock(&member->peer);
	CHECK_EQ(ksm_frame_alloc(&member->peer, KSM_NO_FRAME, &frame), 0);
	CHECK_EQ(ksm_frame_write(&member->peer, frame, 1, page), 0);
	ksm_frame_publish(&member->peer, frame, ksm_page_digest(page));
	ksm_merge_unlock(&member->peer);
	return frame;
}

KIT bool members_frame_is(struct ksm_member *member, ksm_frameno frame, uint64_t seed)
{
	uint64_t page[KSM_PAGE_SIZE / 8];
	CHECK_EQ(ksm_frame_read(&member->peer, frame, 1, page), 0);
	return kit_is(page, seed);
}

KIT bool members_take(struct ksm_member *member, ksm_frameno frame)
{
	ksm_merge_lock(&member->peer);
	bool taken = ksm_frame_take(&member->peer, frame, members_generation(member, frame), KSM_GENERATION_ALL);
	ksm_merge_unlock(&member->peer);
	return taken;
}

KIT void members_put(struct ksm_member *member, ksm_frameno frame)
{
	ksm_merge_lock(&member->peer);
	ksm_frame_put(&member->peer, frame, 1);
	ksm_merge_unlock(&member->peer);
}

#endif
