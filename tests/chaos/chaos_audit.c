/* SPDX-License-Identifier: MIT */
/*
 * The audit: a newcomer joins while everybody else rests, has everything settle, sweeps once, and compares what the
 * kernel says with what must be:
 *
 *    the frames that some mapping of a living process refers to  =  the pages that the store file holds
 *    the peers of the domain                                     =  the processes that are at rest, and the auditor
 *
 * It trusts neither bitmaps nor counters: mappings come from /proc/PID/maps, the store's pages from SEEK_DATA. What the
 * bitmaps, cells and tables say is then held against the invariants of valid.c.
 */
#include "chaos.h"

#include "domain.h"
#include "valid.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define SETTLE_MS (1000 * CHAOS_SETTLE_S)
#define QUIET_US 500000 /* a batch that was begun before merging was switched off is over by then */
#define STORE "memfd:ksmalloc store"
#define PAGEMAP_FILE (1ull << 61)
#define PAGEMAP_PRESENT (1ull << 63)
#define MESSAGES 8
#define VALID_LOOKS 40 /* somebody may be looking around just now, and have a frame in his hands */
#define VALID_PAUSE_US 50000
#define INVARIANT_ROOM 300

static uint8_t *mapped, *held; /* a byte for each frame: is it referred to, is it in the store? */
static uint64_t frames;

/* ---- the store ---------------------------------------------------------------------------------------------- */

/* Our scanner has a descriptor table of its own; there it is. */
static int open_store(void)
{
	char path[300], target[64];
	struct dirent *task, *entry;
	int store = -1;
	DIR *tasks = opendir("/proc/self/task");
	while (tasks && store < 0 && (task = readdir(tasks))) {
		snprintf(path, sizeof(path), "/proc/self/task/%.20s/fd", task->d_name);
		DIR *fds = task->d_name[0] == '.' ? NULL : opendir(path);
		while (fds && store < 0 && (entry = readdir(fds))) {
			snprintf(path, sizeof(path), "/proc/self/task/%.20s/fd/%.20s", task->d_name, entry->d_name);
			ssize_t n = readlink(path, target, sizeof(target) - 1);
			if (n > 0 && !strncmp(target + 1, STORE, strlen(STORE)))
				store = open(path, O_RDONLY | O_CLOEXEC);
		}
		if (fds)
			closedir(fds);
	}
	if (tasks)
		closedir(tasks);
	return store;
}

static void note_held(int store)
{
	off_t end, at = 0;
	memset(held, 0, frames);
	while ((at = lseek(store, at, SEEK_DATA)) >= 0) {
		end = lseek(store, at, SEEK_HOLE);
		for (; at < end; at += CHAOS_PAGE)
			held[at / CHAOS_PAGE] = 1;
	}
	if (errno != ENXIO)
		chaos_die("lseek", errno);
}

/* ---- mappings ----------------------------------------------------------------------------------------------- */

static uint64_t count_merged(int pid, unsigned long from, unsigned long to)
{
	char path[40];
	uint64_t entries[512], merged = 0;
	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	while (fd >= 0 && from < to) {
		size_t n = (to - from) / CHAOS_PAGE < 512 ? (to - from) / CHAOS_PAGE : 512;
		if (pread(fd, entries, n * 8, (off_t)(from / CHAOS_PAGE * 8)) != (ssize_t)(n * 8))
			break;
		for (size_t i = 0; i < n; i++)
			merged += (entries[i] & PAGEMAP_PRESENT) && (entries[i] & PAGEMAP_FILE);
		from += n * CHAOS_PAGE;
	}
	close(fd);
	return merged;
}

/* Returns how many pages of a process are mapped to frames and unbroken. */
static uint64_t note_mapped(int pid, ino_t inode)
{
	char line[400];
	uint64_t merged = 0;
	snprintf(line, sizeof(line), "/proc/%d/maps", pid);
	FILE *maps = fopen(line, "re");
	while (maps && fgets(line, sizeof(line), maps)) {
		unsigned long from, to, offset, number;
		if (!strstr(line, STORE) || sscanf(line, "%lx-%lx %*s %lx %*s %lu", &from, &to, &offset, &number) != 4)
			continue;
		if (number != inode) {
			fprintf(stderr, "process %d has mapped another store\n", pid);
			chaos_add(&chaos->totals.strays, 1);
			continue;
		}
		memset(mapped + offset / CHAOS_PAGE, 1, (to - from) / CHAOS_PAGE);
		merged += count_merged(pid, from, to);
	}
	if (maps)
		fclose(maps);
	return merged;
}

/* ---- what must be ------------------------------------------------------------------------------------------- */

static void compare_frames(uint64_t merged)
{
	uint64_t in_use = 0, leaked = 0, missing = 0;
	for (uint64_t frame = 0; frame < frames; frame++) {
		in_use += mapped[frame];
		leaked += held[frame] && !mapped[frame];
		missing += mapped[frame] && !held[frame];
		if (held[frame] != mapped[frame] && leaked + missing <= MESSAGES)
			fprintf(stderr, "frame %lu is %s\n", frame,
				held[frame] ? "held, but nobody refers to it" : "referred to, but gone");
	}
	chaos_add(&chaos->totals.leaked, leaked);
	chaos_add(&chaos->totals.missing, missing);
	chaos_raise(&chaos->totals.saved_most, merged > in_use ? merged - in_use : 0);
}

static void compare_peers(struct ksm_domain *domain)
{
	struct ksm_peer_info peers[4 * CHAOS_PLACES];
	int living = 0, n = ksm_domain_peers(domain, peers, 4 * CHAOS_PLACES);
	for (unsigned i = 0; i < CHAOS_PLACES; i++)
		living += chaos_pid(&chaos->places[i]) != 0;
	chaos_raise(&chaos->totals.members_most, (uint64_t)living);
	if (n == living + 1)
		return;
	fprintf(stderr, "%d peers, not %d:", n, living + 1);
	for (int i = 0; i < n && i < 4 * CHAOS_PLACES; i++)
		fprintf(stderr, " %d", peers[i].pid);
	fprintf(stderr, "\nprocesses:");
	for (unsigned i = 0; i < CHAOS_PLACES; i++)
		if (chaos_pid(&chaos->places[i]))
			fprintf(stderr, " %d", chaos_pid(&chaos->places[i]));
	fprintf(stderr, "\n");
	chaos_add(&chaos->totals.strays, 1);
}

static int look_at_invariants(struct ksm_member *member, void *context)
{
	char *why = context;
	int r = ksm_scan_know_peers(&member->scanner);
	ksm_merge_lock(&member->peer);
	if (!r)
		r = ksm_peer_refresh(&member->peer);
	if (!r)
		r = ksm_domain_is_valid(&member->peer, KSM_VALID_SWEPT, why, INVARIANT_ROOM);
	ksm_merge_unlock(&member->peer);
	return r;
}

static void check_invariants(struct ksm_domain *domain)
{
	char why[INVARIANT_ROOM] = "";
	int r = -1;
	for (int i = 0; i < VALID_LOOKS && r; i++) {
		if (i)
			usleep(VALID_PAUSE_US);
		r = ksm_worker_call(&domain->worker, look_at_invariants, why);
	}
	if (!r)
		return;
	fprintf(stderr, "invalid: %s: %s\n", ksm_error_name(r), why);
	chaos_add(&chaos->totals.invalid, 1);
}

static void switch_merging(bool on)
{
	struct ksm_domain_options options = {.name = CHAOS_DOMAIN, .path = chaos->rendezvous, .store_fd = -1};
	struct ksm_settings settings;
	chaos_check(ksm_settings_read(&options, &settings, NULL), "settings");
	settings.run = on;
	chaos_check(ksm_settings_write(&options, &settings), "settings");
}

static void *table(uint64_t nbytes)
{
	void *at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED)
		chaos_die("mmap", errno);
	return at;
}

static void say_who_is_behind(struct ksm_domain *domain)
{
	struct ksm_peer_info peers[4 * CHAOS_PLACES];
	int n = ksm_domain_peers(domain, peers, 4 * CHAOS_PLACES);
	for (int i = 0; i < n && i < 4 * CHAOS_PLACES; i++)
		fprintf(stderr, "unsettled: process %d, slot %u: why_not %s, scans %lu, merges %lu, volatile %lu\n",
			peers[i].pid, peers[i].slot, ksm_error_name(peers[i].stats.why_not), peers[i].stats.full_scans,
			peers[i].stats.merges, peers[i].stats.pages_volatile);
}

void chaos_audit(void)
{
	struct ksm_domain *domain;
	struct ksm_report report;
	struct stat stat;
	uint64_t freed, merged = 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	chaos_attach(KSM_BARRIER_AUTO, &domain);
	chaos_check(ksm_domain_settle(domain, SETTLE_MS, 0, &report), "settle");
	if (report.settled != 1) {
		chaos_add(&chaos->totals.unsettled, 1);
		say_who_is_behind(domain);
	}
	switch_merging(false);
	usleep(QUIET_US);
	int store = open_store();
	if (store < 0 || fstat(store, &stat))
		chaos_die("the store", errno);
	frames = (uint64_t)stat.st_size / CHAOS_PAGE;
	mapped = table(frames);
	held = table(frames);
	chaos_check(ksm_domain_sweep(domain, &freed), "sweep at rest");
	for (unsigned i = 0; i < CHAOS_PLACES; i++)
		if (chaos_pid(&chaos->places[i]))
			merged += note_mapped(chaos_pid(&chaos->places[i]), stat.st_ino);
	note_held(store);
	compare_frames(merged);
	compare_peers(domain);
	check_invariants(domain);
	if (chaos_get32(&chaos->drop) && stat.st_blocks && !fstat(store, &stat) && stat.st_blocks) {
		fprintf(stderr, "the store holds %ld blocks after all was freed\n", (long)stat.st_blocks);
		chaos_add(&chaos->totals.leaked, (uint64_t)stat.st_blocks * 512 / CHAOS_PAGE);
	}
	chaos_add(&chaos->totals.audits, 1);
	switch_merging(true);
	ksm_domain_detach(domain);
	_exit(0);
}

/* ---- processes ---------------------------------------------------------------------------------------------- */

static int parent_of(const char *pid)
{
	char path[40], text[400];
	int parent = 0;
	snprintf(path, sizeof(path), "/proc/%.20s/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	close(fd);
	text[n > 0 ? n : 0] = 0;
	char *after = strrchr(text, ')');
	if (after)
		sscanf(after + 1, " %*c %d", &parent);
	return parent;
}

int chaos_unknown_child(void)
{
	struct dirent *entry;
	int found = 0;
	DIR *processes = opendir("/proc");
	while (processes && !found && (entry = readdir(processes))) {
		int pid = atoi(entry->d_name);
		if (pid <= 0 || parent_of(entry->d_name) != (int)getpid())
			continue;
		bool known = false;
		for (unsigned i = 0; i <= CHAOS_PLACES; i++)
			known |= chaos_pid(&chaos->places[i]) == pid;
		found = known ? 0 : pid;
	}
	if (processes)
		closedir(processes);
	return found;
}
