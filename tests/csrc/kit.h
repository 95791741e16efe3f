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
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

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

/* A stop begins in one thread; the others go on until it is their turn. */
KIT void kit_stop(pid_t pid)
{
	int status;
	CHECK_SYS(kill(pid, SIGSTOP));
	CHECK_EQ(waitpid(pid, &status, WUNTRACED), pid);
	CHECK(WIFSTOPPED(status));
}

/* The child's end of a case that must not go on: it says so where kit_panics() reads. */
KIT pid_t kit_fork_to_panic(int said[2])
{
	CHECK_SYS(pipe(said));
	pid_t pid = kit_fork();
	if (pid == 0) {
		CHECK_SYS(dup2(said[1], STDERR_FILENO));
		CHECK_SYS(setrlimit(RLIMIT_CORE, &(struct rlimit){0}));
	}
	close(said[1]);
	return pid;
}

KIT void kit_check_panic(const char *file, int line, pid_t pid, int said, const char *what)
{
	char text[512] = "";
	ssize_t n, all = 0;
	while ((n = read(said, text + all, sizeof(text) - 1 - (size_t)all)) > 0)
		all += n;
	close(said);
	int status = harness_wait(file, line, pid);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
		harness_fail(file, line, "it went on: wait status 0x%x", (unsigned)status);
	if (!strstr(text, "broken invariant: ") || !strstr(text, what))
		harness_fail(file, line, "it did not say \"%s\", but: %s", what, text);
}

/* The statement ends its process with a message that contains these words. */
#define KIT_PANICS(words, ...)                                                                                         \
	do {                                                                                                           \
		int kit_said[2];                                                                                       \
		pid_t kit_pid = kit_fork_to_panic(kit_said);                                                           \
		if (kit_pid == 0) {                                                                                    \
			__VA_ARGS__;                                                                                   \
			_exit(0);                                                                                      \
		}                                                                                                      \
		kit_check_panic(__FILE__, __LINE__, kit_pid, kit_said[0], words);                                      \
	} while (0)

KIT void kit_sleep_ms(unsigned ms)
{
	ksm_os_sleep_ns(ms * 1000000ull);
}

/* Wait until the condition holds; the case fails after so many seconds (as harness_limit() says). */
#define KIT_WAIT(seconds, condition)                                                                                   \
	do {                                                                                                           \
		double kit_until = harness_now() + harness_limit(seconds);                                             \
		while (!(condition)) {                                                                                 \
			if (harness_now() > kit_until)                                                                 \
				FAIL("not within %g s: %s", (double)(seconds), #condition);                            \
			ksm_os_sleep_ns(200000);                                                                       \
		}                                                                                                      \
	} while (0)

/* Something random goes on for so many seconds, and on a busy machine until enough has happened. */
KIT bool kit_goes_on(double start, double seconds, bool enough)
{
	double now = harness_now();
	return now < start + seconds || (!enough && now < start + harness_limit(15));
}

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
	CHECK(watched >= 0 || errno == ENOSYS); /* valgrind 3.19 does not know it */
	CHECK_SYS(pipe(ready));
	CHECK_SYS(mkdir(path, 0700));
	janitor = fork();
	CHECK_SYS(janitor);
	if (janitor == 0) {
		setsid(); /* whoever kills the test's group does not mean this one */
		CHECK_EQ(write(ready[1], "!", 1), 1);
		dup2(watched, 0);
		syscall(SYS_close_range, 1u, ~0u, 0);
		if (watched >= 0)
			poll(&(struct pollfd){.fd = 0, .events = POLLIN}, 1, -1);
		while (watched < 0 && getppid() == test)
			ksm_os_sleep_ns(20000000);
		/* Its children die now; one that was joining may make a name while we remove them. */
		execl("/bin/sh", "sh", "-c",
		      "for i in 1 2 3 4 5; do sleep 0.05; rm -rf \"$0\" /dev/shm/ksmalloc-*/\"${0##*/}\"-*; done", path,
		      (char *)NULL);
		_exit(1);
	}
	char byte;
	CHECK_EQ(read(ready[0], &byte, 1), 1);
	close(ready[0]);
	close(ready[1]);
	if (watched >= 0)
		close(watched);
	return path;
}

/* The name of a domain at the default place, which goes with the directory. */
KIT const char *kit_name(const char *name)
{
	static char full[KSM_NAME_MAX + 1];
	snprintf(full, sizeof(full), "%s-%s", strrchr(kit_directory(), '/') + 1, name);
	return full;
}

#define KIT_NOBODY 65534

/* The process becomes nobody: not dumpable any more. */
KIT void kit_become_nobody(void)
{
	CHECK_SYS(setgid(KIT_NOBODY));
	CHECK_SYS(setuid(KIT_NOBODY));
	CHECK_SYS(prctl(PR_SET_PDEATHSIG, SIGKILL)); /* was lost with the user */
	CHECK_EQ(prctl(PR_GET_DUMPABLE), 0);
}

KIT bool kit_is_root(void)
{
	if (geteuid() != 0)
		printf("only root can become somebody else\n");
	return geteuid() == 0;
}

/* One inside it that belongs to another user, for processes that become that user. */
KIT const char *kit_directory_of(uid_t user)
{
	static char path[96];
	CHECK_SYS(chmod(kit_directory(), 0711));
	snprintf(path, sizeof(path), "%s/of-%u", kit_directory(), (unsigned)user);
	CHECK(!mkdir(path, 0700) || errno == EEXIST);
	CHECK_SYS(chown(path, user, user));
	return path;
}

/* A domain of this case's own; 256 MiB of frames. */
KIT struct ksm_domain_options kit_options(const char *name)
{
	return (struct ksm_domain_options){
		.name = name, .path = kit_directory(), .store_fd = -1, .capacity_bytes = 256u << 20};
}

/* A tool that we run under may not be able to do something; KSMALLOC_TEST_WITHOUT says what (tests/sankit.py). */
KIT bool kit_is_without(const char *what)
{
	const char *without = getenv("KSMALLOC_TEST_WITHOUT");
	if (!without || !strstr(without, what))
		return false;
	printf("without %s here\n", what);
	return true;
}

/* Can windows be opened by moving pages? A kernel or a container may refuse it. */
KIT bool kit_can_move(void)
{
	if (kit_is_without("move"))
		return false;
	int uffd = ksm_os_uffd_open(KSM_UFFD_FEATURE_MOVE);
	ksm_os_close(uffd);
	if (uffd < 0)
		printf("no pages can be moved here: %s\n", ksm_error_name(uffd));
	return uffd >= 0;
}

/* Can pages be merged at all? By moving them, or else by holding every other thread, which only a filter can forbid. */
KIT bool kit_can_merge(void)
{
	if (kit_can_move())
		return true;
	return !kit_is_without("stop") && (syscall(SYS_rt_tgsigqueueinfo, 0, 0, 0, NULL) != -1 || errno != EPERM);
}

/* Is there a window of this kind here? */
KIT bool kit_has_barrier(enum ksm_barrier_kind kind)
{
	return kind == KSM_BARRIER_MOVE   ? kit_can_move()
	       : kind == KSM_BARRIER_STOP ? !kit_is_without("stop")
	       : kind == KSM_BARRIER_SEGV ? !kit_is_without("segv")
					  : true;
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
	uint64_t entry;
	(void)*(volatile const char *)page;
	CHECK_EQ(pread(fd, &entry, 8, (off_t)((uintptr_t)page / KSM_PAGE_SIZE * 8)), 8);
	close(fd);
	return entry >> 63 ? (int)(entry >> 61 & 1) : -1;
}

/* Is the mapping at this address readable only? */
KIT bool kit_is_readonly(const void *at)
{
	char line[512], mode[5] = "";
	unsigned long from, to;
	FILE *maps = fopen("/proc/self/maps", "re");
	CHECK(maps);
	while (fgets(line, sizeof(line), maps)) {
		CHECK_EQ(sscanf(line, "%lx-%lx %4s", &from, &to, mode), 3);
		if ((uintptr_t)at >= from && (uintptr_t)at < to)
			break;
		mode[0] = 0;
	}
	fclose(maps);
	CHECK(mode[0]);
	return !strcmp(mode, "r--p");
}

/* A system call that stores one byte, the one that is there: 0, or what it says. */
KIT int kit_call_store(void *at)
{
	int file = ksm_os_memfd("byte");
	CHECK_EQ(write(file, at, 1), 1);
	int r = pread(file, at, 1, 0) == 1 ? 0 : -errno;
	close(file);
	return r;
}

/* Pin a page as a device would, and be one for whom it may be written: an io_uring's registered buffer. -1: not here. */
KIT int kit_pin(void *page, size_t pages)
{
	struct io_uring_params params = {0};
	struct iovec iov = {page, pages * KSM_PAGE_SIZE};
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0) {
		printf("no io_uring here: %s\n", strerror(errno));
		return -1;
	}
	CHECK_SYS(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1));
	return ring;
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
