/* SPDX-License-Identifier: MIT */
/*
 * A debugger, as rude as one can be, for a process that merges. It is told by lines on standard input, answers each with
 * one line, and lets go of everything when its input ends.
 *
 *    seize            every thread, and those that come (PTRACE_SEIZE)
 *    attach           the old way: with a SIGSTOP to each (PTRACE_ATTACH)
 *    detach
 *    stress N W S     N acts at random: interrupt a thread, look at memory, write memory (W: 1), step through instructions
 *                     (S: 1), go on
 *    hold NAME MS     keep each thread whose name begins so from running for a while, one after the other
 *    poke ADDRESS N   write the word N there
 *
 * stress looks at memory of which it knows the bytes (a file), and if it writes, it writes each word of a second range, one
 * after the other, with its own number; a write that the kernel refuses (EIO, while a window is open) is tried again.
 */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <fcntl.h>
#include <stdbool.h>
#include <unistd.h>

#define MOST 256
#define STEPS 200

static struct thread {
	pid_t tid; /* 0: none */
	int stopped, signal;
} threads[MOST];
static pid_t target;
static const char *known;       /* its bytes as they must be … */
static uint64_t known_at, room; /* … there, and how many; as many are at written_at */
static uint64_t written_at, written;
static unsigned long peeks, wrong, pokes, refused, steps, stops, held;
static uint64_t chance;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t any(uint64_t below)
{
	chance = chance * 6364136223846793005ull + 1442695040888963407ull;
	return (chance >> 33) % below;
}

static struct thread *find(pid_t tid)
{
	for (int i = 0; i < MOST; i++)
		if (threads[i].tid == tid)
			return &threads[i];
	return NULL;
}

static struct thread *add(pid_t tid)
{
	struct thread *thread = find(tid);
	if (!thread) {
		thread = find(0);
		if (!thread)
			die("too many threads");
		*thread = (struct thread){.tid = tid};
	}
	return thread;
}

/* What waitpid() said. A signal on its way to the thread stays on its way. */
static void take(pid_t tid, int status)
{
	struct thread *thread = add(tid);
	if (!WIFSTOPPED(status)) {
		thread->tid = 0;
		return;
	}
	thread->stopped = 1;
	thread->signal = status >> 16 ? 0 : WSTOPSIG(status);
	stops++;
}

static void go_on(struct thread *thread)
{
	if (!thread->stopped)
		return;
	thread->stopped = 0;
	int signal = thread->signal == SIGSTOP || thread->signal == SIGTRAP ? 0 : thread->signal;
	if (ptrace(PTRACE_CONT, thread->tid, 0, signal) && errno != ESRCH)
		die("PTRACE_CONT");
}

/* Whoever has stopped by itself goes on at once. */
static void serve(const struct thread *but)
{
	int status;
	pid_t tid;
	while ((tid = waitpid(-1, &status, __WALL | WNOHANG)) > 0) {
		take(tid, status);
		struct thread *thread = find(tid);
		if (thread && thread != but)
			go_on(thread);
	}
}

/* Returns whether it stands still now; it may have ended. */
static int stand(struct thread *thread)
{
	pid_t tid = thread->tid;
	if (thread->stopped)
		return 1;
	if (ptrace(PTRACE_INTERRUPT, tid, 0, 0))
		return 0;
	while (thread->tid == tid && !thread->stopped) {
		int status;
		pid_t heard = waitpid(-1, &status, __WALL);
		if (heard < 0)
			return 0;
		take(heard, status);
		struct thread *other = find(heard);
		if (other && other != thread)
			go_on(other);
	}
	return thread->tid == tid;
}

/* ---- acts --------------------------------------------------------------------------------------------------- */

/* Returns whether the kernel would. */
static int peek(pid_t tid, uint64_t at, uint64_t *out)
{
	errno = 0;
	*out = (uint64_t)ptrace(PTRACE_PEEKDATA, tid, at, 0);
	return errno == 0;
}

static void peek_known(pid_t tid)
{
	uint64_t at = any(room / 8) * 8, word, right;
	memcpy(&right, known + at, 8);
	if (!peek(tid, known_at + at, &word)) {
		refused++;
		return;
	}
	peeks++;
	wrong += word != right;
}

/* Returns whether it is written, sooner or later: while a window is open the kernel refuses, for a moment. */
static bool poke(pid_t tid, uint64_t at, uint64_t word)
{
	for (int attempt = 0; attempt < 1000; attempt++) {
		if (!ptrace(PTRACE_POKEDATA, tid, at, word))
			return true;
		refused++;
		usleep(100);
	}
	return false;
}

/* The next word of the second range. It is read back, too: once it is there nobody may lose it. */
static void poke_next(pid_t tid)
{
	uint64_t at = written_at + written * 8, word;
	if (written == room / 8 || !poke(tid, at, written + 1))
		return;
	written++;
	pokes++;
	if (peek(tid, at, &word))
		wrong += word != written;
}

static void step(struct thread *thread)
{
	for (int i = 0; i < STEPS && thread->tid && thread->stopped; i++) {
		int signal = thread->signal == SIGTRAP || thread->signal == SIGSTOP ? 0 : thread->signal;
		thread->stopped = 0;
		if (ptrace(PTRACE_SINGLESTEP, thread->tid, 0, signal))
			return;
		for (int wait = 0; wait < 200 && thread->tid && !thread->stopped; wait++) { /* it may sleep */
			serve(thread);
			if (thread->tid && !thread->stopped)
				usleep(20);
		}
		if (thread->tid && !thread->stopped && !stand(thread))
			return;
		steps++;
	}
}

static bool is_any_left(void)
{
	for (int i = 0; i < MOST; i++)
		if (threads[i].tid)
			return true;
	return false;
}

/* Ends early if the process does. */
static void stress(unsigned long acts, int writes, int steps_too)
{
	for (unsigned long i = 0; i < acts; i++) {
		serve(NULL);
		if (!is_any_left())
			return;
		struct thread *thread = &threads[any(MOST)];
		while (!thread->tid)
			thread = &threads[any(MOST)];
		if (!stand(thread))
			continue;
		for (uint64_t looks = any(8); looks; looks--)
			peek_known(thread->tid);
		if (writes && any(2))
			poke_next(thread->tid);
		if (steps_too && !any(8))
			step(thread);
		if (!any(16))
			usleep((useconds_t)any(3000)); /* it stands in the way, but not for long */
		if (thread->tid)
			go_on(thread);
	}
}

static void hold(const char *name, unsigned ms)
{
	for (int i = 0; i < MOST; i++) {
		char path[64], comm[32] = "";
		if (!threads[i].tid)
			continue;
		snprintf(path, sizeof(path), "/proc/%d/comm", threads[i].tid);
		FILE *file = fopen(path, "r");
		if (file && !fgets(comm, sizeof(comm), file))
			comm[0] = 0;
		if (file)
			fclose(file);
		if (strncmp(comm, name, strlen(name)) || !stand(&threads[i]))
			continue;
		held++;
		for (unsigned waited = 0; waited < ms; waited++) {
			usleep(1000);
			serve(&threads[i]);
		}
		if (threads[i].tid)
			go_on(&threads[i]);
	}
}

/* ---- coming and going --------------------------------------------------------------------------------------- */

static void come(int old_way)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/%d/task", target);
	for (int fresh = 1; fresh;) {
		DIR *folder = opendir(path);
		fresh = 0;
		if (!folder)
			die(path);
		for (struct dirent *entry; (entry = readdir(folder));) {
			pid_t tid = atoi(entry->d_name);
			if (!tid || find(tid))
				continue;
			if (ptrace(old_way ? PTRACE_ATTACH : PTRACE_SEIZE, tid, 0, old_way ? 0 : PTRACE_O_TRACECLONE)) {
				if (errno == ESRCH || errno == EPERM)
					continue; /* it has ended, or is ours: it came while we looked */
				die("attach");
			}
			fresh = 1;
			struct thread *thread = add(tid);
			if (!old_way)
				continue;
			int status;
			if (waitpid(tid, &status, __WALL) == tid)
				take(tid, status);
			if (thread->tid)
				ptrace(PTRACE_SETOPTIONS, tid, 0, PTRACE_O_TRACECLONE);
			if (thread->tid)
				go_on(thread);
		}
		closedir(folder);
	}
}

static void leave(int old_way)
{
	for (int i = 0; i < MOST; i++) {
		if (!threads[i].tid)
			continue;
		if (old_way && !threads[i].stopped) { /* without PTRACE_SEIZE there is no PTRACE_INTERRUPT */
			pid_t tid = threads[i].tid;
			syscall(SYS_tgkill, target, tid, SIGSTOP);
			while (threads[i].tid == tid && !threads[i].stopped) {
				int status;
				pid_t heard = waitpid(-1, &status, __WALL);
				if (heard < 0)
					break;
				take(heard, status);
				struct thread *other = find(heard);
				if (other && other->signal != SIGSTOP)
					go_on(other);
			}
		} else if (!stand(&threads[i])) {
			threads[i].tid = 0;
			continue;
		}
		int signal = threads[i].signal == SIGSTOP || threads[i].signal == SIGTRAP ? 0 : threads[i].signal;
		if (threads[i].tid)
			ptrace(PTRACE_DETACH, threads[i].tid, 0, signal);
		threads[i] = (struct thread){0};
	}
}

static void usage(void)
{
	fputs("tracer PID KNOWN-FILE KNOWN-ADDRESS WRITTEN-ADDRESS SEED\n", stderr);
	exit(2);
}

int main(int argc, char **argv)
{
	char line[128], word[64];
	unsigned long long a = 0, b = 0;
	int old_way = 0, stepping;
	struct stat stat;
	if (argc != 6)
		usage();
	target = atoi(argv[1]);
	int fd = open(argv[2], O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &stat))
		die(argv[2]);
	room = (uint64_t)stat.st_size;
	known = mmap(NULL, room, PROT_READ, MAP_PRIVATE, fd, 0);
	known_at = strtoull(argv[3], NULL, 0);
	written_at = strtoull(argv[4], NULL, 0);
	chance = strtoull(argv[5], NULL, 0);
	for (;;) {
		fd_set set;
		struct timeval soon = {0, 1000};
		FD_ZERO(&set);
		FD_SET(0, &set);
		serve(NULL);
		if (select(1, &set, NULL, NULL, &soon) <= 0)
			continue;
		ssize_t n = 0;
		while (n < (ssize_t)sizeof(line) - 1 && read(0, line + n, 1) == 1 && line[n] != '\n')
			n++;
		line[n] = 0;
		if (!n)
			break;
		sscanf(line, "%63s", word);
		if (!strcmp(word, "seize") || !strcmp(word, "attach")) {
			old_way = word[0] == 'a';
			come(old_way);
		} else if (!strcmp(word, "detach")) {
			leave(old_way);
		} else if (sscanf(line, "stress %llu %llu %d", &a, &b, &stepping) == 3) {
			stress(a, (int)b, stepping);
		} else if (sscanf(line, "hold %63s %llu", word, &a) == 2) {
			hold(word, (unsigned)a);
		} else if (sscanf(line, "poke %lli %llu", (long long *)&a, &b) == 2) {
			for (int i = 0; i < MOST; i++)
				if (threads[i].tid == target && stand(&threads[i])) {
					if (!poke(target, a, b))
						die("PTRACE_POKEDATA");
					go_on(&threads[i]);
				}
		} else {
			usage();
		}
		printf("peeks=%lu wrong=%lu pokes=%lu refused=%lu steps=%lu stops=%lu held=%lu\n", peeks, wrong, pokes,
		       refused, steps, stops, held);
		fflush(stdout);
	}
	leave(old_way);
	return 0;
}
