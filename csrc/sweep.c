/* SPDX-License-Identifier: MIT */
/*
 * DOC: The sweep
 *
 * A frame that is freed while somebody's page is mapped to it reads as silent zeros, so this is the most dangerous
 * file of the project. It is the only one that frees.
 *
 *    1. e0 = peer epoch; list the living by their locks; every one's bitmap must be at hand
 *    2. PUBLISHED and no bit set, or ALLOC / DYING of a dead owner:   CAS ─▶ DYING(me)
 *    3. full fence
 *    4. read all bits again; read the peer epoch again, and list the living again
 *    5. a bit is set, or the epoch is not e0, or somebody is new:   DYING ─▶ PUBLISHED, try again later
 *    6. else: punch the hole, then one store: FREE, generation + 1
 *
 * Why nobody is hurt. A taker sets its bit, fences, reads the cell (FRAME-3). Either the taker's fence comes first,
 * and then step 4 sees its bit; or the sweeper's comes first, and then the taker sees DYING and misses. A peer that
 * was not listed in step 1 has raised the epoch before it set its first bit (REFS-3): it too either moves the epoch
 * that step 4 reads or sees DYING; and its lock is there to be listed, whatever was scribbled over the epoch. A child of
 * fork gets its slot, its lock, a copy of its parent's bits and then a new epoch while the parent holds its merge lock,
 * so the parent's own bits stand until the child's do.
 *
 * SWEEP-1. Only the owner named in a DYING cell moves it; a living owner's cell is left alone however long it takes
 *          (no timeouts: it may be stopped); a dead one's is taken over, by compare-and-swap.
 * SWEEP-2. The hole is punched before the cell says FREE: nobody writes a frame that somebody may still punch.
 * SWEEP-3. What is taken over from a dead owner becomes DYING_RAW and never PUBLISHED again: it may be half written,
 *          or punched. If it cannot be freed now it is left to nobody, for anybody to go on with.
 * SWEEP-4. The sweeper's own bit is set from before DYING until after FREE: an allocator that meets a cell scribbled
 *          over with FREE meanwhile sees it (FRAME-1). So is its busy bit: a taker that meets one scribbled over with
 *          PUBLISHED sees that (REFS-7), for the hole may be punched any moment.
 * SWEEP-5. An owner is a process, not a thread: sweeps of one process follow one another, in its scanner's thread.
 * SWEEP-6. A frame whose bit of ours has no memory is left for the next sweep, and its chunk stays marked. Within what
 *          this process refers to, or has referred to, a sweep needs no memory at all.
 *
 * Called by scanners under the merge lock of their process, so our own bits stand still.
 */
#include "sweep.h"

#include "atomic.h"
#include "os.h"

#include <errno.h>
#include <string.h>

struct doomed {
	uint64_t first;                /* frame */
	uint64_t count;                /* frames in the chunk */
	uint64_t bits[KSM_CHUNK / 64]; /* those we have marked DYING */
	uint64_t marked;
};

static bool is_doomed(const struct doomed *doomed, uint64_t i)
{
	return doomed->bits[i / 64] >> (i % 64) & 1;
}

static uint64_t claim_as(const struct ksm_peer *peer, enum ksm_cell_state state, uint64_t cell)
{
	return ksm_cell_make(state, peer->seat.slot, peer->seat.epoch, ksm_cell_generation(cell));
}

static bool owner_is_dead(const struct ksm_peer *peer, uint64_t cell)
{
	return !ksm_peer_is_living(peer, ksm_cell_slot(cell), ksm_cell_epoch(cell));
}

static bool is_ours(const struct ksm_peer *peer, uint64_t cell)
{
	enum ksm_cell_state state = ksm_cell_state(cell);
	return (state == KSM_CELL_DYING || state == KSM_CELL_DYING_RAW) && cell == claim_as(peer, state, cell);
}

/* Step 2 for one cell: is it ours to free? 1, 0, or -ENOMEM: there is no memory for our bit. */
static int try_mark(struct ksm_peer *peer, ksm_frameno frame, bool referred)
{
	uint64_t cell = ksm_load_acquire(&peer->cells[frame]);
	enum ksm_cell_state to;
	switch (ksm_cell_state(cell)) {
	case KSM_CELL_PUBLISHED:
		if (referred)
			return 0;
		to = KSM_CELL_DYING;
		break;
	case KSM_CELL_ALLOC:
	case KSM_CELL_DYING:
	case KSM_CELL_DYING_RAW:
		if (!owner_is_dead(peer, cell)) /* SWEEP-1 */
			return 0;
		to = KSM_CELL_DYING_RAW; /* SWEEP-3 */
		break;
	default:
		return 0;
	}
	int r = ksm_bit_set(peer, frame); /* SWEEP-4 */
	if (r)
		return r;
	ksm_busy_set(peer, frame);
	if (ksm_cas_seqcst(&peer->cells[frame], cell, claim_as(peer, to, cell)))
		return 1;
	ksm_busy_clear(peer, frame);
	ksm_bit_clear(peer, frame);
	return 0;
}

/* Have these 64 cells ever been used? Reading cells that nobody has touched would allocate them. */
static bool is_used(const struct ksm_peer *peer, ksm_frameno first)
{
	uint64_t at = peer->layout.cells + first * sizeof(uint64_t);
	return ksm_sparse_knows(&peer->cells_there, &peer->cells[first]) ||
	       ksm_os_seek_data(peer->fds.control, at) == (int64_t)at;
}

/* Frames of this process are left alone: its own bits stand still, for we hold its merge lock. 0, or what kept some. */
static int mark_chunk(struct ksm_peer *peer, struct doomed *doomed)
{
	int error = 0;
	for (uint64_t i = 0; i < doomed->count; i += 64) {
		ksm_frameno first = (ksm_frameno)(doomed->first + i);
		int r = is_used(peer, first) ? ksm_sparse_reach(&peer->cells_there, &peer->cells[first]) : 1;
		if (r) {
			error = r < 0 ? r : error;
			continue;
		}
		uint64_t referred = ksm_bits_of_others(peer, first);
		for (uint64_t j = 0; j < 64 && i + j < doomed->count; j++) {
			ksm_frameno frame = (ksm_frameno)(first + j);
			r = peer->counts[frame] ? 0 : try_mark(peer, frame, referred >> j & 1);
			if (r > 0) {
				doomed->bits[i / 64] |= 1ull << j;
				doomed->marked++;
			}
			error = r < 0 ? r : error;
		}
	}
	return error;
}

/* Not to be freed now. */
static void spare_frame(struct ksm_peer *peer, ksm_frameno frame)
{
	uint64_t old = ksm_load_acquire(&peer->cells[frame]), back;
	if (ksm_cell_state(old) == KSM_CELL_DYING)
		back = ksm_cell_make(KSM_CELL_PUBLISHED, 0, 0, ksm_cell_generation(old));
	else /* SWEEP-3; of nobody, so that anybody may go on with it */
		back = ksm_cell_make(KSM_CELL_DYING_RAW, KSM_CELL_NOBODY, 0, ksm_cell_generation(old));
	if (is_ours(peer, old))
		ksm_cas_seqcst(&peer->cells[frame], old, back);
	ksm_busy_clear(peer, frame);
	ksm_bit_clear(peer, frame);
}

/* Step 5: those that somebody refers to after all (`all`: every one) go back. Returns whether any did. */
static bool spare(struct ksm_peer *peer, struct doomed *doomed, bool all)
{
	bool spared = false;
	for (uint64_t i = 0; i < doomed->count; i += 64) {
		uint64_t back = doomed->bits[i / 64];
		if (back && !all)
			back &= ksm_bits_of_others(peer, (ksm_frameno)(doomed->first + i));
		for (uint64_t j = 0; j < 64; j++)
			if (back >> j & 1)
				spare_frame(peer, (ksm_frameno)(doomed->first + i + j));
		doomed->bits[i / 64] &= ~back;
		spared |= back != 0;
	}
	return spared;
}

/* Step 6 for a run of doomed frames. */
static int release_run(struct ksm_peer *peer, uint64_t first, uint64_t count)
{
	for (uint64_t frame = first; frame < first + count; frame++) {
		/* No page of ours is mapped to it, and it is our bit that keeps others away: REFS-1, SWEEP-4. */
		ksm_ensure(!peer->counts[frame] && ksm_bit_test(peer, (ksm_frameno)frame));
		if (!is_ours(peer, ksm_load_acquire(&peer->cells[frame])))
			return -ESTALE; /* scribbled over */
	}
	int r = ksm_os_punch(peer->fds.store, first << KSM_PAGE_SHIFT, count << KSM_PAGE_SHIFT);
	if (r)
		return r;
	for (uint64_t frame = first; frame < first + count; frame++) { /* SWEEP-2 */
		uint64_t old = ksm_load_acquire(&peer->cells[frame]);
		ksm_cas_seqcst(&peer->cells[frame], old,
			       ksm_cell_make(KSM_CELL_FREE, 0, 0, ksm_cell_generation(old) + 1));
		ksm_busy_clear(peer, (ksm_frameno)frame);
		ksm_bit_clear(peer, (ksm_frameno)frame);
	}
	return 0;
}

static int release_all(struct ksm_peer *peer, struct doomed *doomed)
{
	int freed = 0;
	for (uint64_t i = 0; i < doomed->count;) {
		if (!is_doomed(doomed, i)) {
			i++;
			continue;
		}
		uint64_t n = 1;
		while (i + n < doomed->count && is_doomed(doomed, i + n))
			n++;
		int r = release_run(peer, doomed->first + i, n);
		if (r) {
			ksm_count(peer->self, KSM_FAILURES, 1);
			spare(peer, doomed, true);
			return r;
		}
		for (uint64_t j = i; j < i + n; j++)
			doomed->bits[j / 64] &= ~(1ull << (j % 64));
		freed += (int)n;
		i += n;
	}
	return freed;
}

uint64_t ksm_sweep_chunks(const struct ksm_peer *peer)
{
	uint64_t high = KSM_MIN(ksm_load_acquire(&peer->control->frames_high), peer->layout.frames);
	return (high + KSM_CHUNK - 1) / KSM_CHUNK;
}

int ksm_sweep_chunk(struct ksm_peer *peer, uint64_t chunk)
{
	struct doomed doomed = {.first = chunk << KSM_CHUNK_SHIFT};
	if (ksm_load_acquire(&peer->control->no_sweep) || doomed.first >= peer->layout.frames)
		return 0;
	doomed.count = KSM_MIN(KSM_CHUNK, peer->layout.frames - doomed.first);
	uint64_t cells = peer->layout.cells + doomed.first * sizeof(uint64_t);
	if (ksm_os_seek_data(peer->fds.control, cells) >= (int64_t)(cells + doomed.count * sizeof(uint64_t)))
		return 0;               /* never used; reading the cells would allocate them */
	int r = ksm_peer_refresh(peer); /* step 1 */
	if (r) {
		ksm_chunk_mark(peer, (ksm_frameno)doomed.first);
		return r;
	}
	int error = mark_chunk(peer, &doomed);
	if (error) /* the next sweep goes on */
		ksm_chunk_mark(peer, (ksm_frameno)doomed.first);
	if (!doomed.marked)
		return error;
	ksm_fence_seqcst(); /* step 3; pairs with the one in ksm_frame_take() */
	bool spared = spare(peer, &doomed, false);
	bool moved = ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch || !ksm_peer_nobody_came(peer) ||
		     ksm_load_seqcst(&peer->control->no_sweep);
	if (moved)
		spared |= spare(peer, &doomed, true);
	r = release_all(peer, &doomed);
	if (spared || r < 0)
		ksm_chunk_mark(peer, (ksm_frameno)doomed.first);
	if (r > 0) {
		ksm_add_seqcst(&peer->control->sweeps, 1);
		ksm_add_seqcst(&peer->control->frames_freed, (uint64_t)r);
	}
	return moved && r == 0 ? -EAGAIN : r ? r : error;
}
