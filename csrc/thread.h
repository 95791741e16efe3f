/* SPDX-License-Identifier: MIT */
/*
 * thread.h: what /proc tells about one thread of this process. tasks: /proc/self/task. No malloc, no stdio, no lock.
 */
#ifndef KSM_THREAD_H
#define KSM_THREAD_H

#include "base.h"

#define KSM_THREAD_NAME 17

/* The letter of its state in stat(5), and its name. 0: it is gone. */
char ksm_thread_state(int tasks, int tid, char name[KSM_THREAD_NAME]);
bool ksm_thread_blocks(int tasks, int tid, int signal);
/* Is it waiting for a child of vfork or posix_spawn? */
bool ksm_thread_in_vfork(int tasks, int tid);
/* Is it one of the kernel's inside this process, by its name: carries out io_uring requests, or a virtual machine's. */
bool ksm_thread_is_kernels(const char *name);

#endif
