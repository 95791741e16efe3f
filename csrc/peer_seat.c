/* SPDX-License-Identifier: MIT */
/*
 * DOC: Seats
 *
 * Taking and leaving a slot: lock first, then a new slot epoch, then the peer epoch (REFS-3), then an empty bitmap that
 * only its owner can write. The same steps serve a process that joins and the child that a fork is about to make.
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
	seat->bitmap->magic = KSM_MAGIC;
	memcpy(seat->bitmap->id, peer->control->id, sizeof(seat->bitmap->id));
	seat->bitmap->slot = seat->slot;
	seat->bitmap->slot_epoch = seat->epoch;
	seat->bitmap->nonce = seat->nonce;
	seat->bitmap->frames = peer->layout.frames;
	ksm_os_advise(map, nbytes, MADV_DONTDUMP);
	r = ksm_os_seal(fd, SEALS_SIZE | F_SEAL_FUTURE_WRITE);
	if (r) {
		ksm_os_unmap(map, nbytes);
		ksm_os_close(fd);
		return r;
	}
	seat->bitmap_fd = fd;
	return 0;
}

/* What the slot says belongs to whoever sat there before, dead now: start afresh under its lock. */
static int occupy_slot(struct ksm_peer *peer, struct ksm_seat *seat)
{
	struct ksm_slot *slot = ksm_peer_slot(peer, seat->slot);
	int r = ksm_os_random(&seat->nonce, sizeof(seat->nonce));
	if (r)
		return r;
	uint32_t high = ksm_load_relaxed(&peer->control->slots_high);
	while (high < seat->slot + 1 && !ksm_cas32_seqcst(&peer->control->slots_high, high, seat->slot + 1))
		high = ksm_load_relaxed(&peer->control->slots_high);
	seat->epoch = ksm_load_relaxed(&slot->epoch) + 1;
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
	ksm_os_close(file); /* the mapping keeps the description, and with it the lock */
	if (!r)
		r = occupy_slot(peer, &seat);
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

void ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from)
{
	uint64_t high = ksm_load_acquire(&from->bitmap->high);
	ksm_store_release(&to->bitmap->high, high);
	for (uint64_t word = 0; word < (high + 63) / 64; word++)
		if (from->bits[word])
			ksm_store_release(&to->bits[word], from->bits[word]);
	ksm_add_seqcst(&peer->control->peer_epoch, 1); /* REFS-3: after the bits, see there */
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

void ksm_peer_sit_nowhere(struct ksm_peer *peer)
{
	void *bitmap, *slot;
	if (ksm_os_map_table(ksm_bitmap_bytes(peer->layout.frames), &bitmap) ||
	    ksm_os_map_table(ksm_page_round_up(sizeof(struct ksm_slot)), &slot))
		ksm_panic(__FILE__, __LINE__, "no memory for a process that has no seat");
	peer->seat = (struct ksm_seat){.slot = KSM_NO_SLOT, .bitmap_fd = -1, .bitmap = bitmap};
	peer->seat.bits = (uint64_t *)((char *)bitmap + KSM_BITMAP_BITS_OFFSET);
	peer->seat.bitmap->frames = peer->seat.bitmap->high = peer->layout.frames;
	peer->self = slot;
}

void ksm_peer_sit(struct ksm_peer *peer, const struct ksm_seat *seat)
{
	peer->seat = *seat;
	peer->self = ksm_peer_slot(peer, seat->slot);
}
