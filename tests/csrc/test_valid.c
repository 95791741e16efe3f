/* SPDX-License-Identifier: MIT */
/* What must hold (VALID-1 to 12): a healthy domain passes, and each kind of damage is found and named. */
#include "members.h"

#include "valid.h"

#define PAGES 4

/* Two peers; `a` has published three frames, has the first two mapped, and has announced a page. */
struct scene {
	struct ksm_member *a, *b;
	ksm_frameno frames[3];
	char *field;
};

static void check_says(struct ksm_member *member, enum ksm_valid_when when, const char *what)
{
	char why[256] = "";
	int r = ksm_domain_is_valid(&member->peer, when, why, sizeof(why));
	if (!what && r)
		FAIL("a healthy domain: %s %s", ksm_error_name(r), why);
	if (what && r != KSM_ECORRUPT)
		FAIL("%s: nothing was found (%s)", what, ksm_error_name(r));
	if (what && (strncmp(why, what, strlen(what)) || why[strlen(what)] != ':'))
		FAIL("%s: what was found is \"%s\"", what, why);
}

/* Damage that must be found whenever one looks. */
static void check_finds(struct scene *s, const char *what)
{
	check_says(s->a, KSM_VALID_ALWAYS, what);
	check_says(s->a, KSM_VALID_AT_REST, what);
	check_says(s->a, KSM_VALID_SWEPT, what);
}

static void check_is_well(struct scene *s)
{
	check_finds(s, NULL);
}

static void map_frame(struct scene *s, size_t page, ksm_frameno frame)
{
	CHECK_EQ(ksm_os_map_frames(s->field + page * KSM_PAGE_SIZE, KSM_PAGE_SIZE, s->a->peer.fds.store,
				   (uint64_t)frame << KSM_PAGE_SHIFT, true),
		 0);
}

static void unmap_page(struct scene *s, size_t page)
{
	CHECK_EQ(ksm_os_map_anon(s->field + page * KSM_PAGE_SIZE, KSM_PAGE_SIZE, true, false, NULL), 0);
}

static struct scene begin(void)
{
	struct scene s = {.a = members_join("d"), .b = members_join("d"), .field = kit_map(PAGES)};
	CHECK_EQ(members_know(s.a), 0);
	CHECK_EQ(members_know(s.b), 0);
	for (uint64_t i = 0; i < 3; i++) {
		char page[KSM_PAGE_SIZE];
		kit_fill(page, i + 1);
		s.frames[i] = members_publish(s.a, i + 1);
		ksm_index_insert(&s.a->index, &s.a->peer, ksm_page_digest(page), s.frames[i],
				 members_generation(s.a, s.frames[i]));
		ksm_candidate_add(&s.a->index, &s.a->peer, ksm_page_digest(page), s.field);
	}
	map_frame(&s, 0, s.frames[0]);
	map_frame(&s, 1, s.frames[1]);
	check_is_well(&s);
	return s;
}

static uint64_t *cell_of(struct scene *s, ksm_frameno frame)
{
	return &s->a->peer.cells[frame];
}

/* The cell says this, while one looks. */
static void check_cell(struct scene *s, ksm_frameno frame, uint64_t cell, const char *what)
{
	uint64_t good = *cell_of(s, frame);
	ksm_store_release(cell_of(s, frame), cell);
	check_finds(s, what);
	ksm_store_release(cell_of(s, frame), good);
	check_is_well(s);
}

/* Other bytes there, while one looks. */
static void check_bytes(struct scene *s, void *at, uint64_t value, size_t size, const char *what)
{
	uint64_t good = 0;
	memcpy(&good, at, size);
	CHECK(memcmp(at, &value, size));
	memcpy(at, &value, size);
	check_finds(s, what);
	memcpy(at, &good, size);
	check_is_well(s);
}

#define CHECK_VALUE(s, lvalue, value, what) check_bytes(s, &(lvalue), value, sizeof(lvalue), what)

/* ---- a healthy one ----------------------------------------------------------------------------------------------- */

TEST(looking_changes_nothing)
{
	struct scene s = begin();
	uint64_t control = kit_blocks(s.a->peer.fds.control), store = kit_blocks(s.a->peer.fds.store);
	uint64_t bitmap = kit_blocks(s.a->peer.seat.bitmap_fd);
	for (int i = 0; i < 3; i++)
		check_is_well(&s);
	check_says(s.b, KSM_VALID_SWEPT, NULL);
	CHECK_EQ(kit_blocks(s.a->peer.fds.control), control);
	CHECK_EQ(kit_blocks(s.a->peer.fds.store), store);
	CHECK_EQ(kit_blocks(s.a->peer.seat.bitmap_fd), bitmap);
}

static void merge_and_look(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind), *b = members_join_with("d", kind);
	struct ksm_region *regions[2];
	for (size_t i = 0; i < 2; i++) {
		struct ksm_member *m = i ? b : a;
		char *at = kit_map(64);
		for (size_t page = 0; page < 64; page++)
			kit_fill(at + page * KSM_PAGE_SIZE, page % 32 + 1);
		CHECK_EQ(members_know(m), 0);
		regions[i] = members_region(m, at, 64);
		CHECK_GT(members_merge(m), 0);
		CHECK_EQ(members_know(a), 0);
		check_says(a, KSM_VALID_AT_REST, NULL);
	}
	CHECK_EQ(members_frames(a), 32);
	CHECK_GE(members_sweep(a), 0);
	check_says(a, KSM_VALID_SWEPT, NULL);
	members_unmap(a, regions[0]);
	check_says(a, KSM_VALID_AT_REST, NULL);
	members_unmap(b, regions[1]);
	check_says(b, KSM_VALID_AT_REST, NULL);
	CHECK_EQ(members_sweep(b), 32);
	check_says(b, KSM_VALID_SWEPT, NULL);
}

TEST(a_domain_at_work_is_well)
{
	members_on_each_barrier(merge_and_look);
}

TEST(without_all_bitmaps_nothing_is_said)
{
	struct scene s = begin();
	char why[256];
	struct ksm_other *other = &s.a->peer.others[s.b->peer.seat.slot];
	const struct ksm_bitmap *bitmap = other->bitmap;
	other->bitmap = NULL;
	CHECK_EQ(ksm_domain_is_valid(&s.a->peer, KSM_VALID_ALWAYS, why, sizeof(why)), -EAGAIN);
	other->bitmap = bitmap;
	s.a->peer.living_known = false;
	CHECK_EQ(ksm_domain_is_valid(&s.a->peer, KSM_VALID_ALWAYS, why, sizeof(why)), -EAGAIN);
	s.a->peer.living_known = true;
	check_is_well(&s);
}

/* ---- always -------------------------------------------------------------------------------------------------------- */

/* Another file in a descriptor's place, while one looks. */
static void check_file(struct scene *s, int *fd, int other)
{
	int good = *fd;
	CHECK_SYS(other);
	*fd = other;
	check_finds(s, "VALID-1");
	*fd = good;
	close(other);
	check_is_well(s);
}

TEST(valid_1_one_domain)
{
	struct scene s = begin();
	struct ksm_peer *peer = &s.a->peer;
	CHECK_VALUE(&s, peer->control->magic, 1, "VALID-1");
	CHECK_VALUE(&s, peer->control->version, 77, "VALID-1");
	CHECK_VALUE(&s, peer->control->layout, 77, "VALID-1");
	CHECK_VALUE(&s, peer->control->frames, 77, "VALID-1");

	int unsealed = ksm_os_memfd("store");
	CHECK_SYS(ftruncate(unsealed, (off_t)(peer->layout.frames << KSM_PAGE_SHIFT)));
	check_file(&s, &peer->fds.store, unsealed);
	check_file(&s, &peer->fds.store, ksm_os_memfd("a small store"));
	check_file(&s, &peer->fds.control, ksm_os_memfd("a small control"));
	unsealed = ksm_os_memfd("control");
	CHECK_SYS(ftruncate(unsealed, (off_t)peer->layout.total));
	check_file(&s, &peer->fds.control, unsealed);

	uint8_t id[16], other[16] = {1};
	off_t at = offsetof(struct ksm_domain_file, id);
	CHECK_EQ(pread(peer->fds.file, id, sizeof(id), at), sizeof(id));
	CHECK_EQ(pwrite(peer->fds.file, other, sizeof(other), at), sizeof(other));
	check_finds(&s, "VALID-1");
	CHECK_EQ(pwrite(peer->fds.file, id, sizeof(id), at), sizeof(id));
	check_is_well(&s);
}

TEST(valid_2_counts_lie_in_their_bounds)
{
	struct scene s = begin();
	struct ksm_control *control = s.a->peer.control;
	CHECK_VALUE(&s, control->frames_high, s.a->peer.layout.frames + 1, "VALID-2");
	CHECK_VALUE(&s, control->frames_high, s.frames[0], "VALID-2"); /* no sweep comes by */
	CHECK_VALUE(&s, control->slots_high, KSM_PEERS_MAX + 1, "VALID-2");
	CHECK_VALUE(&s, control->index_levels, 0, "VALID-2");
	CHECK_VALUE(&s, control->index_levels, 99, "VALID-2");
	CHECK_VALUE(&s, control->candidate_levels, 0, "VALID-2");
	CHECK_VALUE(&s, control->candidate_levels, 99, "VALID-2");
}

TEST(valid_3_a_cell_is_in_one_of_its_states)
{
	struct scene s = begin();
	uint32_t slot = s.b->peer.seat.slot, epoch = s.b->peer.seat.epoch;
	ksm_frameno free = s.frames[2] + 1;
	CHECK_EQ(members_cell(s.a, free), KSM_CELL_FREE);
	for (unsigned state = KSM_CELL_DYING_RAW + 1; state < 8; state++)
		check_cell(&s, free, (uint64_t)state << KSM_CELL_STATE_SHIFT, "VALID-3");
	check_cell(&s, free, ksm_cell_make(KSM_CELL_FREE, slot, epoch, 0), "VALID-3");
	check_cell(&s, s.frames[0], ksm_cell_make(KSM_CELL_PUBLISHED, slot, epoch, 0), "VALID-3");
	for (unsigned state = KSM_CELL_ALLOC; state <= KSM_CELL_DYING_RAW; state++) {
		if (state == KSM_CELL_PUBLISHED)
			continue;
		check_cell(&s, free, ksm_cell_make(state, 900, 1, 0), "VALID-3"); /* nobody ever had it */
		check_cell(&s, free, ksm_cell_make(state, slot, epoch + 1, 0), "VALID-3");
		check_cell(&s, free, ksm_cell_make(state, slot, 0, 0), "VALID-3");
		if (state != KSM_CELL_DYING_RAW)
			check_cell(&s, free, ksm_cell_make(state, KSM_CELL_NOBODY, 0, 0), "VALID-3");
	}
}

TEST(valid_4_a_published_frame_has_its_bytes)
{
	struct scene s = begin();
	struct ksm_peer *peer = &s.a->peer;
	uint64_t offset = (uint64_t)s.frames[2] << KSM_PAGE_SHIFT;
	char page[KSM_PAGE_SIZE];
	kit_fill(page, 3);
	page[2000] ^= 1;
	CHECK_EQ(ksm_os_pwrite(peer->fds.store, page, sizeof(page), offset), 0);
	check_finds(&s, "VALID-4");
	CHECK_EQ(ksm_os_punch(peer->fds.store, offset, KSM_PAGE_SIZE), 0);
	check_finds(&s, "VALID-4");
	kit_fill(page, 3);
	CHECK_EQ(ksm_os_pwrite(peer->fds.store, page, sizeof(page), offset), 0);
	check_is_well(&s);
	CHECK_VALUE(&s, peer->checks[s.frames[2]], peer->checks[s.frames[2]] ^ 1, "VALID-4");
}

TEST(valid_5_a_free_frame_takes_no_memory)
{
	struct scene s = begin();
	uint64_t offset = (uint64_t)(s.frames[2] + 5) << KSM_PAGE_SHIFT;
	CHECK_EQ(ksm_os_pwrite(s.a->peer.fds.store, "x", 1, offset), 0);
	check_finds(&s, "VALID-5");
	CHECK_EQ(ksm_os_punch(s.a->peer.fds.store, offset, KSM_PAGE_SIZE), 0);
	check_is_well(&s);
}

TEST(valid_6_what_is_mapped_is_referred_to)
{
	struct scene s = begin();
	ksm_frameno frame;
	map_frame(&s, 2, s.frames[2] + 1); /* FREE, and nobody's bit is set */
	check_finds(&s, "VALID-6");
	unmap_page(&s, 2);
	check_is_well(&s);
	/* Published, and nobody's bit is set: the bit went before the mapping. */
	members_put(s.a, s.frames[1]);
	check_says(s.a, KSM_VALID_ALWAYS, "VALID-6");
	unmap_page(&s, 1);
	check_says(s.a, KSM_VALID_AT_REST, NULL);
	CHECK_EQ(members_sweep(s.a), 1);
	check_is_well(&s);
	/* Allocated only: its bytes may still change. */
	ksm_merge_lock(&s.a->peer);
	CHECK_EQ(ksm_frame_alloc(&s.a->peer, KSM_NO_FRAME, &frame), 0);
	check_says(s.a, KSM_VALID_ALWAYS, NULL);
	map_frame(&s, 1, frame);
	check_says(s.a, KSM_VALID_ALWAYS, "VALID-6");
	unmap_page(&s, 1);
	ksm_frame_abandon(&s.a->peer, frame);
	ksm_merge_unlock(&s.a->peer);
	check_is_well(&s);
}

TEST(valid_7_a_bitmap_is_its_owners)
{
	struct scene s = begin();
	struct ksm_peer *a = &s.a->peer;
	struct ksm_bitmap *bitmaps[] = {a->seat.bitmap, s.b->peer.seat.bitmap}; /* our own, another's */
	for (size_t i = 0; i < KSM_COUNT(bitmaps); i++) {
		CHECK_VALUE(&s, bitmaps[i]->magic, 1, "VALID-7");
		CHECK_VALUE(&s, bitmaps[i]->slot, 77, "VALID-7");
		CHECK_VALUE(&s, bitmaps[i]->nonce, 77, "VALID-7");
		CHECK_VALUE(&s, bitmaps[i]->frames, 77, "VALID-7");
		CHECK_VALUE(&s, bitmaps[i]->high, a->layout.frames + 1, "VALID-7");
		CHECK_VALUE(&s, bitmaps[i]->id[3], (uint8_t)~bitmaps[i]->id[3], "VALID-7");
	}
	/* Our bits and our counts say the same. */
	CHECK_VALUE(&s, a->counts[s.frames[0]], 0, "VALID-7");
	CHECK_VALUE(&s, a->counts[s.frames[2] + 3], 1, "VALID-7");
	ksm_bit_set(a, s.frames[2] + 3);
	check_finds(&s, "VALID-7");
	ksm_bit_clear(a, s.frames[2] + 3);
	check_is_well(&s);
}

static uint64_t *find_word(const struct ksm_table *table)
{
	for (uint64_t i = 0; i < ksm_table_words(1); i++)
		if (table->words[i])
			return &table->words[i];
	FAIL("there is no word in the table");
}

TEST(valid_8_words_promise_what_is)
{
	struct scene s = begin();
	struct ksm_peer *peer = &s.a->peer;
	struct ksm_table *tables[] = {&s.a->index.frames, &s.a->index.candidates};
	for (size_t i = 0; i < KSM_COUNT(tables); i++) {
		uint64_t *word = find_word(tables[i]);
		uint64_t page = (uint64_t)(word - tables[i]->words) / (KSM_PAGE_SIZE / sizeof(uint64_t));
		CHECK_EQ(*tables[i]->levels_now, 1);
		CHECK_VALUE(&s, tables[i]->words[ksm_table_words(1) + 9], *word, "VALID-8");
		CHECK_VALUE(&s, tables[i]->touched[page / 64], tables[i]->touched[page / 64] & ~(1ull << (page % 64)),
			    "VALID-8");
	}
	uint64_t *word = find_word(tables[0]);
	uint64_t tag = *word >> 32 << 32;
	CHECK_VALUE(&s, *word, tag | UINT32_MAX, "VALID-8");         /* no frame of the store */
	CHECK_VALUE(&s, *word, tag | (s.frames[2] + 2u), "VALID-8"); /* FREE, in this very generation */
	CHECK_VALUE(&s, *word, *word | 5ull << 32, "VALID-8");       /* of a life to come */
	uint64_t *candidate = find_word(tables[1]);
	CHECK_VALUE(&s, *candidate, *candidate & ((1ull << 26) - 1), "VALID-8"); /* without a tag */
	CHECK_VALUE(&s, *candidate, *candidate | 0x3ffull << 15, "VALID-8");     /* of a slot that nobody ever had */
	/* Nobody finds a frame before it is published. */
	ksm_frameno frame;
	ksm_merge_lock(peer);
	CHECK_EQ(ksm_frame_alloc(peer, KSM_NO_FRAME, &frame), 0);
	check_says(s.a, KSM_VALID_ALWAYS, NULL);
	CHECK_EQ(frame, s.frames[2] + 1);
	uint64_t good = *word;
	*word = tag | (frame + 1u);
	check_says(s.a, KSM_VALID_ALWAYS, "VALID-8");
	*word = good;
	ksm_frame_abandon(peer, frame);
	ksm_merge_unlock(peer);
	check_is_well(&s);
}

/* ---- at rest --------------------------------------------------------------------------------------------------------- */

TEST(valid_9_bits_are_set_for_published_frames)
{
	struct scene s = begin();
	ksm_frameno frame = s.frames[2] + 1;
	ksm_bit_set(&s.b->peer, frame); /* FREE; in the middle of an allocation that may be */
	check_says(s.a, KSM_VALID_ALWAYS, NULL);
	check_says(s.a, KSM_VALID_AT_REST, "VALID-9");
	ksm_bit_clear(&s.b->peer, frame);
	check_is_well(&s);
	/* Allocated by one who lives. */
	ksm_merge_lock(&s.b->peer);
	CHECK_EQ(ksm_frame_alloc(&s.b->peer, KSM_NO_FRAME, &frame), 0);
	check_says(s.a, KSM_VALID_ALWAYS, NULL);
	check_says(s.a, KSM_VALID_AT_REST, "VALID-9");
	ksm_frame_abandon(&s.b->peer, frame);
	ksm_merge_unlock(&s.b->peer);
	check_is_well(&s);
}

TEST(valid_10_nothing_is_forgotten)
{
	struct scene s = begin();
	members_put(s.a, s.frames[2]);
	check_says(s.a, KSM_VALID_AT_REST, NULL);
	CHECK(ksm_chunk_unmark(&s.a->peer, s.frames[2] >> KSM_CHUNK_SHIFT));
	check_says(s.a, KSM_VALID_ALWAYS, NULL);
	check_says(s.a, KSM_VALID_AT_REST, "VALID-10");
	ksm_chunk_mark(&s.a->peer, s.frames[2]);
	CHECK_EQ(members_sweep(s.a), 1);
	check_is_well(&s);
	/* What a dead one was in the middle of. */
	uint32_t slot = s.b->peer.seat.slot, epoch = s.b->peer.seat.epoch;
	members_leave(s.b);
	CHECK_EQ(members_know(s.a), 0);
	for (uint64_t chunk = 0; chunk < 64; chunk++)
		ksm_chunk_unmark(&s.a->peer, chunk);
	check_is_well(&s);
	ksm_store_release(cell_of(&s, s.frames[2]),
			  ksm_cell_make(KSM_CELL_DYING, slot, epoch, members_generation(s.a, s.frames[2])));
	check_says(s.a, KSM_VALID_ALWAYS, NULL);
	check_says(s.a, KSM_VALID_AT_REST, "VALID-10");
	ksm_chunk_mark(&s.a->peer, s.frames[2]);
	check_says(s.a, KSM_VALID_AT_REST, NULL);
	CHECK_EQ(members_sweep(s.a), 1);
	check_is_well(&s);
}

/* ---- swept ------------------------------------------------------------------------------------------------------------- */

TEST(valid_11_a_sweep_leaves_nothing)
{
	struct scene s = begin();
	members_put(s.a, s.frames[2]);
	check_says(s.a, KSM_VALID_AT_REST, NULL);
	check_says(s.a, KSM_VALID_SWEPT, "VALID-11");
	/* Not even what belongs to nobody. */
	ksm_store_release(cell_of(&s, s.frames[2]),
			  ksm_cell_make(KSM_CELL_DYING_RAW, KSM_CELL_NOBODY, 0, members_generation(s.a, s.frames[2])));
	check_says(s.a, KSM_VALID_AT_REST, NULL);
	check_says(s.a, KSM_VALID_SWEPT, "VALID-11");
	/* But what somebody refers to after all may wait. */
	ksm_bit_set(&s.b->peer, s.frames[2]);
	check_says(s.a, KSM_VALID_SWEPT, NULL);
	ksm_bit_clear(&s.b->peer, s.frames[2]);
	CHECK_EQ(members_sweep(s.a), 1);
	check_is_well(&s);
}

TEST(valid_12_nobody_holds_the_join_lock)
{
	struct scene s = begin();
	int file = ksm_os_reopen(s.a->peer.fds.file, s.a->peer.fds.directory, "domain");
	CHECK_SYS(file);
	CHECK_EQ(ksm_os_lock_try(file, KSM_LOCK_JOIN), 0);
	check_says(s.a, KSM_VALID_AT_REST, NULL);
	check_says(s.a, KSM_VALID_SWEPT, "VALID-12");
	ksm_os_unlock(file, KSM_LOCK_JOIN);
	check_is_well(&s);
	close(file);
}
