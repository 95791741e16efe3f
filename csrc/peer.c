/* SPDX-License-Identifier: MIT */
/*
 * DOC: Peers
 *
 * This file owns a process's seat in a domain (slot, liveness lock, bitmap) and its view of the others.
 *
 * A peer is alive exactly as long as somebody holds the lock on its slot's byte of the domain file. The lock is
 * an open file description's, and the description is kept by a mapping, not by a descriptor: it survives a
 * program that closes everything, is not inherited by fork (MADV_DONTFORK), and goes with death and exec,
 * after the last of the process's threads has left user space. Pids are for people.
 *
 *    A's bitmap   0 1 1 0 0 1 …   written by A only, sealed: others can map it for reading at most
 *    B's bitmap   0 1 0 0 0 0 …
 *    in use  =    0 1 1 0 0 1 …   the OR over the living: there is no shared count that a death could corrupt
 *
 * REFS-1. Bit f of a peer's bitmap is set before any of its mappings refers to frame f, and cleared only when no
 *         page of the process is mapped to f (counts[f] = 0). A page broken by a write still counts: its
 *         mapping still refers to the frame.
 * REFS-2. Bits, counts and mappings of frames change under the merge lock only.
 * REFS-3. The peer epoch is raised after the liveness lock is held and before the first bit is set: a sweep that
 *         did not list this peer sees the epoch move, and undoes. A seat whose bits are copied from another's (the child
 *         of a fork) raises it once more, after the copy: a sweep that read the copy half-made undoes too, even
 *         if the original's bit is gone by the time it is read.
 * REFS-4. bitmap.high is raised before a bit above it is set; readers take what lies beyond for zeros (reading a
 *         hole of a memory file would allocate it).
 * REFS-8. Below high there are no holes, of busy bits neither: the owner makes sure of their pages first, and a reader
 *         need not (SPARSE-1). Where there is no memory for it the bit is not set, and the frame not referred to.
 * REFS-5. A bitmap that is not at hand counts as all ones: nothing is freed and nothing allocated until it is.
 *
 * REFS-6. Which incarnation lives in a slot is said by the kernel's lock table alone: the offset of a second lock of the
 *         same description is its nonce, and the sealed header of its bitmap holds the same. What the slot says is for
 *         those who look; a nonce put back there makes no dead peer's bitmap pass for a living one's.
 * REFS-7. A peer that writes a frame or frees it has its busy bit set from before the frame's cell names it until after
 *         the bytes are there, or gone, and the cell says so. Whoever takes a frame reads the others' busy bits after its
 *         own bit is set: of the two, at least one sees the other, whatever somebody scribbles over the cell.
 *
 * What others wrote is never trusted: slot numbers and epochs are bounded, bitmaps are believed only as far as
 * their own sealed header and the lock table of the kernel go.
 */
#include "peer.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SEALS_SIZE (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* ---- the merge lock ------------------------------------------------------------------------------ */

void ksm_merge_lock(struct ksm_peer *peer)
{
	pthread_mutex_lock(&peer->merge_next);
	pthread_mutex_lock(&peer->merge_mutex);
	pthread_mutex_unlock(&peer->merge_next);
}

bool ksm_merge_try_lock(struct ksm_peer *peer)
{
	if (pthread_mutex_trylock(&peer->merge_next))
		return false;
	bool locked = !pthread_mutex_trylock(&peer->merge_mutex);
	pthread_mutex_unlock(&peer->merge_next);
	return locked;
}

void ksm_merge_unlock(struct ksm_peer *peer)
{
	pthread_mutex_unlock(&peer->merge_mutex);
}

void ksm_merge_lock_renew(struct ksm_peer *peer)
{
	ksm_merge_unlock(peer);                       /* held by this thread since before the fork */
	pthread_mutex_init(&peer->merge_mutex, NULL); /* others may have been waiting for it, in the parent */
	pthread_mutex_init(&peer->merge_next, NULL);
}

void ksm_peer_init(struct ksm_peer *peer)
{
	memset(peer, 0, sizeof(*peer));
	peer->fds = (struct ksm_descriptors){-1, -1, -1, -1, -1, -1};
	peer->seat.slot = KSM_NO_SLOT;
	peer->seat.bitmap_fd = -1;
	pthread_mutex_init(&peer->merge_mutex, NULL);
	pthread_mutex_init(&peer->merge_next, NULL);
}

/* ---- the control memfd --------------------------------------------------------------------------- */

size_t ksm_peer_table_bytes(void)
{
	return ksm_page_round_up(KSM_PEERS_MAX * (sizeof(ksm_slotno) + sizeof(struct ksm_other)));
}

static int map_others(struct ksm_peer *peer)
{
	void *table;
	int r = ksm_os_map_table(ksm_peer_table_bytes(), &table);
	if (r)
		return r;
	peer->living = table; /* before the others: while few live, and in low slots, both are on one page */
	peer->others = (struct ksm_other *)(peer->living + KSM_PEERS_MAX);
	return 0;
}

size_t ksm_peer_counts_bytes(const struct ksm_peer *peer)
{
	uint64_t longest =
		KSM_MAX(peer->layout.checks - peer->layout.cells, peer->layout.candidates - peer->layout.index);
	return ksm_page_round_up(peer->layout.frames * sizeof(uint16_t)) + ksm_page_round_up(ksm_pages_of(longest));
}

static int map_counts(struct ksm_peer *peer)
{
	void *counts;
	int r = ksm_os_map_table(ksm_peer_counts_bytes(peer), &counts);
	if (r)
		return r;
	peer->counts = counts;
	peer->book.far = (uint8_t *)counts + ksm_page_round_up(peer->layout.frames * sizeof(uint16_t));
	return 0;
}

static void place(struct ksm_peer *peer, void *map)
{
	char *base = map;
	peer->control = map;
	peer->chunks = (uint64_t *)(base + peer->layout.chunks);
	peer->cells = (uint64_t *)(base + peer->layout.cells);
	peer->checks = (uint32_t *)(base + peer->layout.checks);
	peer->slots_there = (struct ksm_sparse){base + peer->layout.slots, &peer->book, KSM_SPARSE_SLOTS};
	peer->cells_there = ksm_peer_sparse(peer, KSM_SPARSE_CELLS, peer->layout.cells);
	peer->checks_there = ksm_peer_sparse(peer, KSM_SPARSE_CHECKS, peer->layout.checks);
}

void ksm_peer_moved(struct ksm_peer *peer)
{
	place(peer, peer->control);
}

static int map_all(struct ksm_peer *peer, int control)
{
	void *map;
	int r = ksm_os_map_shared(control, peer->layout.total, true, &map);
	if (r)
		return r;
	ksm_os_advise(map, peer->layout.total, MADV_DONTDUMP);
	place(peer, map);
	r = ksm_os_populate(map, sizeof(struct ksm_control)); /* SPARSE-1 */
	if (!r)
		r = ksm_os_populate(peer->chunks, peer->layout.cells - peer->layout.chunks);
	if (!r)
		r = map_counts(peer);
	if (!r)
		r = map_others(peer);
	if (r) {
		ksm_os_unmap(map, peer->layout.total);
		peer->control = NULL;
	}
	return r;
}

int ksm_peer_create_control(struct ksm_peer *peer, int control, uint64_t frames, uint32_t backing, const uint8_t id[16])
{
	ksm_layout_compute(frames, &peer->layout);
	int r = ksm_os_truncate(control, peer->layout.total);
	if (!r)
		r = ksm_os_seal(control, SEALS_SIZE);
	if (!r)
		r = map_all(peer, control);
	if (r)
		return r;
	struct ksm_control *c = peer->control;
	c->magic = KSM_MAGIC;
	c->version = KSM_LAYOUT_VERSION;
	c->layout = ksm_layout_hash();
	memcpy(peer->id, id, sizeof(peer->id));
	memcpy(c->id, id, sizeof(c->id));
	c->frames = frames;
	c->backing = backing;
	c->index_levels = c->candidate_levels = 1;
	c->changes = c->settle_seq = 1; /* a peer that has not looked yet says 0 */
	peer->fds.control = control;
	return 0;
}

int ksm_peer_map_control(struct ksm_peer *peer, int control)
{
	struct ksm_control head;
	struct stat stat;
	int r = ksm_os_stat(control, &stat);
	if (!r && (!S_ISREG(stat.st_mode) || !ksm_os_has_fixed_size(control)))
		r = KSM_ECORRUPT; /* whatever it is, reading it might take for ever */
	if (!r)
		r = ksm_os_pread(control, &head, sizeof(head), 0);
	if (r)
		return r == -ENODATA ? KSM_ECORRUPT : r;
	if (head.magic != KSM_MAGIC)
		return KSM_ECORRUPT;
	if (head.version != KSM_LAYOUT_VERSION || head.layout != ksm_layout_hash())
		return KSM_ELAYOUT;
	if (head.frames == 0 || head.frames >= KSM_NO_FRAME)
		return KSM_ECORRUPT;
	ksm_layout_compute(head.frames, &peer->layout);
	if ((uint64_t)stat.st_size != peer->layout.total)
		return KSM_ECORRUPT;
	memcpy(peer->id, head.id, sizeof(peer->id));
	r = map_all(peer, control);
	if (!r)
		peer->fds.control = control;
	return r;
}

struct ksm_sparse ksm_peer_sparse(const struct ksm_peer *peer, enum ksm_sparse_table table, uint64_t offset)
{
	return (struct ksm_sparse){(char *)peer->control + offset, peer->slots_there.book, table};
}

struct ksm_slot *ksm_peer_slot(const struct ksm_peer *peer, ksm_slotno slot)
{
	if (slot >= KSM_PEERS_MAX)
		return NULL;
	char *at = (char *)peer->control + peer->layout.slots + (size_t)slot * KSM_SLOT_SIZE;
	bool there = !ksm_sparse_reach(&peer->slots_there, at) &&
		     !ksm_sparse_reach(&peer->slots_there, at + KSM_SLOT_SIZE - 1); /* it may lie on two pages */
	return there ? (struct ksm_slot *)at : NULL;
}

void ksm_peer_forget_descriptors(struct ksm_peer *peer, bool mappings_stay)
{
	for (size_t i = 0; i < KSM_PEERS_MAX; i++) {
		if (!peer->others[i].bitmap)
			continue;
		peer->others[i].fd = -1;
		if (!mappings_stay)
			peer->others[i].bitmap = NULL;
	}
}

/* ---- the others ---------------------------------------------------------------------------------- */

static void forget(struct ksm_peer *peer, ksm_slotno slot, bool dead)
{
	struct ksm_other *other = &peer->others[slot];
	if (!other->bitmap)
		return;
	uint64_t high = KSM_MIN(ksm_load_acquire(&other->bitmap->high), peer->layout.frames);
	for (uint64_t frame = 0; dead && frame < high; frame += 64)
		if (other->bits[frame / 64])
			ksm_chunk_mark(peer, (ksm_frameno)frame);
	munmap((void *)other->bitmap, ksm_bitmap_bytes(peer->layout.frames));
	ksm_os_close(other->fd);
	other->bitmap = NULL;
	other->fd = -1;
}

void ksm_peer_destroy(struct ksm_peer *peer)
{
	if (peer->others)
		for (ksm_slotno slot = 0; slot < KSM_PEERS_MAX; slot++)
			forget(peer, slot, false);
	ksm_seat_leave(&peer->seat);
	if (peer->living)
		ksm_os_unmap(peer->living, ksm_peer_table_bytes());
	if (peer->counts)
		ksm_os_unmap(peer->counts, ksm_peer_counts_bytes(peer));
	if (peer->control)
		munmap(peer->control, peer->layout.total);
	int *fds = (int *)&peer->fds;
	for (size_t i = 0; i < sizeof(peer->fds) / sizeof(int); i++)
		ksm_os_close(fds[i]);
	ksm_peer_init(peer);
}

bool ksm_peer_has_bitmap(const struct ksm_peer *peer, ksm_slotno slot)
{
	const struct ksm_other *other = &peer->others[slot];
	return slot == peer->seat.slot || (other->bitmap && other->nonce == other->incarnation);
}

void ksm_peer_count_vmas(struct ksm_peer *peer, int64_t delta)
{
	int64_t used = peer->vmas_used + delta;
	ksm_store_relaxed(&peer->vmas_used, used); /* the scanner reads it without the lock, for its budget */
	ksm_count_set(peer->self, KSM_VMAS_USED, (uint64_t)KSM_MAX(used, 0));
}

bool ksm_peer_refers(const struct ksm_peer *peer)
{
	uint64_t high = ksm_load_relaxed(&peer->seat.bitmap->high);
	for (uint64_t word = 0; word < (KSM_MIN(high, peer->layout.frames) + 63) / 64; word++)
		if (peer->seat.bits[word])
			return true;
	return false;
}

/* Whoever sat there is dead. If we never saw its bitmap, any frame may have been its alone. */
static void bury(struct ksm_peer *peer, ksm_slotno slot)
{
	struct ksm_other *other = &peer->others[slot];
	const struct ksm_slot *dead = ksm_peer_slot(peer, slot);
	uint32_t epoch = dead ? ksm_load_acquire(&dead->epoch) : 0;
	if (dead && other->buried == epoch)
		return;
	other->buried = epoch; /* 0 if its slot cannot be read: then it is buried again when it can */
	ksm_chunk_mark_all(peer);
}

int ksm_peer_refresh(struct ksm_peer *peer)
{
	bool alive[KSM_PEERS_MAX] = {false};
	peer->living_known = false;
	peer->living_count = 0;
	peer->missing = KSM_NO_SLOT;
	peer->living_epoch = ksm_load_seqcst(&peer->control->peer_epoch); /* before the list: REFS-3 */
	for (uint64_t from = 0; from < KSM_PEERS_MAX;) {
		int64_t at = ksm_os_lock_find(peer->fds.file, KSM_LOCK_LIVENESS + from, KSM_PEERS_MAX - from);
		if (at == -ENOENT)
			break;
		if (at < 0)
			return (int)at;
		ksm_slotno slot = (ksm_slotno)((uint64_t)at - KSM_LOCK_LIVENESS);
		from = slot + 1u;
		alive[slot] = true;
		peer->living[peer->living_count++] = slot;
		int64_t nonce = ksm_peer_incarnation(peer, slot);
		if (nonce < 0)
			return (int)nonce;
		peer->others[slot].incarnation = (uint64_t)nonce;
		if (!ksm_peer_has_bitmap(peer, slot)) {
			forget(peer, slot, true); /* another incarnation's */
			peer->missing = slot;
		}
	}
	if (peer->seat.slot < KSM_PEERS_MAX && !alive[peer->seat.slot])
		peer->living[peer->living_count++] = peer->seat.slot;
	for (ksm_slotno slot = 0; slot < KSM_PEERS_MAX; slot++)
		if (!alive[slot])
			forget(peer, slot, true);
	uint32_t high = KSM_MIN(ksm_load_acquire(&peer->control->slots_high), (uint32_t)KSM_PEERS_MAX);
	for (ksm_slotno slot = 0; slot < high; slot++)
		if (!alive[slot] && slot != peer->seat.slot)
			bury(peer, slot);
	peer->living_known = peer->missing == KSM_NO_SLOT;
	return peer->living_known ? 0 : -EAGAIN;
}

int ksm_peer_refresh_if_changed(struct ksm_peer *peer)
{
	if (peer->living_known && ksm_load_seqcst(&peer->control->peer_epoch) == peer->living_epoch)
		return 0;
	return ksm_peer_refresh(peer);
}

static uint32_t epoch_of(const struct ksm_peer *peer, ksm_slotno slot)
{
	return slot == peer->seat.slot ? peer->seat.epoch : (uint32_t)peer->others[slot].incarnation;
}

bool ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch)
{
	for (size_t i = 0; i < peer->living_count; i++)
		if (peer->living[i] == slot)
			return ((epoch_of(peer, slot) ^ epoch) & KSM_CELL_EPOCH_MASK) == 0;
	return false;
}

int ksm_peer_attach_bitmap(struct ksm_peer *peer, ksm_slotno slot, int fd)
{
	int required = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
	size_t nbytes = ksm_bitmap_bytes(peer->layout.frames);
	struct stat stat;
	void *map;
	int r = ksm_os_stat(fd, &stat);
	if (!r &&
	    (slot >= KSM_PEERS_MAX || (uint64_t)stat.st_size != nbytes || (ksm_os_seals(fd) & required) != required))
		r = KSM_ECORRUPT;
	if (!r)
		r = ksm_os_map_shared(fd, nbytes, false, &map);
	if (r) {
		ksm_os_close(fd);
		return r;
	}
	const struct ksm_bitmap *bitmap = map;
	if (bitmap->magic != KSM_MAGIC || bitmap->slot != slot || bitmap->frames != peer->layout.frames ||
	    memcmp(bitmap->id, peer->id, sizeof(bitmap->id))) {
		munmap(map, nbytes);
		ksm_os_close(fd);
		return KSM_ECORRUPT;
	}
	ksm_os_advise(map, nbytes, MADV_DONTFORK);
	ksm_os_advise(map, nbytes, MADV_DONTDUMP);
	forget(peer, slot, false);
	struct ksm_other *other = &peer->others[slot];
	other->bitmap = bitmap;
	other->bits = (const uint64_t *)((const char *)map + KSM_BITMAP_BITS_OFFSET);
	other->nonce = bitmap->nonce;
	other->fd = fd;
	return 0;
}

/* ---- chunks ---------------------------------------------------------------------------------------- */

void ksm_chunk_mark(struct ksm_peer *peer, ksm_frameno frame)
{
	uint64_t chunk = frame >> KSM_CHUNK_SHIFT;
	/* Always the full operation: a mark seen and kept back could be taken away by a sweep that read our bit before. */
	ksm_or_seqcst(&peer->chunks[chunk / 64], 1ull << (chunk % 64));
}

void ksm_chunk_mark_all(struct ksm_peer *peer)
{
	uint64_t high = KSM_MIN(ksm_load_acquire(&peer->control->frames_high), peer->layout.frames);
	for (uint64_t frame = 0; frame < high; frame += KSM_CHUNK)
		ksm_chunk_mark(peer, (ksm_frameno)frame);
}

bool ksm_chunk_unmark(struct ksm_peer *peer, uint64_t chunk)
{
	uint64_t bit = 1ull << (chunk % 64);
	return (ksm_load_relaxed(&peer->chunks[chunk / 64]) & bit) &&
	       (ksm_and_seqcst(&peer->chunks[chunk / 64], ~bit) & bit);
}

bool ksm_chunks_any(const struct ksm_peer *peer)
{
	uint64_t high = KSM_MIN(ksm_load_acquire(&peer->control->frames_high), peer->layout.frames);
	for (uint64_t chunk = 0; chunk < (high + KSM_CHUNK - 1) / KSM_CHUNK; chunk += 64)
		if (ksm_load_relaxed(&peer->chunks[chunk / 64]))
			return true;
	return false;
}
