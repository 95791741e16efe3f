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
 *    allocate   set my bit ─▶ full fence ─▶ nobody else's is set, nobody came ─▶ CAS FREE→ALLOC(me) ─▶ pwrite ─▶
 *               CAS ALLOC(me)→PUBLISHED
 *    take       set my bit ─▶ full fence ─▶ read the cell: PUBLISHED, same generation? ─▶ compare ─▶ map
 *    put        unmap ─▶ count - 1 ─▶ zero? clear my bit, mark the chunk for the sweep
 *
 * FRAME-1. A frame is handed out only if no living peer's bit is set, whatever its cell says: a scribbled FREE
 *          must not give away what somebody has mapped, nor what somebody else is about to write.
 * FRAME-2. The bytes of a frame are written only between FREE→ALLOC and ALLOC→PUBLISHED, by its owner.
 * FRAME-3. Nothing about a frame is believed between setting the bit and reading the cell after a full fence.
 * FRAME-4. A process that is not dumpable by its own choice publishes nothing. One that has changed its user since its
 *          program was started (a server that drops root) is not dumpable by the kernel's: that one may.
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

static uint64_t *cell_of(const struct ksm_peer *peer, ksm_frameno frame)
{
	return &peer->cells[frame];
}

/* One page more, mapped or about to be. */
static void refer(struct ksm_peer *peer, ksm_frameno frame)
{
	ksm_assert(ksm_bit_test(peer, frame));
	if (peer->counts[frame]++ == 0)
		ksm_count(peer->self, KSM_FRAMES_REFERRED, 1);
}

static bool try_allocate(struct ksm_peer *peer, ksm_frameno frame)
{
	if (frame >= peer->layout.frames)
		return false;
	uint64_t old = ksm_load_acquire(cell_of(peer, frame));
	if (ksm_cell_state(old) != KSM_CELL_FREE || peer->counts[frame])
		return false;
	if (ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1) /* not worth the trouble */
		return false;
	ksm_bit_set(peer, frame);
	ksm_fence_seqcst(); /* FRAME-1: of two who want the same frame, at least one sees the other's bit */
	uint64_t mine = ksm_cell_make(KSM_CELL_ALLOC, peer->seat.slot, peer->seat.epoch, ksm_cell_generation(old));
	if (ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1 ||
	    ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch ||
	    !ksm_cas_seqcst(cell_of(peer, frame), old, mine)) {
		ksm_bit_clear(peer, frame);
		return false;
	}
	ksm_raise_release(&peer->control->frames_high, (uint64_t)frame + 1);
	refer(peer, frame);
	return true;
}

/* Then no frame can be had until the living are listed again; it is not the frames' fault. */
static bool somebody_came(const struct ksm_peer *peer)
{
	return ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch;
}

/* Free frames from here to the end of the stretch we reserved, a new stretch, then anywhere. */
static bool allocate_anywhere(struct ksm_peer *peer, ksm_frameno *out)
{
	if (peer->next_frame % STRETCH && try_allocate(peer, peer->next_frame)) {
		*out = peer->next_frame;
		return true;
	}
	uint64_t high = ksm_load_acquire(&peer->control->frames_high);
	while (high < peer->layout.frames && !somebody_came(peer)) {
		uint64_t start = (high + STRETCH - 1) / STRETCH * STRETCH;
		if (start >= peer->layout.frames)
			break;
		if (ksm_cas_seqcst(&peer->control->frames_high, high, KSM_MIN(start + STRETCH, peer->layout.frames)) &&
		    try_allocate(peer, (ksm_frameno)start)) {
			*out = (ksm_frameno)start;
			return true;
		}
		high = ksm_load_acquire(&peer->control->frames_high);
	}
	uint64_t freed = ksm_load_acquire(&peer->control->frames_freed);
	if (peer->full_at == freed + 1) /* every frame was looked at, and none was freed since */
		return false;
	for (uint64_t i = 0; i < peer->layout.frames && !somebody_came(peer); i++) {
		ksm_frameno frame = (ksm_frameno)((peer->next_frame + i) % peer->layout.frames);
		if (try_allocate(peer, frame)) {
			*out = frame;
			return true;
		}
	}
	peer->full_at = somebody_came(peer) ? 0 : freed + 1;
	return false;
}

static bool hides_itself(void)
{
	if (ksm_os_dumpable() == 1)
		return false;
	return getauxval(AT_SECURE) || (getauxval(AT_EUID) == geteuid() && getauxval(AT_EGID) == getegid());
}

int ksm_frame_alloc(struct ksm_peer *peer, ksm_frameno want, ksm_frameno *out)
{
	if (hides_itself())
		return KSM_EDUMPABLE; /* FRAME-4 */
	int r = ksm_peer_refresh_if_changed(peer);
	if (r)
		return r;
	if (want != KSM_NO_FRAME && try_allocate(peer, want)) {
		*out = want;
		return 0;
	}
	if (!allocate_anywhere(peer, out))
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
}

uint32_t ksm_frame_publish(struct ksm_peer *peer, ksm_frameno frame, uint64_t digest)
{
	uint64_t mine = ksm_load_acquire(cell_of(peer, frame));
	uint32_t generation = ksm_cell_generation(mine);
	ksm_store_release(&peer->checks[frame], (uint32_t)(digest >> (KSM_DIGEST_CHECK_SHIFT)));
	if (ksm_cell_state(mine) == KSM_CELL_ALLOC && ksm_cell_slot(mine) == peer->seat.slot)
		ksm_cas_seqcst(cell_of(peer, frame), mine, ksm_cell_make(KSM_CELL_PUBLISHED, 0, 0, generation));
	return generation;
}

bool ksm_frame_looks_published(const struct ksm_peer *peer, ksm_frameno frame, uint32_t generation, uint32_t mask)
{
	if (frame >= peer->layout.frames)
		return false;
	uint64_t cell = ksm_load_acquire(cell_of(peer, frame));
	return ksm_cell_state(cell) == KSM_CELL_PUBLISHED && ((ksm_cell_generation(cell) ^ generation) & mask) == 0;
}

bool ksm_frame_looks_like(const struct ksm_peer *peer, ksm_frameno frame, uint64_t digest)
{
	return ksm_frame_looks_published(peer, frame, 0, 0) &&
	       ksm_load_acquire(&peer->checks[frame]) == (uint32_t)(digest >> KSM_DIGEST_CHECK_SHIFT);
}

bool ksm_frame_take(struct ksm_peer *peer, ksm_frameno frame, uint32_t generation, uint32_t mask)
{
	if (frame >= peer->layout.frames || peer->counts[frame] == UINT16_MAX)
		return false;
	ksm_bit_set(peer, frame);
	ksm_fence_seqcst(); /* pairs with the one in the sweep; FRAME-3 */
	bool published = ksm_frame_looks_published(peer, frame, generation, mask);
	refer(peer, frame);
	if (!published)
		ksm_frame_put(peer, frame, 1);
	return published;
}

void ksm_frame_put(struct ksm_peer *peer, ksm_frameno frame, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		ksm_frameno f = frame + (ksm_frameno)i;
		ksm_ensure(f < peer->layout.frames && peer->counts[f] > 0);
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
	return r;
}

int ksm_frame_read(struct ksm_peer *peer, ksm_frameno frame, size_t count, void *to)
{
	return ksm_os_pread(peer->fds.store, to, count * KSM_PAGE_SIZE, (uint64_t)frame * KSM_PAGE_SIZE);
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
