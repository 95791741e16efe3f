/* SPDX-License-Identifier: MIT */
/*
 * What outlives a process: memory files that others have mapped, and what system calls have done to the kernel's own
 * things. All else a victim takes with it. So of boundaries in a row between which no shared byte changed and no system
 * call was made, one is as good as all: who dies there leaves the same.
 *
 * The victim's memory files are mapped read-only here and compared with what they were. Pages that nobody has written
 * are not read (that would allocate them), but that there is one more is a change.
 */
#include "crash.h"

#include <dirent.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILES_MOST 32

struct watched {
	dev_t device;
	ino_t inode;
	size_t pages;
	char *now, *before;
	unsigned char *there, *was_there;
};

static struct watched files[FILES_MOST];
static size_t file_count;

void crash_watch_begin(void)
{
	crash_watch_end();
}

void crash_watch_end(void)
{
	for (size_t i = 0; i < file_count; i++) {
		munmap(files[i].now, files[i].pages * KSM_PAGE_SIZE);
		free(files[i].before);
		free(files[i].there);
		free(files[i].was_there);
	}
	file_count = 0;
}

/* Copy what differs; is there anything? */
static bool compare(struct watched *file)
{
	bool changed = false;
	CHECK(!mincore(file->now, file->pages * KSM_PAGE_SIZE, file->there));
	for (size_t i = 0; i < file->pages; i++) {
		char *now = file->now + i * KSM_PAGE_SIZE, *before = file->before + i * KSM_PAGE_SIZE;
		bool there = file->there[i] & 1;
		changed |= there != file->was_there[i];
		file->was_there[i] = there;
		if (!there || !memcmp(now, before, KSM_PAGE_SIZE))
			continue;
		changed = true;
		memcpy(before, now, KSM_PAGE_SIZE);
	}
	return changed;
}

static void watch(int fd)
{
	struct stat stat;
	CHECK(!fstat(fd, &stat));
	for (size_t i = 0; i < file_count; i++)
		if (files[i].device == stat.st_dev && files[i].inode == stat.st_ino)
			return;
	CHECK(file_count < FILES_MOST);
	if (!stat.st_size) /* not yet */
		return;
	struct watched *file = &files[file_count++];
	size_t pages = ((size_t)stat.st_size + KSM_PAGE_SIZE - 1) / KSM_PAGE_SIZE;
	*file = (struct watched){.device = stat.st_dev, .inode = stat.st_ino, .pages = pages};
	file->now = mmap(NULL, pages * KSM_PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(file->now != MAP_FAILED);
	file->before = calloc(pages, KSM_PAGE_SIZE);
	file->there = calloc(pages, 1);
	file->was_there = calloc(pages, 1);
	CHECK(file->before && file->there && file->was_there);
	compare(file);
}

/* The store is written by system calls only. */
void crash_watch_files(pid_t pid)
{
	char path[320], target[64];
	snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
	DIR *fds = opendir(path);
	CHECK(fds);
	for (struct dirent *entry; (entry = readdir(fds));) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, entry->d_name);
		ssize_t length = readlink(path, target, sizeof(target) - 1);
		if (length <= 0)
			continue;
		target[length] = 0;
		if (strncmp(target, "/memfd:ksmalloc", 15) || !strncmp(target, "/memfd:ksmalloc store", 21))
			continue;
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		CHECK(fd >= 0);
		watch(fd);
		close(fd);
	}
	closedir(fds);
}

bool crash_watch_changed(void)
{
	bool changed = false;
	for (size_t i = 0; i < file_count; i++)
		changed |= compare(&files[i]);
	return changed;
}
