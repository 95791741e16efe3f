/* SPDX-License-Identifier: MIT */
/*
 * DOC: Finding twins
 *
 * The step "find" of a merge: which frame, for each cold page of a stretch? In this order: the frame that would continue
 * the run on the left (or has the page's own number), if its check agrees; what the index says; and if another peer, or
 * another page of ours, has said it has such a page: promote ours, to a frame beside its neighbours'.
 *
 * One content gets one frame, with one exception. A long area of equal pages (a constant array) on a single frame would
 * be one memory mapping a page; so up to EQUAL_RUN neighbours of one content get frames of their own, in a row, and
 * the rest of the area repeats that run.
 */
#include "merge.h"

#include <errno.h>

#define EQUAL_RUN 8
#define EQUAL_WORTH 32 /* pages of one content in a row, from which on that is done */

/* The frame of the page on the left: merged, or about to be. */
static ksm_frameno left_frame(const struct ksm_merger *m, size_t i)
{
	if (i > 0 && m->verdicts[i - 1] == KSM_MERGE_MAP)
		return m->targets[i - 1];
	return m->first + i ? ksm_region_frame(m->region, m->first + i - 1) : KSM_NO_FRAME;
}

/* Would this page's frame be a second one for a content of this very stretch, without being part of a run? */
static bool is_repeated(const struct ksm_merger *m, size_t i)
{
	size_t before = 0, after = 0; /* neighbours with the same content */
	while (before < i && m->promoted[i - 1 - before] && m->digests[i - 1 - before] == m->digests[i])
		before++;
	while (i + after + 1 < m->count && m->verdicts[i + after + 1] == KSM_MERGE_LOOK &&
	       m->digests[i + after + 1] == m->digests[i])
		after++;
	if (before)
		return before >= EQUAL_RUN || before + after + 1 < EQUAL_WORTH;
	for (size_t j = 0; j < i; j++)
		if (m->promoted[j] && m->digests[j] == m->digests[i])
			return true;
	return false;
}

/*
 * No frame can be had for a page that was claimed: it is a candidate like others. That is news once only, or nobody would ever
 * be done while there is such a page.
 */
static void stay_candidate(struct ksm_merger *m, size_t i)
{
	ksm_pageno page = m->first + i;
	bool is_news = ksm_region_state(m->region, page) != KSM_PAGE_CANDIDATE ||
		       ksm_region_digest(m->region, page) != m->digests[i];
	ksm_candidate_release(m->index, m->peer, m->digests[i], ksm_merger_page(m, i), is_news);
	ksm_region_move(m->region, page, KSM_PAGE_CANDIDATE, m->digests[i]);
}

static bool try_promote(struct ksm_merger *m, size_t i)
{
	uint64_t digest = m->digests[i];
	ksm_frameno left = left_frame(m, i), frame;
	if (is_repeated(m, i)) /* it will find the other's frame */
		return false;
	/* Whatever may be missing, it is not found out after the claim, which takes the place of the other's word. */
	int r = ksm_peer_refresh_if_changed(m->peer);
	if (!r)
		r = ksm_index_make_room(m->index, m->peer, digest);
	if (r) {
		ksm_merger_why_not(m, r);
		return false;
	}
	if (!ksm_candidate_claim(m->index, m->peer, digest, ksm_merger_page(m, i)))
		return false;
	frame = ksm_index_take(m->index, m->peer, digest, KSM_NO_FRAME); /* written since we looked? */
	if (frame != KSM_NO_FRAME) {
		ksm_candidate_unclaim(m->index, m->peer, digest, ksm_merger_page(m, i));
		m->targets[i] = frame;
		return true;
	}
	ksm_frameno want = left != KSM_NO_FRAME ? left + 1 : ksm_region_home(m->region, m->first + i);
	r = ksm_frame_alloc(m->peer, want, &frame);
	if (r) {
		stay_candidate(m, i);
		ksm_merger_why_not(m, r);
		return false;
	}
	m->targets[i] = frame;
	m->promoted[i] = true;
	return true;
}

static bool find_target(struct ksm_merger *m, size_t i)
{
	uint64_t digest = m->digests[i];
	ksm_frameno left = left_frame(m, i);
	ksm_frameno expected = left == KSM_NO_FRAME ? ksm_region_home(m->region, m->first + i) : left + 1;
	if (expected != KSM_NO_FRAME && expected < m->peer->layout.frames &&
	    ksm_frame_looks_like(m->peer, expected, digest) && ksm_frame_take(m->peer, expected, 0, 0)) {
		m->targets[i] = expected;
		return true;
	}
	m->targets[i] = ksm_index_take(m->index, m->peer, digest, expected);
	if (m->targets[i] != KSM_NO_FRAME)
		return true;
	switch (ksm_candidate_find(m->index, m->peer, digest, ksm_merger_page(m, i))) {
	case KSM_CANDIDATE_OTHER:
		/* A page that was refused before would be again: its frame would be written for nothing. */
		if (ksm_region_state(m->region, m->first + i) == KSM_PAGE_REFUSED)
			return false;
		if (try_promote(m, i))
			return true;
		ksm_merger_come_back(m, i);
		return false;
	case KSM_CANDIDATE_NONE:
		ksm_candidate_add(m->index, m->peer, digest, ksm_merger_page(m, i));
		ksm_twin_note(m, i);
		/* fall through */
	case KSM_CANDIDATE_OURS:
		ksm_region_move(m->region, m->first + i, KSM_PAGE_CANDIDATE, digest);
		return false;
	case KSM_CANDIDATE_CLAIMED:
	default:
		ksm_merger_come_back(m, i);
		return false;
	}
}

#define AHEAD 8 /* pages for which what the tables say is on its way */

static void prefetch(const struct ksm_merger *m, size_t i)
{
	if (i < m->count && m->verdicts[i] == KSM_MERGE_LOOK)
		ksm_index_prefetch(m->index, m->digests[i]);
}

void ksm_merge_find(struct ksm_merger *m)
{
	m->peer->shows_itself = false;
	for (size_t i = 0; i < AHEAD; i++)
		prefetch(m, i);
	for (size_t i = 0; i < m->count; i++) {
		prefetch(m, i + AHEAD);
		if (m->verdicts[i] != KSM_MERGE_LOOK)
			continue;
		m->verdicts[i] = find_target(m, i) ? KSM_MERGE_MAP : KSM_MERGE_LEAVE;
	}
	int denied = m->peer->book.error; /* to look something up, or to say what we have */
	if (denied) {
		m->peer->book.error = 0;
		ksm_merger_why_not(m, denied);
		ksm_count(m->peer->self, KSM_FAILURES, 1);
	}
}
