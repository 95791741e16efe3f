/* SPDX-License-Identifier: MIT */
/*
 * sweep.h: frames that nobody refers to go back to the system.
 */
#ifndef KSM_SWEEP_H
#define KSM_SWEEP_H

#include "frame.h"

/*
 * Free the unreferenced frames of one chunk (KSM_CHUNK frames). Merge lock held. Returns how many, or an error:
 * -EAGAIN (a living peer's bitmap is not at hand, or somebody came meanwhile): the chunk stays marked.
 */
int ksm_sweep_chunk(struct ksm_peer *peer, uint64_t chunk);

/* Chunks that frames_high reaches into. */
uint64_t ksm_sweep_chunks(const struct ksm_peer *peer);

#endif
