/* SPDX-License-Identifier: MIT */
/*
 * DOC: A change of user
 *
 * A server that starts as root and then becomes somebody else keeps its memory, and with it what is merged. But the domain
 * it joined is root's: its directory is closed to the new user, so no peer could ask it for its bitmap, and
 * newcomers of the new user meet elsewhere. So the membership moves:
 *
 *    join    the new user's domain of the same name, as a second membership beside the old one
 *    restore every page of the process that refers to a frame of the old domain becomes private again
 *    swap    under the merge lock: regions, arenas and blocks refer to the new one from here on
 *    leave   the old one
 *
 * The same happens in the child of a fork that changes its user before it does anything else (gunicorn's workers).
 *
 * USER-1. The swap happens only when no page refers to a frame of the old store and no window is open.
 * USER-2. If any step fails, the old membership stays as it is, valid, and the reason is told (KSM_EUSER).
 * USER-3. Not between the moment in which a seat has been taken for the child of a fork and the fork: the child sits down
 *         where its bits are.
 * USER-4. Only a change for good is followed: real, effective and saved user are the same. One who is somebody else for
 *         a moment (seteuid) must not show its pages to them.
 */
#include "member.h"

#include "atomic.h"
#include "error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PIECE 512 /* pages restored under one hold of the merge lock */

/* The first region at or after `base`. Merge lock held. */
static struct ksm_region *region_from(struct ksm_scanner *scanner, const char *base)
{
	struct ksm_region *region = scanner->regions;
	while (region && region->base < base)
		region = region->next;
	return region;
}

static int restore_round(struct ksm_member *member, struct ksm_restore_counts *counts)
{
	struct ksm_scanner *scanner = &member->scanner;
	struct ksm_park *park = scanner->park.ready ? &scanner->park : NULL;
	const char *base = NULL;
	ksm_pageno page = 0;
	int r = 0;
	while (!r) {
		ksm_scan_lock(scanner);
		struct ksm_region *region = region_from(scanner, base);
		size_t used = region ? ksm_load_acquire(&region->used) : 0;
		if (region && region->base != base) {
			base = region->base;
			page = 0;
		}
		if (region && page < used)
			r = ksm_restore(region, &scanner->barrier, park, page, KSM_MIN(used - page, (size_t)PIECE),
					KSM_RESTORE_PARKED, counts);
		ksm_merge_unlock(&member->peer);
		if (!region)
			break;
		page += PIECE;
		if (page >= used)
			base = region->base + 1;
	}
	return r;
}

static int restore_all(struct ksm_member *member)
{
	struct ksm_restore_counts counts = {0};
	uint64_t before;
	int r;
	bool all;
	do {
		before = counts.restored;
		counts.broken = 0;
		all = ksm_scan_rest(&member->scanner, NULL, NULL);
		r = restore_round(member, &counts);
		ksm_scan_rest_end(&member->scanner);
	} while (!r && (!all || counts.broken) && counts.restored > before);
	return r;
}

/* Merge lock held, no page refers to a frame. */
static void swap(struct ksm_member *member, struct ksm_member *fresh, struct ksm_peer *old)
{
	struct ksm_peer *peer = &member->peer;
	for (struct ksm_region *region = member->scanner.regions; region; region = region->next)
		ksm_region_forget(region, 0, region->used); /* candidates */
	memcpy(fresh->peer.self->counters, peer->self->counters, sizeof(peer->self->counters));
	ksm_store_relaxed(&fresh->peer.self->barrier, ksm_load_relaxed(&peer->self->barrier));
	ksm_store_relaxed(&fresh->peer.self->why_not, member->scanner.barrier.ops ? 0 : member->scanner.barrier.error);
	*old = *peer;
	memcpy(peer, &fresh->peer, offsetof(struct ksm_peer, merge_mutex)); /* the locks stay */
	ksm_peer_moved(old);
	ksm_peer_moved(peer);
	peer->vmas_used = old->vmas_used;
	if (peer->fds.pagemap < 0) { /* opened by the old user, and of this process all the same */
		peer->fds.pagemap = old->fds.pagemap;
		old->fds.pagemap = -1;
	}
	ksm_index_attach(&member->index, peer);
	member->user = fresh->user;
	memcpy(member->directory, fresh->directory, sizeof(member->directory));
}

static void leave_old(struct ksm_member *member, struct ksm_member *fresh, struct ksm_peer *old)
{
	struct ksm_exchange exchange = member->exchange;
	member->exchange = fresh->exchange;
	ksm_member_remember_inodes(member);
	ksm_exchange_close(&exchange, old, true);
	ksm_peer_destroy(old);
}

bool ksm_member_user_has_changed(const struct ksm_member *member)
{
	uid_t real, effective, saved;
	return !getresuid(&real, &effective, &saved) && real == effective && effective == saved &&
	       effective != member->user; /* USER-4 */
}

int ksm_member_follow_user(struct ksm_member *member)
{
	struct ksm_member *fresh;
	struct ksm_peer old;
	if (member->child.slot != KSM_NO_SLOT)
		return -EBUSY; /* USER-3 */
	fresh = ksm_os_allocate(sizeof(*fresh));
	if (!fresh)
		return -ENOMEM;
	ksm_member_init(fresh, &member->options);
	fresh->options.barrier = KSM_BARRIER_AUTO; /* ours is there already */
	int r = member->backing == KSM_BACKING_MEMFD ? ksm_member_join(fresh) : KSM_EBACKING;
	if (r)
		goto out;
	r = restore_all(member);
	ksm_merge_lock(&member->peer);
	if (!r && ksm_peer_refers(&member->peer))
		r = KSM_EUSER; /* broken pages that could not be parked */
	if (!r)
		swap(member, fresh, &old);
	ksm_merge_unlock(&member->peer);
	if (r) {
		ksm_member_leave(fresh);
		goto out;
	}
	leave_old(member, fresh, &old);
	ksm_scanner_fini(&fresh->scanner);
out:
	if (r)
		ksm_store_relaxed(&member->peer.self->why_not, KSM_EUSER);
	free(fresh);
	return r;
}
