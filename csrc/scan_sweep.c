/* SPDX-License-Identifier: MIT */
/*
 * DOC: The scanner's sweeps
 *
 * A frame is freed when no living peer's bitmap has its bit (sweep.c), so every living peer's bitmap must be at hand first:
 * who came since the last time is asked for it. Then the chunks that somebody has marked are swept one by one, each under
 * its own hold of the merge lock.
 *
 * SCAN-2 of scan.c: the scanner's thread only.
 */
#include "scan.h"

#include <errno.h>

#define FETCH_TIMEOUT_MS 50

int ksm_scan_know_peers(struct ksm_scanner *scanner)
{
	for (int attempt = 0; attempt < KSM_PEERS_MAX; attempt++) {
		ksm_merge_lock(scanner->peer);
		int r = ksm_peer_refresh(scanner->peer);
		ksm_slotno missing = scanner->peer->missing;
		ksm_merge_unlock(scanner->peer);
		if (r != -EAGAIN || missing == KSM_NO_SLOT)
			return r;
		r = ksm_exchange_fetch_bitmap(scanner->exchange, scanner->peer, missing, FETCH_TIMEOUT_MS);
		if (r)
			return r;
	}
	return -EAGAIN;
}

int64_t ksm_scan_sweep(struct ksm_scanner *scanner, bool all, const struct ksm_scan_between *between)
{
	int64_t freed = 0;
	int error = ksm_scan_know_peers(scanner);
	if (error)
		return error;
	uint64_t chunks = ksm_sweep_chunks(scanner->peer);
	for (uint64_t chunk = 0; chunk < chunks; chunk++) {
		if (!ksm_chunk_unmark(scanner->peer, chunk) && !all)
			continue;
		ksm_merge_lock(scanner->peer);
		int r = ksm_sweep_chunk(scanner->peer, chunk);
		ksm_merge_unlock(scanner->peer);
		if (r > 0)
			freed += r;
		else if (r < 0)
			error = r;
		if (ksm_scan_call(between))
			break;
	}
	return error && !freed ? error : freed;
}
