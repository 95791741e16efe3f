/* SPDX-License-Identifier: MIT */
/*
 * index.h: digest → frame, and digest → peer that has a page like that.
 */
#ifndef KSM_INDEX_H
#define KSM_INDEX_H

#include "frame.h"
#include "table.h"

struct ksm_index {
	struct ksm_table frames;
	struct ksm_table candidates;
};

/* Point at the tables in the peer's control memfd. */
void ksm_index_attach(struct ksm_index *index, const struct ksm_peer *peer);

/* A digest will be looked up soon, in both tables. */
void ksm_index_prefetch(const struct ksm_index *index, uint64_t digest);

/*
 * Look a digest up and take the frame (merge lock held). `prefer`: this one if it is among those found.
 * Returns the frame, or KSM_NO_FRAME.
 */
ksm_frameno ksm_index_take(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, ksm_frameno prefer);
/* Before a frame is written: that its word will have a place. */
int ksm_index_make_room(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest);
/* A frame was published. */
void ksm_index_insert(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, ksm_frameno frame,
		      uint32_t generation);

enum ksm_candidate {
	KSM_CANDIDATE_NONE,    /* nobody has such a page */
	KSM_CANDIDATE_OURS,    /* only this very page has said so */
	KSM_CANDIDATE_OTHER,   /* a living peer, or another page of this process, has one */
	KSM_CANDIDATE_CLAIMED, /* some living peer is writing the frame right now */
};

/* All of these: `page` is the address of our page, to know its own word again; never followed. */
enum ksm_candidate ksm_candidate_find(struct ksm_index *index, const struct ksm_peer *peer, uint64_t digest,
				      const void *page);
/* We have such a page. */
void ksm_candidate_add(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, const void *page);
/* We have it no longer. */
void ksm_candidate_remove(struct ksm_index *index, const struct ksm_peer *peer, uint64_t digest, const void *page);
/* Become the one who writes the frame. false: somebody else is, or it is gone. */
bool ksm_candidate_claim(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, const void *page);
/* Written, or given up. */
void ksm_candidate_unclaim(struct ksm_index *index, const struct ksm_peer *peer, uint64_t digest, const void *page);

/* We cannot write it: a candidate again, of this page. is_news: the others have not been told of this page before. */
void ksm_candidate_release(struct ksm_index *index, struct ksm_peer *peer, uint64_t digest, const void *page,
			   bool is_news);

/* Could a word, not 0, have come to be there by what the functions above do? See valid.c. */
bool ksm_index_word_is_valid(const struct ksm_peer *peer, uint64_t word);
bool ksm_candidate_word_is_valid(const struct ksm_peer *peer, uint64_t word);

#endif
