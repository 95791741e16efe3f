/* SPDX-License-Identifier: MIT */
/*
 * DOC: System calls
 *
 * Everything the core asks of the kernel goes through os.c (memory, processes), os_file.c, os_uffd.c (userfaultfd and
 * pagemap) and os_socket.c, and nowhere else. A function here makes one call, retries
 * EINTR, and returns 0 or a negative errno; there is no policy and no state.
 *
 * In a build with KSM_FAULTS each of them first asks a table whether it should fail instead. The tests
 * walk that table: every step of a merge and of its put-back, at every call number.
 *
 * Callable from any thread; none of it takes a lock.
 */
#include "os.h"

#include "atomic.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

/* ---- faults on demand -------------------------------------------------------------------------- */

#ifdef KSM_FAULTS
static struct {
	uint32_t calls, skip, count;
	int error;
} faults[KSM_OS_CALL_COUNT];

void ksm_os_fault_set(enum ksm_os_call call, uint32_t skip, uint32_t count, int error)
{
	faults[call].error = error;
	ksm_store_release(&faults[call].calls, 0);
	ksm_store_release(&faults[call].skip, skip);
	ksm_store_release(&faults[call].count, count);
}

void ksm_os_fault_clear(void)
{
	for (int call = 0; call < KSM_OS_CALL_COUNT; call++)
		ksm_os_fault_set(call, 0, 0, 0);
}

uint32_t ksm_os_fault_calls(enum ksm_os_call call)
{
	return ksm_load_acquire(&faults[call].calls);
}

int ksm_os_fault_(enum ksm_os_call call)
{
	uint32_t number = ksm_add_relaxed(&faults[call].calls, 1);
	uint32_t count = ksm_load_acquire(&faults[call].count);
	uint32_t skip = ksm_load_acquire(&faults[call].skip);
	return count && number >= skip && number - skip < count ? faults[call].error : 0;
}

const char *ksm_os_call_name(enum ksm_os_call call)
{
	static const char *const names[] = {
#define KSM_OS_CALL_NAME(name) #name,
		KSM_OS_CALLS(KSM_OS_CALL_NAME)
#undef KSM_OS_CALL_NAME
	};
	return names[call];
}
#endif

/* ---- memory ------------------------------------------------------------------------------------ */

int ksm_os_map_anon(void *at, size_t nbytes, bool fixed, bool reserve, void **out)
{
	KSM_FAULT(MAP_ANON);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (fixed ? MAP_FIXED : 0) | (reserve || fixed ? MAP_NORESERVE : 0);
	void *p = mmap(at, nbytes, reserve ? PROT_NONE : PROT_READ | PROT_WRITE, flags, -1, 0);
	if (p == MAP_FAILED)
		return -errno;
	if (out)
		*out = p;
	return 0;
}

int ksm_os_map_table(size_t nbytes, void **out)
{
	int r = ksm_os_map_anon(NULL, nbytes, false, false, out);
	if (r)
		return r;
	madvise(*out, nbytes, MADV_NOHUGEPAGE);
	madvise(*out, nbytes, MADV_DONTDUMP);
	ksm_os_name_memory(*out, nbytes, "ksmalloc tables");
	return 0;
}

int ksm_os_map_frames(void *at, size_t nbytes, int store, uint64_t offset, bool writable)
{
	KSM_FAULT(MAP_FRAMES);
	int access = writable ? PROT_READ | PROT_WRITE : PROT_READ;
	void *p = mmap(at, nbytes, access, MAP_PRIVATE | MAP_FIXED, store, (off_t)offset);
	return p == MAP_FAILED ? -errno : 0;
}

int ksm_os_map_shared(int fd, size_t nbytes, bool writable, void **out)
{
	KSM_FAULT(MAP_SHARED);
	/* In two steps: under mlockall(MCL_FUTURE) a readable mapping of a sparse file would be filled at once. */
	void *p = mmap(NULL, nbytes, PROT_NONE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return -errno;
	munlock(p, nbytes);
	if (mprotect(p, nbytes, writable ? PROT_READ | PROT_WRITE : PROT_READ)) {
		int error = -errno;
		munmap(p, nbytes);
		return error;
	}
	*out = p;
	return 0;
}

int ksm_os_unmap(void *at, size_t nbytes)
{
	KSM_FAULT(UNMAP);
	return munmap(at, nbytes) ? -errno : 0;
}

int ksm_os_protect(void *at, size_t nbytes, bool writable)
{
	KSM_FAULT(PROTECT);
	return mprotect(at, nbytes, writable ? PROT_READ | PROT_WRITE : PROT_READ) ? -errno : 0;
}

int ksm_os_advise(void *at, size_t nbytes, int advice)
{
	KSM_FAULT(ADVISE);
	return madvise(at, nbytes, advice) ? -errno : 0;
}

int ksm_os_remap(void *from, void *to, size_t nbytes)
{
	KSM_FAULT(REMAP);
	void *p = mremap(from, nbytes, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	return p == MAP_FAILED ? -errno : 0;
}

void ksm_os_name_memory(void *at, size_t nbytes, const char *name)
{
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, at, nbytes, name); /* for people; many kernels refuse */
}

/* ---- process and time --------------------------------------------------------------------------- */

int ksm_os_unshare_files(void)
{
	KSM_FAULT(UNSHARE_FILES);
	return unshare(CLONE_FILES) ? -errno : 0;
}

int ksm_os_close_range(unsigned first, unsigned last)
{
	KSM_FAULT(CLOSE_RANGE);
	if (first > last)
		return 0;
	return syscall(SYS_close_range, first, last, 0) ? -errno : 0;
}

int ksm_os_random(void *to, size_t nbytes)
{
	KSM_FAULT(RANDOM);
	return getrandom(to, nbytes, 0) == (ssize_t)nbytes ? 0 : -EIO;
}

int ksm_os_tid(void)
{
	return (int)syscall(SYS_gettid);
}

void ksm_os_wait_thread_gone(int tid)
{
	while (!syscall(SYS_tgkill, getpid(), tid, 0))
		sched_yield();
}

int ksm_os_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *), void *argument)
{
	KSM_FAULT(THREAD);
	return -pthread_create(thread, attributes, function, argument);
}

int ksm_os_dumpable(void)
{
	return prctl(PR_GET_DUMPABLE);
}

uint64_t ksm_os_memory_bytes(void)
{
	long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
	return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 1ull << 30;
}

uint64_t ksm_os_max_map_count(void)
{
	char text[32] = "";
	int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd >= 0 ? read(fd, text, sizeof(text) - 1) : -1;
	ksm_os_close(fd);
	uint64_t count = n > 0 ? strtoull(text, NULL, 10) : 0;
	return count ? count : 65530; /* the kernel's default */
}

uint64_t ksm_os_count_maps(void)
{
	char text[4096];
	uint64_t lines = 0;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	for (ssize_t n; fd >= 0 && (n = read(fd, text, sizeof(text))) > 0;)
		for (ssize_t i = 0; i < n; i++)
			lines += text[i] == '\n';
	ksm_os_close(fd);
	return lines;
}

uint64_t ksm_os_file_size_limit(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_FSIZE, &limit) || limit.rlim_cur == RLIM_INFINITY)
		return UINT64_MAX;
	return limit.rlim_cur;
}

uint64_t ksm_os_now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void ksm_os_sleep_ns(uint64_t ns)
{
	struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
	nanosleep(&t, NULL);
}

void ksm_os_yield(void)
{
	sched_yield();
}

int ksm_os_signalfd(int signal)
{
	KSM_FAULT(SIGNALFD);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, signal);
	int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

void ksm_os_signalfd_take(int fd, uint32_t count)
{
	struct signalfd_siginfo info;
	while (count-- && read(fd, &info, sizeof(info)) > 0)
		;
}

int ksm_os_poll(struct pollfd *fds, size_t count, uint64_t timeout_ns)
{
	KSM_FAULT(POLL);
	struct timespec t = {.tv_sec = (time_t)(timeout_ns / 1000000000u), .tv_nsec = (long)(timeout_ns % 1000000000u)};
	int n = ppoll(fds, count, timeout_ns == UINT64_MAX ? NULL : &t, NULL);
	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	return n;
}
