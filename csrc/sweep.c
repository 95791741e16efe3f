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
 *    4. read all bits again; read the peer epoch again
 *    5. a bit is set, or the epoch is not e0:   DYING ─▶ PUBLISHED, try again later
 *    6. else: punch the hole, then one store: FREE, generation + 1
 *
 * Why nobody is hurt. A taker sets its bit, fences, reads the cell (FRAME-3). Either the taker's fence comes first,
 * and then step 4 sees its bit; or the sweeper's comes first, and then the taker sees DYING and misses. A peer that
 * was not listed in step 1 has raised the epoch before it set its first bit (REFS-3): it too either moves the epoch
 * that step 4 reads or sees DYING. A child of fork gets its slot, its lock, the new epoch and a copy of its parent's
 * bits while the parent holds its merge lock, so the parent's own bits stand until the child's do.
 *
 * SWEEP-1. Only the owner named in a DYING cell moves it; a living owner's cell is left alone however long it takes
 *          (no timeouts: it may be stopped); a dead one's is taken over, by compare-and-swap.
 * SWEEP-2. The hole is punched before the cell says FREE: nobody writes a frame that somebody may still punch.
 * SWEEP-3. Bytes that nobody vouched for (ALLOC of a dead owner: DYING_RAW) never become PUBLISHED.
 * SWEEP-4. A frame that a dead sweeper had punched and not freed may become PUBLISHED again, as zeros. Nobody is
 *          mapped to it, takers compare, and it is freed by the next sweep.
 *
 * Called by scanners under the merge lock of their process, so our own bits stand still.
 */
#include "sweep.h"

#include "atomic.h"
#include "os.h"

#include <errno.h>
#include <string.h>

struct doomed {
	uint64_t first;                   /* frame */
	uint64_t count;                   /* frames in the chunk */
	uint64_t bits[KSM_CHUNK / 64];    /* those we have marked DYING */
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

static bool owner_is_self(const struct ksm_peer *peer, uint64_t cell)
{
	return ksm_cell_slot(cell) == peer->seat.slot && ksm_cell_epoch(cell) == (peer->seat.epoch & KSM_CELL_EPOCH_MASK);
}

/* Step 2 for one cell: is it ours to free? */
static bool try_mark(struct ksm_peer *peer, ksm_frameno frame, bool referred)
{
	uint64_t cell = ksm_load_acquire(&peer->cells[frame]);
	enum ksm_cell_state state = ksm_cell_state(cell);
	switch (state) {
	case KSM_CELL_PUBLISHED:
		return !referred && ksm_cas_seqcst(&peer->cells[frame], cell, claim_as(peer, KSM_CELL_DYING, cell));
	case KSM_CELL_ALLOC:
		return owner_is_dead(peer, cell) &&
		       ksm_cas_seqcst(&peer->cells[frame], cell, claim_as(peer, KSM_CELL_DYING_RAW, cell));
	case KSM_CELL_DYING:
	case KSM_CELL_DYING_RAW:
		return (owner_is_self(peer, cell) || owner_is_dead(peer, cell)) &&
		       ksm_cas_seqcst(&peer->cells[frame], cell, claim_as(peer, state, cell));
	default:
		return false;
	}
}

static void mark_chunk(struct ksm_peer *peer, struct doomed *doomed)
{
	for (uint64_t i = 0; i < doomed->count; i += 64) {
		uint64_t referred = ksm_bits_of_all(peer, (ksm_frameno)(doomed->first + i));
		for (uint64_t j = 0; j < 64 && i + j < doomed->count; j++) {
			if (try_mark(peer, (ksm_frameno)(doomed->first + i + j), referred >> j & 1)) {
				doomed->bits[i / 64] |= 1ull << j;
				doomed->marked++;
			}
		}
	}
}

/* Step 5: those that somebody refers to after all (`all`: every one) go back. Returns whether any did. */
static bool spare(struct ksm_peer *peer, struct doomed *doomed, bool all)
{
	bool spared = false;
	for (uint64_t i = 0; i < doomed->count; i += 64) {
		uint64_t back = doomed->bits[i / 64];
		if (back && !all)
			back &= ksm_bits_of_all(peer, (ksm_frameno)(doomed->first + i));
		for (uint64_t j = 0; j < 64 && back >> j; j++) {
			if (!(back >> j & 1))
				continue;
			uint64_t *cell = &peer->cells[doomed->first + i + j];
			uint64_t old = ksm_load_acquire(cell);
			if (ksm_cell_state(old) == KSM_CELL_DYING) /* SWEEP-3: DYING_RAW waits for the next sweep */
				ksm_cas_seqcst(cell, old,
					       ksm_cell_make(KSM_CELL_PUBLISHED, 0, 0, ksm_cell_generation(old)));
			spared = true;
		}
		doomed->bits[i / 64] &= ~back;
	}
	return spared;
}

/* Step 6 for a run of doomed frames. */
static int release_run(struct ksm_peer *peer, uint64_t first, uint64_t count)
{
	int r = ksm_os_punch(peer->fds.store, first << KSM_PAGE_SHIFT, count << KSM_PAGE_SHIFT);
	if (r)
		return r;
	for (uint64_t frame = first; frame < first + count; frame++) { /* SWEEP-2 */
		uint64_t old = ksm_load_acquire(&peer->cells[frame]);
		ksm_cas_seqcst(&peer->cells[frame], old,
			       ksm_cell_make(KSM_CELL_FREE, 0, 0, ksm_cell_generation(old) + 1));
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
	int r = ksm_peer_refresh(peer); /* step 1 */
	if (r) {
		ksm_chunk_mark(peer, (ksm_frameno)doomed.first);
		return r;
	}
	mark_chunk(peer, &doomed);
	if (!doomed.marked)
		return 0;
	ksm_fence_seqcst(); /* step 3; pairs with the one in ksm_frame_take() */
	bool spared = spare(peer, &doomed, false);
	bool moved = ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch;
	if (moved)
		spared |= spare(peer, &doomed, true);
	r = release_all(peer, &doomed);
	if (spared || r < 0)
		ksm_chunk_mark(peer, (ksm_frameno)doomed.first);
	if (r > 0) {
		ksm_add_seqcst(&peer->control->sweeps, 1);
		ksm_add_seqcst(&peer->control->frames_freed, (uint64_t)r);
	}
	return moved && r == 0 ? -EAGAIN : r;
}
