/* SPDX-License-Identifier: MIT */
/*
 * DOC: Membership across a fork
 *
 * What member.c describes under prepare, child, parent and resume; MEMBER-1 to MEMBER-3 are kept here.
 */
#include "member.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* A userfaultfd has no inode of its own. */
static bool is_uffd(int fd)
{
	char path[48], target[48] = "";
	snprintf(path, sizeof(path), "/proc/thread-self/fd/%d", fd);
	return ksm_os_read_link(AT_FDCWD, path, target, sizeof(target)) > 0 &&
	       !strcmp(target, "anon_inode:[userfaultfd]");
}

static bool seed_is_good(const struct ksm_member *member, int seed, int fd)
{
	if (fd < 0)
		return false;
	return seed == KSM_SEED_UFFD ? is_uffd(fd)
				     : member->inodes[seed] && ksm_member_inode(fd) == member->inodes[seed];
}

/* ---- resuming ------------------------------------------------------------------------------------------ */

static int take_seed(struct ksm_member *member, enum ksm_seed seed)
{
	int fd = member->seeds_here[seed];
	member->seeds_here[seed] = -1;
	if (seed_is_good(member, seed, fd))
		return fd;
	ksm_os_close(fd); /* the program's by now: our copy of it would keep its file open */
	return -1;
}

/* Is it still the file it was? 0; KSM_ELOST: no; -EIO: nobody can say now. */
static int check_same(const struct ksm_member *member, int seed, int fd)
{
	uint64_t inode = ksm_member_inode(fd);
	return !inode ? -EIO : inode == member->inodes[seed] ? 0 : KSM_ELOST;
}

/* By path, if what is there is still the same. */
static int reopen_rendezvous(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	struct ksm_rendezvous rendezvous;
	if (peer->fds.directory >= 0 && peer->fds.file >= 0)
		return 0;
	int r = ksm_rendezvous_open(&member->options, false, &rendezvous);
	if (r)
		return r;
	r = check_same(member, KSM_SEED_DIRECTORY, rendezvous.directory);
	if (!r)
		r = check_same(member, KSM_SEED_FILE, rendezvous.file);
	if (r) {
		ksm_rendezvous_close(&rendezvous);
		return r;
	}
	ksm_os_close(peer->fds.directory);
	ksm_os_close(peer->fds.file);
	peer->fds.directory = rendezvous.directory;
	peer->fds.file = rendezvous.file;
	return 0;
}

/* From another peer. Our own slot is among the living, but nobody listens there yet. */
static int refetch(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	int control, store;
	if (peer->fds.control >= 0 && peer->fds.store >= 0)
		return 0;
	if (ksm_exchange_join(peer->fds.directory, peer->fds.file, 500, &control, &store))
		return KSM_ELOST;
	int r = check_same(member, KSM_SEED_CONTROL, control);
	if (!r)
		r = check_same(member, KSM_SEED_STORE, store);
	if (r) {
		ksm_os_close(control);
		ksm_os_close(store);
		return r;
	}
	ksm_os_close(peer->fds.control);
	ksm_os_close(peer->fds.store);
	peer->fds.control = control;
	peer->fds.store = store;
	return 0;
}

/* The bitmap's descriptor is gone, so newcomers could not get it: move to a new seat with the same bits. */
static int change_seat(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	struct ksm_seat seat, old = peer->seat;
	int r = ksm_seat_take(peer, false, &seat);
	if (r)
		return r;
	struct ksm_slot *from = peer->self;
	ksm_merge_lock(peer);
	r = ksm_seat_copy_bits(peer, &seat, &old);
	if (!r) {
		ksm_peer_sit(peer, &seat);
		memcpy(peer->self->counters, from->counters, sizeof(from->counters));
		member->inodes[KSM_SEED_BITMAP] = ksm_member_inode(seat.bitmap_fd);
	}
	ksm_merge_unlock(peer);
	ksm_fence_seqcst(); /* the new bits stand before the old lock goes */
	ksm_seat_leave(r ? &seat : &old);
	return r;
}

int ksm_member_resume(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	if (member->lost)
		return KSM_ELOST;
	peer->fds.directory = take_seed(member, KSM_SEED_DIRECTORY);
	peer->fds.file = take_seed(member, KSM_SEED_FILE);
	peer->fds.control = take_seed(member, KSM_SEED_CONTROL);
	peer->fds.store = take_seed(member, KSM_SEED_STORE);
	peer->fds.pagemap = -1;
	peer->fds.maps = -1;
	peer->seat.bitmap_fd = take_seed(member, KSM_SEED_BITMAP);
	peer->living_known = false;
	int r = reopen_rendezvous(member);
	if (!r)
		r = refetch(member);
	if (!r && peer->seat.bitmap_fd < 0)
		r = change_seat(member);
	int child = take_seed(member, KSM_SEED_CHILD);
	if (!r && child >= 0 && member->child_slot != KSM_NO_SLOT)
		ksm_peer_attach_bitmap(peer, member->child_slot, child); /* from us, until the child scans */
	else
		ksm_os_close(child);
	if (!r)
		r = ksm_member_settle_in(member, take_seed(member, KSM_SEED_UFFD));
	if (r)
		ksm_store_relaxed(&peer->self->why_not, r);
	return r;
}

/* ---- fork ---------------------------------------------------------------------------------------------- */

int ksm_member_prepare_child(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	int *seeds = member->exchange.seeds;
	seeds[KSM_SEED_DIRECTORY] = peer->fds.directory;
	seeds[KSM_SEED_FILE] = peer->fds.file;
	seeds[KSM_SEED_CONTROL] = peer->fds.control;
	seeds[KSM_SEED_STORE] = peer->fds.store;
	seeds[KSM_SEED_BITMAP] = peer->seat.bitmap_fd;
	seeds[KSM_SEED_UFFD] = member->scanner.barrier.uffd;
	int r = ksm_seat_take(peer, true, &member->child);
	if (!r) {
		r = ksm_seat_make_room(peer, &member->child, ksm_load_acquire(&peer->seat.bitmap->high));
		if (r)
			ksm_seat_leave(&member->child);
	}
	if (r)
		member->child = (struct ksm_seat){.slot = KSM_NO_SLOT, .bitmap_fd = -1};
	member->child_slot = member->child.slot;
	/* Without a child's bitmap our own stands in for it: seeds travel in order, without gaps. */
	seeds[KSM_SEED_CHILD] = r ? peer->seat.bitmap_fd : member->child.bitmap_fd;
	member->inodes[KSM_SEED_CHILD] = ksm_member_inode(seeds[KSM_SEED_CHILD]);
	return r;
}

void ksm_member_fetch_seeds(struct ksm_member *member)
{
	int fds[KSM_OS_FDS_MAX];
	int n = ksm_exchange_seeds(&member->exchange, fds);
	for (int i = 0; i < n; i++) {
		if (i < KSM_SEEDS)
			member->seeds[i] = fds[i];
		else
			ksm_os_close(fds[i]);
	}
	/* The scanner goes on meanwhile: a window that fails has made a new one, and the old one's number may be anything. */
	int *uffd = &member->seeds[KSM_SEED_UFFD];
	if (!seed_is_good(member, KSM_SEED_UFFD, *uffd)) {
		ksm_os_close(*uffd);
		*uffd = -1;
	}
	for (int seed = 0; seed < KSM_SEED_UFFD && n <= 0; seed++) /* nobody answers: another network namespace */
		if (member->exchange.seeds[seed] >= 0)
			member->seeds[seed] = ksm_os_reopen_from(member->tid, member->exchange.seeds[seed],
								 seed == KSM_SEED_DIRECTORY);
}

void ksm_member_fork_prepare(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	if (member->child.slot != KSM_NO_SLOT && ksm_seat_copy_bits(peer, &member->child, &peer->seat)) {
		ksm_seat_unmap(&member->child);
		member->child_slot = KSM_NO_SLOT;
	}
	if (member->child.slot == KSM_NO_SLOT) {
		if (member->joined)
			ksm_count(peer->self, KSM_FAILURES, 1);
		if (peer->control && ksm_peer_refers(peer))
			ksm_store_release(&peer->control->no_sweep, 1); /* MEMBER-2 */
		return;
	}
	struct ksm_slot *slot = ksm_peer_slot(peer, member->child.slot);
	static const enum ksm_counter gauges[] = {KSM_PAGES_MERGED,    KSM_PAGES_BROKEN, KSM_PAGES_ZERO,
						  KSM_FRAMES_REFERRED, KSM_VMAS_USED,    KSM_VMA_BUDGET};
	for (size_t i = 0; i < KSM_COUNT(gauges); i++)
		ksm_count_set(slot, gauges[i], ksm_counter_of(peer->self, gauges[i]));
	ksm_fence_seqcst();
}

/* The scanner's private memory, gone with it (in the child it was never inherited). */
static void forget_scanner(struct ksm_member *member, bool mapped)
{
	struct ksm_scanner *scanner = &member->scanner;
	if (mapped)
		ksm_merger_fini(&scanner->merger);
	scanner->merger.buffer = NULL;
	ksm_barrier_forget(&scanner->barrier, mapped);
	scanner->tracker.uffd = -1;
	scanner->park.ready = false;
	scanner->park.tasks = -1;
	ksm_exchange_init(&member->exchange);
	member->peer.fds = (struct ksm_descriptors){-1, -1, -1, -1, -1, -1};
	member->peer.living_known = false;
}

void ksm_member_forget_table(struct ksm_member *member)
{
	forget_scanner(member, true);
	ksm_peer_forget_descriptors(&member->peer, true);
	member->peer.seat.bitmap_fd = -1;
}

void ksm_member_fork_parent(struct ksm_member *member)
{
	ksm_member_forget_table(member);
	ksm_seat_unmap(&member->child); /* the child's copy of the mapping keeps its lock */
}

void ksm_member_fork_child(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	forget_scanner(member, false);
	ksm_peer_forget_descriptors(peer, false);
	ksm_merge_lock_renew(peer);
	if (member->child.slot == KSM_NO_SLOT) {
		member->lost = true;
		ksm_member_drop_seeds(member, true);
		ksm_peer_sit_nowhere(peer);
		return;
	}
	ksm_os_close(member->seeds[KSM_SEED_UFFD]); /* it acts on the parent's memory */
	ksm_os_close(member->seeds[KSM_SEED_BITMAP]);
	member->seeds[KSM_SEED_UFFD] = -1;
	member->seeds[KSM_SEED_BITMAP] = member->seeds[KSM_SEED_CHILD];
	member->inodes[KSM_SEED_BITMAP] = member->inodes[KSM_SEED_CHILD];
	member->seeds[KSM_SEED_CHILD] = -1;
	member->child.bitmap_fd = -1;
	ksm_seat_keep(peer, &member->child);
	ksm_peer_sit(peer, &member->child);
	peer->self->pid = (int32_t)getpid();
	member->child = (struct ksm_seat){.slot = KSM_NO_SLOT, .bitmap_fd = -1};
}

void ksm_member_started(struct ksm_member *member, bool resumes, int error)
{
	bool again = resumes && error && error != KSM_ELOST;
	if (!again)
		ksm_member_drop_seeds(member, resumes);
	if (!resumes || !error)
		return;
	member->lost = !again;
	ksm_member_forget_table(member);
	ksm_merge_lock(&member->peer);
	ksm_count(member->peer.self, KSM_FAILURES, 1);
	ksm_store_relaxed(&member->peer.self->why_not, error);
	ksm_merge_unlock(&member->peer);
}

void ksm_member_drop_seeds(struct ksm_member *member, bool ours)
{
	for (int seed = 0; seed < KSM_SEEDS; seed++) {
		if (ours && seed_is_good(member, seed, member->seeds[seed]))
			ksm_os_close(member->seeds[seed]);
		member->seeds[seed] = -1;
	}
}
