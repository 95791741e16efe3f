/* SPDX-License-Identifier: MIT */
/*
 * DOC: One thread
 *
 * Small looks into /proc/self/task/TID. They may be late by the time they return, but for threads that cannot run.
 * Called by scanners, also while all other threads are held.
 */
#include "thread.h"

#include "os.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

/* Flags of a thread in stat(5), PF_ in the kernel's sched.h. The second meant something else before Linux 6.4. */
#define IO_WORKER 0x10u
#define USER_WORKER 0x4000u

/* Threads whose masks were found to be open. One scanner at a time, see park.c. */
#define SEEN 4096
#define SEEN_FOR_NS 100000000u
#define LOOKS 3
#define PAUSE_NS 100000u
static struct seen {
	int tid, signal;
	uint64_t at_ns;
} seen[SEEN];

/* A file of a thread's; its length, 0 if it cannot be had. */
static int read_of(int tasks, int tid, const char *file, char *text, size_t room)
{
	char path[40], digits[12];
	size_t first = sizeof(digits) - 1, n = 0;
	digits[first] = 0;
	for (unsigned number = (unsigned)tid; number; number /= 10)
		digits[--first] = (char)('0' + number % 10);
	for (const char *from = digits + first; *from; from++)
		path[n++] = *from;
	path[n++] = '/';
	memcpy(path + n, file, strlen(file) + 1);
	int r = ksm_os_read_file(tasks, path, text, room);
	return r < 0 ? 0 : r;
}

bool ksm_thread_look(int tasks, int tid, struct ksm_thread *out)
{
	char text[256];
	memset(out, 0, sizeof(*out));
	if (!read_of(tasks, tid, "stat", text, sizeof(text)))
		return false;
	const char *from = strchr(text, '('), *to = strrchr(text, ')'); /* a name may contain anything */
	if (!from || !to || !to[1])
		return false;
	size_t n = KSM_MIN((size_t)(to - from - 1), sizeof(out->name) - 1);
	memcpy(out->name, from + 1, n);
	out->state = to[2];
	const char *field = to + 2;
	for (int i = 0; i < 6 && field; i++) { /* state, and five numbers */
		field = strchr(field, ' ');
		field = field ? field + 1 : NULL;
	}
	unsigned long flags = field ? strtoul(field, NULL, 10) : 0;
	out->kernels = flags & IO_WORKER || (flags & USER_WORKER && !strncmp(out->name, "vhost-", 6));
	return true;
}

bool ksm_thread_blocks(int tasks, int tid, int signal)
{
	char text[4096];
	if (!read_of(tasks, tid, "status", text, sizeof(text)))
		return false;
	const char *field = strstr(text, "\nSigBlk:");
	return field && strtoull(field + 8, NULL, 16) >> (signal - 1) & 1;
}

bool ksm_thread_in_vfork(int tasks, int tid)
{
	char text[64];
	if (!read_of(tasks, tid, "syscall", text, sizeof(text)))
		return false;
	long number = strtol(text, NULL, 10); /* "running" reads as 0, and is none of these */
#ifdef SYS_vfork
	if (number == SYS_vfork)
		return true;
#endif
	return number == SYS_clone || number == SYS_clone3;
}

int ksm_thread_find_blocker(int tasks, const int *tids, size_t count, int signal)
{
	uint64_t now = ksm_os_now_ns();
	for (size_t i = 0; i < count; i++) {
		struct seen *one = &seen[(size_t)tids[i] % SEEN];
		if (one->tid == tids[i] && one->signal == signal && now - one->at_ns < SEEN_FOR_NS)
			continue;
		for (int look = 0; ksm_thread_blocks(tasks, tids[i], signal); look++) {
			if (look == LOOKS)
				return tids[i];
			ksm_os_sleep_ns(PAUSE_NS); /* one that has just begun, or is in a signal handler? */
		}
		*one = (struct seen){tids[i], signal, now};
	}
	return 0;
}
