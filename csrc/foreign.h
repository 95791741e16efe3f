/* SPDX-License-Identifier: MIT */
/*
 * foreign.h: memory that somebody else allocated, registered for merging; the functions are those of ksmalloc.h.
 */
#ifndef KSM_FOREIGN_H
#define KSM_FOREIGN_H

#include "domain.h"

/* Is all of [at, at + nbytes) private, writable, anonymous memory that nothing special was asked for? KSM_EMEMORY. */
int ksm_foreign_check(const void *at, size_t nbytes);

#endif
