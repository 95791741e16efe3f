/* SPDX-License-Identifier: MIT */
/*
 * DOC: Frames
 *
 * This file owns the cells (one 64-bit word a frame, see layout.h) as far as allocating, publishing and taking go,
 * and the bytes of the store. Freeing is sweep.c's.
 *
 * The store is a memory file that nobody maps except where a page is merged. Frames are written with pwrite (a
 * full file is an error, not a signal) and read for comparing with pread into memory of ours.
 *
 *    allocate   set my bit, and busy ─▶ full fence ─▶ nobody else's is set, nobody came ─▶ CAS FREE→ALLOC(me) ─▶
 *               pwrite ─▶ CAS ALLOC(me)→PUBLISHED ─▶ not busy
 *    take       set my bit ─▶ full fence ─▶ read the cell: PUBLISHED, same generation? not busy with anybody? ─▶
 *               compare ─▶ map
 *    put        unmap ─▶ count - 1 ─▶ zero? clear my bit, mark the chunk for the sweep
 *
 * FRAME-1. A frame is handed out only if no living peer's bit is set, whatever its cell says: a scribbled FREE
 *          must not give away what somebody has mapped, nor what somebody else is about to write.
 * FRAME-2. The bytes of a frame are written only between FREE→ALLOC and ALLOC→PUBLISHED, by its owner.
 * FRAME-3. Nothing about a frame is believed between setting the bit and reading the cell after a full fence. That the
 *          cell says PUBLISHED is not enough: somebody may have scribbled that over the ALLOC or DYING of a peer which is
 *          at work on the bytes, and its busy bit says so where nobody can scribble (REFS-7).
 * FRAME-4. A process that is not dumpable by its own choice publishes nothing. One that has changed its user since its
 *          program was started (a server that drops root) is not dumpable by the kernel's: that one may.
 *          It is asked once for each stretch of pages.
 * FRAME-5. All tables that an allocation touches have their memory before it begins (SPARSE-1), and before frames_high
 *          moves: where there is none, no number of a frame is given away in vain.
 *
 * Death: an ALLOC of a dead owner is found by the sweep (the cell names slot and slot epoch); a set bit of a
 * dead peer counts no longer.
 *
 * Frames are allotted so that neighbours stay neighbours: consecutive pages on consecutive frames are one memory
 * mapping, and mappings are what runs out first.
 */
#include "frame.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <unistd.h>

/* Frames at the end of the store that one peer reserves at a time by moving frames_high. */
#define STRETCH 512u
#define LOOK_MOST 65536u /* frames that are looked at for one that is free, in one call */

static uint64_t *cell_of(const struct ksm_peer *peer, ksm_frameno frame)
{
	return &peer->cells[frame];
}

/* One page more, mapped or about to be. */
static void refer(struct ksm_peer *peer, ksm_frameno frame)
{
	ksm_ensure(ksm_bit_test(peer, frame) && peer->counts[frame] < UINT16_MAX); /* REFS-1 */
	if (peer->counts[frame]++ == 0)
		ksm_count(peer->self, KSM_FRAMES_REFERRED, 1);
}

/* All of the tables that an allocation of this frame touches: before anything is done about it. */
static int reach_frame(struct ksm_peer *peer, ksm_frameno frame)
{
	int r = ksm_sparse_reach(&peer->cells_there, cell_of(peer, frame));
	if (!r)
		r = ksm_sparse_reach(&peer->checks_there, &peer->checks[frame]);
	return r ? r : ksm_seat_make_room(peer, &peer->seat, (uint64_t)frame + 1);
}

/* 1: it is ours; 0: it cannot be; or an error. */
static int try_allocate(struct ksm_peer *peer, ksm_frameno frame)
{
	if (frame >= peer->layout.frames)
		return 0;
	int r = reach_frame(peer, frame);
	if (r)
		return r;
	uint64_t old = ksm_load_acquire(cell_of(peer, frame));
	if (ksm_cell_state(old) != KSM_CELL_FREE || peer->counts[frame])
		return 0;
	if (ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1) /* not worth the trouble */
		return 0;
	r = ksm_bit_set(peer, frame);
	if (r)
		return r;
	ksm_busy_set(peer, frame);
	ksm_fence_seqcst(); /* FRAME-1: of two who want the same frame, at least one sees the other's bit */
	uint64_t mine = ksm_cell_make(KSM_CELL_ALLOC, peer->seat.slot, peer->seat.epoch, ksm_cell_generation(old));
	if (ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1 ||
	    ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch ||
	    !ksm_cas_seqcst(cell_of(peer, frame), old, mine)) {
		ksm_busy_clear(peer, frame);
		ksm_bit_clear(peer, frame);
		return 0;
	}
	ksm_raise_release(&peer->control->frames_high, (uint64_t)frame + 1);
	refer(peer, frame);
	return 1;
}

/* Then no frame can be had until the living are listed again; it is not the frames' fault. */
static bool somebody_came(const struct ksm_peer *peer)
{
	return ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch;
}

/* A new stretch at the end of the frames that have ever been allocated. As try_allocate(). */
static int allocate_new(struct ksm_peer *peer, ksm_frameno *out)
{
	uint64_t high = ksm_load_acquire(&peer->control->frames_high);
	uint64_t tries = peer->layout.frames / STRETCH + 1; /* it only rises, if nobody scribbles over it */
	while (tries-- && high < peer->layout.frames && !somebody_came(peer)) {
		uint64_t start = (high + STRETCH - 1) / STRETCH * STRETCH;
		if (start >= peer->layout.frames)
			break;
		int r = reach_frame(peer, (ksm_frameno)start); /* else it would rise each time in vain */
		if (!r &&
		    ksm_cas_seqcst(&peer->control->frames_high, high, KSM_MIN(start + STRETCH, peer->layout.frames)))
			r = try_allocate(peer, (ksm_frameno)start);
		*out = (ksm_frameno)start;
		if (r)
			return r;
		high = ksm_load_acquire(&peer->control->frames_high);
	}
	return 0;
}

/* Free frames from here to the end of the stretch we reserved, a new stretch, then anywhere. As try_allocate(). */
static int allocate_anywhere(struct ksm_peer *peer, ksm_frameno *out)
{
	*out = peer->next_frame;
	int r = peer->next_frame % STRETCH ? try_allocate(peer, peer->next_frame) : 0;
	if (!r)
		r = allocate_new(peer, out);
	if (r)
		return r;
	uint64_t freed = ksm_load_acquire(&peer->control->frames_freed);
	if (peer->full_at != freed + 1) {
		peer->full_at = freed + 1;
		peer->looked = 0;
	}
	/* Until every frame was looked at, and none was freed since. Not all at once: what a confused peer has written
	 * may make each of them look taken, each time again. */
	for (uint64_t i = 0; i < LOOK_MOST && peer->looked < peer->layout.frames && !somebody_came(peer); i++) {
		*out = (ksm_frameno)((peer->next_frame + peer->looked++) % peer->layout.frames);
		r = try_allocate(peer, *out);
		if (r) {
			peer->full_at = 0;
			return r;
		}
	}
	if (somebody_came(peer))
		peer->full_at = 0;
	return 0;
}

static bool hides_itself(void)
{
	if (ksm_os_dumpable() == 1)
		return false;
	return getauxval(AT_SECURE) || (getauxval(AT_EUID) == geteuid() && getauxval(AT_EGID) == getegid());
}

int ksm_frame_alloc(struct ksm_peer *peer, ksm_frameno want, ksm_frameno *out)
{
	if (!peer->shows_itself && hides_itself())
		return KSM_EDUMPABLE; /* FRAME-4 */
	peer->shows_itself = true;
	int r = ksm_peer_refresh_if_changed(peer);
	if (r)
		return r;
	if (want != KSM_NO_FRAME && try_allocate(peer, want) > 0) {
		*out = want;
		return 0;
	}
	r = allocate_anywhere(peer, out);
	if (r < 0)
		return r;
	if (!r)
		return somebody_came(peer) ? -EAGAIN : -ENOSPC;
	peer->next_frame = *out + 1;
	return 0;
}

void ksm_frame_abandon(struct ksm_peer *peer, ksm_frameno frame)
{
	uint64_t mine = ksm_load_acquire(cell_of(peer, frame));
	ksm_frame_put(peer, frame, 1);
	peer->full_at = 0; /* there is one now */
	if (ksm_cell_state(mine) == KSM_CELL_ALLOC && ksm_cell_slot(mine) == peer->seat.slot)
		ksm_cas_seqcst(cell_of(peer, frame), mine,
			       ksm_cell_make(KSM_CELL_FREE, 0, 0, ksm_cell_generation(mine)));
	ksm_busy_clear(peer, frame);
}

uint32_t ksm_frame_publish(struct ksm_peer *peer, ksm_frameno frame, uint64_t digest)
{
	uint64_t mine = ksm_load_acquire(cell_of(peer, frame));
	uint32_t generation = ksm_cell_generation(mine);
	ksm_store_release(&peer->checks[frame], (uint32_t)(digest >> (KSM_DIGEST_CHECK_SHIFT)));
	if (ksm_cell_state(mine) == KSM_CELL_ALLOC && ksm_cell_slot(mine) == peer->seat.slot)
		ksm_cas_seqcst(cell_of(peer, frame), mine, ksm_cell_make(KSM_CELL_PUBLISHED, 0, 0, generation));
	ksm_busy_clear(peer, frame); /* the bytes are there to stay */
	return generation;
}

bool ksm_frame_looks_published(const struct ksm_peer *peer, ksm_frameno frame, uint32_t generation, uint32_t mask)
{
	if (frame >= peer->layout.frames)
		return false;
	if (ksm_sparse_reach(&peer->cells_there, cell_of(peer, frame)))
		return false;
	uint64_t cell = ksm_load_acquire(cell_of(peer, frame));
	return ksm_cell_state(cell) == KSM_CELL_PUBLISHED && ((ksm_cell_generation(cell) ^ generation) & mask) == 0;
}

bool ksm_frame_looks_like(const struct ksm_peer *peer, ksm_frameno frame, uint64_t digest)
{
	return ksm_frame_looks_published(peer, frame, 0, 0) &&
	       !ksm_sparse_reach(&peer->checks_there, &peer->checks[frame]) &&
	       ksm_load_acquire(&peer->checks[frame]) == (uint32_t)(digest >> KSM_DIGEST_CHECK_SHIFT);
}

bool ksm_frame_take(struct ksm_peer *peer, ksm_frameno frame, uint32_t generation, uint32_t mask)
{
	if (frame >= peer->layout.frames || peer->counts[frame] == UINT16_MAX || ksm_bit_set(peer, frame))
		return false;
	ksm_fence_seqcst(); /* pairs with the one in the sweep; FRAME-3 */
	bool published = ksm_frame_looks_published(peer, frame, generation, mask) && !ksm_busy_with_others(peer, frame);
	refer(peer, frame);
	if (!published)
		ksm_frame_put(peer, frame, 1);
	return published;
}

void ksm_frame_put(struct ksm_peer *peer, ksm_frameno frame, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		ksm_frameno f = frame + (ksm_frameno)i;
		ksm_ensure(f < peer->layout.frames && peer->counts[f] > 0);          /* REFS-1 */
		ksm_assert(peer->seat.slot == KSM_NO_SLOT || ksm_bit_test(peer, f)); /* a lost child has no bits */
		if (--peer->counts[f])
			continue;
		ksm_bit_clear(peer, f);
		ksm_chunk_mark(peer, f); /* after the bit: whoever unmarks it sees the bit gone */
		ksm_count(peer->self, KSM_FRAMES_REFERRED, -1);
	}
}

int ksm_frame_write(struct ksm_peer *peer, ksm_frameno frame, size_t count, const void *from)
{
	uint64_t offset = (uint64_t)frame * KSM_PAGE_SIZE;
	int r = ksm_os_pwrite(peer->fds.store, from, count * KSM_PAGE_SIZE, offset);
	if (r) /* what was written of it is nobody's */
		ksm_os_punch(peer->fds.store, offset, count * KSM_PAGE_SIZE);
	/* A memory file is never full: the system may not promise more memory (vm.overcommit_memory=2). */
	return r == -ENOSPC && peer->control->backing == KSM_BACKING_MEMFD ? -ENOMEM : r;
}

int ksm_frame_read(struct ksm_peer *peer, ksm_frameno frame, size_t count, void *to)
{
	return ksm_os_pread(peer->fds.store, to, count * KSM_PAGE_SIZE, (uint64_t)frame * KSM_PAGE_SIZE);
}

int ksm_store_check(int store, uint64_t frames, uint32_t backing)
{
	struct stat stat;
	int r = ksm_os_stat(store, &stat);
	if (r)
		return r;
	if (!S_ISREG(stat.st_mode) || (uint64_t)stat.st_size != frames << KSM_PAGE_SHIFT)
		return KSM_ECORRUPT;
	if (backing == KSM_BACKING_MEMFD && !ksm_os_has_fixed_size(store))
		return KSM_ECORRUPT; /* who truncates it later kills everybody who has mapped it */
	return 0;
}

int ksm_store_prepare(int store, uint64_t frames, uint32_t backing)
{
	uint64_t nbytes = frames * KSM_PAGE_SIZE;
	if (nbytes > ksm_os_file_size_limit())
		return -EFBIG; /* the kernel's answer would be SIGXFSZ */
	int r = ksm_os_truncate(store, nbytes);
	if (r || backing != KSM_BACKING_MEMFD)
		return r; /* files in /dev/shm cannot be sealed */
	return ksm_os_seal(store, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
}
