/* SPDX-License-Identifier: MIT */
/*
 * gate.h: the signal that holds a thread, its handler, and the table in which scanner and threads meet.
 *
 *     prepare ─▶ close ─▶ send to each, wait, withdraw … ─▶ open
 *
 * park.h decides whom to hold, and for how long; whoever calls this holds its lock.
 */
#ifndef KSM_GATE_H
#define KSM_GATE_H

#include "base.h"

#define KSM_GATE_THREADS 32768u /* at most, in one stop */

/* Map the table, once in a process, and have a signal. -ENOMEM; -EAGAIN: no real-time signal is free. */
int ksm_gate_prepare(void);
/* The signal in use, 0: none yet. Any thread. */
int ksm_gate_signal(void);
/* Which one to use from the next ksm_gate_prepare() on; 0: the highest free one. -EINVAL. Any thread. */
int ksm_gate_wish(int signal);
/* Is the signal still ours? Else another one is taken, or -EAGAIN. */
int ksm_gate_check_signal(void);

/* A stop begins: threads that are sent to stay in the handler. */
void ksm_gate_close(void);
/* It ends. They go. */
void ksm_gate_open(void);

/*
 * 1: the signal has been sent, or the thread has just ended. 0: was sent to before in this stop, and it is parked or
 * left out. -EAGAIN: too many signals are pending. -EBUSY: the signal is not ours any more.
 */
int ksm_gate_send(int tid);
/* Nobody is told that all have parked between begin and end: more are being sent to. */
void ksm_gate_begin_sending(void);
void ksm_gate_end_sending(void);

/* How many have not parked yet. */
uint32_t ksm_gate_missing(void);
bool ksm_gate_is_missing(int tid);
/* Sleep while `missing` are. 0 or -EAGAIN: look again; else the time is over. */
int ksm_gate_wait(uint32_t missing, uint64_t timeout_ns);
/* It is not waited for any more. left: for the rest of this stop; else it may be sent to again. */
void ksm_gate_withdraw(int tid, bool left);

/* In the child of a fork. */
void ksm_gate_fork_child(void);

#endif
