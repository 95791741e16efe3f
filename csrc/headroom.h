/* SPDX-License-Identifier: MIT */
/*
 * headroom.h: how much memory the control groups of this process still allow it.
 */
#ifndef KSM_HEADROOM_H
#define KSM_HEADROOM_H

#include "base.h"

#define KSM_HEADROOM_LEVELS 8 /* groups with a limit, from ours up to the root, that are looked at */
#define KSM_HEADROOM_PATH 1024

struct ksm_headroom {
	/* where to look; fixed */
	const char *root;       /* where control groups are mounted */
	const char *membership; /* the file that says which are ours */
	const char *meminfo;    /* the file that says how much swap is free */
	/* what was found */
	char path[KSM_HEADROOM_PATH]; /* our group's directory */
	bool unified;                 /* version 2 of control groups */
	size_t levels[KSM_HEADROOM_LEVELS];
	uint64_t limits[KSM_HEADROOM_LEVELS];
	uint64_t both[KSM_HEADROOM_LEVELS]; /* version 1: of memory and swap together; UINT64_MAX: none */
	size_t count;
	uint64_t found_ns; /* when; 0: never */
	/* the last look at usage */
	uint64_t looked_ns;
	uint64_t room;   /* bytes */
	uint64_t credit; /* of it, that may be used before the next look */
	bool short_of;   /* too little was left: until there is clearly more */
};

/* NULL: the usual places. Looks at nothing yet, takes nothing. */
void ksm_headroom_init(struct ksm_headroom *headroom, const char *root, const char *membership);

/*
 * May `nbytes` more be used, so that a further `spare` bytes stay free for others? 0, or KSM_EHEADROOM. Cheap: looks
 * seldom while there is plenty. Errors of looking count as no limit. One thread at a time.
 */
int ksm_headroom_check(struct ksm_headroom *headroom, uint64_t nbytes, uint64_t spare);
/* Bytes left in the tightest group, looked up now; UINT64_MAX: no limit. */
uint64_t ksm_headroom_now(struct ksm_headroom *headroom);

#endif
