/* SPDX-License-Identifier: MIT */
/*
 * freeze.h: pages that the program wants read-only, and pages that it wants writable for system calls.
 *
 * All: merge lock held, every signal blocked in the calling thread.
 */
#ifndef KSM_FREEZE_H
#define KSM_FREEZE_H

#include "region.h"

/* In the scanner's thread. Read-only from now on, until a store into one of them or ksm_thaw(). The handler is
 * installed. On error none is. */
int ksm_freeze(struct ksm_region *region, ksm_pageno first, size_t count);
/* Writable again, contents unchanged, merged where they are. On error some are not. */
int ksm_thaw(struct ksm_region *region, ksm_pageno first, size_t count);
/* Private and writable, in fact and not only by permission: what a system call needs. */
int ksm_make_private(struct ksm_region *region, ksm_pageno first, size_t count);
/* Of a guarded region: claim what is read-only, waiting for whoever is at work on it; to be set OPEN after replacing. */
void ksm_own_pages(struct ksm_region *region, ksm_pageno page, size_t count);
/* They were not replaced: what was claimed is read-only still. */
void ksm_disown_pages(struct ksm_region *region, ksm_pageno page, size_t count);
/* How many are frozen now. */
size_t ksm_frozen_count(const struct ksm_region *region);

#endif
