/* SPDX-License-Identifier: MIT */
/*
 * DOC: System calls
 *
 * Everything the core asks of the kernel goes through os.c (memory, files, processes), os_uffd.c
 * (userfaultfd and pagemap) and os_socket.c, and nowhere else. A function here makes one call, retries
 * EINTR, and returns 0 or a negative errno; there is no policy and no state.
 *
 * In a build with KSM_FAULTS each of them first asks a table whether it should fail instead. The tests
 * walk that table: every step of a merge and of its put-back, at every call number.
 *
 * Callable from any thread; none of it takes a lock.
 */
#include "os.h"

#include "atomic.h"

#include <dirent.h>
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
#ifndef F_OFD_SETLK
#define F_OFD_GETLK 36
#define F_OFD_SETLK 37
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
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (fixed ? MAP_FIXED : 0) | (reserve ? MAP_NORESERVE : 0);
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

size_t ksm_os_resident(void *at, size_t nbytes)
{
	unsigned char in[256];
	size_t pages = 0;
	for (size_t done = 0; done < nbytes; done += sizeof(in) * KSM_PAGE_SIZE) {
		size_t n = KSM_MIN(nbytes - done, sizeof(in) * KSM_PAGE_SIZE);
		if (mincore((char *)at + done, n, in))
			return nbytes;
		for (size_t i = 0; i < ksm_pages_of(n); i++)
			pages += in[i] & 1;
	}
	return pages * KSM_PAGE_SIZE;
}

int ksm_os_map_frames(void *at, size_t nbytes, int store, uint64_t offset)
{
	KSM_FAULT(MAP_FRAMES);
	void *p = mmap(at, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, store, (off_t)offset);
	return p == MAP_FAILED ? -errno : 0;
}

int ksm_os_map_shared(int fd, size_t nbytes, bool writable, void **out)
{
	KSM_FAULT(MAP_SHARED);
	void *p = mmap(NULL, nbytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return -errno;
	*out = p;
	return 0;
}

int ksm_os_unmap(void *at, size_t nbytes)
{
	KSM_FAULT(UNMAP);
	return munmap(at, nbytes) ? -errno : 0;
}

int ksm_os_protect_rw(void *at, size_t nbytes)
{
	KSM_FAULT(PROTECT);
	return mprotect(at, nbytes, PROT_READ | PROT_WRITE) ? -errno : 0;
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

/* ---- files ------------------------------------------------------------------------------------- */

int ksm_os_open(int dirfd, const char *path, int flags, mode_t mode)
{
	KSM_FAULT(OPEN);
	int fd;
	do
		fd = openat(dirfd, path, flags | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, mode);
	while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : fd;
}

int ksm_os_reopen(int fd, int dirfd, const char *name)
{
	KSM_FAULT(OPEN);
	char path[48];
	snprintf(path, sizeof(path), "/proc/thread-self/fd/%d", fd);
	int again = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY);
	if (again >= 0)
		return again;
	struct stat a, b;
	again = openat(dirfd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY);
	if (again < 0)
		return -errno;
	if (fstat(fd, &a) || fstat(again, &b) || a.st_dev != b.st_dev || a.st_ino != b.st_ino) {
		close(again);
		return -ESTALE;
	}
	return again;
}

int ksm_os_lift(int fd)
{
	if (fd < 0 || fd > STDERR_FILENO)
		return fd;
	int lifted = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
	int error = -errno;
	close(fd);
	return lifted < 0 ? error : lifted;
}

void ksm_os_close(int fd)
{
	if (fd >= 0)
		close(fd);
}

int ksm_os_pread(int fd, void *to, size_t nbytes, uint64_t offset)
{
	KSM_FAULT(PREAD);
	for (size_t done = 0; done < nbytes;) {
		ssize_t n = pread(fd, (char *)to + done, nbytes - done, (off_t)(offset + done));
		if (n < 0 && errno != EINTR)
			return -errno;
		if (n == 0)
			return -ENODATA;
		done += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

int ksm_os_pwrite(int fd, const void *from, size_t nbytes, uint64_t offset)
{
	KSM_FAULT(PWRITE);
	for (size_t done = 0; done < nbytes;) {
		ssize_t n = pwrite(fd, (const char *)from + done, nbytes - done, (off_t)(offset + done));
		if (n < 0 && errno != EINTR)
			return -errno;
		if (n == 0)
			return -ENOSPC;
		done += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

int ksm_os_stat(int fd, struct stat *out)
{
	KSM_FAULT(STAT);
	return fstat(fd, out) ? -errno : 0;
}

int ksm_os_truncate(int fd, uint64_t nbytes)
{
	KSM_FAULT(TRUNCATE);
	int r;
	do
		r = ftruncate(fd, (off_t)nbytes);
	while (r && errno == EINTR);
	return r ? -errno : 0;
}

int ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes)
{
	KSM_FAULT(PUNCH);
	int r;
	do
		r = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)nbytes);
	while (r && errno == EINTR);
	return r ? -errno : 0;
}

int ksm_os_memfd(const char *name)
{
	KSM_FAULT(MEMFD);
	int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	return fd < 0 ? -errno : fd;
}

int ksm_os_seal(int fd, int seals)
{
	KSM_FAULT(SEAL);
	return fcntl(fd, F_ADD_SEALS, seals) ? -errno : 0;
}

int ksm_os_seals(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	return seals < 0 ? -errno : seals;
}

static int lock_set(int fd, uint64_t byte, short type)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
	int r;
	do
		r = fcntl(fd, F_OFD_SETLK, &lock);
	while (r && errno == EINTR);
	if (r)
		return errno == EACCES ? -EAGAIN : -errno;
	return 0;
}

int ksm_os_lock_try(int fd, uint64_t byte)
{
	KSM_FAULT(LOCK);
	return lock_set(fd, byte, F_WRLCK);
}

int ksm_os_unlock(int fd, uint64_t byte)
{
	return lock_set(fd, byte, F_UNLCK);
}

int64_t ksm_os_lock_find(int fd, uint64_t from, uint64_t nbytes)
{
	KSM_FAULT(LOCK);
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)from, .l_len = (off_t)nbytes};
	int r;
	do
		r = fcntl(fd, F_OFD_GETLK, &lock);
	while (r && errno == EINTR);
	if (r)
		return -errno;
	return lock.l_type == F_UNLCK ? -ENOENT : (int64_t)KSM_MAX((uint64_t)lock.l_start, from);
}

int ksm_os_unlink(int dirfd, const char *path, bool directory)
{
	KSM_FAULT(UNLINK);
	return unlinkat(dirfd, path, directory ? AT_REMOVEDIR : 0) ? -errno : 0;
}

int ksm_os_mkdir(int dirfd, const char *path, mode_t mode)
{
	KSM_FAULT(MKDIR);
	return mkdirat(dirfd, path, mode) ? -errno : 0;
}

int ksm_os_list(int dirfd, int (*each)(const char *name, void *context), void *context)
{
	KSM_FAULT(LIST);
	int fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	DIR *directory = fdopendir(fd);
	if (!directory) {
		int error = -errno;
		close(fd);
		return error;
	}
	int r = 0;
	for (struct dirent *entry; !r && (entry = readdir(directory));)
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
			r = each(entry->d_name, context);
	closedir(directory);
	return r;
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

void ksm_os_signalfd_drain(int fd)
{
	struct signalfd_siginfo info[4];
	while (read(fd, info, sizeof(info)) > 0)
		;
}

int ksm_os_poll(struct pollfd *fds, size_t count, uint64_t timeout_ns)
{
	KSM_FAULT(POLL);
	struct timespec t = {.tv_sec = (time_t)(timeout_ns / 1000000000u),
			     .tv_nsec = (long)(timeout_ns % 1000000000u)};
	int n = ppoll(fds, count, timeout_ns == UINT64_MAX ? NULL : &t, NULL);
	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	return n;
}
