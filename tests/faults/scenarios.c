/* SPDX-License-Identifier: MIT */
/*
 * What a process does with ksmalloc, in small: each scenario is run with a fault, and then once more without. A call may
 * fail where its header says so; bytes may not be wrong, and nothing may be lost.
 */
#include "faults.h"

#include "error.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- joining and leaving ---------------------------------------------------------------------------------------- */

static void join(struct world *w)
{
	struct ksm_domain_options options = world_options(w);
	struct ksm_domain *domain, *again;
	struct ksm_stats stats;
	if (MAY(w, ksm_domain_attach(&options, &domain)))
		return;
	if (!MAY(w, ksm_domain_attach(&options, &again))) {
		MUST(again == domain);
		ksm_domain_detach(again);
	}
	if (!MAY(w, ksm_domain_stats(domain, &stats)) && w->strict)
		MUST(stats.peers == (w->alone ? 1 : 2));
	ksm_domain_detach(domain);
}

static void settings(struct world *w)
{
	struct ksm_domain_options options = world_options(w);
	struct ksm_settings got, wanted;
	uint32_t peers;
	ksm_settings_default(&wanted);
	wanted.pages_to_scan = 1234;
	wanted.advisor_mode = 0;
	bool written = !MAY(w, ksm_settings_write(&options, &wanted));
	/* A file that is not there is what it is when there is no such domain. */
	bool hidden = !w->strict && w->fault.call == KSM_OS_OPEN && w->fault.error == -ENOENT;
	if (!MAY(w, ksm_settings_read(&options, &got, &peers)) && written) {
		if (hidden && got.pages_to_scan != wanted.pages_to_scan)
			ksm_settings_default(&wanted);
		MUST(!memcmp(&got, &wanted, sizeof(got)));
		MUST(peers == 0);
	}
	join(w);
	int r = ksm_domain_clean(&options);
	if (r != -ENOENT) /* it was never made */
		may(w, r, "ksm_domain_clean");
}

/* Nobody else has that name, so the number that it makes is nobody else's either. */
static void store_id_of(const char *domain_name, uint8_t id[16])
{
	memset(id, 0, 16);
	memcpy(id, domain_name, strnlen(domain_name, 16));
}

void named_path(const char *domain_name, char path[80])
{
	uint8_t id[16];
	int n = snprintf(path, 80, "/dev/shm/ksmalloc-%u-", (unsigned)geteuid());
	store_id_of(domain_name, id);
	for (size_t i = 0; i < 16; i++)
		n += snprintf(path + n, 80 - (size_t)n, "%02x", id[i]);
}

static void named(struct world *w)
{
	struct ksm_domain_options options = world_options(w);
	struct ksm_domain *domain;
	char path[80];
	options.backing = KSM_BACKING_SHM;
	store_id_of(w->domain_name, options.store_id);
	named_path(w->domain_name, path);
	options.store_fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	MUST(options.store_fd >= 0);
	int r = MAY(w, ksm_domain_attach(&options, &domain));
	close(options.store_fd);
	if (!r)
		ksm_domain_detach(domain);
	if (!r && w->strict)
		MUST(access(path, F_OK) && errno == ENOENT);
	unlink(path);
}

/* ---- memory --------------------------------------------------------------------------------------------------------- */

#define BLOCKS 12

static bool is_zero(const char *at, size_t nbytes)
{
	for (size_t i = 0; i < nbytes; i++)
		if (at[i])
			return false;
	return true;
}

static void blocks(struct world *w)
{
	static const size_t sizes[BLOCKS] = {16, 100, 1000, 3000, 4096, 5000, 20 * 4096, 1, 64, 2000, 40 * 4096, 16};
	struct ksm_block all[BLOCKS] = {{0}};
	struct ksm_arena *arena;
	if (MAY(w, ksm_arena_create(w->domain, world_flags(w), &arena)))
		return;
	for (int round = 0; round < 2; round++) {
		for (size_t i = 0; i < BLOCKS; i++) {
			unsigned flags = i % 4 == 1 ? KSM_ALLOC_UNMERGEABLE : 0;
			if (MAY(w, ksm_arena_alloc(arena, sizes[i], flags, &all[i])))
				continue;
			MUST(is_zero(all[i].address, sizes[i]));
			memset(all[i].address, (int)i + 1, sizes[i]);
		}
		for (size_t i = 0; i < BLOCKS; i++) {
			const char *at = all[i].address;
			for (size_t j = 0; at && j < sizes[i]; j++)
				MUST(at[j] == (char)(i + 1));
			if (at)
				MUST(!ksm_arena_free(arena, &all[i]));
		}
	}
	ksm_arena_release(arena);
}

static void merge(struct world *w)
{
	struct ksm_report report;
	world_merge(w);
	if (!MAY(w, ksm_domain_settle(w->domain, w->strict ? 20000 : 300, 0, &report)) && !report.settled)
		w->said = true;
}

/*
 * A page that the kernel would not let go is asked for again when it has been written, or when somebody calls for a scan;
 * until then every pass counts it as skipped.
 */
static bool skips_refused(struct world *w)
{
	struct ksm_stats stats;
	bool refusing = w->fault.call == KSM_OS_UFFD_REGISTER || w->fault.call == KSM_OS_UFFD_MOVE;
	MUST(!ksm_domain_self_stats(w->domain, &stats));
	return refusing && stats.pages_skipped > w->before.pages_skipped;
}

/* Only what the scanner does by itself. */
static void background(struct world *w)
{
	double until = now() + (w->strict ? 60 : 0.25);
	uint64_t merged = 0;
	bool refused = false;
	while (merged < FIELD_MERGES && !refused && now() < until) {
		ksm_os_sleep_ns(10000000);
		merged = pages_merged(w->arena);
		refused = w->strict && skips_refused(w);
	}
	w->shared->merged = merged > w->shared->merged ? (uint32_t)merged : w->shared->merged;
	MUST(merged >= FIELD_MERGES || refused || !w->strict);
	if (refused)
		world_merge(w);
	world_check_awake(w);
}

/* After attempts that failed, threads are left alone for a while (park.c), and nothing can be made private. */
static int unmerge_in_the_end(struct world *w)
{
	uint64_t unmerged, broken;
	int r;
	for (double until = now() + 60;
	     (r = ksm_arena_unmerge(w->arena, &unmerged, &broken)) && w->strict && now() < until;)
		ksm_os_sleep_ns(50000000);
	return r;
}

static void unmerge(struct world *w)
{
	uint64_t freed;
	struct ksm_report report;
	world_merge(w);
	MAY(w, unmerge_in_the_end(w));
	world_check_awake(w);
	if (w->strict)
		MUST(pages_merged(w->arena) <= FIELD_MERGES / 4); /* those that are broken, and cannot be seen to be */
	MAY(w, ksm_domain_sweep(w->domain, &freed));
	MAY(w, ksm_arena_scan(w->arena, &report)); /* until then it is left alone */
	world_merge(w);
}

static void breaks(struct world *w)
{
	struct ksm_block block;
	struct ksm_report report;
	if (MAY(w, ksm_arena_alloc(w->arena, 16 * PAGE, 0, &block)))
		return;
	for (int round = 0; round < 3; round++) {
		world_fill(block.address, 16, 1);
		MAY(w, ksm_arena_scan(w->arena, &report));
		world_check(block.address, 16, 1);
		for (size_t page = round; page < 16; page += 2)
			world_fill((char *)block.address + page * PAGE, 1, 100 * (uint64_t)round + page + 500);
		MAY(w, ksm_arena_scan(w->arena, &report));
		for (size_t page = 0; page < 16; page++) {
			bool written = page >= (size_t)round && (page - (size_t)round) % 2 == 0;
			world_check((char *)block.address + page * PAGE, 1,
				    written ? 100 * (uint64_t)round + page + 500 : page + 1);
		}
	}
	MUST(!ksm_arena_free(w->arena, &block));
	if (MAY(w, ksm_arena_alloc(w->arena, 16 * PAGE, 0, &block)))
		return;
	MUST(is_zero(block.address, 16 * PAGE));
	MUST(!ksm_arena_free(w->arena, &block));
}

/* ---- read-only and writable ------------------------------------------------------------------------------------------ */

static void freeze(struct world *w)
{
	struct ksm_block block;
	struct ksm_report report;
	struct ksm_arena_stats stats;
	size_t pages;
	if (MAY(w, ksm_arena_alloc(w->arena, 16 * PAGE, 0, &block)))
		return;
	world_fill(block.address, 16, 1);
	if (!MAY(w, ksm_arena_freeze(w->arena, block.address, 16 * PAGE, &pages))) {
		MUST(pages == 16);
		MAY(w, ksm_arena_scan(w->arena, &report));
		world_check(block.address, 16, 1);
		world_fill((char *)block.address + 5 * PAGE, 1, 77); /* a store through an older view */
		MUST(!ksm_arena_stats(w->arena, &stats));
		MUST(stats.pages_frozen <= 15);
		MAY(w, ksm_arena_thaw(w->arena, block.address, 16 * PAGE));
		world_check((char *)block.address + 5 * PAGE, 1, 77);
	}
	world_fill(block.address, 16, 1);
	MAY(w, ksm_arena_scan(w->arena, &report));
	if (!MAY(w, ksm_arena_writable_begin(w->arena, block.address, 8 * PAGE))) {
		int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
		MUST(zero >= 0);
		MUST(read(zero, block.address, PAGE) == (ssize_t)PAGE);
		close(zero);
		MAY(w, ksm_arena_scan(w->arena, &report));
		MUST(is_zero(block.address, PAGE));
		MUST(!ksm_arena_writable_end(w->arena, block.address, 8 * PAGE));
		world_fill(block.address, 1, 1);
	}
	world_check(block.address, 16, 1);
	MUST(!ksm_arena_free(w->arena, &block));
}

static void registered(struct world *w)
{
	struct ksm_region *region;
	struct ksm_report report;
	size_t pages;
	char *at = mmap(NULL, 18 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	world_fill(at, 18, 1);
	if (!MAY(w, ksm_region_register(w->domain, at, 18 * PAGE, &region, &pages))) {
		MUST(pages == 18);
		MAY(w, ksm_domain_scan(w->domain, &report));
		world_check(at, 18, 1);
		world_fill(at + 2 * PAGE, 1, 55);
		int r;
		for (double until = now() + 60; (r = ksm_region_unregister(region));) {
			if (!w->strict)
				may(w, r, "unregister");
			world_check(at + 3 * PAGE, 15, 4); /* it stays registered and valid */
			if (now() > until)
				fail("memory cannot be unregistered");
			ksm_os_sleep_ns(50000000);
		}
		world_check(at + 2 * PAGE, 1, 55);
		world_fill(at + 2 * PAGE, 1, 3);
	}
	world_check(at, 18, 1);
	world_fill(at, 18, 200);
	munmap(at, 18 * PAGE);
}

/* ---- other processes ---------------------------------------------------------------------------------------------------- */

/* Has this process no seat? It says so; and no frame of the domain is freed any more. */
static void note_lost(struct world *w)
{
	struct ksm_stats stats;
	MUST(!ksm_domain_self_stats(w->domain, &stats));
	if (stats.why_not != KSM_ELOST)
		return;
	w->shared->lost = 1;
	w->said = true;
}

/* What a forked child does with what it has. */
static void live(struct world *w)
{
	struct ksm_report report;
	struct ksm_block block;
	MAY(w, ksm_domain_scan(w->domain, &report));
	note_lost(w);
	world_check((char *)w->fields[1].address, FIELD_PAGES - FIELD_ZEROS, 1);
	world_fill((char *)w->fields[1].address + 4 * PAGE, 1, 900);
	if (!MAY(w, ksm_arena_alloc(w->arena, 6 * PAGE, 0, &block))) {
		MUST(is_zero(block.address, 6 * PAGE));
		world_fill(block.address, 6, 1);
		MAY(w, ksm_domain_scan(w->domain, &report));
		world_check(block.address, 6, 1);
		MUST(!ksm_arena_free(w->arena, &block));
	}
	world_check((char *)w->fields[1].address + 4 * PAGE, 1, 900);
	world_check((char *)w->fields[0].address + 12 * PAGE, 6, 13);
}

static void child_of_fork(struct world *w)
{
	w->touching = false;
	live(w);
	for (size_t i = 0; i < 2; i++)
		MUST(!ksm_arena_free(w->arena, &w->fields[i]));
	ksm_arena_release(w->arena);
	ksm_domain_detach(w->domain);
	_exit(0);
}

static void forks(struct world *w)
{
	world_merge(w);
	for (int i = 0; i < 2; i++) {
		pid_t pid = child_fork();
		if (!pid)
			child_of_fork(w);
		ksm_process_resume();
		world_check_awake(w);
		child_wait(w, pid);
	}
	world_merge(w);
}

/* As daemons do: every descriptor is closed, ours too. Before that, ours get the numbers of standard input and output. */
static void closes(struct world *w)
{
	int kept[2];
	world_merge(w);
	for (int fd = 0; fd < 2; fd++) {
		kept[fd] = fcntl(fd, F_DUPFD_CLOEXEC, 100);
		MUST(kept[fd] >= 0);
	}
	close(STDIN_FILENO);
	close(STDOUT_FILENO);
	pid_t pid = child_fork();
	if (!pid) {
		syscall(SYS_close_range, 3u, ~0u, 0);
		child_of_fork(w);
	}
	child_wait(w, pid);
	world_merge(w);
	for (int fd = 0; fd < 2; fd++) {
		MUST(dup2(kept[fd], fd) == fd);
		close(kept[fd]);
	}
}

static void killed(struct world *w)
{
	int ready[2];
	char byte;
	uint64_t freed;
	world_merge(w);
	MUST(!pipe2(ready, O_CLOEXEC));
	pid_t pid = child_fork();
	if (!pid) {
		w->touching = false;
		live(w);
		MUST(write(ready[1], "!", 1) == 1);
		for (;;)
			pause();
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		child_wait(w, pid); /* it has failed, and says why */
	close(ready[0]);
	MUST(!kill(pid, SIGKILL));
	child_reap(pid);
	MAY(w, ksm_domain_sweep(w->domain, &freed));
	world_merge(w);
}

static void execs(struct world *w)
{
	char faults[64], mode[8], strict[2] = {w->strict ? '1' : '0', 0};
	int status;
	snprintf(faults, sizeof(faults), "%d:%u:%u:%d", w->strict ? 0 : (int)w->fault.call, w->fault.number,
		 w->strict ? 0 : w->fault.count, w->fault.error);
	snprintf(mode, sizeof(mode), "%d", (int)w->mode);
	pid_t pid = child_fork();
	if (!pid) {
		note_lost(w);
		execl("/proc/self/exe", "faults", "--joiner", w->directory, w->domain_name, mode, faults, strict,
		      (char *)NULL);
		_exit(126);
	}
	status = child_reap(pid);
	if (status == 3 << 8 && !w->strict)
		w->said = true;
	else if (status)
		fail("the other program ended with wait status 0x%x", (unsigned)status);
	world_merge(w);
}

int joiner(int argc, char **argv)
{
	unsigned call;
	static struct shared shared;
	struct world w = {.shared = &shared, .alone = true};
	if (argc != 7)
		return 2;
	w.directory = argv[2];
	w.domain_name = argv[3];
	w.mode = (enum mode)atoi(argv[4]);
	w.strict = argv[6][0] == '1';
	if (sscanf(argv[5], "%u:%u:%u:%d", &call, &w.fault.number, &w.fault.count, &w.fault.error) != 4)
		return 2;
	if (w.fault.count)
		ksm_os_fault_set((enum ksm_os_call)call, w.fault.number, w.fault.count, w.fault.error);
	struct ksm_domain_options options = world_options(&w);
	struct ksm_block block;
	struct ksm_report report;
	if (!MAY(&w, ksm_domain_attach(&options, &w.domain))) {
		if (!MAY(&w, ksm_arena_create(w.domain, world_flags(&w), &w.arena))) {
			if (!MAY(&w, ksm_arena_alloc(w.arena, 12 * PAGE, 0, &block))) {
				world_fill(block.address, 12, 1);
				MAY(&w, ksm_domain_scan(w.domain, &report));
				world_check(block.address, 12, 1);
				MUST(!ksm_arena_free(w.arena, &block));
			}
			ksm_arena_release(w.arena);
		}
		ksm_domain_detach(w.domain);
	}
	return w.said ? 3 : 0;
}

#define NOBODY 65534

/* In the child: nobody's domain is another one, if it can be had. */
static void user(struct world *w)
{
	if (geteuid())
		return;
	world_merge(w);
	pid_t parent = getpid(), pid = child_fork();
	if (!pid) {
		MUST(!setgid(NOBODY) && !setuid(NOBODY));
		child_die_with(parent);
		w->strict = false; /* the directory is closed to it: it may stay, and say so */
		w->refusal = -EACCES;
		child_of_fork(w);
	}
	child_wait(w, pid);
	world_merge(w);
}

/* ---- facts ---------------------------------------------------------------------------------------------------------------- */

static void facts(struct world *w)
{
	struct ksm_stats stats;
	struct ksm_capabilities caps;
	struct ksm_peer_info peers[4];
	char id[33], again[33];
	int other = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0); /* what holds threads has a look at such */
	ksm_domain_id(w->domain, id);
	MAY(w, ksm_domain_stats(w->domain, &stats));
	MUST(!ksm_domain_self_stats(w->domain, &stats));
	MUST(stats.peers <= 1 && stats.barrier);
	if (!MAY(w, ksm_domain_capabilities(w->domain, &caps)) && w->strict)
		MUST(caps.barrier == stats.barrier && !caps.pagemap);
	int n = MAY(w, ksm_domain_peers(w->domain, peers, 4));
	if (w->strict)
		MUST(n == 2);
	world_merge(w);
	MAY(w, ksm_domain_capabilities(w->domain, &caps));
	ksm_domain_id(w->domain, again);
	MUST(!strcmp(id, again) && strlen(id) == 32);
	MUST(ksm_process_check() == 0);
	if (other >= 0)
		close(other);
}

const struct scenario scenarios[] = {
	{.name = "join", .run = join, .bare = true},
	{.name = "settings", .run = settings, .bare = true, .alone = true},
	{.name = "named", .run = named, .bare = true, .alone = true},
	{.name = "blocks", .run = blocks},
	{.name = "merge", .run = merge},
	{.name = "background", .run = background},
	{.name = "unmerge", .run = unmerge},
	{.name = "breaks", .run = breaks},
	{.name = "freeze", .run = freeze},
	{.name = "registered", .run = registered},
	{.name = "forks", .run = forks},
	{.name = "closes", .run = closes},
	{.name = "killed", .run = killed},
	{.name = "execs", .run = execs},
	{.name = "user", .run = user},
	{.name = "facts", .run = facts},
	{0},
};
