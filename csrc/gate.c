/* SPDX-License-Identifier: MIT */
/*
 * DOC: The gate
 *
 * A thread is sent a real-time signal with a value: the number of the stop, and the slot made for the thread. The handler
 * marks the slot and sleeps until the gate opens.
 *
 *    gate       number of the stop under way, 0: open. Held threads sleep on it
 *    slots      a table of threads by number: (stop, thread, state) in one word each, valid for that stop only
 *    missing    (stop, how many have not parked yet): the scanner sleeps on it
 *
 *    scanner   close ▸ slot = SENT, one more missing ▸ send ▸ … ▸ wait until none is missing ▸ … ▸ open, wake
 *    thread    slot: SENT → PARKED ▸ one less missing ▸ sleep while the gate is this stop's ▸ back to where it was
 *
 * GATE-1. A thread counts as parked when it has exchanged the very word that was made for it in this stop. A signal of an
 *         earlier stop finds another word, and its handler returns at once.
 * GATE-2. After that exchange the handler stores nothing but `missing`, until the gate has moved. One that is still on
 *         its way out when the next stop begins has that stop's signal blocked; it is delivered before the thread's
 *         first instruction of its own.
 * GATE-3. `missing` is lowered once for each thread, by whoever takes its slot out of SENT: the thread, or the scanner
 *         that does not wait for it any more; and never for an earlier stop.
 * GATE-4. In the handler every signal is blocked, those of the C library too: asynchronous cancellation would unwind out
 *         of it, and run.
 * GATE-5. The signal is sent to a thread only if its disposition was ours a moment before. If the program has taken it,
 *         another one is chosen. The handler stays installed for ever: a thread may have been sent to and come late.
 * GATE-6. The table is never unmapped. The handler uses raw system calls only, and no storage of its thread.
 *
 * The same signal from anybody else ends the process, as it would without us. A thread that dies with its slot in
 * SENT is withdrawn by the scanner.
 */
#include "gate.h"

#include "atomic.h"
#include "os.h"

#include <errno.h>
#include <signal.h>

#define MARK 0x6b736d70 /* in si_errno of our signals */
#define SLOTS (2 * KSM_GATE_THREADS)
#define HIGHEST_SIGNAL (SIGRTMAX - 6) /* the one above wakes scanners, see worker.h */

enum state {
	SENT = 0,
	PARKED = 1,
	GONE = 2, /* ended when last looked at */
	LEFT = 3, /* need not park */
};
#define STATE_MASK 3u

/* A stop's number, and something about it. */
#define PAIR(stop, low) ((uint64_t)(stop) << 32 | (uint32_t)(low))
#define STOP_OF(pair) ((uint32_t)((pair) >> 32))
#define LOW_OF(pair) ((uint32_t)(pair))
#define SLOT_OF(tid, state) ((uint32_t)(tid) << 2 | (state))

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the scanner sleeps on the low half of `missing`");

static struct {
	uint64_t *slots;
	int signal;    /* atomic; 0: none yet */
	int wanted;    /* atomic; 0: any */
	uint32_t last; /* number of the last stop */
	uint32_t gate;
	uint64_t missing;
} world;

/* ---- in the threads --------------------------------------------------------------------------------------- */

/* One less is missing in this stop; whoever is the last wakes the scanner. */
static void arrive_sigsafe(uint32_t stop)
{
	uint64_t was = ksm_load_acquire(&world.missing);
	while (STOP_OF(was) == stop) {
		if (ksm_cas_seqcst(&world.missing, was, was - 1)) {
			if (LOW_OF(was) == 1)
				ksm_os_word_wake_sigsafe((uint32_t *)&world.missing, 1);
			return;
		}
		was = ksm_load_acquire(&world.missing);
	}
}

static void on_signal_sigsafe(int signal, siginfo_t *info, void *context KSM_UNUSED)
{
	if (info->si_code != SI_QUEUE || info->si_errno != MARK) {
		ksm_os_die_sigsafe(signal); /* from somebody else: what would have happened without us */
		return;
	}
	uint64_t value = (uintptr_t)info->si_value.sival_ptr;
	uint32_t stop = STOP_OF(value);
	if (LOW_OF(value) >= SLOTS)
		return;
	uint64_t *slot = &world.slots[LOW_OF(value)];
	uint64_t word = ksm_load_acquire(slot);
	if (STOP_OF(word) != stop || (word & STATE_MASK) != SENT || !ksm_cas_seqcst(slot, word, word | PARKED))
		return; /* GATE-1 */
	arrive_sigsafe(stop);
	while (ksm_load_acquire(&world.gate) == stop) /* GATE-2 */
		ksm_os_word_wait_sigsafe(&world.gate, stop);
}

/* ---- the signal ------------------------------------------------------------------------------------------- */

static bool signal_is_ours(void)
{
	return world.signal && ksm_os_handler_state(world.signal, on_signal_sigsafe) == KSM_HANDLER_OURS;
}

static int take_signal(int signal)
{
	struct ksm_os_action old;
	int state = ksm_os_handler_state(signal, on_signal_sigsafe);
	if (state == KSM_HANDLER_OTHER)
		return -EAGAIN;
	int r = state == KSM_HANDLER_NONE ? ksm_os_action_exchange(signal, on_signal_sigsafe, &old) : state;
	if (r < 0)
		return r;
	if (state == KSM_HANDLER_NONE && old.handler) { /* the program took it just now */
		ksm_os_action_sigsafe(signal, &old, NULL);
		return -EAGAIN;
	}
	ksm_store_release(&world.signal, signal);
	return 0;
}

static int choose_signal(void)
{
	int wanted = ksm_load_acquire(&world.wanted), r = -EAGAIN;
	if (wanted)
		return take_signal(wanted);
	if (signal_is_ours())
		return 0;
	for (int signal = HIGHEST_SIGNAL; r && signal >= SIGRTMIN; signal--)
		r = take_signal(signal);
	return r;
}

int ksm_gate_signal(void)
{
	return ksm_load_acquire(&world.signal);
}

int ksm_gate_wish(int signal)
{
	if (signal && (signal < SIGRTMIN || signal > SIGRTMAX || signal == HIGHEST_SIGNAL + 1))
		return -EINVAL;
	ksm_store_release(&world.wanted, signal);
	return 0;
}

int ksm_gate_check_signal(void)
{
	return signal_is_ours() ? 0 : choose_signal();
}

int ksm_gate_prepare(void)
{
	void *at;
	int r = world.slots ? 0 : ksm_os_map_table(SLOTS * sizeof(*world.slots), &at);
	if (r)
		return r;
	if (!world.slots)
		world.slots = at;
	return choose_signal();
}

/* ---- stops -------------------------------------------------------------------------------------------------- */

void ksm_gate_close(void)
{
	world.last = world.last == UINT32_MAX ? 1 : world.last + 1;
	ksm_store_release(&world.missing, PAIR(world.last, 0));
	ksm_store_release(&world.gate, world.last);
}

void ksm_gate_open(void)
{
	ksm_store_release(&world.gate, 0);
	ksm_os_word_wake_sigsafe(&world.gate, INT32_MAX);
}

void ksm_gate_fork_child(void)
{
	ksm_store_release(&world.gate, 0);
}

/* The slot of a thread in this stop: its own, or a free one. There are twice as many as threads. */
static uint32_t find_slot(int tid)
{
	uint32_t i = (uint32_t)tid % SLOTS;
	for (;; i = (i + 1) % SLOTS) {
		uint64_t word = ksm_load_acquire(&world.slots[i]);
		if (STOP_OF(word) != world.last || LOW_OF(word) >> 2 == (uint32_t)tid)
			return i;
	}
}

int ksm_gate_send(int tid)
{
	uint32_t number = find_slot(tid);
	uint64_t word = ksm_load_acquire(&world.slots[number]);
	if (STOP_OF(word) == world.last && (word & STATE_MASK) != GONE)
		return 0;
	if (!signal_is_ours())
		return -EBUSY; /* GATE-5 */
	ksm_store_release(&world.slots[number], PAIR(world.last, SLOT_OF(tid, SENT)));
	ksm_add_seqcst(&world.missing, 1);
	int r = ksm_os_thread_signal(tid, world.signal, MARK, PAIR(world.last, number));
	if (r)
		ksm_gate_withdraw(tid, false);
	return r && r != -ESRCH ? r : 1;
}

void ksm_gate_begin_sending(void)
{
	ksm_add_seqcst(&world.missing, 1);
}

void ksm_gate_end_sending(void)
{
	ksm_sub_seqcst(&world.missing, 1);
}

uint32_t ksm_gate_missing(void)
{
	return LOW_OF(ksm_load_acquire(&world.missing));
}

bool ksm_gate_is_missing(int tid)
{
	return ksm_load_acquire(&world.slots[find_slot(tid)]) == PAIR(world.last, SLOT_OF(tid, SENT));
}

int ksm_gate_wait(uint32_t missing, uint64_t timeout_ns)
{
	return ksm_os_word_wait((uint32_t *)&world.missing, missing, timeout_ns);
}

void ksm_gate_withdraw(int tid, bool left)
{
	uint64_t sent = PAIR(world.last, SLOT_OF(tid, SENT));
	if (ksm_cas_seqcst(&world.slots[find_slot(tid)], sent, sent | (left ? LEFT : GONE)))
		ksm_sub_seqcst(&world.missing, 1); /* GATE-3 */
}
