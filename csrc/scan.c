/* SPDX-License-Identifier: MIT */
/*
 * DOC: The scan
 *
 * A pass looks at every page that regions have handed out, in address order, a stretch at a time. The merge lock is
 * taken for one stretch and released, so that a program that frees memory waits for one stretch at most; between
 * stretches the scanner's thread answers peers and looks for commands.
 *
 * The background pass goes on batch by batch (pages_to_scan pages, then a rest of sleep_millisecs) and merges only
 * cold pages: at least two passes see a page before it is merged. A pass that somebody asked for ignores age.
 *
 * SCAN-1. The cursor points to a region of the list, or nowhere; whoever removes a region moves the cursor on.
 * SCAN-2. Peers are listed, bitmaps fetched and frames freed by the scanner's thread only.
 */
#include "scan.h"

#include "atomic.h"
#include "audit.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#define AGAIN_EVERY 64     /* passes of the background between two tries at pages that were refused */
#define REST_NS 100000000u /* a copying of process_vm_writev is over, even if it lost its processor in the middle */

int ksm_scanner_init(struct ksm_scanner *scanner, struct ksm_peer *peer, struct ksm_index *index,
		     struct ksm_exchange *exchange)
{
	memset(scanner, 0, sizeof(*scanner));
	scanner->peer = peer;
	scanner->index = index;
	scanner->exchange = exchange;
	scanner->barrier.uffd = -1;
	scanner->park.tasks = -1;
	scanner->tracker = (struct ksm_tracker){.peer = peer, .uffd = -1, .error = -EBADF};
	scanner->asked_changes = UINT64_MAX;
	scanner->rest_ns = REST_NS;
	return 0;
}

void ksm_scanner_fini(struct ksm_scanner *scanner)
{
	ksm_merger_fini(&scanner->merger);
	ksm_tracker_fini(&scanner->tracker);
	ksm_barrier_destroy(&scanner->barrier);
	ksm_park_destroy(&scanner->park);
}

void ksm_scanner_use(struct ksm_scanner *scanner, const struct ksm_barrier *barrier)
{
	ksm_barrier_destroy(&scanner->barrier);
	scanner->barrier = *barrier;
	scanner->peer->own[KSM_OWN_SCRATCH] =
		(struct ksm_range){barrier->scratch, barrier->scratch ? KSM_SCRATCH_BYTES : 0};
}

void ksm_scan_track(struct ksm_scanner *scanner)
{
	ksm_merge_lock(scanner->peer);
	ksm_tracker_init(&scanner->tracker, scanner->peer);
	for (struct ksm_region *region = scanner->regions; region; region = region->next)
		ksm_dirty_forget(region);
	ksm_merge_unlock(scanner->peer);
}

bool ksm_scanner_has_work(struct ksm_scanner *scanner)
{
	bool any = scanner->barrier.ops != NULL;
	ksm_merge_lock(scanner->peer);
	for (const struct ksm_region *region = scanner->regions; region && !any; region = region->next)
		any = region->frozen;
	ksm_merge_unlock(scanner->peer);
	return any;
}

/* ---- regions ------------------------------------------------------------------------------------------ */

void ksm_scanner_add(struct ksm_scanner *scanner, struct ksm_region *region)
{
	struct ksm_region **at = &scanner->regions;
	while (*at && (*at)->base < region->base)
		at = &(*at)->next;
	region->next = *at;
	region->tracker = &scanner->tracker;
	*at = region;
}

void ksm_scanner_remove(struct ksm_scanner *scanner, struct ksm_region *region)
{
	struct ksm_region **at = &scanner->regions;
	while (*at && *at != region)
		at = &(*at)->next;
	if (*at)
		*at = region->next;
	region->tracker = NULL;
	if (scanner->cursor == region) {
		scanner->cursor = region->next;
		scanner->cursor_page = 0;
	}
}

bool ksm_scanner_overlaps(const struct ksm_scanner *scanner, const void *at, size_t nbytes)
{
	const char *from = at;
	for (const struct ksm_region *region = scanner->regions; region; region = region->next)
		if (from < region->base + (region->room << KSM_PAGE_SHIFT) && region->base < from + nbytes)
			return true;
	return false;
}

void ksm_scanner_count_breaks(struct ksm_scanner *scanner)
{
	ksm_merge_lock(scanner->peer);
	for (struct ksm_region *region = scanner->regions; region; region = region->next)
		ksm_region_count_breaks(region);
	ksm_merge_unlock(scanner->peer);
}

bool ksm_scan_takes_part(const struct ksm_scanner *scanner, const struct ksm_region *region)
{
	if (scanner->only)
		return region == scanner->only;
	return !region->excluded && (scanner->who == KSM_SCAN_ALL || region->background);
}

static size_t used_pages(const struct ksm_region *region)
{
	return ksm_load_acquire(&region->used);
}

/* ---- passes ------------------------------------------------------------------------------------------- */

/* After a stretch, without the merge lock: the share of time in which threads are held is bounded. A pass by name may be made
 * in here, in the middle of another one. */
static int pause_between(struct ksm_scanner *scanner, const struct ksm_scan_between *between)
{
	const struct ksm_region *only = scanner->only;
	enum ksm_scan_who who = scanner->who;
	size_t worn = scanner->merger.run_count;
	ksm_scan_pause(scanner);
	int stop = ksm_scan_call(between);
	scanner->worn_lost += scanner->merger.run_count < worn;
	scanner->only = only;
	scanner->who = who;
	return stop;
}

/* Move the cursor to the next stretch to look at. Merge lock held. false: the pass is over. */
static bool cursor_settle(struct ksm_scanner *scanner)
{
	while (scanner->cursor) {
		if (ksm_scan_takes_part(scanner, scanner->cursor) && scanner->cursor_page < used_pages(scanner->cursor))
			return true;
		scanner->cursor = scanner->cursor->next;
		scanner->cursor_page = 0;
	}
	return false;
}

/* Nothing may have been tried in this pass, because threads cannot be held. */
static void publish_why_not(struct ksm_scanner *scanner, int why_not)
{
	const struct ksm_barrier_ops *ops = scanner->barrier.ops;
	if (why_not == -EAGAIN) /* the next pass will do it */
		why_not = 0;
	if (!why_not && !ops)
		why_not = scanner->barrier.error;
	else if (!why_not && ops->kind == KSM_BARRIER_STOP)
		why_not = scanner->park.why;
	ksm_store_relaxed(&scanner->peer->self->why_not, why_not);
	ksm_count_set(scanner->peer->self, KSM_STOPS, scanner->park.stops);
}

static void publish_pass(struct ksm_scanner *scanner, const struct ksm_merge_counts *counts)
{
	struct ksm_slot *self = scanner->peer->self;
	uint64_t unshared = 0;
	ksm_count_set(self, KSM_PAGES_VOLATILE, counts->written);
	ksm_merge_lock(scanner->peer);
	const struct ksm_region *any = scanner->regions;
	for (const struct ksm_region *region = any; region; region = region->next)
		unshared += region->states[KSM_PAGE_CANDIDATE];
	ksm_merge_unlock(scanner->peer);
	ksm_count_set(self, KSM_PAGES_UNSHARED, unshared);
	if (any)
		ksm_count(self, KSM_FULL_SCANS, 1);
	publish_why_not(scanner, counts->why_not);
}

/* After a pass, when nothing is under way. */
static void audit(struct ksm_scanner *scanner)
{
	if (KSM_ASSERT_LEVEL < 3)
		return;
	ksm_merge_lock(scanner->peer);
	ksm_audit(scanner->peer, scanner->regions);
	ksm_merge_unlock(scanner->peer);
}

bool ksm_scan_batch(struct ksm_scanner *scanner, uint64_t pages, uint64_t merges,
		    const struct ksm_scan_between *between)
{
	bool over = false;
	scanner->looked = 0;
	scanner->only = NULL;
	scanner->who = KSM_SCAN_BACKGROUND;
	ksm_merge_lock(scanner->peer);
	if (!scanner->cursor) {
		scanner->cursor = scanner->regions;
		scanner->cursor_page = 0;
		scanner->pass = (struct ksm_merge_counts){0};
		scanner->pass_began_ns = ksm_os_now_ns();
		ksm_dirty_begin(&scanner->tracker);
		scanner->pass_changes = ksm_load_seqcst(&scanner->peer->control->changes);
		scanner->merger.again = scanner->merger.passes % AGAIN_EVERY == AGAIN_EVERY - 1;
		scanner->ask = scanner->merger.again || scanner->asked_changes != scanner->pass_changes;
		ksm_scan_forget_worn(scanner);
	}
	uint64_t merged_before = scanner->pass.merged; /* of this very pass */
	while (!over && scanner->looked < pages && scanner->pass.merged - merged_before < merges) {
		if (!cursor_settle(scanner)) {
			over = true;
			break;
		}
		struct ksm_scan_step step = ksm_scan_step(scanner, scanner->cursor, scanner->cursor_page, false,
							  scanner->ask, &scanner->pass);
		scanner->cursor_page += step.pages;
		scanner->looked += step.looked;
		ksm_merge_unlock(scanner->peer);
		int stop = pause_between(scanner, between);
		ksm_merge_lock(scanner->peer);
		if (stop)
			break;
	}
	ksm_merge_unlock(scanner->peer);
	if (!over)
		return false;
	if (scanner->ask)
		scanner->asked_changes = scanner->pass_changes;
	ksm_scan_give_back(scanner, between, &scanner->pass);
	publish_pass(scanner, &scanner->pass);
	scanner->merger.passes++;
	audit(scanner);
	return true;
}

#define PATIENT_WITH 4 /* failures to hold threads in a row: a busy machine, perhaps */
/* Passes that merged nothing and are made again: a scan ends though threads can be stopped only now and then. */
#define FRUITLESS_MOST 8

/* Could threads not be held, and is that likely to pass? */
static bool should_retry(const struct ksm_scanner *scanner, const struct ksm_merge_counts *counts)
{
	return counts->why_not == KSM_EUNSTOPPABLE && scanner->park.in_a_row < PATIENT_WITH;
}

/* What gives the next pass something to do. */
static uint64_t progress(const struct ksm_merge_counts *counts)
{
	return counts->merged + counts->dropped + counts->promoted + counts->given_back;
}

void ksm_scan_try_park(struct ksm_scanner *scanner)
{
	struct ksm_park *park = &scanner->park;
	const struct ksm_barrier_ops *ops = scanner->barrier.ops;
	if (!ops || ops->kind != KSM_BARRIER_STOP || !park->why || ksm_park_ready(park))
		return;
	if (!ksm_park_begin(park))
		ksm_park_end(park);
	publish_why_not(scanner, 0);
}

/* The region after which to go on, found again: it may be gone. Merge lock held. */
static struct ksm_region *region_from(struct ksm_scanner *scanner, const char *base)
{
	for (struct ksm_region *region = scanner->regions; region; region = region->next)
		if (region->base >= base && ksm_scan_takes_part(scanner, region))
			return region;
	return NULL;
}

int ksm_scan_pass(struct ksm_scanner *scanner, struct ksm_region *only, enum ksm_scan_who who,
		  const struct ksm_scan_between *between, struct ksm_merge_counts *counts)
{
	uint64_t changes = ksm_load_seqcst(&scanner->peer->control->changes);
	uint64_t settle_seq = ksm_load_seqcst(&scanner->peer->control->settle_seq);
	uint64_t breaks = ksm_counter_of(scanner->peer->self, KSM_COW_BREAKS);
	struct ksm_merge_counts pass = {0};
	const char *base = NULL;
	uint64_t worn_lost = scanner->worn_lost;
	ksm_pageno page = 0;
	int stop = 0;
	scanner->only = only;
	scanner->who = who;
	ksm_scan_forget_worn(scanner);
	ksm_merge_lock(scanner->peer);
	for (struct ksm_region *region; !stop && (region = region_from(scanner, base));) {
		if (region->base != base) {
			base = region->base;
			page = 0;
		}
		struct ksm_scan_step step = ksm_scan_step(scanner, region, page, true, true, &pass);
		page += step.pages;
		if (step.pages == 0) {
			base = region->base + 1;
			continue;
		}
		ksm_merge_unlock(scanner->peer);
		stop = pause_between(scanner, between);
		ksm_merge_lock(scanner->peer);
	}
	ksm_merge_unlock(scanner->peer);
	if (!stop)
		ksm_scan_give_back(scanner, between, &pass);
	if (!stop && !only) {
		publish_pass(scanner, &pass);
		/* -EAGAIN: no frame could be had, because somebody came whose bitmap we do not have yet */
		bool idle = progress(&pass) == 0 && pass.why_not != -EAGAIN && !should_retry(scanner, &pass);
		/* pages that were found broken only now are given back by the next pass, and then merge */
		idle &= ksm_counter_of(scanner->peer->self, KSM_COW_BREAKS) == breaks &&
			scanner->worn_lost == worn_lost;
		if (who == KSM_SCAN_ALL && idle) {
			ksm_store_release(&scanner->peer->self->quiet_at, changes);
			ksm_store_release(&scanner->peer->self->settled_seq, settle_seq);
		}
	} else if (!stop) {
		publish_why_not(scanner, pass.why_not);
	}
	audit(scanner);
	counts->scanned += pass.scanned;
	counts->merged += pass.merged;
	counts->dropped += pass.dropped;
	counts->promoted += pass.promoted;
	counts->skipped += pass.skipped;
	counts->given_back += pass.given_back;
	counts->written = pass.written;
	counts->why_not = pass.why_not;
	return stop;
}

int ksm_scan_exhaust(struct ksm_scanner *scanner, struct ksm_region *only, const struct ksm_scan_between *between,
		     struct ksm_merge_counts *counts, uint64_t *passes)
{
	int retries = FRUITLESS_MOST;
	for (*passes = 0;;) {
		uint64_t before = progress(counts);
		scanner->merger.again = *passes == 0;
		int stop = ksm_scan_pass(scanner, only, KSM_SCAN_ALL, between, counts);
		scanner->merger.again = false;
		(*passes)++;
		if (stop)
			return stop;
		bool idle = progress(counts) == before;
		if (idle && should_retry(scanner, counts) && retries-- > 0) {
			uint64_t now = ksm_os_now_ns(), at = scanner->park.retry_at_ns;
			ksm_os_sleep_ns(at > now ? at - now : 0);
			if (ksm_scan_call(between))
				return 1;
			continue;
		}
		if (idle && counts->why_not == -EAGAIN && retries-- > 0 && !ksm_scan_know_peers(scanner))
			continue;
		if ((idle && *passes >= 2) || *passes >= 64)
			return 0;
	}
}

/* ---- what was found -------------------------------------------------------------------------------------- */

void ksm_scan_see_breaks(struct ksm_scanner *scanner, struct ksm_region *region, const struct ksm_scan_between *between)
{
	size_t used = used_pages(region);
	for (ksm_pageno page = 0; page < used; page += KSM_STRETCH) {
		ksm_merge_lock(scanner->peer);
		ksm_merge_see_breaks(&scanner->merger, region, page, KSM_MIN(used - page, (size_t)KSM_STRETCH));
		ksm_merge_unlock(scanner->peer);
		if (ksm_scan_call(between))
			return;
	}
}

/* Private memory of [at, at + nbytes); what was only read is the kernel's page of zeros, which costs nothing. */
static uint64_t occupied(const struct ksm_peer *peer, const void *at, size_t nbytes)
{
	uint16_t kinds[256];
	uint64_t pages = 0;
	for (size_t done = 0; at && done < nbytes; done += sizeof(kinds) / sizeof(kinds[0]) * KSM_PAGE_SIZE) {
		size_t n = KSM_MIN(ksm_pages_of(nbytes - done), KSM_COUNT(kinds));
		const char *from = (const char *)at + done;
		bool blind = peer->fds.pagemap < 0;
		if (blind ? ksm_os_resident(from, n, kinds) : ksm_os_pagemap(peer->fds.pagemap, from, n, kinds))
			return nbytes;
		for (size_t i = 0; i < n; i++)
			pages += (kinds[i] & (KSM_PAGE_PRESENT | KSM_PAGE_SHARED)) == KSM_PAGE_PRESENT;
	}
	return pages * KSM_PAGE_SIZE;
}

uint64_t ksm_scan_metadata(struct ksm_scanner *scanner)
{
	struct ksm_peer *peer = scanner->peer;
	struct stat stat;
	uint64_t nbytes = sizeof(*peer) + sizeof(*scanner) + occupied(peer, peer->living, ksm_peer_table_bytes());
	nbytes += occupied(peer, peer->counts, ksm_peer_counts_bytes(peer));
	if (peer->seat.bitmap_fd >= 0 && !ksm_os_stat(peer->seat.bitmap_fd, &stat))
		nbytes += (uint64_t)stat.st_blocks * 512;
	nbytes += occupied(peer, scanner->merger.buffer, KSM_STRETCH * KSM_PAGE_SIZE);
	nbytes += occupied(peer, scanner->barrier.scratch, KSM_WINDOW_PAGES * KSM_PAGE_SIZE);
	ksm_merge_lock(peer);
	for (struct ksm_region *region = scanner->regions; region; region = region->next) {
		nbytes += occupied(peer, region->words, ksm_page_round_up(used_pages(region) * sizeof(uint64_t)));
		nbytes += occupied(peer, region->pieces, ksm_page_round_up(ksm_region_notes_bytes(used_pages(region))));
		if (region->guard)
			nbytes += occupied(peer, region->guard->bytes, ksm_page_round_up(used_pages(region)));
	}
	ksm_merge_unlock(peer);
	return nbytes;
}
