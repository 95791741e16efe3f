/* SPDX-License-Identifier: MIT */
/*
 * thread.h: what /proc tells about one thread of this process. tasks: /proc/self/task. No malloc, no stdio, no lock.
 */
#ifndef KSM_THREAD_H
#define KSM_THREAD_H

#include "base.h"

struct ksm_thread {
	char state;   /* its letter in stat(5) */
	bool kernels; /* it never leaves the kernel: carries out io_uring requests, or a virtual machine's (vhost) */
	char name[17];
};

/* false: it is gone; *out is empty then. */
bool ksm_thread_look(int tasks, int tid, struct ksm_thread *out);
bool ksm_thread_blocks(int tasks, int tid, int signal);
/* The first of these threads that blocks the signal, and not just for a moment; 0: none. Masks are looked up now and then. */
int ksm_thread_find_blocker(int tasks, const int *tids, size_t count, int signal);
/* Is it waiting for a child of vfork or posix_spawn? */
bool ksm_thread_in_vfork(int tasks, int tid);

#endif
