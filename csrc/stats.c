/* SPDX-License-Identifier: MIT */
/*
 * DOC: Statistics
 *
 * Nothing is counted twice and nothing has to be repaired after a death: each peer counts what it did in its
 * own slot, and the domain's figures are sums over the living ones, made when somebody asks. pages_shared is
 * counted from the cells themselves; pages_sharing is what is merged beyond one page a frame.
 */
#include "stats.h"

#include <string.h>

void ksm_stats_of_slot(const struct ksm_slot *slot, struct ksm_stats *out)
{
	memset(out, 0, sizeof(*out));
	out->pages_merged = ksm_counter_of(slot, KSM_PAGES_MERGED);
	out->pages_shared = ksm_counter_of(slot, KSM_FRAMES_REFERRED);
	out->pages_sharing = out->pages_merged > out->pages_shared ? out->pages_merged - out->pages_shared : 0;
	out->pages_unshared = ksm_counter_of(slot, KSM_PAGES_UNSHARED);
	out->pages_volatile = ksm_counter_of(slot, KSM_PAGES_VOLATILE);
	out->pages_scanned = ksm_counter_of(slot, KSM_PAGES_SCANNED);
	out->pages_skipped = ksm_counter_of(slot, KSM_PAGES_SKIPPED);
	out->full_scans = ksm_counter_of(slot, KSM_FULL_SCANS);
	out->ksm_zero_pages = ksm_counter_of(slot, KSM_PAGES_ZERO);
	out->merges = ksm_counter_of(slot, KSM_MERGES);
	out->promotions = ksm_counter_of(slot, KSM_PROMOTIONS);
	out->cow_breaks = ksm_counter_of(slot, KSM_COW_BREAKS);
	out->put_backs = ksm_counter_of(slot, KSM_PUT_BACKS);
	out->failures = ksm_counter_of(slot, KSM_FAILURES);
	out->give_backs = ksm_counter_of(slot, KSM_GIVE_BACKS);
	out->stops = ksm_counter_of(slot, KSM_STOPS);
	out->suspensions = ksm_counter_of(slot, KSM_SUSPENSIONS);
	out->withheld = ksm_counter_of(slot, KSM_WITHHELD);
	out->vmas_used = ksm_counter_of(slot, KSM_VMAS_USED);
	out->vma_budget = ksm_counter_of(slot, KSM_VMA_BUDGET);
	out->metadata_bytes = ksm_counter_of(slot, KSM_METADATA_BYTES);
	out->saved_bytes = out->pages_sharing * KSM_PAGE_SIZE;
	out->peers = 1;
	out->page_size = (uint32_t)KSM_PAGE_SIZE;
	out->barrier = ksm_load_relaxed(&slot->barrier);
	out->why_not = ksm_load_relaxed(&slot->why_not);
}

void ksm_stats_add(struct ksm_stats *sum, const struct ksm_stats *one)
{
	sum->full_scans = sum->peers ? KSM_MIN(sum->full_scans, one->full_scans) : one->full_scans;
	sum->peers += one->peers;
	sum->pages_merged += one->pages_merged;
	sum->pages_unshared += one->pages_unshared;
	sum->pages_volatile += one->pages_volatile;
	sum->pages_scanned += one->pages_scanned;
	sum->pages_skipped += one->pages_skipped;
	sum->ksm_zero_pages += one->ksm_zero_pages;
	sum->merges += one->merges;
	sum->promotions += one->promotions;
	sum->cow_breaks += one->cow_breaks;
	sum->put_backs += one->put_backs;
	sum->failures += one->failures;
	sum->give_backs += one->give_backs;
	sum->stops += one->stops;
	sum->suspensions += one->suspensions;
	sum->withheld += one->withheld;
	sum->vmas_used += one->vmas_used;
	sum->vma_budget += one->vma_budget;
	sum->metadata_bytes += one->metadata_bytes;
}
