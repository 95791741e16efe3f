/* SPDX-License-Identifier: MIT */
/*
 * DOC: Membership
 *
 * Joining happens in the scanner's thread, which has a descriptor table of its own: the program can neither close
 * our descriptors nor get their numbers for files of its own, which our writes would then reach.
 *
 *    join     lock ▸ does anybody live here? ▸ yes: get control and store from a peer; no: create them ▸
 *             take a seat ▸ listen ▸ unlock
 *
 * A fork ends the scanner (a living native thread makes Python warn at every fork), and its table ends with it. So:
 *
 *    prepare  the scanner takes a seat for the child and hands the seeds (the descriptors that cannot be had again
 *             otherwise) to the forking thread; it ends; under the merge lock the child's bits become a copy of ours
 *    child    is born with its lock held, its bits set; it sits down
 *    parent   unmaps the child's lock page: from here on only the child keeps its seat
 *    resume   the next scanner, on either side, starts from the seeds, after their inodes have been checked; what
 *             is missing comes from the rendezvous and a peer
 *
 * MEMBER-1. From before the fork until the child is gone, the child's references are covered by bits of a peer
 *           that is alive: the parent's while the merge lock is held, then the child's own.
 * MEMBER-2. If no seat can be had for a child, nothing in the domain is ever freed again (no_sweep): memory is lost
 *           until its last process ends, bytes are not. The child is a member without a seat and merges nothing.
 * MEMBER-3. A descriptor that comes from the program's table is used only if it still is the file it was.
 * MEMBER-4. A scanner that could not be started again, for want of memory or descriptors, is tried again by the next
 *           call: until then the seeds stay in the program's table. Only KSM_ELOST is for good.
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
#include <sys/stat.h>
#include <unistd.h>

#define JOIN_LOCK_MS 10000
#define ANSWER_MS 5000

void ksm_member_init(struct ksm_member *member, const struct ksm_domain_options *options)
{
	memset(member, 0, sizeof(*member));
	if (options)
		member->options = *options;
	snprintf(member->name, sizeof(member->name), "%s", options && options->name ? options->name : "default");
	member->options.name = member->name;
	if (options && options->path) {
		snprintf(member->base, sizeof(member->base), "%s", options->path);
		member->options.path = member->base;
	}
	if (!options)
		member->options.store_fd = -1;
	ksm_peer_init(&member->peer);
	ksm_exchange_init(&member->exchange);
	member->scanner.tracker.uffd = -1; /* until there is a scanner */
	for (size_t i = 0; i < KSM_SEEDS; i++)
		member->seeds[i] = member->seeds_here[i] = -1;
	if (member->options.backing == KSM_BACKING_SHM)
		member->seeds[KSM_SEED_STORE] = member->options.store_fd;
	member->child = (struct ksm_seat){.slot = KSM_NO_SLOT, .bitmap_fd = -1};
}

/* ---- descriptors --------------------------------------------------------------------------------------- */

uint64_t ksm_member_inode(int fd)
{
	struct stat stat;
	if (fd < 0 || ksm_os_stat(fd, &stat))
		return 0;
	return (uint64_t)stat.st_ino ^ (uint64_t)stat.st_dev * 0x9e3779b97f4a7c15ull;
}

int ksm_member_own_table(struct ksm_member *member)
{
	member->tid = ksm_os_tid();
	int r = ksm_os_unshare_files();
	if (r)
		return r;
	for (size_t i = 0; i < KSM_SEEDS; i++)
		member->seeds_here[i] = ksm_os_lift(member->seeds[i]);
	for (unsigned next = 0;;) { /* close the gaps between the seeds, in order */
		unsigned keep = UINT32_MAX;
		for (size_t i = 0; i < KSM_SEEDS; i++)
			if (member->seeds_here[i] >= 0 && (unsigned)member->seeds_here[i] >= next)
				keep = KSM_MIN(keep, (unsigned)member->seeds_here[i]);
		r = ksm_os_close_range(next, keep == UINT32_MAX ? keep : keep - 1);
		if ((r && r != -EINVAL) || keep == UINT32_MAX)
			break;
		next = keep + 1;
	}
	/* What writes to standard error in this thread must not meet one of our files. */
	while (!r) {
		int fd = ksm_os_open(AT_FDCWD, "/dev/null", O_RDWR, 0);
		if (fd < 0)
			return fd;
		if (fd > STDERR_FILENO) {
			ksm_os_close(fd);
			break;
		}
	}
	return r;
}

void ksm_member_remember_inodes(struct ksm_member *member)
{
	member->inodes[KSM_SEED_DIRECTORY] = ksm_member_inode(member->peer.fds.directory);
	member->inodes[KSM_SEED_FILE] = ksm_member_inode(member->peer.fds.file);
	member->inodes[KSM_SEED_CONTROL] = ksm_member_inode(member->peer.fds.control);
	member->inodes[KSM_SEED_STORE] = ksm_member_inode(member->peer.fds.store);
	member->inodes[KSM_SEED_BITMAP] = ksm_member_inode(member->peer.seat.bitmap_fd);
}

/* ---- joining ------------------------------------------------------------------------------------------- */

static void object_name(const uint8_t id[16], char out[64])
{
	int n = snprintf(out, 64, "/ksmalloc-%u-", (unsigned)geteuid());
	for (size_t i = 0; i < 16; i++)
		n += snprintf(out + n, 64 - (size_t)n, "%02x", id[i]);
}

static void unlink_object(const uint8_t id[16])
{
	char path[80] = "/dev/shm";
	object_name(id, path + strlen(path));
	ksm_os_unlink(AT_FDCWD, path, false);
}

static int open_store(struct ksm_member *member)
{
	if (member->backing == KSM_BACKING_MEMFD)
		return ksm_os_memfd("ksmalloc store");
	int fd = member->seeds_here[KSM_SEED_STORE];    /* the caller's object: it came with the table */
	return fd >= 0 ? ksm_os_duplicate(fd) : -EBADF; /* what fails closes its own, and the next try needs it */
}

/* Nobody lives there: a new store, new tables, a new id. Join lock held. */
static int create(struct ksm_member *member, const struct ksm_rendezvous *rendezvous, const struct ksm_domain_file *old)
{
	uint64_t nbytes = member->options.capacity_bytes ? member->options.capacity_bytes : ksm_os_memory_bytes();
	uint64_t frames = KSM_MAX(nbytes >> KSM_PAGE_SHIFT, (uint64_t)KSM_CHUNK);
	struct ksm_peer *peer = &member->peer;
	uint8_t id[16];
	frames = KSM_MIN(frames, (uint64_t)KSM_NO_FRAME - KSM_CHUNK);
	if (old && old->backing == KSM_BACKING_SHM)
		unlink_object(old->id); /* frames of a domain whose last peer was killed */
	member->backing = (uint32_t)member->options.backing;
	int r = ksm_os_random(id, sizeof(id));
	if (member->backing == KSM_BACKING_SHM)
		memcpy(id, member->options.store_id, sizeof(id));
	if (!r)
		r = ksm_rendezvous_clear(rendezvous, false);
	if (r)
		return r;
	int control = ksm_os_memfd("ksmalloc control");
	if (control < 0)
		return control;
	peer->fds.store = open_store(member);
	r = peer->fds.store < 0 ? peer->fds.store : ksm_store_prepare(peer->fds.store, frames, member->backing);
	if (!r)
		r = ksm_peer_create_control(peer, control, frames, member->backing, id);
	if (!r)
		return ksm_rendezvous_write(rendezvous->file, id, member->backing);
	ksm_os_close(control);
	return r;
}

/* Somebody lives there: control and store come from a peer. */
static int enter(struct ksm_member *member, const struct ksm_rendezvous *rendezvous, const struct ksm_domain_file *head)
{
	struct ksm_peer *peer = &member->peer;
	int control, store;
	if (head->magic != KSM_MAGIC)
		return KSM_ECORRUPT;
	if (head->version != KSM_LAYOUT_VERSION || head->layout != ksm_layout_hash())
		return KSM_ELAYOUT;
	if (member->options.backing != (int)head->backing)
		return KSM_EBACKING;
	int r = ksm_exchange_join(rendezvous->directory, rendezvous->file, ANSWER_MS, &control, &store);
	if (r)
		return r;
	peer->fds.store = store;
	r = ksm_peer_map_control(peer, control);
	if (r) {
		ksm_os_close(control);
		return r;
	}
	r = ksm_store_check(store, peer->layout.frames, head->backing);
	if (!r && memcmp(peer->id, head->id, sizeof(head->id)))
		r = KSM_ECORRUPT;
	member->backing = head->backing;
	return r;
}

static struct ksm_park *park_of(struct ksm_member *member)
{
	return member->scanner.park.ready ? &member->scanner.park : NULL;
}

static int make_barrier(struct ksm_member *member, int uffd)
{
	struct ksm_scanner *scanner = &member->scanner;
	struct ksm_barrier fresh;
	int r = ksm_barrier_create(&fresh, (enum ksm_barrier_kind)member->options.barrier, &scanner->park, uffd);
	ksm_scanner_use(scanner, &fresh);
	struct ksm_slot *self = member->peer.self;
	ksm_store_relaxed(&self->barrier, r ? (int32_t)KSM_BARRIER_NONE : (int32_t)scanner->barrier.ops->kind);
	ksm_store_relaxed(&self->why_not, r);
	if (r && member->options.barrier != KSM_BARRIER_AUTO && !member->joined)
		return KSM_EBARRIER;
	return 0; /* after a fork it may be gone: then nothing merges, and the process lives on */
}

void ksm_member_retry_barrier(struct ksm_member *member)
{
	struct ksm_scanner *scanner = &member->scanner;
	if (!scanner->park.ready) {
		ksm_park_create(&scanner->park);
		scanner->merger.park = park_of(member);
	}
	if (!scanner->barrier.ops)
		make_barrier(member, -1);
}

/* Sit down, get ready to scan, listen. */
int ksm_member_settle_in(struct ksm_member *member, int uffd)
{
	struct ksm_peer *peer = &member->peer;
	peer->fds.pagemap = ksm_os_open(AT_FDCWD, "/proc/self/pagemap", O_RDONLY, 0);
	peer->fds.maps = ksm_os_open(AT_FDCWD, "/proc/self/maps", O_RDONLY, 0);
	ksm_park_create(&member->scanner.park); /* without it broken pages stay broken */
	ksm_scan_track(&member->scanner);
	int r = make_barrier(member, uffd);
	if (!r)
		r = ksm_merger_init(&member->scanner.merger, peer, &member->index, &member->scanner.barrier,
				    park_of(member));
	if (!r)
		r = ksm_exchange_open(&member->exchange, peer);
	if (r && member->joined && member->scanner.merger.buffer)
		r = 0; /* its rendezvous was removed: nobody finds us any more, but those who know us stay */
	if (!r)
		ksm_count_set(peer->self, KSM_VMA_BUDGET, member->scanner.merger.vma_budget);
	return r;
}

static int join_locked(struct ksm_member *member, const struct ksm_rendezvous *rendezvous)
{
	struct ksm_domain_file head;
	struct ksm_seat seat;
	int known = ksm_rendezvous_read(rendezvous->file, &head);
	if (known && known != -ENODATA)
		return known;
	int r = ksm_rendezvous_is_inhabited(rendezvous->file);
	if (r > 0)
		r = known ? KSM_ECORRUPT : enter(member, rendezvous, &head);
	else if (r == 0)
		r = create(member, rendezvous, known || head.magic != KSM_MAGIC ? NULL : &head);
	if (!r)
		r = ksm_seat_take(&member->peer, false, &seat);
	if (r)
		return r;
	ksm_peer_sit(&member->peer, &seat);
	ksm_index_attach(&member->index, &member->peer);
	ksm_scanner_init(&member->scanner, &member->peer, &member->index, &member->exchange);
	return ksm_member_settle_in(member, -1);
}

/* Sockets and descriptors have their names below /proc (os_socket.c): without it -ENOENT would come from anywhere. */
static int check_proc(void)
{
	int fd = ksm_os_open(AT_FDCWD, "/proc/thread-self/fd", O_RDONLY | O_DIRECTORY, 0);
	ksm_os_close(fd);
	return fd == -ENOENT ? KSM_ENOPROC : fd < 0 ? fd : 0;
}

int ksm_member_join(struct ksm_member *member)
{
	int proc = check_proc();
	if (proc)
		return proc;
	for (int attempt = 0; attempt < 16; attempt++) {
		struct ksm_rendezvous rendezvous;
		int lock, r = ksm_rendezvous_enter(&member->options, true, JOIN_LOCK_MS, &rendezvous, &lock);
		if (r)
			return r == -EAGAIN ? KSM_ENOPEER : r; /* whoever is joining lives, and does not get on */
		member->peer.fds.directory = rendezvous.directory;
		member->peer.fds.file = rendezvous.file;
		memcpy(member->directory, rendezvous.path, sizeof(member->directory));
		r = join_locked(member, &rendezvous);
		ksm_rendezvous_unlock(lock);
		if (!r) {
			ksm_member_remember_inodes(member);
			member->user = geteuid();
			member->joined = true;
			ksm_os_close(member->seeds_here[KSM_SEED_STORE]); /* the caller's: we have our own by now */
			member->seeds_here[KSM_SEED_STORE] = -1;
			return 0;
		}
		ksm_scanner_fini(&member->scanner);
		ksm_exchange_close(&member->exchange, &member->peer, true);
		ksm_peer_destroy(&member->peer);
		if (r != -EAGAIN) /* the last peer left between our looking and asking */
			return r;
	}
	return KSM_ENOPEER;
}

/* The join lock, answering whoever holds it and asks us meanwhile. */
static int lock_and_serve(struct ksm_member *member, int file)
{
	uint64_t deadline = ksm_os_now_ns() + JOIN_LOCK_MS * 1000000ull;
	int r;
	while ((r = ksm_os_lock_try(file, KSM_LOCK_JOIN)) == -EAGAIN && ksm_os_now_ns() < deadline) {
		ksm_exchange_serve(&member->exchange, &member->peer);
		ksm_os_sleep_ns(500000);
	}
	return r;
}

void ksm_member_leave(struct ksm_member *member)
{
	struct ksm_peer *peer = &member->peer;
	uint8_t id[16];
	int file = peer->fds.file;
	bool named = member->backing == KSM_BACKING_SHM && file >= 0;
	if (named)
		named = lock_and_serve(member, file) == 0;
	memcpy(id, peer->id, sizeof(id));
	peer->fds.file = -1; /* stays open until the lock is given back */
	ksm_scanner_fini(&member->scanner);
	ksm_exchange_close(&member->exchange, peer, true);
	ksm_peer_destroy(peer);
	if (named && ksm_rendezvous_is_inhabited(file) == 0)
		unlink_object(id);
	ksm_os_close(file);
	member->joined = false;
}
