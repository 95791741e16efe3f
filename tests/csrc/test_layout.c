/* SPDX-License-Identifier: MIT */
/* Every byte that processes share: cells, and where things lie in the control memfd. */
#include "kit.h"

#include "layout.h"

TEST(cells_hold_what_was_put_in)
{
	uint64_t state = 1;
	for (int i = 0; i < 100000; i++) {
		enum ksm_cell_state what = (enum ksm_cell_state)(kit_random(&state) % 5);
		ksm_slotno slot = kit_random(&state) & KSM_CELL_SLOT_MASK;
		uint32_t epoch = kit_random(&state) & KSM_CELL_EPOCH_MASK, generation = (uint32_t)kit_random(&state);
		uint64_t cell = ksm_cell_make(what, slot, epoch, generation);
		CHECK_EQ(ksm_cell_state(cell), what);
		CHECK_EQ(ksm_cell_slot(cell), slot);
		CHECK_EQ(ksm_cell_epoch(cell), epoch);
		CHECK_EQ(ksm_cell_generation(cell), generation);
	}
	CHECK_EQ(ksm_cell_make(KSM_CELL_FREE, 0, 0, 0), 0); /* fresh memory is free frames */
	/* What does not fit spoils nothing else. */
	uint64_t cell = ksm_cell_make(KSM_CELL_ALLOC, UINT32_MAX, UINT32_MAX, 7);
	CHECK_EQ(ksm_cell_state(cell), KSM_CELL_ALLOC);
	CHECK_EQ(ksm_cell_generation(cell), 7);
	CHECK_GE(KSM_CELL_SLOT_MASK, KSM_PEERS_MAX);
	CHECK_GE(KSM_CELL_NOBODY, KSM_PEERS_MAX);
}

TEST(parts_lie_apart_and_aligned)
{
	static const uint64_t capacities[] = {
		1, 63, KSM_CHUNK - 1, KSM_CHUNK, KSM_CHUNK + 1, 65536, 100000, 1u << 24, KSM_NO_FRAME - KSM_CHUNK};
	for (size_t i = 0; i < KSM_COUNT(capacities); i++) {
		uint64_t frames = capacities[i];
		struct ksm_layout at;
		ksm_layout_compute(frames, &at);
		uint64_t table = ksm_table_words(ksm_table_levels_for(frames)) * 8;
		const struct {
			uint64_t at, nbytes;
		} parts[] = {
			{0, sizeof(struct ksm_control)},
			{at.slots, (uint64_t)KSM_PEERS_MAX * KSM_SLOT_SIZE},
			{at.chunks, (frames / KSM_CHUNK + 64) / 64 * 8},
			{at.cells, frames * 8},
			{at.checks, frames * 4},
			{at.index, table},
			{at.candidates, table},
			{at.total, 0},
		};
		CHECK_EQ(at.frames, frames);
		for (size_t part = 0; part + 1 < KSM_COUNT(parts); part++) {
			CHECK_EQ(parts[part].at % KSM_PAGE_SIZE, 0);
			CHECK_LE(parts[part].at + parts[part].nbytes, parts[part + 1].at);
		}
		CHECK_EQ(at.total % KSM_PAGE_SIZE, 0);
		/* The word of the last frame's chunk is inside. */
		CHECK_LE(at.chunks + ((frames - 1) >> KSM_CHUNK_SHIFT) / 64 * 8 + 8, at.cells);
	}
	CHECK_GE(KSM_SLOT_SIZE, sizeof(struct ksm_slot));
	CHECK_EQ(KSM_SLOT_SIZE % 8, 0);
}

TEST(tables_hold_every_frame)
{
	for (uint64_t frames = 1; frames < (1ull << 32); frames = frames * 3 + 1) {
		unsigned levels = ksm_table_levels_for(frames);
		CHECK_GE(levels, 1);
		CHECK_LE(levels, KSM_TABLE_LEVELS);
		CHECK(ksm_table_words(levels) >= 2 * frames || levels == KSM_TABLE_LEVELS);
	}
	CHECK_EQ(ksm_table_words(0), 0);
	for (unsigned level = 0; level < KSM_TABLE_LEVELS; level++) {
		CHECK_EQ(ksm_table_words(level + 1) - ksm_table_words(level), 1ull << ksm_table_level_shift(level));
		CHECK_GE(ksm_table_level_shift(level), level ? ksm_table_level_shift(level - 1) + 1 : 12);
	}
}

TEST(the_locks_lie_beyond_the_file)
{
	CHECK_GT(KSM_LOCK_JOIN, sizeof(struct ksm_domain_file));
	CHECK_LE(sizeof(struct ksm_domain_file), KSM_PAGE_SIZE);
	CHECK_GT(KSM_LOCK_LIVENESS, KSM_LOCK_JOIN);
	CHECK_EQ(KSM_LOCK_LIVENESS, (1ull << 32) + 64); /* in every version */
	CHECK_EQ(ksm_layout_hash(), ksm_layout_hash());
}
