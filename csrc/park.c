/* SPDX-License-Identifier: MIT */
/*
 * DOC: Parking
 *
 * Every other thread of the process is held in a signal handler (gate.c). Nobody can store then: a thread in a handler
 * is in no system call, and what a system call had to write has been written. What writes without a thread is looked
 * for (hazards.c), and refused.
 *
 *    hazards ▸ close the gate ▸ list ▸ send ▸ wait for the missing ▸ list again, until a listing adds nobody ▸
 *    hazards, exactly ▸ … compare and remap … ▸ open the gate ▸ rest
 *
 * PARK-1. All are parked when a listing that began after everybody known was parked names nobody else. Only running
 *         threads make threads; and one that ends while it is listed is not parked, so that listing does not count.
 * PARK-2. Left out are zombies (a main thread that has ended), which have no memory any more, and our own scanners, which
 *         write to ksmalloc's own memory alone. A scanner stops being one only between stops.
 * PARK-3. Nobody is held without bound: if not all are parked in time everybody is let go. What did not answer is named,
 *         and the next attempts come later and later; while it is known to block the signal nobody else is disturbed.
 * PARK-4. While anybody may be parked the scanner allocates nothing, takes no lock and uses no stdio: a parked thread may
 *         be in the middle of malloc().
 * PARK-5. The program runs at least four times as long as it was stopped, if scanners rest as they are told to.
 * PARK-6. A signal that reaches a thread inside execve(2) stays pending and kills the new program, which has no handler.
 *         So whoever is about to call exec says so, and no stop begins for a while. Nobody can see it from outside.
 *
 * One stop at a time: scanners take turns; of other threads only one that is about to call exec takes that lock. fork:
 * scanners have ended, no stop is under way; the child starts anew. vfork: the parent's thread sleeps in the kernel and
 * does not answer, so the stop is given up. Not seen: a process made by clone(CLONE_VM) that is neither a thread nor
 * waited for in vfork.
 *
 * If a page that is touched between begin and end is one that a thread of the program has to provide (its own
 * userfaultfd) everybody waits for ever: such memory must not be registered. A stack, or a thread's own storage, must not
 * be either: the kernel and the handler write there while a thread goes to sleep.
 */
#include "park.h"

#include "atomic.h"
#include "error.h"
#include "gate.h"
#include "hazards.h"
#include "os.h"
#include "thread.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define EXEMPT_MOST 256
#define LIST_BYTES 32768u

#define US 1000ull
#define MS 1000000ull
#define PATIENCE_NS (20 * MS)
#define PATIENCE_EACH_NS (20 * US)
#define FIRST_LOOK_NS (200 * US) /* until threads that have not parked are looked at */
#define LOOK_AT_MOST 16          /* missing threads whose state is looked up */
#define SHARE 4                  /* PARK-5 */
#define EXEC_NS (10000 * MS)     /* PARK-6: by then it has happened, or failed */
#define SOON 2                   /* delays at most, see back_off(): nothing is wrong with the thread … */
#define OFTEN 3                  /* … or looking costs others nothing … */
#define LATER 5                  /* … or it may stay like that */

struct tables {
	int tids[KSM_GATE_THREADS]; /* of the last listing, without scanners */
	char buffer[LIST_BYTES];
};

static struct {
	pthread_mutex_t turn;
	struct tables *tables;        /* mapped once */
	size_t count;                 /* of tids */
	int dead_leader;              /* the main thread, if it has ended; 0: not known to have */
	uint32_t exempt_used;         /* entries of exempt[] ever in use */
	uint32_t exempt[EXEMPT_MOST]; /* thread numbers; 0: free */
	uint64_t exec_until_ns;       /* PARK-6 */
} world = {.turn = PTHREAD_MUTEX_INITIALIZER};

int ksm_park_signal(void)
{
	return ksm_gate_signal();
}

int ksm_park_choose_signal(int signal)
{
	return ksm_gate_wish(signal);
}

void ksm_park_before_exec(void)
{
	pthread_mutex_lock(&world.turn); /* no stop is under way, and what was sent to us has been taken */
	world.exec_until_ns = ksm_os_now_ns() + EXEC_NS;
	pthread_mutex_unlock(&world.turn);
}

/* ---- scanners --------------------------------------------------------------------------------------------- */

bool ksm_park_is_exempt(int tid)
{
	uint32_t used = ksm_load_acquire(&world.exempt_used);
	for (size_t i = 0; i < used; i++)
		if (ksm_load_acquire(&world.exempt[i]) == (uint32_t)tid)
			return true;
	return false;
}

static void begin_exempt(uint32_t tid)
{
	for (size_t i = 0; i < EXEMPT_MOST; i++) {
		uint32_t used = ksm_load_acquire(&world.exempt_used);
		if (used == i)
			ksm_cas32_seqcst(&world.exempt_used, used, used + 1);
		if (ksm_cas32_seqcst(&world.exempt[i], 0, tid))
			return;
	}
}

static void end_exempt(uint32_t tid)
{
	for (size_t i = 0; i < EXEMPT_MOST; i++)
		ksm_cas32_seqcst(&world.exempt[i], tid, 0);
}

void ksm_park_exempt(bool on)
{
	int tid = ksm_os_tid();
	if (on) { /* without the lock: during a stop it would be waited for */
		if (!ksm_park_is_exempt(tid))
			begin_exempt((uint32_t)tid);
		return;
	}
	pthread_mutex_lock(&world.turn); /* PARK-2 */
	end_exempt((uint32_t)tid);
	pthread_mutex_unlock(&world.turn);
}

void ksm_park_fork_child(void)
{
	pthread_mutex_init(&world.turn, NULL);
	memset(world.exempt, 0, sizeof(world.exempt));
	world.dead_leader = 0;
	world.exec_until_ns = 0;
	ksm_gate_fork_child();
}

/* ---- gathering --------------------------------------------------------------------------------------------- */

struct gathering {
	struct ksm_park *park;
	int culprit;      /* of a failure; 0: nobody in particular */
	const char *text; /* of a failure without one */
};

static int note_thread(unsigned tid, void *self)
{
	if (tid == *(unsigned *)self || (int)tid == world.dead_leader || ksm_park_is_exempt((int)tid))
		return 0;
	if (world.count == KSM_GATE_THREADS)
		return KSM_EUNSTOPPABLE;
	world.tables->tids[world.count++] = (int)tid;
	return 0;
}

static int list_threads(const struct ksm_park *park)
{
	unsigned self = (unsigned)ksm_os_tid();
	world.count = 0;
	return ksm_os_list_numbers(park->tasks, world.tables->buffer, LIST_BYTES, note_thread, &self);
}

/* Of those that have not parked: some have ended, some need not. Anybody else is the one to be blamed. */
static int look_at_missing(struct gathering *g)
{
	struct ksm_thread thread = {0};
	bool few = ksm_gate_missing() <= LOOK_AT_MOST;
	g->culprit = 0;
	for (size_t i = 0; i < world.count; i++) {
		int tid = world.tables->tids[i];
		if (!ksm_gate_is_missing(tid))
			continue;
		if (!ksm_os_thread_exists(tid)) {
			ksm_gate_withdraw(tid, false);
			continue;
		}
		if (few)
			ksm_thread_look(g->park->tasks, tid, &thread);
		if (ksm_park_is_exempt(tid) || thread.state == 'Z' || thread.state == 'X') { /* PARK-2 */
			ksm_gate_withdraw(tid, true);
			if (thread.state == 'Z' && tid == getpid())
				world.dead_leader = tid; /* or signals would pile up in it */
			continue;
		}
		if (!g->culprit)
			g->culprit = tid;
		if (thread.kernels) {
			g->culprit = tid;
			return KSM_EDEVICES;
		}
	}
	return 0;
}

static int await_missing(struct gathering *g, uint64_t until_ns)
{
	uint64_t pause = FIRST_LOOK_NS;
	uint32_t missing;
	while ((missing = ksm_gate_missing())) {
		int r = ksm_gate_wait(missing, pause);
		if (!r || r == -EAGAIN)
			continue;
		r = look_at_missing(g);
		if (r)
			return r;
		if (g->culprit && ksm_os_now_ns() > until_ns)
			return KSM_EUNSTOPPABLE; /* PARK-3 */
		pause = KSM_MIN(2 * pause, 2 * MS);
	}
	g->culprit = 0;
	return 0;
}

/* List, and send to whoever is new. Returns whether anybody was, or an error. */
static int send_to_all(struct gathering *g)
{
	int fresh = 0, r = list_threads(g->park);
	if (r == KSM_EUNSTOPPABLE)
		g->text = "there are too many threads";
	for (size_t i = 0; !r && i < world.count; i++) {
		int sent = ksm_gate_send(world.tables->tids[i]);
		fresh |= sent == 1;
		r = sent < 0 ? KSM_EUNSTOPPABLE : 0;
		if (r)
			g->text = sent == -EAGAIN  ? "too many signals are pending (RLIMIT_SIGPENDING)"
				  : sent == -EBUSY ? "the program has taken the signal"
						   : "a signal cannot be sent";
	}
	return r ? r : fresh;
}

/* PARK-1 */
static int gather(struct gathering *g)
{
	for (bool late = false;;) {
		ksm_gate_begin_sending();
		int r = send_to_all(g);
		ksm_gate_end_sending();
		if (r <= 0)
			return r;
		if (late) { /* and there is somebody new again */
			g->text = "threads come faster than they can be stopped";
			return KSM_EUNSTOPPABLE;
		}
		uint64_t until_ns = g->park->begun_ns + PATIENCE_NS + world.count * PATIENCE_EACH_NS;
		r = await_missing(g, until_ns);
		if (r)
			return r;
		late = ksm_os_now_ns() > until_ns;
	}
}

/* ---- stops ------------------------------------------------------------------------------------------------------ */

static void let_go(struct ksm_park *park)
{
	ksm_gate_open();
	uint64_t now = ksm_os_now_ns();
	park->rest_until_ns = KSM_MAX(park->rest_until_ns, now) + SHARE * (now - park->begun_ns); /* PARK-5 */
}

/* In words what kept the culprit, now that everybody runs again. Returns the code. */
static int explain(struct ksm_park *park, int code, int tid)
{
	struct ksm_thread thread;
	const char *what = NULL;
	ksm_thread_look(park->tasks, tid, &thread);
	if (thread.kernels) {
		snprintf(park->reason, sizeof(park->reason), "io_uring or vhost: thread %d (%s)", tid, thread.name);
		return KSM_EDEVICES;
	}
	if (thread.state == 'T') {
		what = "is stopped by a signal";
	} else if (thread.state == 't') {
		what = "is stopped by a debugger";
	} else if (thread.state == 'D') {
		what = ksm_thread_in_vfork(park->tasks, tid) ? "waits in vfork" : "sleeps in the kernel (state D)";
	} else if (ksm_thread_blocks(park->tasks, tid, ksm_gate_signal())) {
		what = "blocks the signal";
		park->culprit = tid;
	}
	park->patience = what ? LATER : SOON; /* SOON: it got no processor, on a busy machine */
	snprintf(park->reason, sizeof(park->reason), "thread %d (%s) %s", tid, thread.name,
		 what ? what : "did not answer in time");
	return code;
}

static void say(struct ksm_park *park, const char *text)
{
	snprintf(park->reason, sizeof(park->reason), "%s", text);
}

/*
 * A thread that blocks the signal would not park; and if it waits for signals itself (sigwait, signalfd) it would be handed
 * ours. So it is not sent one. Nobody was disturbed to find this out, so it can be looked up often.
 */
static int refuse_blocker(struct ksm_park *park, int tid)
{
	struct ksm_thread thread;
	ksm_thread_look(park->tasks, tid, &thread);
	snprintf(park->reason, sizeof(park->reason), "thread %d (%s) blocks the signal", tid, thread.name);
	park->culprit = tid;
	park->patience = OFTEN;
	return KSM_EUNSTOPPABLE;
}

static int begin_locked(struct ksm_park *park)
{
	if (park->culprit && !ksm_park_is_exempt(park->culprit) &&
	    ksm_thread_blocks(park->tasks, park->culprit, ksm_gate_signal()))
		return park->why; /* PARK-3: the others are left in peace */
	park->culprit = 0;
	park->reason[0] = 0;
	park->patience = LATER;
	if (ksm_os_now_ns() < world.exec_until_ns) {
		park->patience = OFTEN;
		say(park, "the program is about to call exec");
		return KSM_EUNSTOPPABLE;
	}
	int r = ksm_gate_check_signal();
	if (r) {
		say(park, "no real-time signal is free");
		return r;
	}
	r = list_threads(park);
	if (!r)
		r = ksm_hazards_look(park->hazards, world.tables->tids, world.count, false);
	if (r) {
		say(park, ksm_hazards_text(park->hazards));
		return r;
	}
	int blocker = ksm_thread_find_blocker(park->tasks, world.tables->tids, world.count, ksm_gate_signal());
	if (blocker)
		return refuse_blocker(park, blocker);
	struct gathering g = {.park = park};
	park->begun_ns = ksm_os_now_ns();
	ksm_gate_close();
	r = gather(&g);
	if (!r) {
		r = ksm_hazards_look(park->hazards, world.tables->tids, world.count, true);
		g.text = ksm_hazards_text(park->hazards);
		g.culprit = 0;
	}
	if (!r)
		return 0;
	let_go(park);
	if (g.culprit)
		return explain(park, r, g.culprit);
	say(park, g.text ? g.text : "");
	return r;
}

/* PARK-3 */
static void back_off(struct ksm_park *park, int why)
{
	static const uint64_t delays[] = {10 * MS, 100 * MS, 1000 * MS, 10000 * MS, 30000 * MS};
	size_t most = why == KSM_EUNSTOPPABLE ? park->patience : 3;
	park->failures++;
	park->in_a_row++;
	park->why = why;
	park->retry_at_ns = ksm_os_now_ns() + delays[KSM_MIN((size_t)park->in_a_row, most) - 1];
}

int ksm_park_begin(struct ksm_park *park)
{
	ksm_assert(park->ready);
	if (ksm_os_now_ns() < park->retry_at_ns)
		return park->why;
	pthread_mutex_lock(&world.turn);
	int r = begin_locked(park);
	if (r) {
		back_off(park, r);
		pthread_mutex_unlock(&world.turn);
		return r;
	}
	park->stops++;
	park->in_a_row = 0;
	park->why = 0;
	return 0;
}

void ksm_park_end(struct ksm_park *park)
{
	let_go(park);
	pthread_mutex_unlock(&world.turn);
}

uint64_t ksm_park_rest_ns(const struct ksm_park *park)
{
	uint64_t now = ksm_os_now_ns();
	return park->rest_until_ns > now ? park->rest_until_ns - now : 0;
}

/* ---- life ------------------------------------------------------------------------------------------------------- */

static int find_thread(unsigned tid, void *self)
{
	return tid == *(unsigned *)self;
}

static int prepare_locked(struct ksm_park *park)
{
	unsigned self = (unsigned)ksm_os_tid();
	void *at;
	int r = world.tables ? 0 : ksm_os_map_table(ksm_page_round_up(sizeof(struct tables)), &at);
	if (r)
		return r;
	if (!world.tables)
		world.tables = at;
	r = ksm_os_list_numbers(park->tasks, world.tables->buffer, LIST_BYTES, find_thread, &self);
	if (r <= 0)
		return r < 0 ? r : -ENOENT; /* /proc is another pid namespace's */
	return ksm_gate_prepare();
}

int ksm_park_create(struct ksm_park *park)
{
	memset(park, 0, sizeof(*park));
	park->tasks = ksm_os_open(AT_FDCWD, "/proc/self/task", O_RDONLY | O_DIRECTORY, 0);
	int r = KSM_MIN(park->tasks, 0);
	pthread_mutex_lock(&world.turn);
	if (!r)
		r = prepare_locked(park);
	pthread_mutex_unlock(&world.turn);
	if (!r)
		r = ksm_hazards_create(&park->hazards);
	if (r)
		ksm_os_close(park->tasks);
	park->ready = !r;
	park->why = r;
	return r;
}

void ksm_park_destroy(struct ksm_park *park)
{
	if (!park->ready)
		return;
	ksm_hazards_destroy(park->hazards);
	ksm_os_close(park->tasks);
	park->hazards = NULL;
	park->ready = false;
}
