/* SPDX-License-Identifier: MIT */
/*
 * handler.h: the process's SIGSEGV handler and its manners: it is one among others.
 */
#ifndef KSM_HANDLER_H
#define KSM_HANDLER_H

#include "base.h"

#include <signal.h>

/* Install it unless it is. 0 or an error. Any thread. Stays until the process ends. */
int ksm_handler_install(void);
bool ksm_handler_is_installed(void);
/*
 * Would a store into a read-only page be answered? 0: yes. KSM_EDISPLACED: somebody else's handler stands in our place.
 * KSM_EMASKED: a thread blocks SIGSEGV (looked for in /proc/self/task, now and then). When the answer changes to an error
 * every guarded page is made writable and ksm_handler_suspensions() grows. The scanner's thread, before each batch.
 */
int ksm_handler_check(void);
uint64_t ksm_handler_suspensions(void);
/* Stand on top again: whoever has displaced us is called after us from now on. 0 or an error. Any thread. */
int ksm_handler_reinstall(void);
/* Whoever is called after us first has been removed by its owner (as faulthandler.disable() does). */
void ksm_handler_popped(void);

#endif
