/* SPDX-License-Identifier: MIT */
/*
 * hazards.h: what else than this process's threads may write to its memory: requests that the kernel or a device
 * completes by itself. Who holds all threads has not stopped those.
 */
#ifndef KSM_HAZARDS_H
#define KSM_HAZARDS_H

#include "base.h"

struct ksm_hazards;

/* -ENOENT (no /proc), -ENOMEM, -EMFILE. The descriptors lie in the calling thread's table. */
int ksm_hazards_create(struct ksm_hazards **out);
void ksm_hazards_destroy(struct ksm_hazards *hazards);

/*
 * Look at the descriptors of these threads' tables, and at the process. parked: all of them are held, so nothing changes
 * any more and nothing is allocated. 0: none. KSM_EDEVICES: something, see the text. Other errors: a look failed.
 */
int ksm_hazards_look(struct ksm_hazards *hazards, const int *tids, size_t count, bool parked);
/* What the last look found, "" if nothing. */
const char *ksm_hazards_text(const struct ksm_hazards *hazards);

#endif
