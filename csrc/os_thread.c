/* SPDX-License-Identifier: MIT */
/*
 * DOC: Threads and signals
 *
 * What holding every thread of a process takes: lists of threads and descriptors, real-time signals with a value, waits
 * on a word of memory, and the looks into /proc that tell what a thread or a descriptor is.
 *
 * Nothing here allocates or uses stdio: most of it is called while every other thread is held, maybe in the middle of
 * malloc(). The functions in _sigsafe are for handlers. They make raw system calls without errno, because a thread that
 * was made without the C library has none of its own.
 */
#include "os.h"

#include "raw.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* ---- words of memory -------------------------------------------------------------------------------- */

void ksm_os_word_wait_sigsafe(const uint32_t *word, uint32_t value)
{
	ksm_raw_call(SYS_futex, (long)(uintptr_t)word, FUTEX_WAIT_PRIVATE, (long)value, 0, 0, 0);
}

void ksm_os_word_wake_sigsafe(const uint32_t *word, int count)
{
	ksm_raw_call(SYS_futex, (long)(uintptr_t)word, FUTEX_WAKE_PRIVATE, count, 0, 0, 0);
}

int ksm_os_word_wait(const uint32_t *word, uint32_t value, uint64_t timeout_ns)
{
	KSM_FAULT(WORD_WAIT);
	struct timespec t = {.tv_sec = (time_t)(timeout_ns / 1000000000u), .tv_nsec = (long)(timeout_ns % 1000000000u)};
	return syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &t) ? -errno : 0;
}

/* ---- signals --------------------------------------------------------------------------------------- */

int ksm_os_handler_state(int signal, ksm_os_handler handler)
{
	struct ksm_os_action now;
	int r = ksm_os_action_sigsafe(signal, NULL, &now);
	if (r)
		return r;
	return now.handler == handler ? KSM_HANDLER_OURS : now.handler ? KSM_HANDLER_OTHER : KSM_HANDLER_NONE;
}

void ksm_os_die_sigsafe(int signal)
{
	static const struct ksm_os_action none;
	ksm_os_action_sigsafe(signal, &none, NULL);
	ksm_raw_call(SYS_tgkill, ksm_raw_call(SYS_getpid, 0, 0, 0, 0, 0, 0), ksm_raw_call(SYS_gettid, 0, 0, 0, 0, 0, 0),
		     signal, 0, 0, 0);
}

int ksm_os_thread_signal(int tid, int signal, int mark, uint64_t value)
{
	KSM_FAULT(THREAD_SIGNAL);
	siginfo_t info;
	memset(&info, 0, sizeof(info));
	info.si_signo = signal;
	info.si_errno = mark;
	info.si_code = SI_QUEUE;
	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_ptr = (void *)(uintptr_t)value;
	return syscall(SYS_rt_tgsigqueueinfo, info.si_pid, tid, signal, &info) ? -errno : 0;
}

bool ksm_os_thread_exists(int tid)
{
	return !syscall(SYS_tgkill, getpid(), tid, 0) || errno != ESRCH;
}

/* ---- looks into /proc ------------------------------------------------------------------------------- */

struct raw_entry { /* struct linux_dirent64, which no header declares */
	uint64_t inode;
	int64_t offset;
	uint16_t nbytes;
	uint8_t type;
	char name[];
};

int ksm_os_list_numbers(int fd, void *buffer, size_t room, int (*each)(unsigned number, void *context), void *context)
{
	KSM_FAULT(LIST);
	if (lseek(fd, 0, SEEK_SET) < 0)
		return -errno;
	for (;;) {
		long n = syscall(SYS_getdents64, fd, buffer, room);
		if (n <= 0)
			return n < 0 ? -errno : 0;
		for (long at = 0; at < n;) {
			const struct raw_entry *entry = (const struct raw_entry *)((char *)buffer + at);
			unsigned number = 0;
			at += entry->nbytes;
			if (entry->name[0] == '.')
				continue;
			for (const char *digit = entry->name; *digit >= '0' && *digit <= '9'; digit++)
				number = number * 10 + (unsigned)(*digit - '0');
			int r = each(number, context);
			if (r)
				return r;
		}
	}
}

int ksm_os_read_text(int fd, uint64_t offset, char *text, size_t room)
{
	KSM_FAULT(PREAD);
	ssize_t n;
	do
		n = pread(fd, text, room - 1, (off_t)offset);
	while (n < 0 && errno == EINTR);
	text[n > 0 ? n : 0] = 0;
	return n < 0 ? -errno : (int)n;
}

int ksm_os_read_file(int dirfd, const char *path, char *text, size_t room)
{
	text[0] = 0;
	int fd = ksm_os_open(dirfd, path, O_RDONLY, 0);
	if (fd < 0)
		return fd;
	int n = ksm_os_read_text(fd, 0, text, room);
	close(fd);
	return n;
}

int ksm_os_read_link(int dirfd, const char *path, char *text, size_t room)
{
	KSM_FAULT(READ_LINK);
	ssize_t n = readlinkat(dirfd, path, text, room - 1);
	text[n > 0 ? n : 0] = 0;
	return n < 0 ? -errno : (int)n;
}

int ksm_os_kind(int dirfd, const char *path, unsigned *type, unsigned *major, unsigned *minor)
{
	KSM_FAULT(STAT);
	struct statx found;
	if (statx(dirfd, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, STATX_TYPE, &found))
		return -errno;
	*type = found.stx_mode & S_IFMT;
	*major = found.stx_rdev_major;
	*minor = found.stx_rdev_minor;
	return 0;
}

int ksm_os_attribute(const char *path, const char *name, char *text, size_t room)
{
	KSM_FAULT(ATTRIBUTE);
	ssize_t n = getxattr(path, name, text, room - 1);
	text[n > 0 ? n : 0] = 0;
	return n < 0 ? -errno : (int)n;
}

#define KCMP_FILES_ 2 /* enum kcmp_type of linux/kcmp.h */

int ksm_os_same_descriptors(int a, int b)
{
	KSM_FAULT(COMPARE);
	long r = syscall(SYS_kcmp, a, b, KCMP_FILES_, 0, 0);
	return r < 0 ? -errno : r == 0;
}
