/* SPDX-License-Identifier: MIT */
/*
 * Stepping. The first victim of an operation is stepped from its first breakpoint to its second, and each boundary's
 * address is kept. A later one runs to breakpoints, one after the other, the last as near as possible before the boundary
 * at which it shall die, and is stepped the rest of the way: a few steps instead of thousands. That it arrives at the same
 * address is checked.
 *
 * The tracer is a peer too, and answers the victim's requests whenever a system call of the victim's has returned: so
 * nothing depends on who is faster.
 */
#include "crash.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define INT3 0xcc
#define NOP 0x90
#define VDSO_BYTES 0x4000
#define ARRIVAL_COST 3 /* in steps */
#define BOUNDARIES_MOST ((size_t)1 << 22)

static const uint8_t *code_at(uint64_t pc)
{
	return (const uint8_t *)pc; /* the victim was forked: the same code lies at the same place */
}

static bool is_call(uint64_t pc)
{
	return code_at(pc)[0] == 0x0f && code_at(pc)[1] == 0x05;
}

uint64_t crash_pc(pid_t pid)
{
	errno = 0;
	long pc = ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user_regs_struct, rip), 0);
	if (errno)
		FAIL("PTRACE_PEEKUSER: %s", strerror(errno));
	return (uint64_t)pc;
}

static void set_pc(pid_t pid, uint64_t pc)
{
	CHECK(!ptrace(PTRACE_POKEUSER, pid, offsetof(struct user_regs_struct, rip), pc));
}

/* code: what the first byte there shall be. */
static void poke(pid_t pid, uint64_t pc, uint8_t code)
{
	long word;
	memcpy(&word, code_at(pc), sizeof(word));
	word = (long)(((unsigned long)word & ~0xfful) | code);
	if (ptrace(PTRACE_POKETEXT, pid, pc, word))
		FAIL("PTRACE_POKETEXT: %s", strerror(errno));
}

static int wait_stop(pid_t pid)
{
	int status;
	while (waitpid(pid, &status, __WALL) < 0)
		CHECK(errno == EINTR);
	return status;
}

/* A child was born to the tracee. */
static void welcome(struct world *world, pid_t pid, uint64_t planted)
{
	unsigned long child;
	CHECK(!ptrace(PTRACE_GETEVENTMSG, pid, 0, &child));
	int status = wait_stop((pid_t)child);
	if (!WIFSTOPPED(status))
		FAIL("the child ended at birth: 0x%x", (unsigned)status);
	if (planted)
		poke((pid_t)child, planted, code_at(planted)[0]);
	world->board->child = (pid_t)child;
	if (!(world->operation->flags & WANTS_CHILD))
		CHECK(!ptrace(PTRACE_DETACH, (pid_t)child, 0, 0));
}

/* Let the tracee go on in one way until it stops again; false: it stands where a system call began or ended. */
static bool resume(struct world *world, pid_t pid, int how, uint64_t planted)
{
	for (int signal = 0;;) {
		CHECK(!ptrace((enum __ptrace_request)how, pid, 0, signal));
		int status = wait_stop(pid);
		if (!WIFSTOPPED(status))
			FAIL("%s: the victim ended by itself, with wait status 0x%x", world->operation->name,
			     (unsigned)status);
		signal = 0;
		if (status >> 8 == (SIGTRAP | PTRACE_EVENT_FORK << 8))
			welcome(world, pid, planted);
		else if (WSTOPSIG(status) == (SIGTRAP | 0x80))
			return false;
		else if (WSTOPSIG(status) == SIGTRAP)
			return true;
		else
			signal = WSTOPSIG(status);
	}
}

static void answer(struct world *world)
{
	if (world->survivor && world->survivor->exchange.listener >= 0)
		ksm_exchange_serve(&world->survivor->exchange, &world->survivor->peer);
}

static void step(struct world *world, pid_t pid, uint64_t pc)
{
	bool call = is_call(pc);
	resume(world, pid, PTRACE_SINGLESTEP, 0);
	crash_tally->steps++;
	if (call)
		answer(world);
}

/* Run to a breakpoint, its n-th arrival. false: it met another one before. */
static bool run_to(struct world *world, pid_t pid, uint64_t pc, uint32_t arrivals)
{
	for (uint32_t n = 1;; n++) {
		poke(pid, pc, INT3);
		while (!resume(world, pid, PTRACE_SYSCALL, pc))
			answer(world);
		uint64_t at = crash_pc(pid);
		if (at != pc + 1)
			return false;
		set_pc(pid, pc);
		poke(pid, pc, code_at(pc)[0]);
		if (n == arrivals)
			return true;
		step(world, pid, pc);
	}
}

pid_t crash_start(struct world *world)
{
	fflush(NULL);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		CHECK(!ptrace(PTRACE_TRACEME, 0, 0, 0));
		raise(SIGSTOP);
		crash_victim(world);
	}
	world->victim = pid;
	int status = wait_stop(pid);
	CHECK(WIFSTOPPED(status));
	long options = PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD;
	if (world->operation->flags & (MAY_FORK | WANTS_CHILD))
		options |= PTRACE_O_TRACEFORK;
	CHECK(!ptrace(PTRACE_SETOPTIONS, pid, 0, options));
	resume(world, pid, PTRACE_CONT, 0); /* to its first breakpoint */
	if (!(world->operation->flags & WANTS_CHILD)) {
		crash_world_meet(world);
		return pid;
	}
	CHECK(world->board->child > 0);
	CHECK(!ptrace(PTRACE_DETACH, pid, 0, 0)); /* it waits until it is killed */
	resume(world, world->board->child, PTRACE_CONT, 0);
	crash_world_meet(world);
	return world->board->child;
}

/* ---- traces ----------------------------------------------------------------------------------------------------- */

static void *map_shared(size_t nbytes)
{
	void *at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(at != MAP_FAILED);
	return at;
}

struct trace crash_trace_new(void)
{
	size_t *counts = map_shared(3 * sizeof(*counts));
	return (struct trace){.count = counts,
			      .state_count = counts + 1,
			      .chosen_count = counts + 2,
			      .pcs = map_shared(BOUNDARIES_MOST * sizeof(uint64_t)),
			      .states = map_shared(BOUNDARIES_MOST * sizeof(size_t)),
			      .chosen = map_shared(BOUNDARIES_MOST * sizeof(size_t)),
			      .froms = map_shared(BOUNDARIES_MOST * sizeof(uint32_t))};
}

/* previous[boundary]: the last one before it at the same address; SIZE_MAX: there is none. */
static size_t *find_previous(const struct trace *trace)
{
	size_t count = *trace->count, buckets = 1;
	while (buckets < 2 * count)
		buckets *= 2;
	size_t *lasts = calloc(buckets, sizeof(*lasts)); /* a boundary, plus 1 */
	size_t *previous = calloc(count, sizeof(*previous));
	CHECK(lasts && previous);
	for (size_t k = 0; k < count; k++) {
		uint64_t pc = trace->pcs[k];
		size_t at = (size_t)(pc * 0x9e3779b97f4a7c15ull >> 20) & (buckets - 1);
		while (lasts[at] && trace->pcs[lasts[at] - 1] != pc)
			at = (at + 1) & (buckets - 1);
		previous[k] = lasts[at] ? lasts[at] - 1 : SIZE_MAX;
		lasts[at] = k + 1;
	}
	free(lasts);
	return previous;
}

/*
 * The cheapest way to each boundary: by a step from the one before it; or from any other between it and the last time its
 * address was met, by a breakpoint there. `cheap` holds those that may be the cheapest after some boundary: of two, the
 * later one only if it costs more.
 */
void crash_find_ways(const struct trace *trace)
{
	size_t count = *trace->count, cheap_count = 1;
	uint64_t vdso = getauxval(AT_SYSINFO_EHDR);
	size_t *previous = find_previous(trace), *cheap = calloc(count, sizeof(*cheap));
	uint32_t *costs = calloc(count, sizeof(*costs));
	CHECK(cheap && costs);
	for (size_t k = 1; k < count; k++) {
		uint64_t pc = trace->pcs[k];
		trace->froms[k] = (uint32_t)k - 1;
		costs[k] = costs[k - 1] + 1;
		if (code_at(pc)[0] != INT3 && (!vdso || pc - vdso >= VDSO_BYTES)) {
			size_t low = 0, high = cheap_count;
			while (low < high) { /* the first after previous[k] */
				size_t middle = (low + high) / 2;
				if (previous[k] == SIZE_MAX || cheap[middle] > previous[k])
					high = middle;
				else
					low = middle + 1;
			}
			if (low < cheap_count && costs[cheap[low]] + ARRIVAL_COST < costs[k]) {
				costs[k] = costs[cheap[low]] + ARRIVAL_COST;
				trace->froms[k] = (uint32_t)cheap[low];
			}
		}
		while (cheap_count && costs[cheap[cheap_count - 1]] >= costs[k])
			cheap_count--;
		cheap[cheap_count++] = k;
	}
	free(costs);
	free(cheap);
	free(previous);
}

void crash_record(struct world *world, pid_t pid, const struct trace *trace)
{
	bool fresh = true;
	crash_watch_begin();
	crash_watch_files(pid);
	for (;;) {
		uint64_t pc = crash_pc(pid);
		CHECK(*trace->count < BOUNDARIES_MOST);
		if (fresh)
			trace->states[(*trace->state_count)++] = *trace->count;
		trace->pcs[(*trace->count)++] = pc;
		if (code_at(pc)[0] == INT3)
			break;
		bool call = is_call(pc);
		step(world, pid, pc);
		fresh = crash_watch_changed() || call;
		if (call)
			crash_watch_files(pid);
	}
	crash_watch_end();
}

bool crash_go(struct world *world, pid_t pid, const struct trace *trace, size_t boundary)
{
	size_t length = 0, *way;
	for (size_t k = boundary; k; k = trace->froms[k])
		length++;
	way = calloc(length + 1, sizeof(*way));
	CHECK(way);
	for (size_t k = boundary, i = length; k; k = trace->froms[k])
		way[i--] = k;
	bool there = true;
	for (size_t i = 1; there && i <= length; i++) {
		if (way[i] == way[i - 1] + 1)
			step(world, pid, trace->pcs[way[i - 1]]);
		else
			there = run_to(world, pid, trace->pcs[way[i]], 1);
		there = there && crash_pc(pid) == trace->pcs[way[i]];
	}
	free(way);
	return there;
}

bool crash_go_anyhow(struct world *world, pid_t pid, const struct trace *trace, size_t boundary)
{
	uint64_t pc = trace->pcs[boundary];
	uint32_t arrivals = 0;
	for (size_t k = 1; k <= boundary; k++)
		arrivals += trace->pcs[k] == pc;
	if (boundary == 0)
		return true;
	if (pc == trace->pcs[0])
		step(world, pid, pc);
	if (code_at(pc)[0] != INT3)
		return run_to(world, pid, pc, arrivals);
	while (!resume(world, pid, PTRACE_SYSCALL, 0))
		answer(world);
	set_pc(pid, crash_pc(pid) - 1);
	return crash_pc(pid) == pc;
}

void crash_detach(pid_t pid, const struct trace *trace, bool stopped)
{
	poke(pid, trace->pcs[*trace->count - 1], NOP); /* nobody is there to meet it at its second breakpoint */
	CHECK(!ptrace(PTRACE_DETACH, pid, 0, stopped ? SIGSTOP : 0));
}
