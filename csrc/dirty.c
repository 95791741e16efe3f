/* SPDX-License-Identifier: MIT */
/*
 * DOC: Cold pages
 *
 * Only pages that were not written for a whole pass are worth a merge: others would break at once. Kernel KSM reads every
 * page in every pass, and a page whose checksum stays the same is cold. Here the kernel is asked which pages were written:
 * a userfaultfd with UFFD_FEATURE_WP_ASYNC marks pages as write protected, the first store to one takes the mark away by
 * itself (about a microsecond, and nobody waits for anybody), and PAGEMAP_SCAN lists the pages without a mark, and sets it
 * again, in one step.
 *
 *    update (one piece)                       visit (some stretches of it)
 *    ──────────────────                       ────────────────────────────
 *    what is there and not watched?           clean: the digest in the word is right, nothing is read
 *      frames' pages: broken                  else:  read, digest, set the clean bit
 *      others: watch them                     unchanged for a pass: cold, look for a twin
 *    what was written? clean bit off, todo
 *    mark it again (if that is worth it)
 *
 * A pass in which nothing was written is two calls for each piece, and reads no page and no word.
 *
 * The marks cost the program a fault for each page that it writes after a pass. Pages that it writes all the time would be
 * marked all the time, for nothing. So the pages that had been marked and were written within one pass are counted; what
 * these faults have cost is a debt, which time pays off at a few per cent; and until it is paid a piece with such pages is
 * only looked at (KSM_WATCH_KNOWN): what was written is left without a mark and without a digest. Whether there is a debt is
 * looked up once a pass, so that all pieces get their turn.
 *
 * DIRTY-1. All of this proposes, as digests do (MERGE-1). A page that is wrongly called clean costs a comparison in a
 *          window, or a merge that is not made; never a byte. Devices write without the kernel's knowledge.
 * DIRTY-2. A mark is set before the digest is taken, so that no write falls between the two unseen. The clean bit is
 *          trusted only after an update in the same pass, which takes it away from every page that was written or is not
 *          watched any more: its mapping was replaced, or moved by mremap.
 * DIRTY-3. Only anonymous memory is watched, and only what is in use. Pages mapped to frames are not: they are
 *          broken if they are there and anonymous.
 * DIRTY-4. A mapping can be registered with one descriptor only; the windows of "move" need their own. So what a window
 *          covers is let go before it opens, and taken back when it is closed.
 * DIRTY-5. Whatever fails, the piece is KSM_WATCH_NONE, and digests decide.
 * DIRTY-6. What the program has registered with a descriptor of its own is neither marked nor let go: of registered memory
 *          everything is registered with ours before anything is marked, or, if the kernel says EBUSY, nothing is; and only
 *          what we have registered is unregistered (before Linux 6.17 any descriptor can do that to any other's).
 * DIRTY-7. Fresh memory amid watched memory is watched before it is touched: with its first page a mapping becomes one that
 *          joins its neighbours never more, and each costs one of those that a process may have.
 *
 * DIRTY-8. Not before Linux 6.9. PAGEMAP_SCAN could lose a dirty bit that a processor set just then, and with it a write
 *          (CVE-2024-36943, mended in 6.8.10 and 6.9); closing a descriptor left marks behind, and a page with one counted
 *          as unwritten for ever (CVE-2024-36881, the same). What else is called 6.8 may or may not have the repairs.
 *
 * A child of a fork watches nothing that its parent watched: its scanner
 * begins anew. A process that dies takes its marks along.
 *
 * Called by the scanner under the merge lock.
 */
#include "dirty.h"

#include "atomic.h"

#include <errno.h>
#include <string.h>

#define FAULT_NS 1200u /* what the first store to a marked page costs */
#define DEBT_MOST_NS                                                                                                   \
	100000000u    /* passes that somebody asks for are not to keep the background from new data for minutes */
#define DEBT_SHARE 20 /* of the program's time, one part in so many */

static const struct ksm_os_query UNWATCHED = {
	.none = KSM_PAGE_WATCHED | KSM_PAGE_FILE,
	.any = KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED,
};

static const struct ksm_os_query WATCHED = {.all = KSM_PAGE_WATCHED};

static const struct ksm_os_query WRITTEN = {
	.all = KSM_PAGE_WATCHED | KSM_PAGE_WRITTEN,
	/* Nothing is in it yet. A page that is not there counts as written, and would be marked by an entry in the page
	 * tables that looks as if it were swapped out. */
	.none = KSM_PAGE_ZERO,
	.any = KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED,
};

int ksm_tracker_init(struct ksm_tracker *tracker, struct ksm_peer *peer)
{
	struct ksm_os_range range;
	const char *at = (const char *)&range - ((uintptr_t)&range & (KSM_PAGE_SIZE - 1));
	tracker->peer = peer; /* what is owed is owed still */
	tracker->uffd = -1;
	tracker->error = -EBADF;
	if (peer->fds.pagemap < 0)
		return tracker->error;
	if (!ksm_os_is_linux(6, 9)) /* DIRTY-8 */
		return tracker->error = -EINVAL;
	int r = ksm_os_page_ranges(peer->fds.pagemap, &at, at + KSM_PAGE_SIZE, &UNWATCHED, &range, 1);
	tracker->uffd = r < 0 ? r : ksm_os_uffd_open_watch();
	tracker->error = KSM_MIN(tracker->uffd, 0);
	tracker->uffd = KSM_MAX(tracker->uffd, -1);
	return tracker->error;
}

void ksm_tracker_fini(struct ksm_tracker *tracker)
{
	if (tracker->uffd >= 0)
		ksm_os_close(tracker->uffd);
	tracker->uffd = -1;
}

static size_t pieces_of(const struct ksm_region *region)
{
	return (ksm_load_acquire(&region->used) + KSM_PIECE_PAGES - 1) / KSM_PIECE_PAGES;
}

static ksm_pageno next_stretch(ksm_pageno page)
{
	return (page / KSM_TODO_PAGES + 1) * KSM_TODO_PAGES;
}

static bool is_ours(const struct ksm_region *region, ksm_pageno page)
{
	return *ksm_region_todo(region, page) & KSM_TODO_OURS;
}

void ksm_dirty_forget(struct ksm_region *region)
{
	for (size_t piece = 0; piece < pieces_of(region); piece++) {
		struct ksm_piece *at = &region->pieces[piece];
		memset(at->clean, 0, sizeof(at->clean));
		for (size_t i = 0; i < KSM_COUNT(at->todo); i++)
			at->todo[i] &= (uint8_t)~(KSM_TODO_OURS | KSM_TODO_FRESH);
		at->watch = KSM_WATCH_NONE; /* what is hot stays so: forks forget often */
	}
	ksm_store_relaxed(&region->fresh, 0);
}

/* ---- watching ------------------------------------------------------------------------------------------------ */

static bool is_watchable(const struct ksm_region *region, ksm_pageno page)
{
	enum ksm_page_state state = ksm_region_state(region, page);
	return state != KSM_PAGE_MERGED && state != KSM_PAGE_BROKEN;
}

static bool is_tracked(const struct ksm_region *region)
{
	return region->tracker && region->tracker->uffd >= 0;
}

static int watch(struct ksm_region *region, ksm_pageno page, size_t count)
{
	int r = ksm_os_uffd_register(region->tracker->uffd, ksm_region_page(region, page), count << KSM_PAGE_SHIFT,
				     KSM_UFFD_PROTECT);
	if (!r)
		ksm_region_note(region, page, count, KSM_TODO_OURS);
	return r;
}

/* Errors are the next update's business: it finds them unwatched. */
void ksm_dirty_watch(struct ksm_region *region, ksm_pageno page, size_t count)
{
	bool may = !region->registered || ksm_region_piece(region, page)->watch != KSM_WATCH_NONE; /* DIRTY-6 */
	if (count && may && is_tracked(region))
		watch(region, page, count);
}

void ksm_dirty_take_back(struct ksm_region *region, ksm_pageno page, size_t count)
{
	for (size_t i = 0, n; is_tracked(region) && i < count; i += n + 1) {
		for (n = 0; i + n < count && is_watchable(region, page + i + n);)
			n++;
		ksm_dirty_watch(region, page + i, n);
	}
}

/* ---- fresh memory --------------------------------------------------------------------------------------------- */

void ksm_dirty_note_fresh(struct ksm_region *region, ksm_pageno page, size_t count)
{
	for (ksm_pageno at = page; is_tracked(region) && at < page + count; at = next_stretch(at)) {
		uint8_t *todo = ksm_region_todo(region, at);
		if (!(*todo & KSM_TODO_FRESH))
			ksm_store_relaxed(&region->fresh, region->fresh + 1);
		*todo |= KSM_TODO_FRESH;
	}
}

bool ksm_dirty_is_fresh(const struct ksm_region *region, ksm_pageno page, size_t count)
{
	bool any = false;
	for (ksm_pageno at = page; region->fresh && at < page + count && !any; at = next_stretch(at))
		any = *ksm_region_todo(region, at) & KSM_TODO_FRESH;
	return any;
}

void ksm_dirty_forget_fresh(struct ksm_region *region, ksm_pageno page, size_t count)
{
	for (ksm_pageno at = page; region->fresh && at < page + count; at = next_stretch(at)) {
		uint8_t *todo = ksm_region_todo(region, at);
		if (!(*todo & KSM_TODO_FRESH))
			continue;
		ksm_store_relaxed(&region->fresh, region->fresh - 1);
		*todo &= (uint8_t)~KSM_TODO_FRESH;
	}
}

void ksm_dirty_watch_fresh(struct ksm_region *region, ksm_pageno page, size_t count)
{
	size_t used = ksm_load_acquire(&region->used);
	ksm_pageno at = page / KSM_TODO_PAGES * KSM_TODO_PAGES;
	for (size_t n; region->fresh && at < page + count; at += n + KSM_TODO_PAGES) {
		for (n = 0; at + n < page + count && *ksm_region_todo(region, at + n) & KSM_TODO_FRESH;)
			n += KSM_TODO_PAGES;
		ksm_dirty_take_back(region, at, KSM_MIN(used - at, n));
	}
	ksm_dirty_forget_fresh(region, page, count);
}

/* ---- windows -------------------------------------------------------------------------------------------------- */

int ksm_dirty_let_go(struct ksm_region *region, ksm_pageno page, size_t count)
{
	int r = 0;
	for (ksm_pageno end = page + count, next; page < end && !r; page = next) {
		next = KSM_MIN(end, next_stretch(page));
		if (!is_tracked(region) || !is_ours(region, page))
			continue;
		for (ksm_pageno i = page; i < next; i++)
			ksm_region_set_clean(region, i, false);
		r = ksm_os_uffd_unregister(region->tracker->uffd, ksm_region_page(region, page),
					   (next - page) << KSM_PAGE_SHIFT);
	}
	return r;
}

void ksm_dirty_release(struct ksm_region *region)
{
	size_t used = ksm_load_acquire(&region->used);
	for (ksm_pageno page = 0; is_tracked(region) && page < used; page += KSM_TODO_PAGES)
		if (is_ours(region, page))
			ksm_os_uffd_unregister(region->tracker->uffd, ksm_region_page(region, page),
					       KSM_MIN(region->room - page, (size_t)KSM_TODO_PAGES) << KSM_PAGE_SHIFT);
	ksm_dirty_forget(region);
}

/* ---- updates ------------------------------------------------------------------------------------------------- */

struct update {
	struct ksm_region *region;
	ksm_pageno first;
	size_t count;
	uint32_t hot; /* pages that had been marked, and were written */
};

/* Calls each(update, page, count) for every range of pages that the query is about. 0 or an error. */
static int ask(struct update *update, const struct ksm_os_query *query,
	       void (*each)(struct update *update, ksm_pageno page, size_t count))
{
	struct ksm_tracker *tracker = update->region->tracker;
	const char *base = update->region->base, *at = ksm_region_page(update->region, update->first);
	const char *to = at + (update->count << KSM_PAGE_SHIFT);
	while (at < to) {
		const char *before = at;
		int n = ksm_os_page_ranges(tracker->peer->fds.pagemap, &at, to, query, tracker->ranges,
					   KSM_COUNT(tracker->ranges));
		if (n < 0)
			return n;
		for (int i = 0; i < n; i++)
			each(update, (tracker->ranges[i].from - (uintptr_t)base) >> KSM_PAGE_SHIFT,
			     (tracker->ranges[i].to - tracker->ranges[i].from) >> KSM_PAGE_SHIFT);
		if (at <= before)
			return -EIO;
	}
	return 0;
}

/* With their neighbours, so that mappings join; of those that are watched already the kernel leaves the marks alone. */
static void found_unwatched(struct update *update, ksm_pageno page, size_t count)
{
	struct ksm_region *region = update->region;
	ksm_pageno end = page + count, limit = update->first + update->count;
	ksm_region_note(region, page, count, KSM_TODO_LOOK);
	for (ksm_pageno i = page; i < end; i++)
		ksm_region_set_clean(region, i, false);
	while (page > update->first && is_watchable(region, page) && is_watchable(region, page - 1))
		page--;
	for (size_t n; page < end; page += n + 1) {
		for (n = 0; page + n < limit && is_watchable(region, page + n);)
			n++;
		if (n)
			watch(region, page, n);
	}
}

static void found_written(struct update *update, ksm_pageno page, size_t count)
{
	ksm_region_note(update->region, page, count, KSM_TODO_LOOK);
	for (ksm_pageno i = page; i < page + count; i++) {
		update->hot += ksm_region_is_clean(update->region, i);
		ksm_region_set_clean(update->region, i, false);
	}
}

void ksm_dirty_begin(struct ksm_tracker *tracker)
{
	uint64_t now = ksm_os_now_ns(), paid = (now - tracker->debt_at_ns) / DEBT_SHARE;
	tracker->debt_at_ns = now;
	tracker->debt_ns -= KSM_MIN(tracker->debt_ns, paid);
	tracker->solvent = tracker->debt_ns == 0;
}

static size_t watchable_at(const struct update *update, ksm_pageno page)
{
	size_t n = 0;
	while (page + n < update->first + update->count && is_watchable(update->region, page + n))
		n++;
	return n;
}

/* DIRTY-6: registered memory may be watched by a descriptor of the program's, and what it is told we would take away. So all of
 * a piece is registered with ours, or nothing. */
static int own(struct update *update)
{
	struct ksm_region *region = update->region;
	ksm_pageno end = update->first + update->count, page = update->first;
	uint8_t before[KSM_PIECE_PAGES / KSM_TODO_PAGES];
	int r = 0;
	memcpy(before, ksm_region_piece(region, page)->todo, sizeof(before));
	for (size_t n; page < end && !r; page += r ? 0 : n + 1) {
		n = watchable_at(update, page);
		if (n)
			r = watch(region, page, n);
	}
	for (ksm_pageno at = update->first, n; r && at < page; at += n + 1) {
		n = watchable_at(update, at);
		if (n && at < page)
			ksm_os_uffd_unregister(region->tracker->uffd, ksm_region_page(region, at), n << KSM_PAGE_SHIFT);
	}
	if (r)
		memcpy(ksm_region_piece(region, update->first)->todo, before, sizeof(before));
	return r;
}

/* What has come since. */
static int check_owner(struct update *update)
{
	struct ksm_region *region = update->region;
	ksm_pageno end = update->first + update->count;
	int r = 0;
	for (ksm_pageno page = update->first, n; page < end && !r; page += n + 1) {
		for (n = 0; page + n < end && is_watchable(region, page + n) && !is_ours(region, page + n);)
			n++;
		if (n)
			r = watch(region, page, n);
	}
	return r;
}

static int update_piece(struct update *update, bool armed)
{
	struct ksm_os_query query = WRITTEN;
	query.protect = armed;
	bool theirs = update->region->registered;
	int r = theirs && ksm_region_piece(update->region, update->first)->watch == KSM_WATCH_NONE ? own(update) : 0;
	if (!r)
		r = ask(update, &UNWATCHED, found_unwatched);
	if (!r && theirs)
		r = check_owner(update);
	return r ? r : ask(update, &query, found_written);
}

static void found_watched(struct update *update, ksm_pageno page, size_t count)
{
	ksm_os_uffd_unregister(update->region->tracker->uffd, ksm_region_page(update->region, page),
			       count << KSM_PAGE_SHIFT);
}

/* The program has unmapped some of it: it merges no more, and what has come there is none of ours. */
static void leave_alone(struct ksm_region *region)
{
	size_t used = ksm_load_acquire(&region->used);
	for (size_t piece = 0; piece < pieces_of(region); piece++) {
		struct update update = {.region = region, .first = piece * KSM_PIECE_PAGES};
		update.count = KSM_MIN(used - update.first, (size_t)KSM_PIECE_PAGES);
		if (region->pieces[piece].watch != KSM_WATCH_NONE)
			ask(&update, &WATCHED, found_watched);
	}
	ksm_dirty_forget(region);
}

void ksm_dirty_update(struct ksm_region *region, ksm_pageno page, bool force)
{
	size_t used = ksm_load_acquire(&region->used);
	struct ksm_tracker *tracker = region->tracker;
	struct ksm_piece *piece = &region->pieces[page / KSM_PIECE_PAGES];
	struct update update = {.region = region, .first = page / KSM_PIECE_PAGES * KSM_PIECE_PAGES};
	if (update.first >= used)
		return;
	if (!is_tracked(region) || tracker->peer->fds.pagemap < 0) {
		if (piece->watch != KSM_WATCH_NONE)
			ksm_dirty_forget(region);
		return;
	}
	if (region->gone) {
		leave_alone(region);
		return;
	}
	update.count = KSM_MIN(used - update.first, (size_t)KSM_PIECE_PAGES);
	ksm_dirty_watch_fresh(region, update.first, update.count);
	bool armed = force || !piece->hot || tracker->solvent;
	int r = update_piece(&update, armed);
	if (r) { /* DIRTY-5 */
		ksm_count(tracker->peer->self, KSM_FAILURES, r != -EBUSY && r != -EINVAL);
		for (ksm_pageno i = update.first; i < update.first + update.count; i++)
			ksm_region_set_clean(region, i, false);
		piece->watch = KSM_WATCH_NONE;
		piece->since = piece->hot = 0;
		return;
	}
	piece->watch = armed ? KSM_WATCH_ARMED : KSM_WATCH_KNOWN;
	piece->since += update.hot;
	if (armed) {
		piece->hot = piece->since;
		piece->since = 0;
	}
	tracker->debt_ns = KSM_MIN(tracker->debt_ns + (uint64_t)update.hot * FAULT_NS, (uint64_t)DEBT_MOST_NS);
}

bool ksm_dirty_is_due(const struct ksm_region *region, ksm_pageno page)
{
	return region->pieces[page / KSM_PIECE_PAGES].watch != KSM_WATCH_KNOWN;
}

void ksm_dirty_digested(struct ksm_region *region, ksm_pageno page)
{
	if (region->pieces[page / KSM_PIECE_PAGES].watch == KSM_WATCH_ARMED)
		ksm_region_set_clean(region, page, true);
}

enum ksm_dirty ksm_dirty_query(const struct ksm_region *region, ksm_pageno page, uint64_t digest)
{
	switch (ksm_region_state(region, page)) {
	case KSM_PAGE_SEEN:
	case KSM_PAGE_CANDIDATE:
	case KSM_PAGE_REFUSED:
		return ksm_region_digest(region, page) == digest ? KSM_DIRTY_UNWRITTEN : KSM_DIRTY_WRITTEN;
	default:
		return KSM_DIRTY_NEW;
	}
}
