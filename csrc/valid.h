/* SPDX-License-Identifier: MIT */
/*
 * valid.h: is what the processes of a domain share as it should be? For tests and debug builds.
 */
#ifndef KSM_VALID_H
#define KSM_VALID_H

#include "index.h"

enum ksm_valid_when {
	KSM_VALID_ALWAYS,  /* whoever is in the middle of what, and whoever has died there */
	KSM_VALID_AT_REST, /* nobody who lives is in the middle of anything, and the dead have been buried */
	KSM_VALID_SWEPT,   /* the same, after a sweep of the marked chunks */
};

/*
 * Walk everything and compare it with the numbered invariants of valid.c. `peer` is whose eyes are used: its descriptors,
 * its view of the living as of its last ksm_peer_refresh(), which must have said 0. Merge lock held. Changes nothing.
 * Returns 0; or KSM_ECORRUPT, and why[] says in words what was found first; or -EAGAIN: a bitmap is not at hand.
 */
int ksm_domain_is_valid(const struct ksm_peer *peer, enum ksm_valid_when when, char *why, size_t room);

#endif
