/* SPDX-License-Identifier: MIT */
/*
 * cow.h: copy-on-write in user space: what the kernel's do_wp_page() does, for pages we mapped read-only.
 */
#ifndef KSM_COW_H
#define KSM_COW_H

#include "guard.h"

/*
 * Replace [at, at + pages) by private anonymous memory with the same bytes, in one step as seen by everybody.
 * Nobody may write to the range meanwhile (it is read-only, or all are parked). writable: as it shall be afterwards.
 * like_arena: without huge pages, as the rest of an arena. -ENOMEM: nothing has changed. Safe in a signal handler.
 */
int ksm_cow_copy_sigsafe(void *at, size_t pages, bool writable, bool like_arena);

enum ksm_cow_answer {
	KSM_COW_NOT_OURS = 0, /* somebody else's fault */
	KSM_COW_RETRY,        /* done, or to be tried again: return to the program */
};
/* A store to `address` found it read-only (SEGV_ACCERR). tid: of the calling thread. Safe in a signal handler only. */
enum ksm_cow_answer ksm_cow_fault_sigsafe(void *address, int tid);

/* Under the merge lock: make one page ready to be written, as a store by the program would. 0 or -ENOMEM. */
int ksm_cow_break(struct ksm_guard *guard, size_t page);

#endif
