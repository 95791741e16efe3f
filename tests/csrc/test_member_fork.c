/* SPDX-License-Identifier: MIT */
/* Living on through a fork, and through a program that closes every descriptor; MEMBER-1 to 3. */
#include "kit.h"

#include "domain.h"

#define PAGES 200

static struct ksm_domain *domain;
static struct ksm_arena *arena;

static void attach(const char *name)
{
	struct ksm_domain_options options = kit_options(name);
	CHECK_EQ(ksm_domain_attach(&options, &domain), 0);
	CHECK_EQ(ksm_arena_create(domain, KSM_ARENA_NO_SCAN, &arena), 0);
}

static struct ksm_block block(size_t pages, uint64_t first)
{
	struct ksm_block block;
	CHECK_EQ(ksm_arena_alloc(arena, pages * KSM_PAGE_SIZE, 0, &block), 0);
	for (size_t i = 0; i < pages; i++)
		kit_fill(kit_page(block.address, i), first + i);
	return block;
}

static uint64_t scan(void)
{
	struct ksm_report report;
	CHECK_EQ(ksm_domain_scan(domain, &report), 0);
	return report.pages_merged;
}

static struct ksm_stats self_stats(void)
{
	struct ksm_stats stats;
	CHECK_EQ(ksm_domain_self_stats(domain, &stats), 0);
	return stats;
}

/* Frames freed since the last call: the scanner sweeps by itself, too, five times a second. */
static uint64_t sweep(void)
{
	static uint64_t counted;
	CHECK_EQ(ksm_domain_sweep(domain, NULL), 0);
	uint64_t now = ksm_load_acquire(&ksm_domain_peer(domain)->control->frames_freed), freed = now - counted;
	counted = now;
	return freed;
}

/* After a sweep: how many it freed depends on whether the scanner swept a moment before. */
static uint64_t left_by_sweep(void)
{
	struct ksm_stats stats;
	sweep();
	CHECK_EQ(ksm_domain_stats(domain, &stats), 0);
	return stats.pages_shared;
}

static ksm_slotno slot(void)
{
	return ksm_domain_peer(domain)->seat.slot;
}

static uint64_t bits_set(void)
{
	const struct ksm_seat *seat = &ksm_domain_peer(domain)->seat;
	uint64_t n = 0;
	for (uint64_t word = 0; word < (seat->bitmap->high + 63) / 64; word++)
		n += (uint64_t)__builtin_popcountll(seat->bits[word]);
	return n;
}

TEST(a_child_keeps_its_data_and_joins_again)
{
	if (!kit_can_merge())
		return;
	uint32_t *steps = kit_steps();
	attach("d");
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	CHECK_EQ(scan(), 2 * PAGES);
	ksm_slotno parents = slot();
	pid_t child = kit_fork();
	if (child == 0) {
		CHECK_NE(slot(), parents);
		CHECK_EQ(bits_set(), PAGES);
		CHECK_EQ(ksm_domain_peer(domain)->self->pid, getpid());
		kit_check_filled(one.address, PAGES, 1);
		kit_check_filled(two.address, PAGES, 1);
		kit_fill(one.address, 900);
		kit_reach(steps, 1);
		kit_await(steps, 2); /* the parent has freed all and swept */
		kit_check_filled(two.address, PAGES, 1);
		kit_check_filled(kit_page(one.address, 1), PAGES - 1, 2);
		CHECK(kit_is(one.address, 900));
		ksm_process_resume();
		struct ksm_block three = block(PAGES, 1);
		CHECK_EQ(scan(), PAGES);
		CHECK_EQ(self_stats().why_not, 0);
		CHECK_EQ(self_stats().pages_merged, 3 * PAGES - 1);
		kit_check_filled(three.address, PAGES, 1);
		kit_reach(steps, 3);
		kit_await(steps, 4);
		CHECK_EQ(ksm_arena_free(arena, &one), 0);
		CHECK_EQ(ksm_arena_free(arena, &two), 0);
		CHECK_EQ(ksm_arena_free(arena, &three), 0);
		ksm_arena_release(arena);
		ksm_domain_detach(domain);
		_exit(0);
	}
	kit_await(steps, 1);
	CHECK_EQ(slot(), parents);
	CHECK(kit_is(one.address, 1));
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	CHECK_EQ(bits_set(), 0);
	CHECK_EQ(left_by_sweep(), PAGES); /* the child, which answers nobody yet, has them all */
	kit_reach(steps, 2);
	kit_await(steps, 3);
	struct ksm_peer_info peers[4];
	CHECK_EQ(ksm_domain_peers(domain, peers, 4), 2);
	struct ksm_block four = block(PAGES, 1);
	CHECK_EQ(scan(), PAGES); /* onto the child's frames */
	CHECK_EQ(self_stats().promotions, PAGES);
	kit_reach(steps, 4);
	CHECK_CHILD(child);
	CHECK_EQ(left_by_sweep(), PAGES);
	kit_check_filled(four.address, PAGES, 1);
	CHECK_EQ(ksm_arena_free(arena, &four), 0);
	CHECK_EQ(left_by_sweep(), 0);
	ksm_arena_release(arena);
	ksm_domain_detach(domain);
}

TEST(a_child_that_never_resumes_is_safe_until_it_dies)
{
	if (!kit_can_merge())
		return;
	uint32_t *steps = kit_steps();
	attach("d");
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	scan();
	pid_t child = kit_fork();
	if (child == 0) {
		for (;;) {
			kit_check_filled(one.address, PAGES, 1);
			kit_check_filled(two.address, PAGES, 1);
			ksm_add_relaxed(steps, 1);
		}
	}
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	for (int i = 0; i < 20; i++) {
		CHECK_EQ(left_by_sweep(), PAGES);
		struct ksm_block other = block(PAGES, 1000 * (1 + (uint64_t)i)),
				 twin = block(PAGES, 1000 * (1 + (uint64_t)i));
		CHECK_EQ(scan(), 2 * PAGES); /* new frames, written meanwhile */
		CHECK_EQ(ksm_arena_free(arena, &other), 0);
		CHECK_EQ(ksm_arena_free(arena, &twin), 0);
		CHECK_EQ(left_by_sweep(), PAGES);
	}
	uint32_t now = ksm_load_relaxed(steps);
	KIT_WAIT(10, ksm_load_relaxed(steps) > now + 2);
	kit_kill(child);
	CHECK_EQ(left_by_sweep(), 0);
}

/* ---- forks while others work --------------------------------------------------------------------------------------------- */

static uint32_t stop;

static void *keep_scanning(void *argument)
{
	uint64_t *scans = argument;
	while (!ksm_load_relaxed(&stop)) {
		scan();
		ksm_add_relaxed(scans, 1);
	}
	return NULL;
}

static void *fork_now_and_then(void *argument)
{
	struct ksm_block *blocks = argument;
	for (int i = 0; i < 25; i++) {
		pid_t child = fork();
		CHECK_SYS(child);
		if (child == 0) {
			kit_check_filled(blocks[0].address, PAGES, 1);
			kit_check_filled(blocks[1].address, PAGES, 1);
			if (i % 5 == 0) {
				ksm_process_resume();
				struct ksm_report report;
				CHECK_EQ(ksm_domain_scan(domain, &report), 0);
				kit_check_filled(blocks[0].address, PAGES, 1);
			}
			_exit(0);
		}
		CHECK_CHILD(child);
	}
	return NULL;
}

TEST_LIMIT(another_thread_forks_while_the_scanner_works, 60)
{
	if (!kit_can_merge())
		return;
	pthread_t forker, scanner;
	uint64_t scans = 0;
	attach("d");
	struct ksm_block blocks[2] = {block(PAGES, 1), block(PAGES, 1)};
	CHECK_EQ(pthread_create(&scanner, NULL, keep_scanning, &scans), 0);
	CHECK_EQ(pthread_create(&forker, NULL, fork_now_and_then, blocks), 0);
	uint64_t state = 5;
	while (pthread_tryjoin_np(forker, NULL)) { /* a third one allocates and frees */
		struct ksm_block some = block(20, kit_random(&state) % 3 ? 1 : 5000), more = block(20, 5000);
		kit_sleep_ms(1);
		CHECK_EQ(ksm_arena_free(arena, &some), 0);
		CHECK_EQ(ksm_arena_free(arena, &more), 0);
	}
	uint64_t now = ksm_load_relaxed(&scans);
	KIT_WAIT(10, ksm_load_relaxed(&scans) > now + 1);
	ksm_store_release(&stop, 1);
	pthread_join(scanner, NULL);
	kit_check_filled(blocks[0].address, PAGES, 1);
	kit_check_filled(blocks[1].address, PAGES, 1);
	CHECK_EQ(ksm_arena_free(arena, &blocks[0]), 0);
	CHECK_EQ(ksm_arena_free(arena, &blocks[1]), 0);
	sweep();
	struct ksm_stats stats;
	CHECK_EQ(ksm_domain_stats(domain, &stats), 0);
	CHECK_EQ(stats.store_bytes, 0);
	CHECK_EQ(stats.peers, 1);
}

TEST_LIMIT(fifty_forks, 60)
{
	if (!kit_can_merge())
		return;
	attach("d");
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	scan();
	int files = kit_open_files();
	for (int i = 0; i < 50; i++) {
		pid_t child = kit_fork();
		if (child == 0) {
			kit_check_filled(one.address, PAGES, 1);
			CHECK_EQ(ksm_arena_free(arena, &one), 0);
			kit_check_filled(two.address, PAGES, 1);
			_exit(0);
		}
		CHECK_CHILD(child);
		if (i % 7 == 0)
			ksm_process_resume();
	}
	ksm_process_resume();
	KIT_WAIT(5, kit_open_files() <= files);
	kit_check_filled(one.address, PAGES, 1);
	struct ksm_stats stats;
	CHECK_EQ(ksm_domain_stats(domain, &stats), 0);
	CHECK_EQ(stats.peers, 1);
	CHECK_EQ(stats.pages_shared, PAGES);
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	CHECK_EQ(ksm_arena_free(arena, &two), 0);
	CHECK_EQ(left_by_sweep(), 0);
}

/* ---- what a fork leaves behind ------------------------------------------------------------------------------------- */

#define WARM 4
#define FORKS 24

/* The address sanitizer keeps more with every thread that has been: there, what nobody may read has to do. */
#ifdef __SANITIZE_ADDRESS__
#define COUNTED(access) (!strncmp(access, "---p", 4))
#else
#define COUNTED(access) (*(access) != 0)
#endif

static uint64_t address_space(void)
{
	char line[512], access[8];
	unsigned long from, to, nbytes = 0;
	FILE *maps = fopen("/proc/self/maps", "re");
	CHECK(maps);
	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %7s", &from, &to, access) == 3 && COUNTED(access))
			nbytes += to - from;
	fclose(maps);
	return nbytes;
}

/* After the scanner has come and merged: it has all that it uses. */
static uint64_t address_space_of_a_member(void)
{
	ksm_process_resume();
	scan();
	CHECK_EQ(self_stats().why_not, 0);
	return address_space();
}

/* Nothing: no more than a page for each of the forks that were counted, whatever else there is in the process. */
static void check_nothing_left(uint64_t before)
{
	uint64_t now = address_space_of_a_member();
	printf("%llu KiB before, %llu KiB after %d forks\n", (unsigned long long)before >> 10,
	       (unsigned long long)now >> 10, FORKS - WARM);
	CHECK_LE(now, before + (FORKS - WARM) * KSM_PAGE_SIZE);
}

/* Either the parent goes on, again and again, or the child does. */
static void fork_on(bool in_the_child)
{
	uint64_t before = 0;
	if (!kit_can_merge())
		return;
	attach("d");
	block(PAGES, 1);
	for (int i = 0; i < FORKS; i++) {
		uint64_t now = address_space_of_a_member();
		before = i <= WARM ? now : before;
		pid_t child = kit_fork();
		if (child == 0 && !in_the_child)
			_exit(0);
		if (child)
			CHECK_CHILD(child);
		if (child && in_the_child)
			return;
	}
	check_nothing_left(before);
	fflush(NULL);
	if (in_the_child)
		_exit(0);
}

TEST_LIMIT(a_parent_keeps_no_memory_of_its_forks, 60)
{
	fork_on(false);
}

TEST_LIMIT(children_of_children_inherit_no_memory_of_scanners, 60)
{
	fork_on(true);
}

/* ---- a program that closes everything -------------------------------------------------------------------------------------- */

enum {
	FILES = 40
};

struct opened {
	int fds[FILES];
	char path[96];
};

/* Files of the program's under all the numbers that ours might have had. */
static struct opened open_files(void)
{
	struct opened files;
	snprintf(files.path, sizeof(files.path), "%s/file-%d", kit_directory(), (int)getpid());
	for (int i = 0; i < FILES; i++) {
		files.fds[i] = open(files.path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		CHECK_SYS(files.fds[i]);
	}
	return files;
}

static void check_untouched(const struct opened *files)
{
	struct stat stat;
	CHECK_SYS(fstat(files->fds[0], &stat));
	CHECK_EQ(stat.st_size, 0);
	for (int i = 0; i < FILES; i++)
		CHECK_SYS(fcntl(files->fds[i], F_GETFD));
}

/* Another process of the domain, with a set of pages; it merges when told to. */
static pid_t start_supplier(uint32_t *steps)
{
	pid_t pid = kit_fork();
	if (pid)
		return pid;
	attach("d");
	block(PAGES, 3000);
	scan();
	kit_reach(steps, 1);
	for (;;) {
		scan();
		kit_sleep_ms(5);
	}
}

static void close_all(bool then_fork)
{
	uint32_t *steps = kit_steps();
	kit_directory();
	pid_t supplier = start_supplier(steps);
	kit_await(steps, 1);
	attach("d");
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	CHECK_EQ(scan(), 2 * PAGES);
	CHECK_SYS(syscall(SYS_close_range, 3u, ~0u, 0));
	struct opened files = open_files();
	if (then_fork) {
		pid_t child = kit_fork();
		if (child == 0) {
			kit_check_filled(one.address, PAGES, 1);
			ksm_process_resume();
			struct ksm_block again = block(PAGES, 1);
			CHECK_EQ(scan(), PAGES);
			kit_check_filled(again.address, PAGES, 1);
			check_untouched(&files);
			_exit(0);
		}
		CHECK_CHILD(child);
	}
	struct ksm_block three = block(PAGES, 3000), four = block(PAGES, 6000), five = block(PAGES, 6000);
	KIT_WAIT(10, (scan(), self_stats().pages_merged == 5 * PAGES));
	kit_check_filled(one.address, PAGES, 1);
	kit_check_filled(two.address, PAGES, 1);
	kit_check_filled(three.address, PAGES, 3000);
	kit_check_filled(four.address, PAGES, 6000);
	kit_check_filled(five.address, PAGES, 6000);
	check_untouched(&files);
	CHECK_EQ(self_stats().why_not, 0);
	CHECK_EQ(ksm_arena_free(arena, &one), 0);
	sweep();
	kit_check_filled(two.address, PAGES, 1);
	kit_kill(supplier);
	check_untouched(&files);
}

TEST(the_program_closes_everything)
{
	if (kit_can_merge())
		close_all(false);
}

TEST(the_program_closes_everything_and_forks)
{
	if (kit_can_merge())
		close_all(true);
}

/* Between fork and resume nothing but the program's table holds the descriptors; then they are all gone. */
TEST(everything_is_closed_before_the_scanner_is_back)
{
	if (!kit_can_merge())
		return;
	uint32_t *steps = kit_steps();
	kit_directory();
	pid_t supplier = start_supplier(steps);
	kit_await(steps, 1);
	attach("d");
	struct ksm_block one = block(PAGES, 1), two = block(PAGES, 1);
	CHECK_EQ(scan(), 2 * PAGES);
	pid_t child = kit_fork();
	CHECK_SYS(syscall(SYS_close_range, 3u, ~0u, 0));
	struct opened files = open_files();
	ksm_process_resume();
	kit_check_filled(one.address, PAGES, 1);
	struct ksm_block three = block(PAGES, 3000);
	KIT_WAIT(10, (scan(), self_stats().pages_merged == 3 * PAGES));
	kit_check_filled(one.address, PAGES, 1);
	kit_check_filled(two.address, PAGES, 1);
	kit_check_filled(three.address, PAGES, 3000);
	check_untouched(&files);
	if (child == 0)
		_exit(0);
	CHECK_CHILD(child);
	kit_kill(supplier);
	kit_check_filled(two.address, PAGES, 1);
}
