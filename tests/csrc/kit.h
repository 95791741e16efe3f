/* SPDX-License-Identifier: MIT */
/*
 * kit.h: what most C tests need: a rendezvous directory that is removed however the test ends, children that die with
 * the test, pages of known contents, and looks at the process from outside.
 */
#ifndef KSM_TESTS_KIT_H
#define KSM_TESTS_KIT_H

#include "harness.h"

#include "atomic.h"
#include "error.h"
#include "ksmalloc.h"
#include "os.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define KIT __attribute__((unused)) static

/* ---- processes ------------------------------------------------------------------------------------------------- */

/* A child that is killed when this thread ends. */
KIT pid_t kit_fork(void)
{
	pid_t parent = getpid(), pid;
	fflush(NULL);
	pid = fork();
	CHECK_SYS(pid);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
	}
	return pid;
}

KIT void kit_kill(pid_t pid)
{
	CHECK_SYS(kill(pid, SIGKILL));
	CHECK_KILLED(pid, SIGKILL);
}

KIT void kit_sleep_ms(unsigned ms)
{
	ksm_os_sleep_ns(ms * 1000000ull);
}

/* Wait until the condition holds; the case fails after so many seconds. */
#define KIT_WAIT(seconds, condition)                                                                                   \
	do {                                                                                                           \
		double kit_until = harness_now() + (seconds);                                                          \
		while (!(condition)) {                                                                                 \
			if (harness_now() > kit_until)                                                                 \
				FAIL("not within %g s: %s", (double)(seconds), #condition);                            \
			ksm_os_sleep_ns(200000);                                                                       \
		}                                                                                                      \
	} while (0)

/* Steps that processes take in turn: memory they share. */
KIT uint32_t *kit_steps(void)
{
	void *at = mmap(NULL, KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED);
	return at;
}

KIT void kit_reach(uint32_t *steps, uint32_t step)
{
	ksm_store_release(steps, step);
}

KIT void kit_await(uint32_t *steps, uint32_t step)
{
	KIT_WAIT(20, ksm_load_acquire(steps) >= step);
}

/* ---- the rendezvous -------------------------------------------------------------------------------------------- */

/* A directory of this case's, made at the first call. A process of its own removes it when this one is gone. */
KIT const char *kit_directory(void)
{
	static char path[64];
	pid_t test = getpid(), janitor;
	if (path[0])
		return path;
	snprintf(path, sizeof(path), "/dev/shm/ksmtest-%d", (int)test);
	int ready[2], watched = (int)syscall(SYS_pidfd_open, test, 0);
	CHECK_SYS(watched);
	CHECK_SYS(pipe(ready));
	CHECK_SYS(mkdir(path, 0700));
	janitor = fork();
	CHECK_SYS(janitor);
	if (janitor == 0) {
		setsid(); /* whoever kills the test's group does not mean this one */
		CHECK_EQ(write(ready[1], "!", 1), 1);
		dup2(watched, 0);
		syscall(SYS_close_range, 1u, ~0u, 0);
		poll(&(struct pollfd){.fd = 0, .events = POLLIN}, 1, -1);
		/* Its children die now; one that was joining may make a name while we remove them. */
		execl("/bin/sh", "sh", "-c", "for i in 1 2 3 4 5; do sleep 0.05; rm -rf \"$0\"; done", path,
		      (char *)NULL);
		_exit(1);
	}
	char byte;
	CHECK_EQ(read(ready[0], &byte, 1), 1);
	close(ready[0]);
	close(ready[1]);
	close(watched);
	return path;
}

/* A domain of this case's own; 256 MiB of frames. */
KIT struct ksm_domain_options kit_options(const char *name)
{
	return (struct ksm_domain_options){
		.name = name, .path = kit_directory(), .store_fd = -1, .capacity_bytes = 256u << 20};
}

/* Is there a barrier here? A kernel or a container may refuse all of them; then there is nothing to test. */
KIT bool kit_can_merge(void)
{
	int uffd = ksm_os_uffd_open(KSM_UFFD_FEATURE_MOVE);
	ksm_os_close(uffd);
	if (uffd < 0)
		printf("no window can be opened here: %s\n", ksm_error_name(uffd));
	return uffd >= 0;
}

/* ---- pages ----------------------------------------------------------------------------------------------------- */

KIT uint64_t kit_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* A page that is like no other one with another seed. Seed 0: zeros. */
KIT void kit_fill(void *page, uint64_t seed)
{
	uint64_t state = seed;
	for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++)
		((uint64_t *)page)[i] = seed ? kit_random(&state) : 0;
}

KIT bool kit_is(const void *page, uint64_t seed)
{
	uint64_t expected[KSM_PAGE_SIZE / 8];
	kit_fill(expected, seed);
	return memcmp(page, expected, KSM_PAGE_SIZE) == 0;
}

KIT char *kit_page(char *base, size_t page)
{
	return base + page * KSM_PAGE_SIZE;
}

KIT char *kit_map(size_t pages)
{
	char *at = mmap(NULL, pages * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(at != MAP_FAILED);
	madvise(at, pages * KSM_PAGE_SIZE, MADV_NOHUGEPAGE);
	return at;
}

/* `pages` pages, page i filled with seed first + i. */
KIT char *kit_map_filled(size_t pages, uint64_t first)
{
	char *at = kit_map(pages);
	for (size_t i = 0; i < pages; i++)
		kit_fill(kit_page(at, i), first + i);
	return at;
}

KIT void kit_check_filled(const char *at, size_t pages, uint64_t first)
{
	for (size_t i = 0; i < pages; i++)
		if (!kit_is(at + i * KSM_PAGE_SIZE, first + i))
			FAIL("page %zu does not hold what belongs there (seed %llu)", i,
			     (unsigned long long)(first + i));
}

/* ---- from outside ---------------------------------------------------------------------------------------------- */

/* Calls each(line, context) for the lines in smaps of every mapping inside [at, at + nbytes). Returns how many there are. */
KIT size_t kit_smaps(const void *at, size_t nbytes, void (*each)(const char *line, void *context), void *context)
{
	char line[512];
	size_t mappings = 0;
	bool inside = false;
	FILE *smaps = fopen("/proc/self/smaps", "re");
	CHECK(smaps);
	while (fgets(line, sizeof(line), smaps)) {
		unsigned long from, to;
		if (line[0] < 'A' || line[0] > 'Z') {
			if (sscanf(line, "%lx-%lx ", &from, &to) == 2) {
				inside = from < (uintptr_t)at + nbytes && to > (uintptr_t)at;
				mappings += inside;
			}
		} else if (inside && each) {
			each(line, context);
		}
	}
	fclose(smaps);
	return mappings;
}

struct kit_field {
	const char *name;
	uint64_t bytes;
};

KIT void kit_add_field(const char *line, void *context)
{
	struct kit_field *field = context;
	size_t n = strlen(field->name);
	if (strncmp(line, field->name, n) == 0 && line[n] == ':')
		field->bytes += strtoull(line + n + 1, NULL, 10) * 1024;
}

/* One field of smaps ("Rss", "Anonymous") over a range of whole mappings, in bytes. */
KIT uint64_t kit_smaps_bytes(const void *at, size_t pages, const char *name)
{
	struct kit_field field = {name, 0};
	kit_smaps(at, pages * KSM_PAGE_SIZE, kit_add_field, &field);
	return field.bytes;
}

KIT void kit_find_flag(const char *line, void *context)
{
	if (!strncmp(line, "VmFlags:", 8) && (strstr(line, " um") || strstr(line, " uw")))
		*(bool *)context = true;
}

/* Is any of it registered with userfaultfd? */
KIT bool kit_is_registered(const void *at, size_t pages)
{
	bool found = false;
	kit_smaps(at, pages * KSM_PAGE_SIZE, kit_find_flag, &found);
	return found;
}

/* Is the page mapped from a file, not yet written? -1: it is not there at all. */
KIT int kit_is_file(const void *page)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint16_t kind;
	(void)*(volatile const char *)page;
	CHECK_EQ(ksm_os_pagemap(fd, page, 1, &kind), 0);
	close(fd);
	return kind & KSM_PAGE_PRESENT ? (kind & KSM_PAGE_FILE) != 0 : -1;
}

KIT int kit_open_files(void)
{
	int n = 0;
	DIR *directory = opendir("/proc/self/fd");
	CHECK(directory);
	while (readdir(directory))
		n++;
	closedir(directory);
	return n;
}

KIT uint64_t kit_blocks(int fd)
{
	struct stat stat;
	CHECK_SYS(fstat(fd, &stat));
	return (uint64_t)stat.st_blocks * 512;
}

#endif
