/* SPDX-License-Identifier: MIT */
/*
 * DOC: Index and candidates
 *
 * Two tables (table.c) whose words are
 *
 *    index       │ tag 22 bits │ generation 10 bits │ frame + 1, 32 bits │
 *    candidate   │ tag 38 bits │ claimed 1 │ slot 10 bits │ slot epoch 3 bits │ page 12 bits │
 *
 * An index word says "a frame whose page has this digest"; it is stale when the frame is not published or has
 * another generation, and then it may be overwritten. A candidate says "this peer has a cold page with this
 * digest", nothing else: no content, and of the address only twelve hashed bits, by which a page knows its own
 * word again. Whoever finds another's candidate for its own page promotes
 * its own page to a frame; the other finds the frame in the index when it looks next. No process ever reads
 * another's private memory.
 *
 * Before writing a frame a peer turns the candidate into a claim of its own, so that two do not write
 * the same content. To others a claim is a miss, looked at again in the next pass, never a wait: the claimer
 * may be stopped. A dead one's claim, like its candidates, counts as an empty word. Whoever then can have no frame
 * (it is not dumpable, the store is full) leaves a candidate of its own in that place: others may be able to.
 *
 * INDEX-1. Words only propose. Whatever they say, a frame is taken (FRAME-3) and compared before it is mapped.
 * INDEX-2. A frame appears here after it is published, never before.
 *
 * The look-ups are made by the scanner under the merge lock of its own process; others' scanners work on the
 * same words at the same time.
 */
#include "index.h"

#include "atomic.h"

#define INDEX_GENERATION_MASK 0x3ffu
#define CLAIMED (1ull << 25)
#define TAG_SHIFT 26

void ksm_index_attach(struct ksm_index *index, const struct ksm_peer *peer)
{
	char *base = (char *)peer->control;
	unsigned levels = ksm_table_levels_for(peer->layout.frames);
	index->frames = (struct ksm_table){
		.words = (uint64_t *)(base + peer->layout.index),
		.touched = (uint64_t *)(base + peer->layout.index_touched),
		.levels_now = &peer->control->index_levels,
		.levels_max = levels,
		.words_there = ksm_peer_sparse(peer, KSM_SPARSE_INDEX, peer->layout.index),
		.touched_there = ksm_peer_sparse(peer, KSM_SPARSE_TOUCHED, peer->layout.index_touched),
	};
	index->candidates = (struct ksm_table){
		.words = (uint64_t *)(base + peer->layout.candidates),
		.touched = (uint64_t *)(base + peer->layout.candidates_touched),
		.levels_now = &peer->control->candidate_levels,
		.levels_max = levels,
		.words_there = ksm_peer_sparse(peer, KSM_SPARSE_CANDIDATES, peer->layout.candidates),
		.touched_there = ksm_peer_sparse(peer, KSM_SPARSE_TOUCHED, peer->layout.index_touched),
	};
}

void ksm_index_prefetch(const struct ksm_index *index, uint64_t digest)
{
	ksm_table_prefetch(&index->frames, digest);
	ksm_table_prefetch(&index->candidates, digest);
}

/* ---- frames ---------------------------------------------------------------------------------------- */

static uint64_t index_word(uint64_t digest, ksm_frameno frame, uint32_t generation)
{
	uint64_t tag = digest >> (KSM_DIGEST_BITS - 22);
	return tag << 42 | (uint64_t)(generation & INDEX_GENERATION_MASK) << 32 | (frame + 1u);
}

static ksm_frameno index_frame(uint64_t word)
{
	return (ksm_frameno)word - 1u;
}

static uint32_t index_generation(uint64_t word)
{
	return (uint32_t)(word >> 32) & INDEX_GENERATION_MASK;
}

static bool index_is_stale(void *context, uint64_t word)
{
	return !ksm_frame_looks_published(context, index_frame(word), index_generation(word), INDEX_GENERATION_MASK);
}

static bool index_word_fits(const struct ksm_peer *peer, uint64_t word, uint64_t digest)
{
	return word && word >> 42 == digest >> (KSM_DIGEST_BITS - 22) &&
	       ksm_frame_looks_published(peer, index_frame(word), index_generation(word), INDEX_GENERATION_MASK) &&
	       ksm_frame_looks_like(peer, index_frame(word), digest);
}

ksm_frameno ksm_index_take(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, ksm_frameno prefer)
{
	uint64_t best = 0;
	const struct ksm_table_view *view = ksm_table_view(&index->frames, digest);
	for (unsigned n = 0; n < view->count; n++) {
		for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++) {
			uint64_t word = ksm_load_acquire(&view->buckets[n][i]);
			if (!index_word_fits(peer, word, digest))
				continue;
			/* the preferred one, else the first of a run, if there is one */
			if (index_frame(word) == prefer || (!(best && index_frame(best) == prefer) &&
							    (!best || index_frame(word) < index_frame(best))))
				best = word;
		}
	}
	if (best && ksm_frame_take(peer, index_frame(best), index_generation(best), INDEX_GENERATION_MASK))
		return index_frame(best);
	return KSM_NO_FRAME;
}

void ksm_index_insert(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, ksm_frameno frame,
		      uint32_t generation)
{
	ksm_table_insert(&index->frames, digest, index_word(digest, frame, generation), index_is_stale, peer);
	ksm_add_seqcst(&peer->control->changes, 1); /* after it can be found: see ksm_slot.quiet_at */
}

int ksm_index_make_room(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest)
{
	return ksm_table_make_room(&index->frames, digest, index_is_stale, peer);
}

/* ---- candidates ------------------------------------------------------------------------------------- */

static uint64_t candidate_tag(uint64_t digest)
{
	uint64_t tag = digest >> (KSM_DIGEST_BITS - 64 + TAG_SHIFT);
	return (tag ? tag : 1) << TAG_SHIFT; /* never 0: an empty word is */
}

static uint64_t candidate_word(const struct ksm_peer *peer, uint64_t digest, const void *page)
{
	uint64_t hashed = ((uint64_t)((uintptr_t)page >> KSM_PAGE_SHIFT) * 0x9e3779b97f4a7c15ull) >> 52;
	return candidate_tag(digest) | (uint64_t)(peer->seat.slot & 0x3ff) << 15 | (peer->seat.epoch & 7) << 12 |
	       hashed;
}

static bool owner_is_living(const struct ksm_peer *peer, uint64_t word)
{
	ksm_slotno slot = (ksm_slotno)(word >> 15 & 0x3ff);
	const struct ksm_slot *owner = ksm_peer_slot(peer, slot);
	if (!owner)
		return false;
	uint32_t epoch = ksm_load_relaxed(&owner->epoch);
	if ((epoch ^ (word >> 12)) & 7)
		return false;
	/* Somebody came whom we have not listed yet: it may be that one, and its claim is not to be taken over. */
	return ksm_peer_is_living(peer, slot, epoch) ||
	       ksm_load_seqcst(&peer->control->peer_epoch) != peer->living_epoch;
}

/* Ours, whatever page of ours it was. */
static bool owner_is_self(const struct ksm_peer *peer, uint64_t word)
{
	return ((word ^ candidate_word(peer, 0, NULL)) >> 12 & 0x1fff) == 0;
}

static bool candidate_is_stale(void *context, uint64_t word)
{
	return !owner_is_living(context, word);
}

/* Calls visit for every word with this digest's tag, claimed or not, until one returns true. */
static bool candidates_visit(struct ksm_index *index, uint64_t digest,
			     bool (*visit)(void *context, uint64_t *at, uint64_t word), void *context)
{
	const struct ksm_table_view *view = ksm_table_view(&index->candidates, digest);
	uint64_t tag = candidate_tag(digest);
	for (unsigned n = 0; n < view->count; n++) {
		for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++) {
			uint64_t *at = &view->buckets[n][i], word = ksm_load_acquire(at);
			if ((word ^ tag) >> TAG_SHIFT == 0 && visit(context, at, word))
				return true;
		}
	}
	return false;
}

struct candidate_search {
	const struct ksm_peer *peer;
	uint64_t mine;
	enum ksm_candidate found;
};

static bool visit_find(void *context, uint64_t *at KSM_UNUSED, uint64_t word)
{
	struct candidate_search *search = context;
	if (word == search->mine)
		search->found = KSM_MAX(search->found, KSM_CANDIDATE_OURS);
	else if (owner_is_self(search->peer, word))
		search->found = KSM_MAX(search->found, KSM_CANDIDATE_OTHER); /* a claim of ours is one we gave up */
	else if (owner_is_living(search->peer, word))
		search->found = KSM_MAX(search->found, word & CLAIMED ? KSM_CANDIDATE_CLAIMED : KSM_CANDIDATE_OTHER);
	return search->found == KSM_CANDIDATE_CLAIMED;
}

enum ksm_candidate ksm_candidate_find(struct ksm_index *index, const struct ksm_peer *peer, uint64_t digest,
				      const void *page)
{
	struct candidate_search search = {peer, candidate_word(peer, digest, page), KSM_CANDIDATE_NONE};
	candidates_visit(index, digest, visit_find, &search);
	return search.found;
}

void ksm_candidate_add(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, const void *page)
{
	ksm_table_insert(&index->candidates, digest, candidate_word(peer, digest, page), candidate_is_stale, peer);
	ksm_add_seqcst(&peer->control->changes, 1);
}

static bool visit_remove(void *context, uint64_t *at, uint64_t word)
{
	uint64_t mine = *(uint64_t *)context;
	return word == mine && ksm_cas_seqcst(at, word, 0);
}

void ksm_candidate_remove(struct ksm_index *index, const struct ksm_peer *peer, uint64_t digest, const void *page)
{
	uint64_t mine = candidate_word(peer, digest, page);
	candidates_visit(index, digest, visit_remove, &mine);
}

static bool visit_claim(void *context, uint64_t *at, uint64_t word)
{
	struct candidate_search *search = context;
	if (word & CLAIMED && !owner_is_self(search->peer, word) && owner_is_living(search->peer, word))
		return false;
	return ksm_cas_seqcst(at, word, search->mine | CLAIMED);
}

static bool visit_rival(void *context, uint64_t *at KSM_UNUSED, uint64_t word)
{
	const struct ksm_peer *peer = context;
	return (word & CLAIMED) && !owner_is_self(peer, word) && owner_is_living(peer, word);
}

bool ksm_candidate_claim(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, const void *page)
{
	struct candidate_search search = {peer, candidate_word(peer, digest, page), KSM_CANDIDATE_NONE};
	if (!candidates_visit(index, digest, visit_claim, &search))
		return false;
	/* Two peers may have said they have it, and two others claimed one word each: of them at least one sees the
	 * other here, for a claim is a full fence. */
	if (!candidates_visit(index, digest, visit_rival, peer))
		return true;
	ksm_candidate_unclaim(index, peer, digest, page);
	return false;
}

void ksm_candidate_unclaim(struct ksm_index *index, const struct ksm_peer *peer, uint64_t digest, const void *page)
{
	uint64_t claimed = candidate_word(peer, digest, page) | CLAIMED;
	candidates_visit(index, digest, visit_remove, &claimed);
}

static bool visit_release(void *context, uint64_t *at, uint64_t word)
{
	uint64_t mine = *(uint64_t *)context;
	return word == (mine | CLAIMED) && ksm_cas_seqcst(at, word, mine);
}

static bool visit_own(void *context, uint64_t *at KSM_UNUSED, uint64_t word)
{
	return word == *(uint64_t *)context;
}

void ksm_candidate_release(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, const void *page,
			   bool is_news)
{
	uint64_t mine = candidate_word(peer, digest, page);
	if (candidates_visit(index, digest, visit_own, &mine)) /* one is enough */
		ksm_candidate_unclaim(index, peer, digest, page);
	else if (candidates_visit(index, digest, visit_release, &mine) && is_news)
		ksm_add_seqcst(&peer->control->changes, 1);
}

/* ---- for debug builds -------------------------------------------------------------------------------- */

bool ksm_index_word_is_valid(const struct ksm_peer *peer, uint64_t word)
{
	ksm_frameno frame = index_frame(word);
	if (frame >= peer->layout.frames)
		return false;
	uint64_t cell = ksm_load_acquire(&peer->cells[frame]);
	uint32_t generation = ksm_cell_generation(cell);
	if (generation > INDEX_GENERATION_MASK || generation != index_generation(word))
		return generation >= index_generation(word);                                    /* of an earlier life */
	return ksm_cell_state(cell) != KSM_CELL_FREE && ksm_cell_state(cell) != KSM_CELL_ALLOC; /* INDEX-2 */
}

bool ksm_candidate_word_is_valid(const struct ksm_peer *peer, uint64_t word)
{
	return word >> TAG_SHIFT && (word >> 15 & 0x3ff) < ksm_load_acquire(&peer->control->slots_high);
}
