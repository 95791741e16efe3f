/* SPDX-License-Identifier: MIT */
/*
 * DOC: Files
 *
 * Files, memory files, directories and locks. Locks are open file description locks (Linux 3.15): unlike classic POSIX
 * locks they do not vanish when some other descriptor of the file is closed, and they end with the description.
 */
#include "os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef F_OFD_SETLK
#define F_OFD_GETLK 36
#define F_OFD_SETLK 37
#endif

int ksm_os_open(int dirfd, const char *path, int flags, mode_t mode)
{
	KSM_FAULT(OPEN);
	int fd;
	do
		fd = openat(dirfd, path, flags | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, mode);
	while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : fd;
}

static int open_link(const char *path, int flags)
{
	KSM_FAULT(REOPEN);
	int fd = open(path, flags | O_CLOEXEC | O_NOCTTY);
	return fd < 0 ? -errno : fd;
}

int ksm_os_reopen(int fd, int dirfd, const char *name)
{
	char path[48];
	snprintf(path, sizeof(path), "/proc/thread-self/fd/%d", fd);
	int again = open_link(path, O_RDWR);
	if (again >= 0)
		return again;
	struct stat a, b;
	again = ksm_os_open(dirfd, name, O_RDWR, 0);
	if (again < 0)
		return again;
	int r = ksm_os_stat(fd, &a);
	if (!r)
		r = ksm_os_stat(again, &b);
	if (!r && (a.st_dev != b.st_dev || a.st_ino != b.st_ino))
		r = -ESTALE;
	if (!r)
		return again;
	close(again);
	return r;
}

int ksm_os_reopen_from(int tid, int fd, bool directory)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/task/%d/fd/%d", tid, fd);
	return open_link(path, directory ? O_RDONLY | O_DIRECTORY : O_RDWR);
}

static int dup_above(int fd, int least)
{
	KSM_FAULT(LIFT);
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, least);
	return copy < 0 ? -errno : copy;
}

int ksm_os_duplicate(int fd)
{
	return dup_above(fd, STDERR_FILENO + 1);
}

int ksm_os_lift(int fd)
{
	if (fd < 0 || fd > STDERR_FILENO)
		return fd;
	int lifted = dup_above(fd, STDERR_FILENO + 1);
	close(fd);
	return lifted;
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

int ksm_os_stat_at(int dirfd, const char *path, struct stat *out)
{
	KSM_FAULT(STAT);
	return fstatat(dirfd, path, out, AT_SYMLINK_NOFOLLOW) ? -errno : 0;
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

int64_t ksm_os_seek_data(int fd, uint64_t offset)
{
	if (KSM_FAULTED(SEEK))
		return (int64_t)offset;
	off_t at = lseek(fd, (off_t)offset, SEEK_DATA);
	if (at < 0)
		return errno == ENXIO ? INT64_MAX : (int64_t)offset;
	return (int64_t)at;
}

int ksm_os_seal(int fd, int seals)
{
	KSM_FAULT(SEAL);
	return fcntl(fd, F_ADD_SEALS, seals) ? -errno : 0;
}

int ksm_os_seals(int fd)
{
	KSM_FAULT(SEALS);
	int seals = fcntl(fd, F_GET_SEALS);
	return seals < 0 ? -errno : seals;
}

bool ksm_os_has_fixed_size(int fd)
{
	int fixed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, seals = ksm_os_seals(fd);
	return seals >= 0 && (seals & fixed) == fixed && !(seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE));
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
	KSM_FAULT(UNLOCK);
	return lock_set(fd, byte, F_UNLCK);
}

int64_t ksm_os_lock_find(int fd, uint64_t from, uint64_t nbytes)
{
	KSM_FAULT(LOCK);
	int64_t found = -ENOENT;
	/* The kernel names some lock of the range, not the first: look again below it until there is none. */
	for (uint64_t end = from + nbytes; end > from; end = (uint64_t)found) {
		struct flock lock = {
			.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)from, .l_len = (off_t)(end - from)};
		int r;
		do
			r = fcntl(fd, F_OFD_GETLK, &lock);
		while (r && errno == EINTR);
		if (r)
			return -errno;
		if (lock.l_type == F_UNLCK)
			break;
		found = (int64_t)KSM_MAX((uint64_t)lock.l_start, from);
	}
	return found;
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
