/* SPDX-License-Identifier: MIT */
/*
 * DOC: Who lives
 *
 * What the kernel's lock table says of the peers of a domain, and nothing else does: shared memory may be scribbled over,
 * locks cannot be. A peer holds two, both on one description, so that both go with it: the byte of its slot, and
 * the byte whose offset is its incarnation's nonce (REFS-6). The first is taken before the second; a slot without
 * a second one is a newcomer's, or another version's, and alive.
 *
 * Called by scanners, under the merge lock of their process. A peer that dies in the middle is seen or not.
 */
#include "os.h"
#include "peer.h"

#include <errno.h>

int64_t ksm_peer_incarnation(const struct ksm_peer *peer, ksm_slotno slot)
{
	uint64_t from = ksm_lock_incarnations(slot);
	int64_t at = ksm_os_lock_find(peer->fds.file, from, 1ull << KSM_NONCE_BITS);
	if (at == -ENOENT)
		return 0;
	return at < 0 ? at : (int64_t)((uint64_t)at - from);
}

static bool was_listed(const struct ksm_peer *peer, ksm_slotno slot)
{
	for (size_t i = 0; i < peer->living_count; i++)
		if (peer->living[i] == slot)
			return true;
	return false;
}

bool ksm_peer_nobody_came(const struct ksm_peer *peer)
{
	for (uint64_t from = 0; from < KSM_PEERS_MAX;) {
		int64_t at = ksm_os_lock_find(peer->fds.file, KSM_LOCK_LIVENESS + from, KSM_PEERS_MAX - from);
		if (at < 0)
			return at == -ENOENT;
		ksm_slotno slot = (ksm_slotno)((uint64_t)at - KSM_LOCK_LIVENESS);
		from = slot + 1u;
		if (slot == peer->seat.slot)
			continue;
		int64_t nonce = ksm_peer_incarnation(peer, slot);
		if (!was_listed(peer, slot) || nonce < 0 || (uint64_t)nonce != peer->others[slot].incarnation)
			return false;
	}
	return true;
}
