/* SPDX-License-Identifier: MIT */
/*
 * DOC: Looking at pages
 *
 * The step "look" of a merge: which pages of the stretch are private, present and cold; which merged ones have been
 * broken since. What the pagemap says of a page decides, with two exceptions:
 *
 *    guarded      a page that we mapped read-only is unbroken while its guard says MERGED, and was copied to anonymous
 *                 memory by our handler if the guard says OPEN: exact, and free
 *    no pagemap   a process that is not dumpable (it changed its user) may not read its own. mincore() tells which pages
 *                 are there, and a merged page that nobody guards is compared with its frame, now and then: if the bytes
 *                 differ it is broken. A page that was written with the same bytes goes on being called merged, which is
 *                 wrong about memory and right about bytes.
 */
#include "merge.h"

#include "dirty.h"
#include "error.h"
#include "os.h"
#include "page.h"
#include "survey.h"

#include <string.h>

#define BLIND_EVERY 16 /* passes between two comparisons of merged pages with their frames */

static bool is_blind(const struct ksm_merger *m)
{
	return m->peer->fds.pagemap < 0;
}

int ksm_merger_see_kinds(struct ksm_merger *m)
{
	if (!is_blind(m))
		return ksm_os_pagemap(m->peer->fds.pagemap, ksm_merger_page(m, 0), m->count, m->kinds);
	return ksm_os_resident(ksm_merger_page(m, 0), m->count, m->kinds);
}

const char *ksm_merger_bytes(struct ksm_merger *m, size_t i)
{
	if (!m->region->registered)
		return ksm_merger_page(m, i);
	return ksm_survey_read(m->region, m->first + i, m->mirror) ? NULL : (const char *)m->mirror;
}

/* ---- pages mapped to frames -------------------------------------------------------------------------------- */

static void became_broken(struct ksm_merger *m, size_t i)
{
	ksm_region_move(m->region, m->first + i, KSM_PAGE_BROKEN, ksm_region_frame(m->region, m->first + i));
	ksm_count(m->peer->self, KSM_COW_BREAKS, 1);
}

/* Merged, and not guarded: pages [i, i + n) with consecutive frames. */
static void compare_with_frames(struct ksm_merger *m, size_t i, size_t n)
{
	char *copy = ksm_merger_copy(m, i);
	memset(m->at_hand + i, false, n);
	if (ksm_frame_read(m->peer, ksm_region_frame(m->region, m->first + i), n, copy))
		return;
	for (size_t j = 0; j < n; j++) {
		const char *bytes = ksm_merger_bytes(m, i + j);
		if (bytes && !ksm_page_equal(bytes, copy + j * KSM_PAGE_SIZE))
			became_broken(m, i + j);
	}
}

static bool is_unguarded(const struct ksm_merger *m, size_t i)
{
	return ksm_region_state(m->region, m->first + i) == KSM_PAGE_MERGED &&
	       KSM_GUARD_STATE(ksm_region_guard_of(m->region, m->first + i)) == KSM_GUARD_WRITABLE;
}

static void look_without_pagemap(struct ksm_merger *m)
{
	for (size_t i = 0, n; i < m->count; i += n ? n : 1) {
		ksm_frameno frame = ksm_region_frame(m->region, m->first + i);
		n = 0;
		while (i + n < m->count && is_unguarded(m, i + n) &&
		       ksm_region_frame(m->region, m->first + i + n) == frame + n)
			n++;
		if (n)
			compare_with_frames(m, i, n);
	}
}

static void look_at_merged(struct ksm_merger *m, size_t i)
{
	uint16_t kind = m->kinds[i];
	switch (KSM_GUARD_STATE(ksm_region_guard_of(m->region, m->first + i))) {
	case KSM_GUARD_OPEN:
		ksm_region_forget(m->region, m->first + i, 1);
		return;
	case KSM_GUARD_WRITABLE:
		if (!is_blind(m) &&
		    ((kind & KSM_PAGE_SWAPPED) || ((kind & KSM_PAGE_PRESENT) && !(kind & KSM_PAGE_FILE))))
			became_broken(m, i);
		return;
	default: /* read-only, or about to be copied */
		return;
	}
}

void ksm_merge_see_breaks(struct ksm_merger *merger, struct ksm_region *region, ksm_pageno first, size_t count)
{
	merger->region = region;
	merger->first = first;
	merger->count = count;
	ksm_region_count_breaks(region);
	if (ksm_merger_see_kinds(merger))
		return;
	if (is_blind(merger))
		look_without_pagemap(merger);
	for (size_t i = 0; i < count; i++)
		if (ksm_region_state(region, first + i) == KSM_PAGE_MERGED)
			look_at_merged(merger, i);
}

/* ---- private pages ------------------------------------------------------------------------------------------ */

/* A page of zeros that was given back. Returns whether there is something in it again. */
static bool look_at_dropped(struct ksm_merger *m, size_t i)
{
	uint16_t kind = m->kinds[i];
	bool private = (kind & KSM_PAGE_SWAPPED) || ((kind & KSM_PAGE_PRESENT) && !(kind & KSM_PAGE_FILE));
	if (!private || (kind & KSM_PAGE_SHARED))
		return false;
	const char *bytes = is_blind(m) ? ksm_merger_bytes(m, i) : NULL;
	if (bytes && ksm_page_is_zero(bytes))
		return false; /* read since, perhaps: the kernel's own page of zeros */
	ksm_region_move(m->region, m->first + i, KSM_PAGE_UNKNOWN, 0);
	return true;
}

static bool can_be_had(const struct ksm_merger *m, size_t i)
{
	uint16_t kind = m->kinds[i];
	if (!(kind & KSM_PAGE_PRESENT) || (kind & KSM_PAGE_FILE))
		return false;
	const struct ksm_barrier *barrier = ksm_merger_barrier(m, i);
	return !(kind & KSM_PAGE_SHARED) || (barrier->ops && barrier->ops->shared);
}

/* The page's digest, from its word or its bytes, and what it says. UNKNOWN: it is not to be had, or not worth it now. */
static enum ksm_dirty digest_of(struct ksm_merger *m, size_t i, uint64_t *digest, bool *zero)
{
	ksm_pageno page = m->first + i;
	bool exact = m->force && m->again; /* devices write, and nothing tells */
	if (ksm_region_is_clean(m->region, page) && !exact) {
		*digest = ksm_region_digest(m->region, page);
		*zero = *digest == ksm_page_zero_digest();
		return KSM_DIRTY_UNWRITTEN;
	}
	if (!m->force && !ksm_dirty_is_due(m->region, page)) {
		m->counts->written++;
		return KSM_DIRTY_UNKNOWN;
	}
	const char *bytes = ksm_merger_bytes(m, i);
	if (!bytes) { /* its owner has protected it, or unmapped it this very moment */
		m->counts->skipped++;
		return KSM_DIRTY_UNKNOWN;
	}
	*digest = ksm_page_digest(bytes);
	*zero = ksm_page_is_zero(bytes);
	enum ksm_dirty dirty = ksm_dirty_query(m->region, page, *digest);
	if (dirty == KSM_DIRTY_UNWRITTEN) /* or with what was there before */
		ksm_dirty_digested(m->region, page);
	return dirty;
}

static void look_at_private(struct ksm_merger *m, size_t i)
{
	ksm_pageno page = m->first + i;
	uint16_t kind = m->kinds[i];
	enum ksm_page_state state = ksm_region_state(m->region, page);
	if (!can_be_had(m, i)) {
		if (state != KSM_PAGE_UNKNOWN)
			ksm_region_unknow(m->region, page);
		m->counts->skipped += (kind & (KSM_PAGE_SWAPPED | KSM_PAGE_FILE | KSM_PAGE_SHARED)) != 0;
		return;
	}
	bool zero;
	uint64_t digest;
	enum ksm_dirty dirty = digest_of(m, i, &digest, &zero);
	if (dirty == KSM_DIRTY_UNKNOWN)
		return;
	m->counts->scanned++;
	m->digests[i] = digest;
	if (dirty != KSM_DIRTY_UNWRITTEN) {
		m->counts->written += dirty == KSM_DIRTY_WRITTEN;
		if (state != KSM_PAGE_UNKNOWN)
			ksm_region_unknow(m->region, page);
		ksm_region_move(m->region, page, KSM_PAGE_SEEN, digest);
		ksm_dirty_digested(m->region, page);
		if (!m->force)
			return;
	} else if (state == KSM_PAGE_REFUSED && m->again) {
		ksm_region_move(m->region, page, KSM_PAGE_SEEN, digest); /* pins end, and nothing tells */
	} else if (state == KSM_PAGE_REFUSED && !m->force) {
		m->counts->skipped++;
		return;
	}
	int ready = ksm_merger_ready(m, i);
	if (ready) {
		ksm_merger_why_not(m, ready);
		m->counts->skipped++;
		ksm_merger_come_back(m, i);
		return;
	}
	m->verdicts[i] = zero ? KSM_MERGE_DROP : KSM_MERGE_LOOK;
}

void ksm_merge_note_rest(struct ksm_merger *m)
{
	for (size_t i = 0; i < m->count; i++) {
		switch (ksm_region_state(m->region, m->first + i)) {
		case KSM_PAGE_UNKNOWN:
			if (m->kinds[i] & (KSM_PAGE_PRESENT | KSM_PAGE_SWAPPED))
				ksm_region_note(m->region, m->first + i, 1, KSM_TODO_LOOK);
			break;
		case KSM_PAGE_SEEN:
		case KSM_PAGE_BROKEN:
			ksm_region_note(m->region, m->first + i, 1, KSM_TODO_LOOK);
			break;
		case KSM_PAGE_CANDIDATE:
		case KSM_PAGE_REFUSED: /* if not clean, it could not be read now */
			ksm_region_note(m->region, m->first + i, 1,
					ksm_region_is_clean(m->region, m->first + i) ? KSM_TODO_ASK : KSM_TODO_LOOK);
			break;
		default:
			break;
		}
	}
}

bool ksm_merge_look(struct ksm_merger *m)
{
	bool any = false;
	int r = ksm_merger_see_kinds(m);
	if (r) {
		ksm_region_note(m->region, m->first, m->count, KSM_TODO_LOOK);
		ksm_merger_why_not(m, r);
		return false;
	}
	ksm_region_count_breaks(m->region);
	uint8_t found[KSM_STRETCH];
	if (!m->region->gone)
		ksm_survey_roughly(m->region, m->first, m->count, found);
	if (m->region->gone || ksm_survey_give_up(m->region, m->first, m->count, found)) {
		ksm_merger_why_not(m, KSM_EMEMORY);
		return false;
	}
	for (size_t i = 0; i < m->count; i++) {
		m->is_frozen[i] = (ksm_region_guard_of(m->region, m->first + i) & KSM_GUARD_FROZEN) != 0;
		if (m->twins && !m->at_hand[i])
			continue;
		if (found[i] != KSM_SURVEY_OURS) {
			ksm_merger_why_not(m, KSM_EMEMORY);
			m->counts->skipped++;
			continue;
		}
		switch (ksm_region_state(m->region, m->first + i)) {
		case KSM_PAGE_MERGED:
			look_at_merged(m, i);
			break;
		case KSM_PAGE_BROKEN: /* since before this look, so that what is being written now gets some rest */
			if (KSM_GUARD_STATE(ksm_region_guard_of(m->region, m->first + i)) == KSM_GUARD_OPEN)
				ksm_region_forget(m->region, m->first + i, 1); /* our handler has copied it since */
			else
				m->worn[i] = !(m->kinds[i] & KSM_PAGE_SWAPPED) &&
					     !ksm_region_is_held(m->region, m->first + i);
			break;
		case KSM_PAGE_DROPPED:
			if (!look_at_dropped(m, i))
				break;
			/* fall through */
		default:
			if (!ksm_region_is_held(m->region, m->first + i))
				look_at_private(m, i);
		}
		any |= m->verdicts[i] != KSM_MERGE_LEAVE;
	}
	if (is_blind(m) && (m->force || m->passes % BLIND_EVERY == 0))
		look_without_pagemap(m);
	return any;
}
