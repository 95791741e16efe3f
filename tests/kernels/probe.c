/* SPDX-License-Identifier: MIT */
/*
 * probe: use one of the features that as_on can take away, directly, and say what the kernel answers.
 *
 *	probe NAME                  prints "OK" or the error's name
 *	probe --list                the names
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096
#define FEATURE_MOVE (1u << 16) /* linux/userfaultfd.h, Linux 6.8 */
#define UFFDIO_MOVE_ _IOWR(UFFDIO, 0x05, struct move)
#define PAGEMAP_SCAN_ _IOWR('f', 16, struct scan)
#define PROCMAP_QUERY_ _IOWR('f', 17, struct query)

struct move {
	uint64_t to, from, nbytes, mode;
	int64_t moved;
};
struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any, returned;
};
struct query {
	uint64_t size, flags, address, from, to, vma_flags, page_size, offset, inode;
	uint32_t major, minor, name_size, id_size;
	uint64_t name, id;
};

static char *pages(size_t n)
{
	char *at = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		exit(2);
	return at;
}

static int uffd(uint64_t features)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	return fd < 0 || ioctl(fd, UFFDIO_API, &api) ? -1 : fd;
}

static int move(void)
{
	char *from = pages(1), *to = pages(1);
	struct uffdio_register all = {.range = {(uintptr_t)to, PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	struct move request = {(uintptr_t)to, (uintptr_t)from, PAGE, 0, 0};
	from[0] = 1;
	int fd = uffd(0); /* the feature only says that the call exists */
	return ioctl(fd, UFFDIO_REGISTER, &all) ? -1 : ioctl(fd, UFFDIO_MOVE_, &request);
}

static int scan(void)
{
	char *at = pages(1);
	struct scan request = {.size = sizeof(request), .start = (uintptr_t)at, .end = (uintptr_t)at + PAGE};
	request.any = request.returned = 1;
	return ioctl(open("/proc/self/pagemap", O_RDONLY), PAGEMAP_SCAN_, &request);
}

static int query(void)
{
	struct query request = {.size = sizeof(request), .address = (uintptr_t)pages(1)};
	return ioctl(open("/proc/self/maps", O_RDONLY), PROCMAP_QUERY_, &request);
}

static int queue_signal(void)
{
	siginfo_t info = {.si_signo = SIGCHLD, .si_code = SI_QUEUE, .si_pid = getpid()};
	return (int)syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), SIGCHLD, &info);
}

static int wait_for_signals(void)
{
	sigset_t set;
	sigemptyset(&set);
	return signalfd(-1, &set, SFD_CLOEXEC);
}

static int memfd(unsigned flags)
{
	return (int)syscall(SYS_memfd_create, "probe", flags | MFD_CLOEXEC | MFD_ALLOW_SEALING);
}

static int punch(void)
{
	int fd = open("/dev/shm", O_TMPFILE | O_RDWR, 0600);
	return ftruncate(fd, PAGE) ? -1 : fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE);
}

static int read_own(void)
{
	char *at = pages(2);
	struct iovec to = {at, PAGE}, from = {at + PAGE, PAGE};
	return (int)process_vm_readv(getpid(), &to, 1, &from, 1, 0);
}

static int random_byte(void)
{
	char byte;
	return (int)getrandom(&byte, 1, 0);
}

static int status_of(void)
{
	struct statx found;
	return statx(AT_FDCWD, "/", 0, STATX_TYPE, &found);
}

static int resident(void)
{
	unsigned char kinds[1];
	return mincore(pages(1), PAGE, kinds);
}

static int remap(void)
{
	return mremap(pages(1), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, pages(1)) == MAP_FAILED ? -1 : 0;
}

static int name_memory(void)
{
	return prctl(0x53564d41, 0, pages(1), PAGE, "probe"); /* PR_SET_VMA, PR_SET_VMA_ANON_NAME */
}

#define PROBE(name, call)                                                                                              \
	if (listing)                                                                                                   \
		puts(name);                                                                                            \
	else if (!strcmp(argv[1], name))                                                                               \
	return (call) < 0 ? say() : puts("OK") < 0

static int say(void)
{
	return puts(strerrorname_np(errno)) < 0;
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	int listing = !strcmp(argv[1], "--list");
	PROBE("PROCMAP_QUERY", query());
	PROBE("UFFDIO_MOVE", move());
	PROBE("UFFD_FEATURE_MOVE", uffd(FEATURE_MOVE));
	PROBE("PAGEMAP_SCAN", scan());
	PROBE("MFD_NOEXEC_SEAL", memfd(0x8));
	PROBE("device", open("/dev/userfaultfd", O_RDWR));
	PROBE("MADV_COLLAPSE", madvise(pages(1), 0, 25));
	PROBE("PR_SET_VMA_ANON_NAME", name_memory());
	PROBE("MADV_POPULATE_READ", madvise(pages(1), PAGE, 22));
	PROBE("MADV_POPULATE_WRITE", madvise(pages(1), PAGE, 23));
	PROBE("UFFD_USER_MODE_ONLY", syscall(SYS_userfaultfd, O_CLOEXEC | 1));
	PROBE("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC));
	PROBE("filtered-userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC));
	PROBE("memfd", memfd(0));
	PROBE("seals", fcntl(memfd(0), F_ADD_SEALS, F_SEAL_GROW));
	PROBE("close_range", syscall(SYS_close_range, ~0u, ~0u, 0));
	PROBE("filtered-close_range", syscall(SYS_close_range, ~0u, ~0u, 0));
	PROBE("unshare", unshare(CLONE_FILES));
	PROBE("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 2, 0, 0));
	PROBE("filtered-kcmp", syscall(SYS_kcmp, getpid(), getpid(), 2, 0, 0));
	PROBE("process_vm_readv", read_own());
	PROBE("filtered-process_vm_readv", read_own());
	PROBE("statx", status_of());
	PROBE("rt_tgsigqueueinfo", queue_signal());
	PROBE("signalfd", wait_for_signals());
	PROBE("fallocate", punch());
	PROBE("mincore", resident());
	PROBE("mremap", remap());
	PROBE("getrandom", random_byte());
	PROBE("pagemap", open("/proc/self/pagemap", O_RDONLY));
	PROBE("proc", open("/proc/self", O_RDONLY));
	return !listing;
}
