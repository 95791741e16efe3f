/* SPDX-License-Identifier: MIT */
#include "parking.h"

#include "gate.h"
#include "hazards.h"

#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>

#ifndef AF_XDP
#define AF_XDP 44
#endif

/* What a new look at this process says; both kinds of look. */
static int look(const char **text)
{
	static char said[256];
	struct ksm_hazards *hazards;
	int tid = ksm_os_tid();
	CHECK_EQ(ksm_hazards_create(&hazards), 0);
	int parked = ksm_hazards_look(hazards, &tid, 1, true);
	int running = ksm_hazards_look(hazards, &tid, 1, false);
	snprintf(said, sizeof(said), "%s", ksm_hazards_text(hazards));
	ksm_hazards_destroy(hazards);
	*text = said;
	if (parked)
		CHECK_EQ(running, parked);
	return running;
}

static void refuses(const char *what)
{
	const char *text;
	int r = look(&text);
	if (r != KSM_EDEVICES || !strstr(text, what))
		FAIL("\"%s\" was expected, not %s: \"%s\"", what, ksm_error_name(r), text);
}

static void refuses_descriptor(const char *what, int fd)
{
	char text[256];
	snprintf(text, sizeof(text), "%s: descriptor %d of thread %d", what, fd, ksm_os_tid());
	refuses(text);
}

static void allows(void)
{
	const char *text;
	int r = look(&text);
	if (r)
		FAIL("%s: %s", ksm_error_name(r), text);
	CHECK_STR_EQ(text, "");
}

static bool there(const char *what, int fd)
{
	if (fd < 0)
		printf("no %s here: %s\n", what, strerror(errno));
	return fd >= 0;
}

/* ---- io_uring ------------------------------------------------------------------------------------------------------ */

struct ring {
	int fd;
	struct io_uring_params params;
	char *queue; /* of submissions, and of completions: one mapping */
	struct io_uring_sqe *entries;
};

#define RING_BYTES 4096

static bool ring_create(struct ring *ring)
{
	*ring = (struct ring){.fd = -1};
	ring->fd = (int)syscall(SYS_io_uring_setup, 2, &ring->params);
	if (!there("io_uring", ring->fd))
		return false;
	ring->queue =
		mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
	ring->entries =
		mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	CHECK(ring->queue != MAP_FAILED && (void *)ring->entries != MAP_FAILED);
	return true;
}

static void ring_read(struct ring *ring, int fd, void *to, unsigned nbytes)
{
	uint32_t *tail = (uint32_t *)(ring->queue + ring->params.sq_off.tail);
	ring->entries[0] = (struct io_uring_sqe){
		.opcode = IORING_OP_READ, .fd = fd, .addr = (uintptr_t)to, .len = nbytes, .off = (uint64_t)-1};
	((uint32_t *)(ring->queue + ring->params.sq_off.array))[0] = 0;
	ksm_store_release(tail, *tail + 1);
	CHECK_EQ(syscall(SYS_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0), 1);
}

TEST(a_ring)
{
	struct ring ring;
	allows();
	if (!ring_create(&ring))
		return;
	refuses("io_uring: a mapping of a ring");
	munmap(ring.queue, RING_BYTES);
	munmap(ring.entries, RING_BYTES);
	refuses_descriptor("io_uring", ring.fd);
	close(ring.fd);
	allows();
}

TEST(a_ring_whose_descriptor_is_closed)
{
	struct ring ring;
	if (!ring_create(&ring))
		return;
	close(ring.fd);
	refuses("io_uring: a mapping of a ring");
	munmap(ring.queue, RING_BYTES);
	munmap(ring.entries, RING_BYTES);
	allows();
}

TEST(pinned_memory)
{
	struct ring ring;
	if (!ring_create(&ring))
		return;
	struct iovec buffer = {kit_map_filled(4, 1), 4 * KSM_PAGE_SIZE};
	CHECK_SYS(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1));
	refuses("VmPin");
}

/* ---- why a ring is refused ------------------------------------------------------------------------------------------- */

struct reader {
	struct ring ring;
	int from, ends[2];
	char *page;
	uint32_t submitted, over;
};

static void *read_with_a_ring(void *argument)
{
	struct reader *self = argument;
	ring_read(&self->ring, self->ends[0], self->page, 64);
	ksm_store_release(&self->submitted, 1);
	while (!ksm_load_acquire(&self->over))
		ksm_os_sleep_ns(500000);
	return NULL;
}

/* Compare a page with its frame, let what the ring was asked for arrive, and map the frame. */
static void merge_while_it_arrives(struct reader *reader, int store)
{
	char frame[KSM_PAGE_SIZE], arriving[64];
	CHECK_EQ(ksm_os_pread(store, frame, KSM_PAGE_SIZE, 0), 0);
	CHECK(!memcmp(reader->page, frame, KSM_PAGE_SIZE));
	memset(arriving, 'X', sizeof(arriving));
	CHECK_EQ(write(reader->ends[1], arriving, 64), 64);
	kit_sleep_ms(50);
	CHECK_EQ(ksm_os_map_frames(reader->page, KSM_PAGE_SIZE, store, 0, true), 0);
}

static bool loses_a_read(bool look_for_hazards)
{
	static struct reader reader;
	pthread_t thread;
	reader = (struct reader){.page = kit_map_filled(1, 7)};
	CHECK(ring_create(&reader.ring));
	CHECK_SYS(pipe(reader.ends));
	int store = ksm_os_memfd("store");
	CHECK_EQ(ksm_os_pwrite(store, reader.page, KSM_PAGE_SIZE, 0), 0);
	CHECK_EQ(pthread_create(&thread, NULL, read_with_a_ring, &reader), 0);
	KIT_WAIT(10, ksm_load_acquire(&reader.submitted));
	kit_sleep_ms(5);
	struct ksm_park park = parking_lot();
	if (look_for_hazards) {
		int r = ksm_park_begin(&park);
		CHECK_EQ(r, KSM_EDEVICES);
		CHECK(strstr(park.reason, "io_uring"));
		if (!r)
			merge_while_it_arrives(&reader, store);
		CHECK_EQ(write(reader.ends[1], "XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX", 64),
			 64);
	} else { /* every thread held, and nothing else asked */
		DIR *tasks = opendir("/proc/self/task");
		ksm_gate_close();
		for (struct dirent *entry; (entry = readdir(tasks));)
			if (atoi(entry->d_name) && atoi(entry->d_name) != ksm_os_tid())
				CHECK_EQ(ksm_gate_send(atoi(entry->d_name)), 1);
		closedir(tasks);
		KIT_WAIT(10, !ksm_gate_missing());
		merge_while_it_arrives(&reader, store);
		ksm_gate_open();
	}
	uint32_t *tail = (uint32_t *)(reader.ring.queue + reader.ring.params.cq_off.tail);
	KIT_WAIT(10, ksm_load_acquire(tail) == 1);
	struct io_uring_cqe *done = (struct io_uring_cqe *)(reader.ring.queue + reader.ring.params.cq_off.cqes);
	CHECK_EQ(done->res, 64);
	bool lost = reader.page[0] != 'X';
	ksm_store_release(&reader.over, 1);
	pthread_join(thread, NULL);
	ksm_park_destroy(&park);
	close(reader.ring.fd);
	munmap(reader.ring.queue, RING_BYTES);
	munmap(reader.ring.entries, RING_BYTES);
	return lost;
}

TEST(a_read_that_would_be_lost)
{
	struct ring ring;
	if (!ring_create(&ring))
		return;
	close(ring.fd);
	munmap(ring.queue, RING_BYTES);
	munmap(ring.entries, RING_BYTES);
	CHECK(!loses_a_read(true));
	CHECK(loses_a_read(false)); /* without the look: told that 64 bytes were read, which are not there */
}

/* ---- asynchronous I/O ------------------------------------------------------------------------------------------------- */

TEST(contexts_of_asynchronous_io)
{
	aio_context_t context = 0;
	allows();
	if (!there("asynchronous I/O", (int)syscall(SYS_io_setup, 8, &context)))
		return;
	refuses("asynchronous I/O");
	CHECK_SYS(syscall(SYS_io_destroy, context));
	allows();
	uint32_t *steps = kit_steps(); /* of another process: not ours */
	pid_t other = kit_fork();
	if (other == 0) {
		context = 0;
		CHECK_SYS(syscall(SYS_io_setup, 8, &context));
		kit_reach(steps, 1);
		kit_await(steps, 2);
		_exit(0);
	}
	kit_await(steps, 1);
	allows();
	/* one that is made after a look at running threads is seen in the next at held ones */
	struct ksm_hazards *hazards;
	int tid = ksm_os_tid();
	CHECK_EQ(ksm_hazards_create(&hazards), 0);
	CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, false), 0);
	CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, true), 0);
	context = 0;
	CHECK_SYS(syscall(SYS_io_setup, 8, &context));
	CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, true), KSM_EDEVICES);
	CHECK_SYS(syscall(SYS_io_destroy, context));
	CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, true), 0);
	ksm_hazards_destroy(hazards);
	kit_reach(steps, 2);
	CHECK_CHILD(other);
}

/* ---- devices ------------------------------------------------------------------------------------------------------------ */

TEST(devices_that_are_harmless)
{
	static const char *const paths[] = {
		"/dev/null",        "/dev/zero", "/dev/full",  "/dev/random", "/dev/urandom",    "/dev/kmsg",
		"/dev/tty",         "/dev/tty1", "/dev/ptmx",  "/dev/fuse",   "/dev/net/tun",    "/dev/hwrng",
		"/dev/userfaultfd", "/dev/rtc",  "/dev/loop0", "/dev/shm",    "/proc/self/maps", "/dev/console"};
	for (size_t i = 0; i < KSM_COUNT(paths); i++) {
		int fd = open(paths[i], O_RDONLY | O_NONBLOCK | O_NOCTTY);
		if (!there(paths[i], fd))
			continue;
		const char *text;
		if (look(&text))
			FAIL("%s: %s", paths[i], text);
		close(fd);
	}
	int master = posix_openpt(O_RDWR | O_NOCTTY);
	if (there("pseudo-terminal", master)) {
		CHECK_SYS(grantpt(master));
		CHECK_SYS(unlockpt(master));
		CHECK_SYS(open(ptsname(master), O_RDWR | O_NOCTTY));
		allows();
	}
}

TEST(devices_that_are_not)
{
	static const char *const paths[] = {"/dev/mem", "/dev/kvm",       "/dev/loop-control", "/dev/cpu_dma_latency",
					    "/dev/vcs", "/dev/vhost-net", "/dev/uinput"};
	int tried = 0;
	for (size_t i = 0; i < KSM_COUNT(paths); i++) {
		int fd = open(paths[i], O_RDONLY | O_NONBLOCK | O_NOCTTY);
		char what[64];
		if (!there(paths[i], fd))
			continue;
		tried++;
		snprintf(what, sizeof(what), "device %s", paths[i]);
		refuses_descriptor(what, fd);
		close(fd);
		allows();
	}
	printf("%d devices tried\n", tried);
}

/* It is the number that counts, not the name. */
TEST(devices_by_another_name)
{
	char path[96];
	snprintf(path, sizeof(path), "%s/some file", kit_directory());
	if (mknod(path, S_IFCHR | 0600, makedev(1, 3))) {
		printf("no devices can be made here: %s\n", strerror(errno));
		return;
	}
	int fd = open(path, O_RDONLY);
	if (there("device in this directory", fd)) {
		allows();
		close(fd);
		unlink(path);
		CHECK_SYS(mknod(path, S_IFCHR | 0600, makedev(10, 237)));
		fd = open(path, O_RDONLY);
		if (there("loop-control", fd)) {
			unlink(path);
			refuses("device ");
		}
	}
}

TEST(virtual_machines)
{
	int kvm = open("/dev/kvm", O_RDWR);
	int machine = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
	close(kvm);
	if (there("virtual machine", machine))
		refuses("kind kvm-vm");
}

/* ---- sockets and other descriptors ------------------------------------------------------------------------------------------ */

TEST(sockets)
{
	int pair[2];
	CHECK_SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
	there("IPv4", socket(AF_INET, SOCK_STREAM, 0));
	there("IPv6", socket(AF_INET6, SOCK_DGRAM, 0));
	there("netlink", socket(AF_NETLINK, SOCK_RAW, 0));
	there("packet", socket(AF_PACKET, SOCK_RAW, 0));
	allows();
	int xdp = socket(AF_XDP, SOCK_RAW, 0);
	if (there("AF_XDP", xdp)) {
		refuses_descriptor("AF_XDP socket", xdp);
		close(xdp);
		allows();
	}
}

TEST(descriptors_that_are_harmless)
{
	sigset_t set;
	int pipes[2];
	sigemptyset(&set);
	CHECK_SYS(pipe(pipes));
	CHECK_SYS(eventfd(0, 0));
	CHECK_SYS(epoll_create1(0));
	CHECK_SYS(signalfd(-1, &set, 0));
	CHECK_SYS(timerfd_create(CLOCK_MONOTONIC, 0));
	CHECK_SYS(inotify_init());
	CHECK_GE(ksm_os_memfd("file"), 0);
	there("pidfd", (int)syscall(SYS_pidfd_open, getpid(), 0));
	there("userfaultfd", ksm_os_uffd_open(0));
	there("name space", open("/proc/self/ns/net", O_RDONLY));
	there("fanotify", (int)syscall(SYS_fanotify_init, 0, 0));
	there("map of bpf", (int)syscall(SYS_bpf, 0, (uint32_t[16]){2, 4, 4, 1}, 64));
	there("path", open("/", O_PATH));
	allows();
}

/* ---- whose descriptors -------------------------------------------------------------------------------------------------------- */

struct keeper {
	uint32_t tid, over;
};

/* The only one who has the device: in a table of its own. */
static void *keep_a_device(void *argument)
{
	struct keeper *self = argument;
	CHECK_SYS(unshare(CLONE_FILES));
	CHECK_SYS(open("/dev/loop-control", O_RDONLY));
	ksm_store_release(&self->tid, ksm_os_tid());
	while (!ksm_load_acquire(&self->over))
		ksm_os_sleep_ns(500000);
	return NULL;
}

TEST(tables_of_their_own)
{
	if (access("/dev/loop-control", R_OK)) {
		printf("there is no device that would be refused\n");
		return;
	}
	struct keeper keeper = {0};
	pthread_t thread;
	CHECK_EQ(pthread_create(&thread, NULL, keep_a_device, &keeper), 0);
	KIT_WAIT(10, ksm_load_acquire(&keeper.tid));
	allows(); /* of this thread alone */
	struct ksm_park park = parking_lot();
	for (int way = 0; way < 2; way++) { /* also where tables cannot be compared */
		ksm_os_fault_set(KSM_OS_COMPARE, 0, way ? UINT32_MAX : 0, -EPERM);
		park.retry_at_ns = 0;
		CHECK_EQ(ksm_park_begin(&park), KSM_EDEVICES);
		char text[64];
		snprintf(text, sizeof(text), "of thread %u", keeper.tid);
		CHECK(strstr(park.reason, text) && strstr(park.reason, "loop-control"));
	}
	ksm_os_fault_clear();
	ksm_store_release(&keeper.over, 1);
	pthread_join(thread, NULL);
	park.retry_at_ns = 0;
	parking_stop(&park);
	ksm_park_end(&park);
	ksm_park_destroy(&park);
}

/* Another user, and not dumpable: /proc belongs to root then, but threads may still look at each other. */
TEST(a_process_that_changed_its_user)
{
	if (getuid()) {
		printf("not root\n");
		return;
	}
	pid_t child = kit_fork();
	if (child == 0) {
		parking_start(parking_nap, -1, -1, NULL);
		CHECK_SYS(setgid(65534));
		CHECK_SYS(setuid(65534));
		CHECK_EQ(ksm_os_dumpable(), 0);
		int pair[2];
		CHECK_SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
		struct ksm_park park = parking_lot();
		parking_stop(&park);
		ksm_park_end(&park);
		int null = open("/dev/null", O_RDONLY);
		allows();
		struct ring ring;
		if (null >= 0 && ring_create(&ring)) {
			munmap(ring.queue, RING_BYTES);
			munmap(ring.entries, RING_BYTES);
			refuses_descriptor("io_uring", ring.fd);
			CHECK_EQ(ksm_park_begin(&park), KSM_EDEVICES);
			close(ring.fd);
		}
		aio_context_t context = 0;
		CHECK_SYS(syscall(SYS_io_setup, 8, &context));
		refuses("asynchronous I/O");
		_exit(0);
	}
	CHECK_CHILD(child);
}

TEST(a_look_that_fails)
{
	static const enum ksm_os_call calls[] = {KSM_OS_OPEN,      KSM_OS_PREAD, KSM_OS_LIST,
						 KSM_OS_READ_LINK, KSM_OS_STAT,  KSM_OS_ATTRIBUTE};
	struct ksm_hazards *hazards;
	int tid = ksm_os_tid(), pair[2];
	CHECK_SYS(open("/dev/null", O_RDONLY));
	for (size_t i = 0; i < KSM_COUNT(calls); i++) {
		CHECK_SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair)); /* new ones are asked about */
		CHECK_EQ(ksm_hazards_create(&hazards), 0);
		ksm_os_fault_clear();
		ksm_os_fault_set(calls[i], 0, 1, -EACCES);
		CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, true), -EACCES); /* HAZ-2 */
		CHECK(strstr(ksm_hazards_text(hazards), "cannot be read"));
		ksm_os_fault_clear();
		CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, true), 0);
		ksm_hazards_destroy(hazards);
	}
	int before = kit_open_files();
	for (uint32_t skip = 0; skip < 4; skip++) {
		ksm_os_fault_set(KSM_OS_OPEN, skip, 1, -EMFILE);
		CHECK_EQ(ksm_hazards_create(&hazards), -EMFILE);
		ksm_os_fault_clear();
	}
	CHECK_EQ(kit_open_files(), before);
}

TEST(what_a_look_costs)
{
	struct ksm_hazards *hazards;
	int tid = ksm_os_tid(), pair[2];
	for (int i = 0; i < 200; i++) {
		CHECK_SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
		CHECK_SYS(pipe(pair));
		CHECK_SYS(open("/dev/null", O_RDONLY));
	}
	CHECK_EQ(ksm_hazards_create(&hazards), 0);
	for (int parked = 0; parked < 2; parked++) {
		CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, parked), 0);
		double begin = harness_now();
		for (int i = 0; i < 20; i++)
			CHECK_EQ(ksm_hazards_look(hazards, &tid, 1, parked), 0);
		printf("1000 descriptors, %s: %.0f us\n", parked ? "held" : "running",
		       (harness_now() - begin) / 20 * 1e6);
	}
	ksm_hazards_destroy(hazards);
}
