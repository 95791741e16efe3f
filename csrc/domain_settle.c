/* SPDX-License-Identifier: MIT */
/*
 * DOC: Settling
 *
 * Somebody wants everything merged that can be, now. The wish is a number in shared memory (settle_seq) that every peer's
 * scanner answers with whole passes, ignoring age, until one of them merges nothing; it then notes for which state of
 * the domain that was true (quiet_at, settled_seq). The caller waits until all the living have noted the present one, and
 * reminds those that are behind (settle_beats, wakes) now and then: a caller that goes away stops reminding, and the
 * others stop hurrying.
 *
 * Called from any thread; each look happens in the scanner's thread.
 */
#include "domain.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

struct settle_request {
	bool remind; /* whoever is behind */
	bool settled;
};

static int settle_begin(struct ksm_member *member, void *context KSM_UNUSED)
{
	ksm_add_seqcst(&member->peer.control->settle_seq, 1);
	ksm_add_seqcst(&member->peer.control->settle_beats, 1);
	return 0;
}

static int settle_check(struct ksm_member *member, void *context)
{
	struct settle_request *request = context;
	struct ksm_peer *peer = &member->peer;
	bool wake = request->remind;
	request->settled = true;
	if (wake)
		ksm_add_seqcst(&peer->control->settle_beats, 1);
	ksm_scan_know_peers(&member->scanner);
	uint64_t seq = ksm_load_seqcst(&peer->control->settle_seq);
	uint64_t changes = ksm_load_seqcst(&peer->control->changes);
	for (size_t i = 0; i < peer->living_count; i++) {
		struct ksm_slot *slot = ksm_peer_slot(peer, peer->living[i]);
		if (slot && ksm_load_acquire(&slot->quiet_at) == changes && ksm_load_acquire(&slot->settled_seq) == seq)
			continue;
		request->settled = false;
		if (wake && slot != peer->self)
			ksm_exchange_wake(peer, peer->living[i]);
	}
	return 0;
}

int ksm_domain_settle(struct ksm_domain *domain, uint32_t timeout_ms, int again, struct ksm_report *out)
{
	struct ksm_stats before, now;
	struct settle_request request = {.remind = true};
	uint64_t start = ksm_os_now_ns(), deadline = start + timeout_ms * 1000000ull, reminded = 0;
	int r = ksm_domain_stats(domain, &before);
	if (!r && !again)
		r = ksm_worker_call(&domain->worker, settle_begin, NULL);
	while (!r) {
		uint64_t t = ksm_os_now_ns();
		request.remind = t - reminded > 500000000u;
		if (request.remind)
			reminded = t;
		r = ksm_worker_call(&domain->worker, settle_check, &request);
		if (r || request.settled || t >= deadline)
			break;
		ksm_os_sleep_ns(3000000);
	}
	if (!r)
		r = ksm_domain_stats(domain, &now);
	if (r)
		return r;
	*out = (struct ksm_report){
		.pages_scanned = now.pages_scanned - KSM_MIN(before.pages_scanned, now.pages_scanned),
		.pages_merged = now.merges - KSM_MIN(before.merges, now.merges),
		.zero_pages = now.ksm_zero_pages - KSM_MIN(before.ksm_zero_pages, now.ksm_zero_pages),
		.frames_written = now.promotions - KSM_MIN(before.promotions, now.promotions),
		.passes = now.full_scans - KSM_MIN(before.full_scans, now.full_scans),
		.seconds = (double)(ksm_os_now_ns() - start) / 1e9,
		.settled = request.settled,
		.why_not = domain->worker.settings.run ? now.why_not : KSM_ESTOPPED,
	};
	return 0;
}
