/* SPDX-License-Identifier: MIT */
/*
 * Scribbles over the control memory. Some are blind, some know what they hit: whoever believes a word of it without a
 * check must come to grief here.
 */
#include "mad.h"

#include "atomic.h"
#include "member.h"

#include <fcntl.h>
#include <string.h>

#define BURST_NS 3000000ull

static struct ksm_peer *peer_of(struct mad_state *mad)
{
	return &mad->member->peer;
}

/* A number that somebody might use as a count, an index or an offset. */
static uint64_t nasty(struct mad_state *mad)
{
	uint64_t frames = peer_of(mad)->layout.frames, r = mad_random(&mad->random);
	switch (mad_below(&mad->random, 10)) {
	case 0:
		return 0;
	case 1:
		return UINT64_MAX;
	case 2:
		return frames + mad_below(&mad->random, 3) - 1;
	case 3:
		return 1ull << (r % 64);
	case 4:
		return (1ull << (r % 64)) - 1;
	case 5:
		return UINT32_MAX - r % 3;
	case 6:
		return r % (2 * frames);
	case 7:
		return r % 2048;
	default:
		return r;
	}
}

/* ---- what is there ------------------------------------------------------------------------------------------ */

void mad_look(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	size_t most = KSM_COUNT(mad->active);
	mad->actives = 0;
	for (uint64_t frame = 0; frame < peer->layout.frames && mad->actives < most; frame++)
		if (ksm_cell_state(ksm_load_relaxed(&peer->cells[frame])) != KSM_CELL_FREE)
			mad->active[mad->actives++] = (uint32_t)frame;
	memcpy(mad->old_header, peer->control, sizeof(mad->old_header));
	memcpy(mad->old_slots, ksm_peer_slot(peer, 0), sizeof(mad->old_slots));
}

static ksm_frameno some_frame(struct mad_state *mad)
{
	if (mad->actives && mad_below(&mad->random, 8))
		return mad->active[mad_below(&mad->random, mad->actives)];
	return (ksm_frameno)mad_below(&mad->random, peer_of(mad)->layout.frames);
}

static ksm_slotno some_slot(struct mad_state *mad)
{
	return (ksm_slotno)(mad_below(&mad->random, 8) ? mad_below(&mad->random, MAD_HONEST + 4)
						       : mad_below(&mad->random, KSM_PEERS_MAX));
}

/* Somewhere in what is used; a multiple of `grain` from the beginning. */
static char *somewhere(struct mad_state *mad, size_t grain)
{
	struct ksm_peer *peer = peer_of(mad);
	const struct ksm_layout *layout = &peer->layout;
	const uint64_t starts[] = {0,
				   layout->slots,
				   layout->chunks,
				   layout->cells,
				   layout->checks,
				   layout->index,
				   layout->candidates,
				   layout->index_touched,
				   layout->total};
	size_t part = mad_below(&mad->random, KSM_COUNT(starts) - 1);
	uint64_t nbytes = starts[part + 1] - starts[part];
	if (part == 0)
		nbytes = sizeof(struct ksm_control);
	if (part == 1 && mad_below(&mad->random, 8))
		nbytes = (MAD_HONEST + 4) * KSM_SLOT_SIZE;
	if (part == 3 && mad->actives && mad_below(&mad->random, 8))
		return (char *)&peer->cells[some_frame(mad)];
	return (char *)peer->control + (starts[part] + mad_below(&mad->random, nbytes)) / grain * grain;
}

/* ---- blind -------------------------------------------------------------------------------------------------- */

static void scribble_words(struct mad_state *mad)
{
	uint64_t *at = (uint64_t *)somewhere(mad, 8);
	switch (mad_below(&mad->random, 4)) {
	case 0:
		ksm_store_relaxed(at, mad_random(&mad->random));
		break;
	case 1:
		ksm_store_relaxed(at, ksm_load_relaxed(at) ^ 1ull << mad_below(&mad->random, 64));
		break;
	case 2:
		ksm_store_relaxed((uint8_t *)at + mad_below(&mad->random, 8), (uint8_t)mad_random(&mad->random));
		break;
	default:
		ksm_store_relaxed(at, nasty(mad));
	}
}

static void scribble_pages(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	uint64_t *page = (uint64_t *)somewhere(mad, KSM_PAGE_SIZE);
	const uint64_t *other = (const uint64_t *)somewhere(mad, KSM_PAGE_SIZE);
	switch (mad_below(&mad->random, 5)) {
	case 0:
		for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++)
			ksm_store_relaxed(&page[i], mad_random(&mad->random));
		break;
	case 1:
		memset(page, (int)mad_below(&mad->random, 256), KSM_PAGE_SIZE);
		break;
	case 2:
		memmove(page, other, KSM_PAGE_SIZE);
		break;
	case 3:
		memcpy(peer->control, mad->old_header, sizeof(struct ksm_control));
		memcpy(ksm_peer_slot(peer, 0), mad->old_slots, sizeof(mad->old_slots));
		break;
	default:
		ksm_os_punch(peer->fds.control, (uint64_t)((char *)page - (char *)peer->control), KSM_PAGE_SIZE);
	}
}

/* ---- with intent -------------------------------------------------------------------------------------------- */

static void scribble_header(struct mad_state *mad)
{
	struct ksm_control *control = peer_of(mad)->control;
	uint64_t *words[] = {&control->frames_high,  &control->changes, &control->settle_seq,
			     &control->settle_beats, &control->sweeps,  &control->frames_freed,
			     &control->peer_epoch,   &control->frames};
	uint32_t *halves[] = {&control->index_levels, &control->candidate_levels, &control->slots_high,
			      &control->no_sweep, &control->backing};
	uint64_t *word = words[mad_below(&mad->random, KSM_COUNT(words))];
	switch (mad_below(&mad->random, 4)) {
	case 0:
		ksm_store_relaxed(halves[mad_below(&mad->random, KSM_COUNT(halves))], (uint32_t)nasty(mad));
		break;
	case 1:
		ksm_store_relaxed(word, ksm_load_relaxed(word) + mad_below(&mad->random, 3) - 1);
		break;
	default:
		ksm_store_relaxed(word, nasty(mad));
	}
}

static void scribble_slots(struct mad_state *mad)
{
	struct ksm_slot *slot = ksm_peer_slot(peer_of(mad), some_slot(mad));
	const struct ksm_slot *other = ksm_peer_slot(peer_of(mad), some_slot(mad));
	switch (mad_below(&mad->random, 8)) {
	case 0:
		ksm_store_relaxed(&slot->nonce, mad_random(&mad->random));
		break;
	case 1:
		ksm_store_relaxed(&slot->nonce, other->nonce);
		break;
	case 2:
		ksm_store_relaxed(&slot->epoch, slot->epoch + (uint32_t)mad_below(&mad->random, 3) - 1);
		break;
	case 3:
		ksm_store_relaxed(&slot->epoch, (uint32_t)nasty(mad));
		break;
	case 4:
		ksm_store_relaxed(&slot->counters[mad_below(&mad->random, 32)], nasty(mad));
		break;
	case 5:
		ksm_store_relaxed(&slot->barrier, (int32_t)nasty(mad));
		ksm_store_relaxed(&slot->why_not, (int32_t)nasty(mad));
		break;
	case 6:
		ksm_store_relaxed(&slot->quiet_at, nasty(mad));
		ksm_store_relaxed(&slot->settled_seq, nasty(mad));
		break;
	default:
		ksm_store_relaxed(&slot->sleeping, (uint32_t)mad_below(&mad->random, 2));
		ksm_store_relaxed(&slot->pid, (int32_t)nasty(mad));
	}
}

static void scribble_cells(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	uint64_t *cell = &peer->cells[some_frame(mad)], old = ksm_load_relaxed(cell);
	ksm_slotno slot = mad_below(&mad->random, 4) ? some_slot(mad) : (ksm_slotno)KSM_CELL_NOBODY;
	uint32_t epoch = slot < KSM_PEERS_MAX ? ksm_load_relaxed(&ksm_peer_slot(peer, slot)->epoch) : 0;
	enum ksm_cell_state state = (enum ksm_cell_state)mad_below(&mad->random, 8);
	uint32_t generation = ksm_cell_generation(old);
	if (mad_below(&mad->random, 4) == 0)
		generation += (uint32_t)mad_below(&mad->random, 3) - 1;
	if (mad_below(&mad->random, 16) == 0)
		generation = (uint32_t)mad_random(&mad->random);
	if (state > KSM_CELL_DYING_RAW && mad_below(&mad->random, 4))
		state = KSM_CELL_FREE;
	ksm_store_relaxed(cell, ksm_cell_make(state, slot, epoch, generation));
}

static uint64_t *some_word(struct mad_state *mad, uint64_t table, uint64_t touched)
{
	char *base = (char *)peer_of(mad)->control;
	const uint64_t *bits = (const uint64_t *)(base + touched);
	uint64_t pages = ksm_table_words(ksm_table_levels_for(peer_of(mad)->layout.frames)) * 8 / KSM_PAGE_SIZE;
	uint64_t page = mad_below(&mad->random, pages);
	for (unsigned tries = 0; tries < 64 && !(bits[page / 64] >> page % 64 & 1); tries++)
		page = mad_below(&mad->random, pages);
	return (uint64_t *)(base + table) + page * (KSM_PAGE_SIZE / 8) + mad_below(&mad->random, KSM_PAGE_SIZE / 8);
}

static void scribble_index(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	const struct ksm_layout *layout = &peer->layout;
	uint64_t *word = some_word(mad, layout->index, layout->index_touched), old = ksm_load_relaxed(word);
	uint64_t *candidate = some_word(mad, layout->candidates, layout->candidates_touched);
	ksm_frameno frame = some_frame(mad);
	switch (mad_below(&mad->random, 8)) {
	case 0: /* the same digest, another frame, which really is published */
		ksm_store_relaxed(word, (old >> 42 << 42) |
						(uint64_t)(ksm_cell_generation(peer->cells[frame]) & 0x3ff) << 32 |
						(frame + 1u));
		ksm_store_relaxed(&peer->checks[frame], (uint32_t)mad_random(&mad->random));
		break;
	case 1: /* … beyond the end */
		ksm_store_relaxed(word, (old >> 32 << 32) | (uint32_t)nasty(mad));
		break;
	case 2:
		ksm_store_relaxed(word, old ^ 1ull << mad_below(&mad->random, 64));
		break;
	case 3: /* a check that fits another frame */
		ksm_store_relaxed(&peer->checks[frame], ksm_load_relaxed(&peer->checks[some_frame(mad)]));
		break;
	case 4: /* claimed by somebody, for ever */
		ksm_store_relaxed(candidate, ksm_load_relaxed(candidate) | 1ull << 25);
		break;
	case 5: /* somebody else has it */
		ksm_store_relaxed(candidate, ksm_load_relaxed(candidate) ^ mad_below(&mad->random, 1u << 13) << 12);
		break;
	case 6:
		ksm_store_relaxed(candidate, mad_random(&mad->random));
		break;
	default: { /* pages of the tables that were never used */
		uint64_t *touched = (uint64_t *)((char *)peer->control + layout->index_touched);
		uint64_t words = (layout->total - layout->index_touched) / 8;
		ksm_store_relaxed(&touched[mad_below(&mad->random, words)], mad_random(&mad->random));
	}
	}
}

/* As fast as possible, in all cells in use: change a state as soon as it is seen. */
static void race(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	uint64_t until = mad_now_ns() + 20 * BURST_NS, kind = mad_below(&mad->random, 5), epoch = 0;
	while (mad_now_ns() < until) {
		mad_add(&mad->totals->ways[MAD_RACES], 1);
		for (size_t i = 0; i < mad->actives; i++) {
			uint64_t *cell = &peer->cells[mad->active[i]], old = ksm_load_relaxed(cell);
			enum ksm_cell_state state = ksm_cell_state(old), to = state;
			uint32_t generation = ksm_cell_generation(old);
			if (kind == 0 && (state == KSM_CELL_DYING || state == KSM_CELL_DYING_RAW))
				to = KSM_CELL_PUBLISHED;
			else if (kind == 1 && state == KSM_CELL_ALLOC)
				to = KSM_CELL_PUBLISHED;
			else if (kind == 2 && state == KSM_CELL_PUBLISHED && mad_below(&mad->random, 256) == 0)
				to = KSM_CELL_FREE;
			else if (kind == 3 && state != KSM_CELL_PUBLISHED)
				to = KSM_CELL_PUBLISHED;
			if (to != state)
				ksm_cas_seqcst(cell, old, ksm_cell_make(to, 0, 0, generation));
		}
		if (kind == 4) { /* nobody ever came */
			if (!epoch)
				epoch = ksm_load_relaxed(&peer->control->peer_epoch);
			ksm_store_relaxed(&peer->control->peer_epoch, epoch);
		}
	}
}

void mad_scribble(struct mad_state *mad, enum mad_way way)
{
	static void (*const scribbles[])(struct mad_state *) = {
		[MAD_WORDS] = scribble_words, [MAD_PAGES_] = scribble_pages, [MAD_HEADER] = scribble_header,
		[MAD_SLOTS] = scribble_slots, [MAD_CELLS] = scribble_cells,  [MAD_INDEX] = scribble_index,
	};
	uint64_t until = mad_now_ns() + BURST_NS;
	if (way == MAD_RACES) {
		race(mad);
		return;
	}
	/* Some bursts are a few words, some are many: most damage is seen only while something still works. */
	uint64_t count = 1ull << mad_below(&mad->random, way == MAD_PAGES_ ? 4 : 13);
	for (uint64_t i = 0; i < count && mad_now_ns() < until; i++) {
		scribbles[way](mad);
		mad_add(&mad->totals->ways[way], 1);
	}
}

/* ---- healing ------------------------------------------------------------------------------------------------ */

/* The bitmaps of the others are sealed: what they say of their owners is true, or was when those still lived. */
static void heal_slots(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	for (ksm_slotno slot = 0; slot < KSM_PEERS_MAX; slot++) {
		const struct ksm_bitmap *bitmap =
			slot == peer->seat.slot ? peer->seat.bitmap : peer->others[slot].bitmap;
		if (!bitmap)
			continue;
		ksm_store_relaxed(&ksm_peer_slot(peer, slot)->nonce, bitmap->nonce);
		ksm_store_relaxed(&ksm_peer_slot(peer, slot)->epoch, bitmap->slot_epoch);
	}
}

void mad_heal(struct mad_state *mad)
{
	struct ksm_peer *peer = peer_of(mad);
	struct ksm_control *control = peer->control;
	heal_slots(mad);
	control->magic = KSM_MAGIC;
	control->version = KSM_LAYOUT_VERSION;
	control->layout = ksm_layout_hash();
	memcpy(control->id, peer->seat.bitmap->id, sizeof(control->id));
	control->frames = peer->layout.frames;
	control->backing = KSM_BACKING_MEMFD;
	ksm_store_relaxed(&control->no_sweep, 0);
	ksm_store_relaxed(&control->slots_high, MAD_HONEST + 8);
	ksm_store_relaxed(&control->frames_high, peer->layout.frames);
	ksm_store_relaxed(&control->index_levels, 1);
	ksm_store_relaxed(&control->candidate_levels, 1);
	ksm_add_seqcst(&control->peer_epoch, 1);
	for (uint64_t frame = 0; frame < peer->layout.frames; frame++) {
		uint64_t cell = ksm_load_relaxed(&peer->cells[frame]);
		if (ksm_cell_state(cell) > KSM_CELL_DYING)
			ksm_store_relaxed(&peer->cells[frame], 0);
	}
	for (uint64_t i = 0; i < peer->layout.frames / KSM_CHUNK; i++)
		ksm_chunk_mark(peer, (ksm_frameno)(i * KSM_CHUNK));
	char *candidates = (char *)control + peer->layout.candidates;
	memset(candidates, 0, ksm_table_words(1) * sizeof(uint64_t));
}
