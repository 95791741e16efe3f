/* SPDX-License-Identifier: MIT */
/*
 * as_on: run a program as on an older kernel, or where something is forbidden.
 *
 *	as_on 6.1 PROGRAM [ARGUMENT…]                 all that came later than Linux 6.1 is missing
 *	as_on memfd,proc PROGRAM [ARGUMENT…]          these are missing
 *	as_on 5.15,kcmp PROGRAM [ARGUMENT…]           both
 *	as_on --list                                  what it knows: name, since, error
 *
 * System calls answer as such a kernel does: a seccomp filter looks at their numbers, ioctl requests and flags. It holds
 * for raw system calls too, in signal handlers and everywhere, and for all children. What cannot be seen there, names of
 * files and the release that uname(2) gives, is up to libabsent.so beside this program, which the dynamic linker loads
 * first. "proc" hides /proc in a mount namespace.
 *
 * The filter sees no memory: that an old UFFDIO_API refuses a feature, it says by refusing every UFFDIO_API. The core
 * never makes one that does not ask for UFFD_FEATURE_MOVE.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define MOST_STEPS 256
#define NEVER 0 /* every kernel that we work on has it, but a filter or a configuration may not */
#define LINUX(major, minor) ((major) * 1000 + (minor))
#define UFFDIO_MOVE_ _IOC(_IOC_READ | _IOC_WRITE, UFFDIO, 0x05, 40)
#define PAGEMAP_SCAN_ _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, 96)
#define PROCMAP_QUERY_ _IOC(_IOC_READ | _IOC_WRITE, 'f', 17, 104)

enum test {
	ANY,
	EQUAL,
	HAS_BITS
};

static const struct feature {
	const char *name;
	unsigned since; /* LINUX() */
	int error;      /* 0: not a system call */
	long call;
	enum test test;
	unsigned argument;
	uint32_t value;
	const char *path; /* libabsent.so: no such file */
} features[] = {
	{"PROCMAP_QUERY", LINUX(6, 11), ENOTTY, SYS_ioctl, EQUAL, 1, (uint32_t)PROCMAP_QUERY_, NULL},
	{"UFFDIO_MOVE", LINUX(6, 8), EINVAL, SYS_ioctl, EQUAL, 1, (uint32_t)UFFDIO_MOVE_, NULL},
	{"UFFD_FEATURE_MOVE", LINUX(6, 8), EINVAL, SYS_ioctl, EQUAL, 1, (uint32_t)UFFDIO_API, NULL},
	{"PAGEMAP_SCAN", LINUX(6, 7), ENOTTY, SYS_ioctl, EQUAL, 1, (uint32_t)PAGEMAP_SCAN_, NULL},
	{"MFD_NOEXEC_SEAL", LINUX(6, 3), EINVAL, SYS_memfd_create, HAS_BITS, 1, 0x8 | 0x10, NULL},
	{"device", LINUX(6, 1), 0, 0, ANY, 0, 0, "/dev/userfaultfd"},
	{"MADV_COLLAPSE", LINUX(6, 1), EINVAL, SYS_madvise, EQUAL, 2, 25, NULL},
	{"PR_SET_VMA_ANON_NAME", LINUX(5, 17), EINVAL, SYS_prctl, EQUAL, 0, 0x53564d41, NULL},
	{"MADV_POPULATE_READ", LINUX(5, 14), EINVAL, SYS_madvise, EQUAL, 2, 22, NULL},
	{"MADV_POPULATE_WRITE", LINUX(5, 14), EINVAL, SYS_madvise, EQUAL, 2, 23, NULL},
	{"UFFD_USER_MODE_ONLY", LINUX(5, 11), EINVAL, SYS_userfaultfd, HAS_BITS, 0, 1, NULL},
	{"userfaultfd", NEVER, ENOSYS, SYS_userfaultfd, ANY, 0, 0, "/dev/userfaultfd"},
	{"filtered-userfaultfd", NEVER, EPERM, SYS_userfaultfd, ANY, 0, 0, "/dev/userfaultfd"},
	{"memfd", NEVER, ENOSYS, SYS_memfd_create, ANY, 0, 0, NULL},
	{"seals", NEVER, EINVAL, SYS_fcntl, EQUAL, 1, F_ADD_SEALS, NULL},
	{"close_range", NEVER, ENOSYS, SYS_close_range, ANY, 0, 0, NULL},
	{"filtered-close_range", NEVER, EPERM, SYS_close_range, ANY, 0, 0, NULL},
	{"unshare", NEVER, EPERM, SYS_unshare, ANY, 0, 0, NULL},
	{"kcmp", NEVER, ENOSYS, SYS_kcmp, ANY, 0, 0, NULL},
	{"filtered-kcmp", NEVER, EPERM, SYS_kcmp, ANY, 0, 0, NULL},
	{"process_vm_readv", NEVER, ENOSYS, SYS_process_vm_readv, ANY, 0, 0, NULL},
	{"filtered-process_vm_readv", NEVER, EPERM, SYS_process_vm_readv, ANY, 0, 0, NULL},
	{"statx", NEVER, EPERM, SYS_statx, ANY, 0, 0, NULL},
	{"rt_tgsigqueueinfo", NEVER, EPERM, SYS_rt_tgsigqueueinfo, ANY, 0, 0, NULL},
	{"signalfd", NEVER, ENOSYS, SYS_signalfd4, ANY, 0, 0, NULL},
	{"fallocate", NEVER, EOPNOTSUPP, SYS_fallocate, ANY, 0, 0, NULL},
	{"mincore", NEVER, ENOSYS, SYS_mincore, ANY, 0, 0, NULL},
	{"mremap", NEVER, ENOSYS, SYS_mremap, ANY, 0, 0, NULL},
	{"getrandom", NEVER, ENOSYS, SYS_getrandom, ANY, 0, 0, NULL},
	{"pagemap", NEVER, 0, 0, ANY, 0, 0, "/proc/self/pagemap"},
	{"proc", NEVER, 0, 0, ANY, 0, 0, NULL},
};

static struct sock_filter steps[MOST_STEPS];
static size_t step_count;

static void die(const char *what)
{
	fprintf(stderr, "as_on: %s: %s\n", what, strerror(errno));
	exit(2);
}

static void add(unsigned code, unsigned yes, unsigned no, uint32_t value)
{
	if (step_count == MOST_STEPS)
		die("too many features");
	steps[step_count++] = (struct sock_filter){(uint16_t)code, (uint8_t)yes, (uint8_t)no, value};
}

static void refuse(const struct feature *one)
{
	bool looks = one->test != ANY;
	add(BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr));
	add(BPF_JMP | BPF_JEQ | BPF_K, 0, looks ? 3 : 1, (uint32_t)one->call);
	if (looks) {
		add(BPF_LD | BPF_W | BPF_ABS, 0, 0,
		    offsetof(struct seccomp_data, args) + one->argument * sizeof(uint64_t));
		add(BPF_JMP | (one->test == EQUAL ? BPF_JEQ : BPF_JSET) | BPF_K, 0, 1, one->value);
	}
	add(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | (uint32_t)one->error);
}

static void hide_proc(void)
{
	if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", "/proc", "tmpfs", 0, "size=4k"))
		die("hiding /proc");
}

/* A list that libabsent.so reads, with `more` at its end. */
static void append(const char *variable, const char *more)
{
	const char *old = getenv(variable);
	char all[4096];
	snprintf(all, sizeof(all), "%s%s%s", old ? old : "", old ? ":" : "", more);
	setenv(variable, all, 1);
}

static void preload(const char *self)
{
	const char *slash = strrchr(self, '/');
	char path[4096];
	int n = slash ? (int)(slash - self) : 1;
	snprintf(path, sizeof(path), "%.*s/libabsent.so", n, slash ? self : ".");
	if (access(path, R_OK))
		die(path);
	append("LD_PRELOAD", path);
}

static void take_away(const struct feature *one)
{
	if (one->error)
		refuse(one);
	if (one->path)
		append("ABSENT_FILES", one->path);
}

/* All that came later. */
static void grow_old(unsigned release, const char *text)
{
	for (size_t i = 0; i < COUNT(features); i++)
		if (features[i].since > release)
			take_away(&features[i]);
	char full[64];
	snprintf(full, sizeof(full), "%s.0-as-on", text);
	setenv("ABSENT_RELEASE", full, 1);
}

static void lack(const char *name)
{
	unsigned major, minor;
	if (sscanf(name, "%u.%u", &major, &minor) == 2) {
		grow_old(LINUX(major, minor), name);
		return;
	}
	for (size_t i = 0; i < COUNT(features); i++) {
		if (!strcmp(features[i].name, name)) {
			take_away(&features[i]);
			if (!strcmp(name, "proc"))
				hide_proc();
			return;
		}
	}
	fprintf(stderr, "as_on: nothing is called %s\n", name);
	exit(2);
}

static void list(void)
{
	for (size_t i = 0; i < COUNT(features); i++)
		printf("%s %u.%u %s\n", features[i].name, features[i].since / 1000, features[i].since % 1000,
		       features[i].error ? strerrorname_np(features[i].error) : "ENOENT");
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "--list")) {
		list();
		return 0;
	}
	if (argc < 3) {
		fprintf(stderr, "usage: %s RELEASE-OR-FEATURE[,…] PROGRAM [ARGUMENT…]\n", argv[0]);
		return 2;
	}
	preload(argv[0]);
	for (char *name = strtok(argv[1], ","); name; name = strtok(NULL, ","))
		lack(name);
	add(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW);
	struct sock_fprog program = {(unsigned short)step_count, steps};
	if (geteuid() != 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		die("PR_SET_NO_NEW_PRIVS");
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		die("PR_SET_SECCOMP");
	execvp(argv[2], argv + 2);
	die(argv[2]);
}
