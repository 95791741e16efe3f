/* SPDX-License-Identifier: MIT */
/*
 * audit.h: are this process's own books right? For tests: see level 3 in base.h.
 */
#ifndef KSM_AUDIT_H
#define KSM_AUDIT_H

#include "region.h"

/*
 * Recount everything that is known of these regions (linked by `next`: all that the peer has), and compare it with the
 * peer's books and with what the kernel says. Merge lock held, nothing under way. Changes nothing.
 * 0; or KSM_ECORRUPT, and why[] says in words what was found first. What cannot be looked at passes.
 */
int ksm_books_are_valid(const struct ksm_peer *peer, const struct ksm_region *regions, char *why, size_t room);

/* At level 3: the same, and the process ends with a message if they are wrong. Else nothing. */
void ksm_audit(const struct ksm_peer *peer, const struct ksm_region *regions);

#endif
