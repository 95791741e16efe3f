/* SPDX-License-Identifier: MIT */
/*
 * layout.h: every byte that processes share. Offsets, never pointers. Each field says who writes it, in
 * what order, and what it means after the writer's death.
 *
 *   control memfd (mapped shared and writable by every peer; sealed against resizing)
 *   ┌──────────────┬────────────────────┬──────────────┬──────────────┬─────────────┬──────────┬────────────┐
 *   │ struct       │ struct ksm_slot    │ dirty chunks │ cells        │ checks      │ index    │ candidates │
 *   │ ksm_control  │ [KSM_PEERS_MAX]    │ 1 bit each   │ 8 B a frame  │ 4 B a frame │ levels   │ levels     │
 *   └──────────────┴────────────────────┴──────────────┴──────────────┴─────────────┴──────────┴────────────┘
 *   sparse: what nobody touched takes no memory
 *
 *   bitmap memfd (one a peer; its owner maps it writable, then seals it: others can only read)
 *   ┌───────────────────┬───────────────────────────────────┬──────────────────────────────────────────┐
 *   │ struct ksm_bitmap │ one bit a frame, in 64-bit words: │ one bit a frame:                         │
 *   │ (one page)        │ its owner refers to it; valid     │ its owner is writing or freeing it;      │
 *   │                   │ below ksm_bitmap.high             │ there are ksm_bitmap.busy such frames    │
 *   └───────────────────┴───────────────────────────────────┴──────────────────────────────────────────┘
 *
 *   domain file in the rendezvous directory (read and written by pread and pwrite, never mapped)
 *   ┌────────────────────────┐ 0
 *   │ struct ksm_domain_file │
 *   └────────────────────────┘ one page
 *     2^32 + 0                 join lock (OFD); also taken to write settings
 *     2^32 + 64 + slot         liveness locks (OFD), in the same place in every version of the layout
 *     2^52 + slot · 2^40 + nonce
 *                              incarnation locks (OFD): who it is that lives there, where nobody can scribble
 */
#ifndef KSM_LAYOUT_H
#define KSM_LAYOUT_H

#include "base.h"
#include "ksmalloc.h"

#define KSM_LAYOUT_VERSION 2u
#define KSM_MAGIC 0x636f6c6c616d736bull /* "ksmalloc" */

/* ---- cells: the life of a frame ---------------------------------------------------------------- */

/*
 * A cell is one 64-bit word, changed by compare-and-swap only, so that a crash leaves it before or after.
 *
 *    63      61 60                    47 46                  32 31                                 0
 *   ┌──────────┬────────────────────────┬──────────────────────┬────────────────────────────────────┐
 *   │ state    │ owner's slot           │ owner's slot epoch   │ generation                         │
 *   └──────────┴────────────────────────┴──────────────────────┴────────────────────────────────────┘
 *
 *   FREE ──▶ ALLOC(owner) ──▶ PUBLISHED ──▶ DYING(owner) ──▶ FREE, generation + 1
 *              │   ▲                            │ ▲ │
 *              └───┴── back to FREE (no space)  └─┘ └── back to PUBLISHED (somebody refers to it)
 *
 * The owner of ALLOC and DYING is a slot and its epoch, so that a dead one's frame can be found and taken over.
 */
enum ksm_cell_state {
	KSM_CELL_FREE = 0,
	KSM_CELL_ALLOC = 1,
	KSM_CELL_PUBLISHED = 2,
	KSM_CELL_DYING = 3, /* was PUBLISHED, and is being freed */
	/* Taken over from a dead owner, who may have written half of it or punched it already: nobody vouches for its
	 * bytes, and it can only be freed. */
	KSM_CELL_DYING_RAW = 4,
};

#define KSM_CELL_STATE_SHIFT 61
#define KSM_CELL_SLOT_SHIFT 47
#define KSM_CELL_EPOCH_SHIFT 32
#define KSM_CELL_SLOT_MASK 0x3fffull
#define KSM_CELL_NOBODY KSM_CELL_SLOT_MASK /* an owner that never lives */
#define KSM_CELL_EPOCH_MASK 0x7fffull

static inline uint64_t ksm_cell_make(enum ksm_cell_state state, ksm_slotno slot, uint32_t slot_epoch,
				     uint32_t generation)
{
	return ((uint64_t)state << KSM_CELL_STATE_SHIFT) | ((slot & KSM_CELL_SLOT_MASK) << KSM_CELL_SLOT_SHIFT) |
	       ((slot_epoch & KSM_CELL_EPOCH_MASK) << KSM_CELL_EPOCH_SHIFT) | generation;
}

static inline enum ksm_cell_state ksm_cell_state(uint64_t cell)
{
	return (enum ksm_cell_state)(cell >> KSM_CELL_STATE_SHIFT);
}

static inline ksm_slotno ksm_cell_slot(uint64_t cell)
{
	return (ksm_slotno)((cell >> KSM_CELL_SLOT_SHIFT) & KSM_CELL_SLOT_MASK);
}

static inline uint32_t ksm_cell_epoch(uint64_t cell)
{
	return (uint32_t)((cell >> KSM_CELL_EPOCH_SHIFT) & KSM_CELL_EPOCH_MASK);
}

static inline uint32_t ksm_cell_generation(uint64_t cell)
{
	return (uint32_t)cell;
}

/* ---- slots: the peers -------------------------------------------------------------------------- */

/*
 * Written only by the process that holds the slot's liveness lock (statistics: only by the scanner or under
 * the merge lock). After a death the fields stay as they were until the slot is taken again; what
 * they say about a slot whose lock is free means nothing.
 */
struct ksm_slot {
	uint64_t nonce;       /* of this incarnation; its lock says the same, and that is what counts */
	uint32_t epoch;       /* raised by one each time the slot is taken; identifies the incarnation */
	int32_t pid;          /* for people */
	uint32_t sleeping;    /* 1: a wake message would shorten its sleep */
	uint64_t quiet_at;    /* value of ksm_control.changes before its last forced pass that merged nothing */
	uint64_t settled_seq; /* value of ksm_control.settle_seq before that pass */
	int32_t barrier;      /* enum ksm_barrier_kind */
	int32_t why_not;
	uint64_t counters[32]; /* enum ksm_counter of stats.h */
};

#define KSM_SLOT_SIZE 320
_Static_assert(sizeof(struct ksm_slot) <= KSM_SLOT_SIZE, "a slot outgrew its room");

/* ---- levels of a table: see table.c ------------------------------------------------------------- */

#define KSM_TABLE_LEVELS 12
#define KSM_TABLE_FIRST_SHIFT 12 /* words in the first level: 4,096 */
#define KSM_TABLE_DOUBLINGS 2    /* so many further ones have twice as many as the one before, the others four times */
#define KSM_TABLE_BUCKET 8       /* words in a bucket: one cache line */
#define KSM_TABLE_CHOICES 2      /* buckets of a level in which a digest may lie */

/* ---- the control memfd --------------------------------------------------------------------------- */

struct ksm_control {
	uint64_t magic;
	uint32_t version;
	uint32_t layout;  /* hash over the sizes and offsets of everything here */
	uint8_t id[16];   /* random; the same as in the domain file */
	uint64_t frames;  /* capacity of the store */
	uint32_t backing; /* enum ksm_backing */
	uint32_t reserved;
	/* all above: written once by the creator before anybody else has the descriptor */

	/* seq-cst; raised by a joiner after its liveness lock is taken and before its first bit is set, and for the
	 * child of a fork after its bits are copied */
	uint64_t peer_epoch;
	uint64_t frames_high;  /* frames [0, frames_high) have ever been allocated */
	uint64_t changes;      /* raised by every publication and every candidate: somebody may find a twin now */
	uint64_t settle_seq;   /* raised by every settle: all peers make passes until they are quiet */
	uint64_t settle_beats; /* raised now and then by whoever waits for a settle: go on */
	uint64_t sweeps;       /* sweeps that freed something */
	uint64_t frames_freed;
	uint32_t no_sweep;     /* 1, for good: some process could not be given a slot, so nothing is ever freed */
	uint32_t index_levels; /* levels in use, raised by compare-and-swap */
	uint32_t candidate_levels;
	uint32_t slots_high; /* slots [0, slots_high) have ever been taken */
};

#define KSM_CHUNK_SHIFT 12 /* frames in a chunk of the sweep: 4,096 */
#define KSM_CHUNK ((uint64_t)1 << KSM_CHUNK_SHIFT)

/* ---- bitmaps ------------------------------------------------------------------------------------ */

struct ksm_bitmap {
	uint64_t magic;
	uint8_t id[16]; /* the domain's */
	uint32_t slot;
	uint32_t slot_epoch;
	uint64_t nonce;  /* the incarnation's */
	uint64_t frames; /* room */
	uint64_t high;   /* bits [0, high) are valid; raised (release) before the first bit above is set */
	uint64_t busy;   /* busy bits that are set. 0, nearly always: then nobody need read them */
};

#define KSM_BITMAP_BITS_OFFSET (KSM_PAGE_SIZE / 2) /* the first bits share a page with the header */

/* ---- the domain file ----------------------------------------------------------------------------- */

struct ksm_settings_record {
	struct ksm_settings settings;
	uint32_t check; /* over the settings: a torn read is read again, a scribble means the defaults */
	uint32_t version;
};

struct ksm_domain_file {
	uint64_t magic;
	uint32_t version;
	uint32_t layout;
	uint8_t id[16]; /* of the domain that lives here; meaningless while no liveness lock is held */
	uint32_t backing;
	uint32_t reserved;
	struct ksm_settings_record settings;
};

#define KSM_LOCK_BASE (1ull << 32)
#define KSM_LOCK_JOIN (KSM_LOCK_BASE + 0)
#define KSM_LOCK_LIVENESS (KSM_LOCK_BASE + 64)
#define KSM_LOCK_INCARNATION (1ull << 52)
#define KSM_NONCE_BITS 40

/* Never 0. Its low bits are those of the slot epoch that cells name. */
static inline uint64_t ksm_nonce_make(uint32_t random, uint32_t slot_epoch)
{
	return 1ull << (KSM_NONCE_BITS - 1) | (uint64_t)(random & 0xffffff) << 15 | (slot_epoch & KSM_CELL_EPOCH_MASK);
}

/* The first byte of a slot's incarnation locks; there are 2^KSM_NONCE_BITS. */
static inline uint64_t ksm_lock_incarnations(ksm_slotno slot)
{
	return KSM_LOCK_INCARNATION + ((uint64_t)slot << KSM_NONCE_BITS);
}

/* ---- messages between peers ------------------------------------------------------------------------ */

enum ksm_message_kind {
	KSM_MESSAGE_JOIN = 1,   /* answer: descriptors of control and store */
	KSM_MESSAGE_BITMAP = 2, /* answer: the descriptor of slot's bitmap, or status -ENOENT */
	KSM_MESSAGE_WAKE = 3,   /* no answer: there may be something new */
	KSM_MESSAGE_ANSWER = 4,
	KSM_MESSAGE_SEEDS = 5, /* from a thread of our own process: everything a new scanner needs */
};

struct ksm_message {
	uint64_t magic;
	uint32_t kind;
	uint32_t slot;
	int32_t status;
	uint32_t layout;
	uint8_t id[16]; /* of the domain; zeros in JOIN */
};

/* ---- offsets in the control memfd ---------------------------------------------------------------- */

struct ksm_layout {
	uint64_t frames;
	uint64_t slots;
	uint64_t chunks;
	uint64_t cells;
	uint64_t checks;
	uint64_t index;
	uint64_t candidates;
	uint64_t index_touched; /* a bit for each page of the table that ever got a word */
	uint64_t candidates_touched;
	uint64_t total;
};

/* A level has 1 << so many words. */
static inline unsigned ksm_table_level_shift(unsigned level)
{
	return KSM_TABLE_FIRST_SHIFT + level + (level > KSM_TABLE_DOUBLINGS ? level - KSM_TABLE_DOUBLINGS : 0);
}

/* Words in levels 0 … levels - 1 of a table. */
static inline uint64_t ksm_table_words(unsigned levels)
{
	const unsigned doubled = KSM_TABLE_DOUBLINGS + 1;
	uint64_t words = (1ull << (levels < doubled ? levels : doubled)) - 1;
	if (levels > doubled) /* 1 + 4 + 16 + … */
		words += ((1ull << 2 * (levels - doubled)) - 1) / 3 << (KSM_TABLE_DOUBLINGS + 2);
	return words << KSM_TABLE_FIRST_SHIFT;
}

/* Levels a table may grow to so that it holds every frame twice. */
static inline unsigned ksm_table_levels_for(uint64_t frames)
{
	unsigned levels = 1;
	while (levels < KSM_TABLE_LEVELS && ksm_table_words(levels) < 2 * frames)
		levels++;
	return levels;
}

static inline void ksm_layout_compute(uint64_t frames, struct ksm_layout *out)
{
	uint64_t at = ksm_page_round_up(sizeof(struct ksm_control));
	uint64_t table = ksm_table_words(ksm_table_levels_for(frames)) * sizeof(uint64_t);
	uint64_t touched = (table / KSM_PAGE_SIZE + 64) / 64 * sizeof(uint64_t);

	out->frames = frames;
	out->slots = at;
	at = ksm_page_round_up(at + (uint64_t)KSM_PEERS_MAX * KSM_SLOT_SIZE);
	out->chunks = at;
	at = ksm_page_round_up(at + (frames / KSM_CHUNK + 64) / 8 + 8);
	out->cells = at;
	at = ksm_page_round_up(at + frames * sizeof(uint64_t));
	out->checks = at;
	at = ksm_page_round_up(at + frames * sizeof(uint32_t));
	out->index = at;
	at = ksm_page_round_up(at + table);
	out->candidates = at;
	at = ksm_page_round_up(at + table);
	out->index_touched = at;
	out->candidates_touched = at + touched;
	out->total = ksm_page_round_up(at + 2 * touched);
}

/* Changes whenever the meaning of a shared byte does. */
static inline uint32_t ksm_layout_hash(void)
{
	uint64_t words[] = {
		KSM_LAYOUT_VERSION,
		KSM_PAGE_SHIFT,
		KSM_PEERS_MAX,
		KSM_SLOT_SIZE,
		KSM_CHUNK_SHIFT,
		KSM_TABLE_FIRST_SHIFT,
		KSM_TABLE_DOUBLINGS,
		KSM_TABLE_BUCKET,
		KSM_TABLE_CHOICES,
		sizeof(struct ksm_slot),
		sizeof(struct ksm_control),
		sizeof(struct ksm_bitmap),
		sizeof(struct ksm_domain_file),
		offsetof(struct ksm_control, peer_epoch),
		offsetof(struct ksm_bitmap, high),
	};
	uint64_t hash = 0x9e3779b97f4a7c15ull;
	for (size_t i = 0; i < KSM_COUNT(words); i++)
		hash = (hash ^ words[i]) * 0xff51afd7ed558ccdull + (hash >> 29);
	return (uint32_t)(hash ^ (hash >> 32));
}

#endif
