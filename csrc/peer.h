/* SPDX-License-Identifier: MIT */
/*
 * peer.h: this process as a peer of one domain: its seat, its bitmap, and what it knows of the others'.
 */
#ifndef KSM_PEER_H
#define KSM_PEER_H

#include "layout.h"
#include "sparse.h"
#include "stats.h"

#include <pthread.h>

/*
 * A place in the domain: a slot, whose liveness lock is held by a description that only `lock_page` keeps, and a
 * bitmap. The process's own, or one prepared for the child of a fork.
 */
struct ksm_seat {
	ksm_slotno slot;
	uint32_t epoch;
	uint64_t nonce; /* of this incarnation */
	void *lock_page;
	int bitmap_fd;
	struct ksm_bitmap *bitmap;
	uint64_t *bits;
	uint64_t room; /* frames below have the pages of their bits, busy ones too: REFS-8 */
};

/* What we know of a slot that is not ours. */
struct ksm_other {
	const struct ksm_bitmap *bitmap; /* NULL: we do not have it */
	const uint64_t *bits;
	uint64_t nonce;       /* of the incarnation the bitmap belongs to */
	uint64_t incarnation; /* the nonce of who lives there, as its lock says; 0: nobody, or not yet */
	uint32_t buried;      /* the epoch of the last of the dead whose frames have been marked */
	int fd;               /* of the bitmap, to hand on to others; -1: none */
};

/* All lie in the scanner's own descriptor table; -1: none. */
struct ksm_descriptors {
	int directory; /* the rendezvous */
	int file;      /* the domain file, for locks on behalf of nobody and for settings */
	int control;
	int store;
	int pagemap;
	int maps;
};

struct ksm_range {
	const void *at;
	size_t nbytes;
};

enum ksm_own {
	KSM_OWN_STACK = 0,
	KSM_OWN_WORKER,
	KSM_OWN_BUFFER,
	KSM_OWN_SCRATCH,
	KSM_OWN_RANGES
};

struct ksm_peer {
	struct ksm_descriptors fds;
	struct ksm_layout layout;
	uint8_t id[16]; /* of the domain */
	struct ksm_control *control;
	uint64_t *chunks;            /* dirty chunks, in shared memory */
	uint64_t *cells;             /* in shared memory */
	uint32_t *checks;            /* in shared memory */
	struct ksm_sparse_book book; /* what is there of the tables in shared memory */
	struct ksm_sparse slots_there, cells_there, checks_there;
	struct ksm_seat seat;
	struct ksm_slot *self;    /* our slot, in shared memory */
	uint16_t *counts;         /* private: pages of ours mapped to each frame */
	struct ksm_other *others; /* private, by slot: a table of which only what is used takes memory, like the next */
	ksm_slotno *living;       /* the slots of the living, as of the last ksm_peer_refresh() */
	size_t living_count;
	uint64_t living_epoch; /* peer epoch before they were listed */
	bool living_known;     /* every one's bitmap is at hand */
	ksm_slotno missing;    /* if not: one whose bitmap is not */
	int64_t vmas_used;     /* memory mappings that merging costs this process */
	uint64_t full_at; /* frames_freed, plus 1, when frames were last looked through for a free one; 0: since then */
	uint64_t looked;  /* … so many of them: all, and the store is full */
	ksm_frameno next_frame; /* where the last run of allocations ended */
	bool shows_itself;      /* it may publish pages, as far as was asked in this stretch: FRAME-4 */
	pthread_mutex_t merge_mutex, merge_next;
	/* what stays even if the process moves to another user's domain */
	struct ksm_range own[KSM_OWN_RANGES]; /* what the scanner's thread uses while a window is open; SURVEY-3 */
	uint64_t survey_at_ns;                /* not before: the next look that may be dear */
};

/* From a frame's bit to its busy bit. */
static inline size_t ksm_bitmap_half(uint64_t frames)
{
	return ksm_page_round_up((frames + 63) / 64 * 8);
}

/* Bytes of a bitmap memfd for so many frames. */
static inline size_t ksm_bitmap_bytes(uint64_t frames)
{
	return KSM_BITMAP_BITS_OFFSET + 2 * ksm_bitmap_half(frames);
}

/* Where the page begins in which a frame has its bit. */
static inline size_t ksm_bitmap_page(uint64_t frame)
{
	return (KSM_BITMAP_BITS_OFFSET + frame / 8) / KSM_PAGE_SIZE * KSM_PAGE_SIZE;
}

/* Set to nothing: no descriptors, no memory. */
void ksm_peer_init(struct ksm_peer *peer);
/* The struct itself was copied to where it is now; it contains what it points to. */
void ksm_peer_moved(struct ksm_peer *peer);
/* Bytes of the table that holds others, and who of them lives. */
size_t ksm_peer_table_bytes(void);
/* Bytes of the table that holds counts, and what the book has not near. */
size_t ksm_peer_counts_bytes(const struct ksm_peer *peer);
/* Give up everything but the memory others map: leave the domain. */
void ksm_peer_destroy(struct ksm_peer *peer);

/*
 * The merge lock: everything that maps, unmaps or releases a frame happens under it, and every change to
 * bitmap, counts and page words. Fair enough that a scanner in a loop does not starve the program.
 */
void ksm_merge_lock(struct ksm_peer *peer);
bool ksm_merge_try_lock(struct ksm_peer *peer);
void ksm_merge_unlock(struct ksm_peer *peer);
/* In the child of a fork whose prepare handler held it: a new, free lock. */
void ksm_merge_lock_renew(struct ksm_peer *peer);

/* Size and map the control memfd of a new domain and write its header. */
int ksm_peer_create_control(struct ksm_peer *peer, int control, uint64_t frames, uint32_t backing,
			    const uint8_t id[16]);
/* Map an existing one. KSM_ELAYOUT, KSM_ECORRUPT. */
int ksm_peer_map_control(struct ksm_peer *peer, int control);

/* One of the tables in the control memfd, `offset` bytes from its beginning. */
struct ksm_sparse ksm_peer_sparse(const struct ksm_peer *peer, enum ksm_sparse_table table, uint64_t offset);
/* Slot number `slot` of the table, or NULL if there is no such one, or its memory cannot be had. */
struct ksm_slot *ksm_peer_slot(const struct ksm_peer *peer, ksm_slotno slot);

/*
 * Take a free slot: its liveness lock, a new slot epoch, then the peer epoch, then an empty sealed bitmap.
 * inherit: the seat is for the child of a fork, whose mappings it must survive in. KSM_EPEERS: none is free.
 */
int ksm_seat_take(struct ksm_peer *peer, bool inherit, struct ksm_seat *out);
/* Give it up: everything unmapped, the lock gone. */
void ksm_seat_leave(struct ksm_seat *seat);
/* Make sure of the memory for the bits of all frames below `high`. 0, or -ENOMEM. Merge lock held, or the seat not in use. */
int ksm_seat_make_room(struct ksm_peer *peer, struct ksm_seat *seat, uint64_t high);
/* The bits of `to` become those of `from`, then the peer epoch moves. Merge lock held, `to` not used by anybody yet.
 * -ENOMEM: nothing was done. */
int ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from);
/* Parent after a fork: unmap a seat that was prepared for the child. */
void ksm_seat_unmap(struct ksm_seat *seat);
/* Child after a fork: its own children shall not inherit the seat. */
void ksm_seat_keep(struct ksm_peer *peer, struct ksm_seat *seat);
/* After a fork the scanner's table is gone: no descriptor of others' bitmaps; in the child their mappings neither. */
void ksm_peer_forget_descriptors(struct ksm_peer *peer, bool mappings_stay);
/* A member without a seat: bits and counters in private memory that nobody reads. */
void ksm_peer_sit_nowhere(struct ksm_peer *peer);
/* Sit down: from now on the peer's own. */
void ksm_peer_sit(struct ksm_peer *peer, const struct ksm_seat *seat);

/*
 * List the living by their locks; forget the dead (their chunks become dirty). Merge lock held. Returns 0 if
 * every living peer's bitmap is at hand, else -EAGAIN with peer->missing naming one that is not.
 */
int ksm_peer_refresh(struct ksm_peer *peer);
/* The same, but only if somebody came since. */
int ksm_peer_refresh_if_changed(struct ksm_peer *peer);
/* Who lives in a slot, as the kernel says: a nonce; 0: nobody, or not yet; or an error. */
int64_t ksm_peer_incarnation(const struct ksm_peer *peer, ksm_slotno slot);
/* Do the same live as at the last refresh, or fewer? Asks the kernel: the peer epoch may have been scribbled over. */
bool ksm_peer_nobody_came(const struct ksm_peer *peer);
/* Is this incarnation of that slot among the living, as of the last refresh? Only the low 15 bits of `epoch` count. */
bool ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch);
/* Map another's bitmap read-only; takes fd over. KSM_ECORRUPT: it is not what it should be. Merge lock held. */
int ksm_peer_attach_bitmap(struct ksm_peer *peer, ksm_slotno slot, int fd);

/* Is the bitmap at hand that of the slot's present incarnation? */
bool ksm_peer_has_bitmap(const struct ksm_peer *peer, ksm_slotno slot);
/* Merging costs this many mappings more (or fewer). */
void ksm_peer_count_vmas(struct ksm_peer *peer, int64_t delta);

/* Is any page of ours mapped to a frame? Merge lock held. */
bool ksm_peer_refers(const struct ksm_peer *peer);

/* Our own bit of a frame. Merge lock held. -ENOMEM: it is not set, for it has no memory. */
int ksm_bit_set(struct ksm_peer *peer, ksm_frameno frame);
void ksm_bit_clear(struct ksm_peer *peer, ksm_frameno frame);
bool ksm_bit_test(const struct ksm_peer *peer, ksm_frameno frame);
/* 64 bits from frame (a multiple of 64): all the living's or'ed, as of the last refresh, without ours. */
uint64_t ksm_bits_of_others(const struct ksm_peer *peer, ksm_frameno frame);

/* Our own busy bit of a frame, whose own bit is set: we write or free it, and nobody may take it meanwhile (REFS-7). */
void ksm_busy_set(struct ksm_peer *peer, ksm_frameno frame);
void ksm_busy_clear(struct ksm_peer *peer, ksm_frameno frame);
/* Is another living peer writing or freeing it, as far as its bitmap is at hand? */
bool ksm_busy_with_others(const struct ksm_peer *peer, ksm_frameno frame);

/* A frame of this chunk may have lost its last reference. */
void ksm_chunk_mark(struct ksm_peer *peer, ksm_frameno frame);
void ksm_chunk_mark_all(struct ksm_peer *peer);
/* Was the chunk marked? It is not any more. */
bool ksm_chunk_unmark(struct ksm_peer *peer, uint64_t chunk);
bool ksm_chunks_any(const struct ksm_peer *peer);

#endif
