/* SPDX-License-Identifier: MIT */
/*
 * DOC: Seats
 *
 * Taking and leaving a slot: lock first, then a new slot epoch, the incarnation's lock (REFS-6), then the peer epoch
 * (REFS-3), then an empty bitmap that only its owner can write. The same steps serve a process that joins and the child
 * that a fork is about to make.
 */
#include "peer.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NOWHERE_ATTEMPTS 500
#define NOWHERE_PAUSE_NS 10000000u
#define SEALS_SIZE (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

static int lock_some_slot(struct ksm_peer *peer, int file, ksm_slotno *out)
{
	for (ksm_slotno slot = 0; slot < KSM_PEERS_MAX; slot++) {
		int r = ksm_os_lock_try(file, KSM_LOCK_LIVENESS + slot);
		if (!r) {
			*out = slot;
			return 0;
		}
		if (r != -EAGAIN)
			return r;
	}
	(void)peer;
	return KSM_EPEERS;
}

static int make_bitmap(struct ksm_peer *peer, struct ksm_seat *seat)
{
	size_t nbytes = ksm_bitmap_bytes(peer->layout.frames);
	void *map;
	int fd = ksm_os_memfd("ksmalloc bitmap");
	int r = fd < 0 ? fd : ksm_os_truncate(fd, nbytes);
	if (!r)
		r = ksm_os_map_shared(fd, nbytes, true, &map);
	if (r) {
		ksm_os_close(fd);
		return r;
	}
	seat->bitmap = map;
	seat->bits = (uint64_t *)((char *)map + KSM_BITMAP_BITS_OFFSET);
	r = ksm_seat_make_room(peer, seat, 1); /* with the header */
	if (!r) {
		seat->bitmap->magic = KSM_MAGIC;
		memcpy(seat->bitmap->id, peer->id, sizeof(seat->bitmap->id));
		seat->bitmap->slot = seat->slot;
		seat->bitmap->slot_epoch = seat->epoch;
		seat->bitmap->nonce = seat->nonce;
		seat->bitmap->frames = peer->layout.frames;
		ksm_os_advise(map, nbytes, MADV_DONTDUMP);
		r = ksm_os_seal(fd, SEALS_SIZE | F_SEAL_FUTURE_WRITE);
	}
	if (r) {
		munmap(map, nbytes);
		ksm_os_close(fd);
		seat->bitmap = NULL;
		return r;
	}
	seat->bitmap_fd = fd;
	return 0;
}

/* What the slot says belongs to whoever sat there before, dead now: start afresh under its lock. */
static int occupy_slot(struct ksm_peer *peer, int file, struct ksm_seat *seat)
{
	struct ksm_slot *slot = ksm_peer_slot(peer, seat->slot);
	uint32_t random;
	int r = slot ? ksm_os_random(&random, sizeof(random)) : -ENOMEM;
	if (r)
		return r;
	seat->epoch = ksm_load_relaxed(&slot->epoch) + 1;
	seat->nonce = ksm_nonce_make(random, seat->epoch);
	r = ksm_os_lock_try(file, ksm_lock_incarnations(seat->slot) + seat->nonce); /* REFS-6 */
	if (r)
		return r;
	uint32_t high = ksm_load_relaxed(&peer->control->slots_high);
	for (unsigned tries = 0; tries < 1000 && high < seat->slot + 1; tries++) { /* somebody may scribble there */
		if (ksm_cas32_seqcst(&peer->control->slots_high, high, seat->slot + 1))
			break;
		high = ksm_load_relaxed(&peer->control->slots_high);
	}
	if (seat->epoch > 1)
		ksm_chunk_mark_all(peer);
	/* Not the epoch, not for an instant: who is killed here must not make the next ones look like earlier ones. */
	memset((char *)slot + offsetof(struct ksm_slot, pid), 0, sizeof(*slot) - offsetof(struct ksm_slot, pid));
	slot->pid = (int32_t)getpid();
	ksm_store_release(&slot->nonce, seat->nonce);
	ksm_store_release(&slot->epoch, seat->epoch);
	ksm_add_seqcst(&peer->control->peer_epoch, 1); /* REFS-3 */
	return 0;
}

int ksm_seat_take(struct ksm_peer *peer, bool inherit, struct ksm_seat *out)
{
	struct ksm_seat seat = {.slot = KSM_NO_SLOT, .bitmap_fd = -1};
	int file = ksm_os_reopen(peer->fds.file, peer->fds.directory, "domain");
	int r = file < 0 ? file : lock_some_slot(peer, file, &seat.slot);
	if (!r)
		r = ksm_os_map_shared(file, KSM_PAGE_SIZE, false, &seat.lock_page);
	if (!r && !inherit)
		r = ksm_os_advise(seat.lock_page, KSM_PAGE_SIZE, MADV_DONTFORK);
	if (!r)
		r = occupy_slot(peer, file, &seat);
	ksm_os_close(file); /* the mapping keeps the description, and with it the locks */
	if (!r)
		r = make_bitmap(peer, &seat);
	if (!r && !inherit)
		r = ksm_os_advise(seat.bitmap, ksm_bitmap_bytes(peer->layout.frames), MADV_DONTFORK);
	if (r) {
		ksm_seat_leave(&seat);
		return r;
	}
	*out = seat;
	return 0;
}

void ksm_seat_leave(struct ksm_seat *seat)
{
	if (seat->bitmap)
		munmap(seat->bitmap, ksm_bitmap_bytes(seat->bitmap->frames));
	ksm_os_close(seat->bitmap_fd);
	if (seat->lock_page)
		munmap(seat->lock_page, KSM_PAGE_SIZE);
	*seat = (struct ksm_seat){.slot = KSM_NO_SLOT, .bitmap_fd = -1};
}

/* The same part of a page belongs to the bits and to the busy bits of a frame, for both begin there. */
int ksm_seat_make_room(struct ksm_peer *peer, struct ksm_seat *seat, uint64_t high)
{
	while (seat->room < high) {
		char *at = (char *)seat->bitmap + ksm_bitmap_page(seat->room);
		int r = ksm_os_populate(at, KSM_PAGE_SIZE);
		if (!r)
			r = ksm_os_populate(at + ksm_bitmap_half(peer->layout.frames), KSM_PAGE_SIZE);
		if (r) {
			peer->book.error = r;
			return r;
		}
		seat->room = (ksm_bitmap_page(seat->room) + KSM_PAGE_SIZE - KSM_BITMAP_BITS_OFFSET) * 8;
	}
	return 0;
}

int ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from)
{
	uint64_t high = ksm_load_acquire(&from->bitmap->high);
	int r = ksm_seat_make_room(peer, to, high);
	if (r)
		return r;
	ksm_store_release(&to->bitmap->high, high);
	for (uint64_t word = 0; word < (high + 63) / 64; word++)
		if (from->bits[word])
			ksm_store_release(&to->bits[word], from->bits[word]);
	ksm_add_seqcst(&peer->control->peer_epoch, 1); /* REFS-3: after the bits, see there */
	return 0;
}

void ksm_seat_unmap(struct ksm_seat *seat)
{
	seat->bitmap_fd = -1; /* its number means something else in this table */
	ksm_seat_leave(seat);
}

void ksm_seat_keep(struct ksm_peer *peer, struct ksm_seat *seat)
{
	madvise(seat->lock_page, KSM_PAGE_SIZE, MADV_DONTFORK);
	madvise(seat->bitmap, ksm_bitmap_bytes(peer->layout.frames), MADV_DONTFORK);
}

/* A process that has just been born may wait a moment for memory: it would have to end. */
static void *wait_for_table(size_t nbytes)
{
	void *table;
	for (int attempt = 0; ksm_os_map_table(nbytes, &table); attempt++) {
		if (attempt == NOWHERE_ATTEMPTS)
			ksm_panic(__FILE__, __LINE__, "no memory for a process that has no seat");
		ksm_os_sleep_ns(NOWHERE_PAUSE_NS);
	}
	return table;
}

void ksm_peer_sit_nowhere(struct ksm_peer *peer)
{
	void *bitmap = wait_for_table(ksm_bitmap_bytes(peer->layout.frames));
	void *slot = wait_for_table(ksm_page_round_up(sizeof(struct ksm_slot)));
	peer->seat = (struct ksm_seat){.slot = KSM_NO_SLOT, .bitmap_fd = -1, .bitmap = bitmap};
	peer->seat.bits = (uint64_t *)((char *)bitmap + KSM_BITMAP_BITS_OFFSET);
	peer->seat.bitmap->frames = peer->seat.bitmap->high = peer->seat.room = peer->layout.frames;
	peer->self = slot;
}

void ksm_peer_sit(struct ksm_peer *peer, const struct ksm_seat *seat)
{
	peer->seat = *seat;
	peer->self = ksm_peer_slot(peer, seat->slot);
}

/* ---- bits ------------------------------------------------------------------------------------------ */

int ksm_bit_set(struct ksm_peer *peer, ksm_frameno frame)
{
	ksm_ensure(frame < peer->layout.frames);
	int r = ksm_seat_make_room(peer, &peer->seat, (uint64_t)frame + 1);
	if (r)
		return r;
	ksm_raise_release(&peer->seat.bitmap->high, (uint64_t)frame + 1); /* REFS-4 */
	ksm_or_release(&peer->seat.bits[frame / 64], 1ull << (frame % 64));
	return 0;
}

void ksm_bit_clear(struct ksm_peer *peer, ksm_frameno frame)
{
	ksm_ensure(frame < peer->layout.frames && peer->counts[frame] == 0); /* REFS-1 */
	ksm_and_release(&peer->seat.bits[frame / 64], ~(1ull << (frame % 64)));
}

bool ksm_bit_test(const struct ksm_peer *peer, ksm_frameno frame)
{
	return frame < ksm_load_relaxed(&peer->seat.bitmap->high) &&
	       (ksm_load_relaxed(&peer->seat.bits[frame / 64]) >> (frame % 64) & 1);
}

uint64_t ksm_bits_of_others(const struct ksm_peer *peer, ksm_frameno frame)
{
	uint64_t any = 0;
	for (size_t i = 0; i < peer->living_count; i++) {
		const struct ksm_other *other = &peer->others[peer->living[i]];
		if (peer->living[i] == peer->seat.slot)
			continue;
		if (!other->bitmap)
			return UINT64_MAX; /* REFS-5 */
		if (frame < KSM_MIN(ksm_load_acquire(&other->bitmap->high), peer->layout.frames))
			any |= ksm_load_acquire(&other->bits[frame / 64]);
	}
	return any;
}

/* ---- what we are busy with: REFS-7 ------------------------------------------------------------------- */

static uint64_t *busy_bits(const struct ksm_peer *peer, const struct ksm_bitmap *bitmap)
{
	size_t half = ksm_bitmap_half(peer->layout.frames);
	return (uint64_t *)((uintptr_t)bitmap + KSM_BITMAP_BITS_OFFSET + half);
}

void ksm_busy_set(struct ksm_peer *peer, ksm_frameno frame)
{
	ksm_ensure(ksm_bit_test(peer, frame));
	uint64_t bit = 1ull << (frame % 64);
	if (ksm_or_release(&busy_bits(peer, peer->seat.bitmap)[frame / 64], bit) & bit)
		return;
	ksm_add_relaxed(&peer->seat.bitmap->busy, 1);
}

void ksm_busy_clear(struct ksm_peer *peer, ksm_frameno frame)
{
	ksm_ensure(frame < peer->layout.frames);
	uint64_t bit = 1ull << (frame % 64);
	if (ksm_and_release(&busy_bits(peer, peer->seat.bitmap)[frame / 64], ~bit) & bit)
		ksm_sub_relaxed(&peer->seat.bitmap->busy, 1);
}

bool ksm_busy_with_others(const struct ksm_peer *peer, ksm_frameno frame)
{
	for (size_t i = 0; i < peer->living_count; i++) {
		const struct ksm_bitmap *bitmap = peer->others[peer->living[i]].bitmap;
		if (peer->living[i] == peer->seat.slot || !bitmap || !ksm_load_acquire(&bitmap->busy) ||
		    frame >= ksm_load_acquire(&bitmap->high))
			continue;
		if (ksm_load_acquire(&busy_bits(peer, bitmap)[frame / 64]) >> (frame % 64) & 1)
			return true;
	}
	return false;
}
