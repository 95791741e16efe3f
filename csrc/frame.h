/* SPDX-License-Identifier: MIT */
/*
 * frame.h: the store: who may use which frame, and the frames' bytes. Everything here is called under the merge
 * lock, except ksm_frame_read().
 */
#ifndef KSM_FRAME_H
#define KSM_FRAME_H

#include "page.h"
#include "peer.h"

/* Generations are compared under a mask: the index keeps only the low bits. */
#define KSM_GENERATION_ALL UINT32_MAX

/*
 * Allocate a frame to write: `want` if it is free (KSM_NO_FRAME: no wish), else the one after the last allocated,
 * else a new stretch at the end of the store. Errors: -ENOSPC, -EAGAIN (a living peer's bitmap is
 * not at hand), KSM_EDUMPABLE. One reference is held.
 */
int ksm_frame_alloc(struct ksm_peer *peer, ksm_frameno want, ksm_frameno *out);
/* Allocated, but not to be published after all: free again. */
void ksm_frame_abandon(struct ksm_peer *peer, ksm_frameno frame);
/* Written: others may take it. Returns its generation. The reference stays. */
uint32_t ksm_frame_publish(struct ksm_peer *peer, ksm_frameno frame, uint64_t digest);

/* Is it published with this generation? A hint, before the trouble of a take. */
bool ksm_frame_looks_published(const struct ksm_peer *peer, ksm_frameno frame, uint32_t generation, uint32_t mask);
/* Does the published frame's check agree with this digest? A hint. */
bool ksm_frame_looks_like(const struct ksm_peer *peer, ksm_frameno frame, uint64_t digest);

/*
 * Take a reference before comparing: set our bit, fence, read the cell. false: a miss, nothing is held.
 * true: the frame's bytes will not change and it will not be freed until ksm_frame_put().
 */
bool ksm_frame_take(struct ksm_peer *peer, ksm_frameno frame, uint32_t generation, uint32_t mask);
/* Give one reference to each of `count` consecutive frames back: not mapped after all, or unmapped already. */
void ksm_frame_put(struct ksm_peer *peer, ksm_frameno frame, size_t count);

/* The bytes of `count` consecutive frames. -ENOSPC: the store is full (never a signal). */
int ksm_frame_write(struct ksm_peer *peer, ksm_frameno frame, size_t count, const void *from);
int ksm_frame_read(struct ksm_peer *peer, ksm_frameno frame, size_t count, void *to);

/* The store of a new domain: sized and sealed. 0 or an error. */
int ksm_store_prepare(int store, uint64_t frames, uint32_t backing);
/* That of a domain that exists, from a peer: KSM_ECORRUPT if it is not a store of this size that will stay so. */
int ksm_store_check(int store, uint64_t frames, uint32_t backing);

#endif
