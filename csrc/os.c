/* SPDX-License-Identifier: MIT */
/*
 * DOC: System calls
 *
 * Everything the core asks of the kernel goes through os.c (memory, processes), os_file.c, os_uffd.c (userfaultfd and
 * pagemap) and os_socket.c, and nowhere else. A function here makes one call, retries
 * EINTR, and returns 0 or a negative errno; there is no policy and no state.
 *
 * In a build with KSM_FAULTS each of them first asks a table whether it should fail instead (os_fault.c). The tests walk
 * that table, at every call number. What has no place in it cannot fail: clocks, sleeps, a thread's own number, waking
 * somebody, closing.
 *
 * Callable from any thread; none of it takes a lock.
 */
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
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
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif
#define MADV_POPULATE_WRITE_ 23 /* Linux 5.14 */
#define CLOSE_RANGE_UNSHARE_ 2u /* linux/close_range.h; Linux 5.9 */

/* ---- memory ------------------------------------------------------------------------------------ */

/* Why there is no mapping. EAGAIN: all of it would be locked, and RLIMIT_MEMLOCK is reached; that is not "try again". */
static int no_mapping(void)
{
	return errno == EAGAIN ? -ENOMEM : -errno;
}

int ksm_os_map_anon(void *at, size_t nbytes, bool fixed, bool reserve, void **out)
{
	KSM_FAULT(MAP_ANON);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (fixed ? MAP_FIXED : 0) | (reserve || fixed ? MAP_NORESERVE : 0);
	void *p = mmap(at, nbytes, reserve ? PROT_NONE : PROT_READ | PROT_WRITE, flags, -1, 0);
	if (p == MAP_FAILED)
		return no_mapping();
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
	return p == MAP_FAILED ? no_mapping() : 0;
}

int ksm_os_map_shared(int fd, size_t nbytes, bool writable, void **out)
{
	KSM_FAULT(MAP_SHARED);
	/* In two steps: under mlockall(MCL_FUTURE) a readable mapping of a sparse file would be filled at once. */
	void *p = mmap(NULL, nbytes, PROT_NONE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return no_mapping();
	munlock(p, nbytes);
	int r = ksm_os_protect(p, nbytes, writable);
	if (r)
		munmap(p, nbytes);
	else
		*out = p;
	return r;
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
	return p == MAP_FAILED ? no_mapping() : 0;
}

/* Before Linux 5.14: the kernel reads a word of each page, which has it there too, for a call that it then refuses. */
static int let_kernel_read(const char *at, size_t nbytes)
{
	for (size_t done = 0; done < nbytes; done += KSM_PAGE_SIZE) {
		syscall(SYS_rt_sigprocmask, INT_MAX, at + done, NULL, sizeof(uint64_t));
		if (errno == EFAULT)
			return -ENOMEM;
	}
	return 0;
}

int ksm_os_populate(void *at, size_t nbytes)
{
	KSM_FAULT(POPULATE);
	int r;
	do
		r = madvise(at, nbytes, MADV_POPULATE_WRITE_);
	while (r && (errno == EINTR || errno == EAGAIN));
	if (!r)
		return 0;
	if (errno == EINVAL)
		return let_kernel_read(at, nbytes);
	return errno == EFAULT ? -ENOMEM : -errno; /* EFAULT: it would have been SIGBUS */
}

void *ksm_os_allocate(size_t nbytes)
{
	if (KSM_FAULTED(ALLOCATE))
		return NULL;
	return calloc(1, nbytes);
}

void ksm_os_name_memory(void *at, size_t nbytes, const char *name)
{
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, at, nbytes, name); /* for people; many kernels refuse */
}

/* ---- process and time --------------------------------------------------------------------------- */

int ksm_os_unshare_files(void)
{
	KSM_FAULT(UNSHARE_FILES);
	if (!unshare(CLONE_FILES))
		return 0;
	/* Containers' filters refuse unshare(2), whatever it is for. This closes nothing, in a table of our own. */
	int error = -errno;
	return syscall(SYS_close_range, UINT_MAX, UINT_MAX, CLOSE_RANGE_UNSHARE_) ? error : 0;
}

struct range {
	unsigned first, last;
	int listing;
};

static int close_in_range(unsigned number, void *context)
{
	const struct range *range = context;
	if (number >= range->first && number <= range->last && (int)number != range->listing)
		close((int)number);
	return 0;
}

/* One by one, where a filter is older than close_range(2). */
static int close_listed(unsigned first, unsigned last)
{
	char buffer[1024];
	struct range range = {first, last, open("/proc/thread-self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
	if (range.listing < 0)
		return -errno;
	int r = ksm_os_list_numbers(range.listing, buffer, sizeof(buffer), close_in_range, &range);
	close(range.listing);
	return r;
}

int ksm_os_close_range(unsigned first, unsigned last)
{
	KSM_FAULT(CLOSE_RANGE);
	if (first > last)
		return 0;
	if (!syscall(SYS_close_range, first, last, 0))
		return 0;
	int error = -errno;
	return (error == -ENOSYS || error == -EPERM) && !close_listed(first, last) ? 0 : error;
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

int ksm_os_thread_kick(pthread_t thread, int signal)
{
	KSM_FAULT(KICK);
	return -pthread_kill(thread, signal);
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

bool ksm_os_is_linux(unsigned major, unsigned minor)
{
	struct utsname name;
	unsigned is_major = 0, is_minor = 0;
	if (uname(&name) || sscanf(name.release, "%u.%u", &is_major, &is_minor) != 2)
		return false;
	return is_major > major || (is_major == major && is_minor >= minor);
}

uint64_t ksm_os_max_map_count(void)
{
	char text[32];
	int n = ksm_os_read_file(AT_FDCWD, "/proc/sys/vm/max_map_count", text, sizeof(text));
	uint64_t count = n > 0 ? strtoull(text, NULL, 10) : 0;
	return count ? count : 65530; /* the kernel's default */
}

uint64_t ksm_os_count_maps(void)
{
	char text[4096];
	uint64_t lines = 0;
	int fd = ksm_os_open(AT_FDCWD, "/proc/self/maps", O_RDONLY, 0);
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

uint64_t ksm_os_address_limit(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur == RLIM_INFINITY)
		return UINT64_MAX;
	return limit.rlim_cur;
}

uint64_t ksm_os_now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t ksm_os_thread_cpu_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
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
