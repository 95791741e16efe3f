/* SPDX-License-Identifier: MIT */
/*
 * DOC: The SIGSEGV handler
 *
 * One disposition of SIGSEGV belongs to the whole process, and many want it: crash reporters, garbage collectors,
 * language runtimes, the program itself. So ours is polite. It acts on one thing only, a store (SEGV_ACCERR, not known to
 * be a read) to an address that has a guard; all else it hands to whoever was there before, as the kernel would have.
 *
 * Who comes after whom. Whoever installs a handler remembers the one before and may put that back at any time: to leave,
 * or in the middle of a crash, to raise the signal again for it. A crash reporter above us does that, and then we must
 * pass the signal to whom *we* found, not to the reporter again. So our handler has several entries, all doing the same,
 * each remembering one predecessor for ever:
 *
 *      SIG_DFL ◀── entry 0 ◀── reporter ◀── entry 1     in force: entry 1
 *                     ▲            │
 *                     └────────────┘ the reporter puts back what it found: entry 0, whose predecessor is SIG_DFL
 *
 * HANDLER-1. An entry's predecessor never changes while somebody may call it: an entry is used again only for an equal
 *            predecessor, and not on top of itself. There are ENTRIES of them; then reinstalling fails with -ENOSPC.
 * HANDLER-2. A predecessor is called with the mask it asked for (SA_NODEFER too), after SA_RESETHAND has taken effect, in
 *            the thread and on the stack where the signal was delivered. It may leave by longjmp: nothing is held.
 *            Its wishes about SA_ONSTACK and SA_RESTART cannot be met one by one: ours has both.
 * HANDLER-3. SIG_DFL: a fault happens again with SIG_DFL in force, at the same instruction, so that the core shows what it
 *            would have shown without us. A signal that was sent (si_code ≤ 0) does not happen again, so it is queued
 *            to the thread once more with the same siginfo. SIG_IGN does not apply to faults.
 * HANDLER-4. Every signal is blocked while the handler works on a page, the C library's own for cancelling threads and
 *            changing users included, so a page that was claimed is always let go. No lock, no errno, no sigaltstack().
 *
 * Two things make a store into a read-only page deadly. Somebody may have taken our place without calling us
 * (KSM_EDISPLACED); and a thread that blocks SIGSEGV is killed in spite of any handler, because the kernel has nobody to
 * ask (KSM_EMASKED). ksm_handler_check() looks for both before each batch of merges, and when it finds one, everything
 * read-only becomes writable: no longer exact in what it counts, but safe. Between two looks, or while a signal handler of
 * the program that blocks SIGSEGV runs for a moment, a store can still kill; that is why read-only merging is only for
 * those who ask for it.
 *
 * Which threads count as blocking: a mask with the C library's own signals in it is set by that library and by handlers
 * like this one only, for moments; it has to stay for FULL_NS, without faults of that thread in between. Any other mask
 * with SIGSEGV in it is looked at three times within 2 ms.
 * Left out are our own scanners, which block everything and store into no guarded memory, io_uring's workers, which store
 * as system calls do, the helper threads of ZeroMQ (in every Jupyter kernel), which block everything and store into ZeroMQ's
 * own memory, and the dead. Without /proc nobody can be found.
 *
 * Any thread may call what is exported; the short lock inside is stolen when its owner was left behind by a fork.
 */
#include "handler.h"

#include "atomic.h"
#include "cow.h"
#include "error.h"
#include "os.h"
#include "park.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define ENTRIES 32
#define LOOK_NS 200000000u
#define FULL_NS 2000000000u
#define SUSPECTS 64
#define CANCEL 32 /* the C library's own signal for cancelling threads */

static struct entry {
	bool used;
	uint32_t spent; /* atomic: SA_RESETHAND has taken effect */
	int below;      /* the entry that the predecessor had displaced; -1: none */
	struct ksm_os_action previous;
} entries[ENTRIES];

static struct {
	uint32_t lock;        /* process number of the owner; 0: nobody */
	int top;              /* the last entry we have put in force and not popped since; -1: none. Lock held */
	int latest;           /* the last entry that was seen in force; atomic */
	int last_answer;      /* of ksm_handler_check(); atomic */
	uint64_t suspensions; /* atomic */
} self = {.top = -1, .latest = -1};

/* Faults met by threads, by a hash of their numbers: who takes faults does not block them. Atomic. */
static uint32_t faults_met[256];

static uint32_t *faults_met_by(int tid)
{
	return &faults_met[(uint32_t)tid % KSM_COUNT(faults_met)];
}

/* ---- in the handler -------------------------------------------------------------------------------------------- */

static uint64_t bit_of(int signal)
{
	return 1ull << (signal - 1);
}

static bool is_function(ksm_os_handler handler)
{
	return (uintptr_t)handler != (uintptr_t)SIG_DFL && (uintptr_t)handler != (uintptr_t)SIG_IGN;
}

/* HANDLER-3 */
static void do_default(int signal, siginfo_t *info, bool sent)
{
	struct ksm_os_action none = {0}; /* SIG_DFL */
	ksm_os_action_sigsafe(signal, &none, NULL);
	if (sent && ksm_os_signal_self_sigsafe(signal, info))
		ksm_os_die_sigsafe(signal);
}

static void pass_on(struct entry *entry, int signal, siginfo_t *info, void *context)
{
	const struct ksm_os_action *next = &entry->previous;
	bool sent = info->si_code <= 0;
	uint64_t mask;
	if ((uintptr_t)next->handler == (uintptr_t)SIG_IGN && sent)
		return;
	if (!is_function(next->handler) || ksm_load_acquire(&entry->spent)) {
		do_default(signal, info, sent);
		return;
	}
	if (next->flags & SA_RESETHAND)
		ksm_store_release(&entry->spent, 1);
	memcpy(&mask, &((ucontext_t *)context)->uc_sigmask, sizeof(mask));
	mask |= next->mask | (next->flags & SA_NODEFER ? 0 : bit_of(signal));
	ksm_os_mask_sigsafe(mask);
	next->handler(signal, info, context); /* one that takes only the number gets the rest all the same */
}

static void on_signal(size_t number, int signal, siginfo_t *info, void *context)
{
	if (info->si_code == SEGV_ACCERR && ksm_os_access_sigsafe(context) != KSM_ACCESS_READ) {
		int tid = ksm_os_tid_sigsafe();
		ksm_add_relaxed(faults_met_by(tid), 1);
		if (ksm_cow_fault_sigsafe(info->si_addr, tid) == KSM_COW_RETRY)
			return;
	}
	pass_on(&entries[number], signal, info, context);
}

#define EACH_EIGHT(X, n)                                                                                               \
	X(n##0)                                                                                                        \
	X(n##1)                                                                                                        \
	X(n##2)                                                                                                        \
	X(n##3)                                                                                                        \
	X(n##4)                                                                                                        \
	X(n##5)                                                                                                        \
	X(n##6)                                                                                                        \
	X(n##7)
#define EACH_ENTRY(X) EACH_EIGHT(X, 00) EACH_EIGHT(X, 01) EACH_EIGHT(X, 02) EACH_EIGHT(X, 03) /* in octal */

#define ENTRY(n)                                                                                                       \
	static void entry_##n(int signal, siginfo_t *info, void *context)                                              \
	{                                                                                                              \
		on_signal(n, signal, info, context);                                                                   \
	}
EACH_ENTRY(ENTRY)

#define ENTRY_NAME(n) entry_##n,
static const ksm_os_handler functions[ENTRIES] = {EACH_ENTRY(ENTRY_NAME)};

/* ---- who is in force --------------------------------------------------------------------------------------------- */

static void lock(void)
{
	uint32_t mine = (uint32_t)getpid(), owner = 0;
	while (!__atomic_compare_exchange_n(&self.lock, &owner, mine, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
		if (owner != mine)
			continue; /* another process's: nobody here can let it go */
		ksm_os_yield();
		owner = 0;
	}
}

static void unlock(void)
{
	ksm_store_release(&self.lock, 0);
}

/* Which entry of ours this is, or -1. One that was put back by signal(2) would get no siginfo. */
static int index_of(const struct ksm_os_action *action)
{
	for (int i = 0; i < ENTRIES; i++)
		if (action->handler == functions[i] && (action->flags & SA_SIGINFO))
			return i;
	return -1;
}

static int in_force(void)
{
	struct ksm_os_action now;
	int found = ksm_os_action_sigsafe(SIGSEGV, NULL, &now) ? -1 : index_of(&now);
	if (found >= 0)
		ksm_store_relaxed(&self.latest, found);
	return found;
}

static bool is_same(const struct ksm_os_action *a, const struct ksm_os_action *b)
{
	const unsigned long flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER | SA_RESETHAND;
	return a->handler == b->handler &&
	       (!is_function(a->handler) || (a->mask == b->mask && (a->flags & flags) == (b->flags & flags)));
}

/* Is an entry, or what its predecessor had displaced, and so on, this one? */
static bool is_beneath(int entry, int top)
{
	for (int i = 0; i < ENTRIES && top >= 0; i++) {
		if (top == entry)
			return true;
		top = entries[top].below;
	}
	return false;
}

/* An entry with this predecessor: HANDLER-1. Or -ENOSPC. */
static int entry_for(const struct ksm_os_action *previous)
{
	int latest = ksm_load_relaxed(&self.latest);
	for (int i = 0; i < ENTRIES; i++) {
		struct entry *entry = &entries[i];
		if (entry->used && (i == latest || !is_same(&entry->previous, previous)))
			continue;
		if (!entry->used)
			entry->previous = *previous;
		entry->used = true;
		/* Whoever came has found the one on top, unless that was gone without a word. */
		entry->below = is_beneath(latest, self.top) ? latest : self.top;
		ksm_store_release(&entry->spent, 0);
		return i;
	}
	return -ENOSPC;
}

/* Lock held. */
static int stand_on_top(void)
{
	struct ksm_os_action now, was;
	int r = ksm_os_action_sigsafe(SIGSEGV, NULL, &now);
	if (r || index_of(&now) >= 0)
		return r;
	int entry = entry_for(&now);
	if (entry < 0)
		return entry;
	r = ksm_os_action_exchange(SIGSEGV, functions[entry], &was);
	if (!r && index_of(&was) < 0 && !is_same(&was, &now)) { /* somebody else's came between */
		entry = entry_for(&was);
		r = entry < 0 ? entry : ksm_os_action_exchange(SIGSEGV, functions[entry], &now);
	}
	if (r)
		return r;
	ksm_store_relaxed(&self.top, entry);
	ksm_store_relaxed(&self.latest, entry);
	return 0;
}

int ksm_handler_install(void)
{
	lock();
	int r = self.top < 0 ? stand_on_top() : 0;
	unlock();
	return r;
}

int ksm_handler_reinstall(void)
{
	lock();
	int r = self.top < 0 ? 0 : stand_on_top();
	unlock();
	return r;
}

void ksm_handler_popped(void)
{
	struct ksm_os_action was;
	lock();
	int now = in_force();
	int below = self.top >= 0 && is_function(entries[self.top].previous.handler) ? entries[self.top].below : -1;
	if (below >= 0) {
		/* Its owner may have put back what it found, which was ours, or one of ours still further down. */
		if (now >= 0 && now != below && is_beneath(below, now))
			ksm_os_action_exchange(SIGSEGV, functions[below], &was);
		ksm_store_relaxed(&self.top, below);
	}
	in_force();
	unlock();
}

bool ksm_handler_is_installed(void)
{
	return ksm_load_relaxed(&self.top) >= 0;
}

uint64_t ksm_handler_suspensions(void)
{
	return ksm_load_relaxed(&self.suspensions);
}

/* ---- threads that block SIGSEGV ------------------------------------------------------------------------------------- */

struct suspect {
	int tid;
	uint32_t faults; /* it had met when it was seen last */
	uint64_t since_ns, seen_ns;
};

static struct {
	uint32_t looking; /* process number of who does, as in lock(); the rest is its own */
	uint32_t masked;  /* what the last look found; atomic */
	uint64_t next_ns; /* when to look again; atomic */
	uint64_t threads; /* how many there were; atomic */
	struct suspect suspects[SUSPECTS];
} looks;

struct look {
	int tasks;
	uint64_t now_ns;
	bool found;
};

enum mask {
	MASK_OPEN, /* SIGSEGV is let through */
	MASK_SOME,
	MASK_FULL, /* … and with it what only the C library and handlers like ours block */
};

static enum mask mask_of(int tasks, unsigned tid)
{
	char path[32], text[8192];
	char *at = path + sizeof(path) - sizeof("/status");
	memcpy(at, "/status", sizeof("/status"));
	do
		*--at = (char)('0' + tid % 10);
	while (tid /= 10);
	if (ksm_os_read_file(tasks, at, text, sizeof(text)) <= 0)
		return MASK_OPEN; /* gone */
	const char *state = strstr(text, "\nState:\t"), *blocked = strstr(text, "\nSigBlk:\t");
	if (!state || !blocked || strchr("ZXx", state[8]) || !strncmp(text, "Name:\tiou-", 10) ||
	    !strncmp(text, "Name:\tZMQbg/", 12) ||
	    !strncmp(text, "Name:\tksmalloc\n", 15)) /* a scanner that is about to end */
		return MASK_OPEN;
	uint64_t mask = strtoull(blocked + 9, NULL, 16);
	if (!(mask & bit_of(SIGSEGV)))
		return MASK_OPEN;
	return mask & bit_of(CANCEL) ? MASK_FULL : MASK_SOME;
}

/* Has it blocked everything for long, as far as anybody looked? */
static bool is_stuck(int tid, uint64_t now_ns)
{
	struct suspect *one = &looks.suspects[(uint32_t)tid % SUSPECTS];
	uint32_t faults = ksm_load_relaxed(faults_met_by(tid));
	if (one->tid != tid || one->faults != faults || now_ns - one->seen_ns > 4ull * LOOK_NS)
		*one = (struct suspect){.tid = tid, .faults = faults, .since_ns = now_ns};
	one->seen_ns = now_ns;
	return now_ns - one->since_ns >= FULL_NS;
}

static int look_at(unsigned tid, void *context)
{
	struct look *look = context;
	if (ksm_park_is_exempt((int)tid))
		return 0;
	enum mask mask = mask_of(look->tasks, tid);
	if (mask == MASK_OPEN && looks.suspects[tid % SUSPECTS].tid == (int)tid)
		looks.suspects[tid % SUSPECTS].tid = 0;
	for (int again = 0; again < 2 && mask == MASK_SOME && !ksm_load_relaxed(&looks.masked); again++) {
		ksm_os_sleep_ns(1000000); /* in a signal handler of the program, for a moment? */
		mask = mask_of(look->tasks, tid);
	}
	look->found = mask == MASK_SOME || (mask == MASK_FULL && is_stuck((int)tid, look->now_ns));
	return look->found;
}

static bool is_masked(void)
{
	char buffer[2048];
	struct stat stat;
	struct look look = {.now_ns = ksm_os_now_ns()};
	uint32_t mine = (uint32_t)getpid(), owner = ksm_load_acquire(&looks.looking);
	look.tasks = ksm_os_open(AT_FDCWD, "/proc/self/task", O_RDONLY | O_DIRECTORY, 0);
	uint64_t threads = look.tasks >= 0 && !ksm_os_stat(look.tasks, &stat) ? stat.st_nlink : 0;
	bool due = look.now_ns >= ksm_load_relaxed(&looks.next_ns) || threads != ksm_load_relaxed(&looks.threads);
	if (threads && due && owner != mine && ksm_cas32_seqcst(&looks.looking, owner, mine)) {
		if (ksm_os_list_numbers(look.tasks, buffer, sizeof(buffer), look_at, &look) >= 0) {
			ksm_store_relaxed(&looks.masked, look.found);
			ksm_store_relaxed(&looks.threads, threads);
			ksm_store_relaxed(&looks.next_ns, look.now_ns + LOOK_NS);
		}
		ksm_store_release(&looks.looking, 0);
	}
	ksm_os_close(look.tasks);
	return ksm_load_relaxed(&looks.masked);
}

int ksm_handler_check(void)
{
	if (!ksm_handler_is_installed())
		return KSM_EDISPLACED;
	int answer = in_force() < 0 ? KSM_EDISPLACED : is_masked() ? KSM_EMASKED : 0;
	int before = ksm_exchange_acqrel(&self.last_answer, answer);
	if (!answer)
		return 0;
	if (!before)
		ksm_add_relaxed(&self.suspensions, 1);
	ksm_guards_open_all(); /* also what became read-only since, by a scanner that had asked before */
	return answer;
}
