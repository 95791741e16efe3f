/* SPDX-License-Identifier: MIT */
/* Domains through the public interface: processes come, go, stop and are killed. */
#include "kit.h"

#include "domain.h"

#define PAGES 200
#define CREW 4

static struct ksm_domain *attach(const char *name)
{
	struct ksm_domain_options options = kit_options(name);
	struct ksm_domain *domain = NULL;
	int r = ksm_domain_attach(&options, &domain);
	if (r)
		FAIL("attach: %s", ksm_error_name(r));
	return domain;
}

/* Peers have some time to answer, which is not much if many wait for the processor. */
static struct ksm_domain *attach_in_the_end(const char *name)
{
	struct ksm_domain_options options = kit_options(name);
	struct ksm_domain *domain = NULL;
	int r = KSM_ENOPEER;
	for (int attempt = 0; attempt < 10 && r == KSM_ENOPEER; attempt++)
		r = ksm_domain_attach(&options, &domain);
	CHECK_EQ(r, 0);
	return domain;
}

static struct ksm_arena *arena_of(struct ksm_domain *domain)
{
	struct ksm_arena *arena;
	CHECK_EQ(ksm_arena_create(domain, 0, &arena), 0);
	return arena;
}

static struct ksm_block block(struct ksm_arena *arena, size_t pages, uint64_t first)
{
	struct ksm_block block;
	CHECK_EQ(ksm_arena_alloc(arena, pages * KSM_PAGE_SIZE, 0, &block), 0);
	for (size_t i = 0; i < pages; i++)
		kit_fill(kit_page(block.address, i), first + i);
	return block;
}

static struct ksm_stats stats_of(struct ksm_domain *domain)
{
	struct ksm_stats stats;
	CHECK_EQ(ksm_domain_stats(domain, &stats), 0);
	return stats;
}

static struct ksm_report settle(struct ksm_domain *domain, uint32_t timeout_ms)
{
	struct ksm_report report;
	CHECK_EQ(ksm_domain_settle(domain, timeout_ms, 0, &report), 0);
	return report;
}

TEST(a_process_is_in_a_domain_once)
{
	struct ksm_domain *one = attach("d"), *again = attach("d"), *other = attach("e");
	char id[33], id2[33];
	CHECK(one == again);
	CHECK(one != other);
	ksm_domain_id(one, id);
	ksm_domain_id(other, id2);
	CHECK(strcmp(id, id2));
	CHECK_EQ(stats_of(one).peers, 1);
	CHECK_EQ(stats_of(other).peers, 1);
	char *expected = NULL;
	CHECK_GT(asprintf(&expected, "%s/d", kit_directory()), 0);
	CHECK_STR_EQ(ksm_domain_directory(one), expected);
	free(expected);
	struct ksm_arena *arena = arena_of(one), *arena2 = arena_of(other);
	struct ksm_block a = block(arena, PAGES, 1), b = block(arena2, PAGES, 1), c = block(arena2, PAGES, 1);
	struct ksm_report report;
	CHECK_EQ(ksm_domain_scan(one, &report), 0);
	CHECK_EQ(stats_of(one).pages_merged, 0); /* the copies are in the other domain */
	if (kit_can_merge()) {
		CHECK_EQ(ksm_domain_scan(other, &report), 0);
		CHECK_EQ(stats_of(other).pages_merged, 2 * PAGES);
		CHECK_EQ(stats_of(other).saved_bytes, PAGES * KSM_PAGE_SIZE);
	}
	ksm_domain_detach(again);
	ksm_domain_detach(one);
	ksm_arena_release(arena);
	kit_check_filled(a.address, PAGES, 1); /* the block holds all of it */
	struct ksm_domain_options options = kit_options("d");
	CHECK_EQ(ksm_domain_clean(&options), -EBUSY);
	CHECK_EQ(ksm_arena_free(arena, &a), 0);
	CHECK_EQ(ksm_arena_free(arena2, &b), 0);
	CHECK_EQ(ksm_arena_free(arena2, &c), 0);
	CHECK_EQ(ksm_arena_free(arena2, &c), -EINVAL);
	ksm_arena_release(arena2);
	ksm_domain_detach(other);
	CHECK_EQ(ksm_domain_clean(&options), 0);
	CHECK_EQ(ksm_domain_clean(&options), -ENOENT);
}

TEST(wishes_are_checked)
{
	struct ksm_domain *domain = attach("d"), *out = NULL;
	struct ksm_domain_options options = kit_options("d");
	static const char *const bad[] = {"", ".x", "a/b", "..", "a b", "\xc3\xa4"};
	options.backing = KSM_BACKING_SHM;
	CHECK_EQ(ksm_domain_attach(&options, &out), KSM_EBACKING);
	options = kit_options("d");
	options.barrier = 77;
	CHECK_EQ(ksm_domain_attach(&options, &out), -EINVAL);
	for (size_t i = 0; i < KSM_COUNT(bad); i++) {
		options = kit_options(bad[i]);
		CHECK_EQ(ksm_domain_attach(&options, &out), -EINVAL);
	}
	char name[KSM_NAME_MAX + 2] = "";
	memset(name, 'n', KSM_NAME_MAX + 1);
	options = kit_options(name);
	CHECK_EQ(ksm_domain_attach(&options, &out), -EINVAL);
	char path[600];
	memset(path, '/', sizeof(path));
	path[sizeof(path) - 1] = 0;
	options = kit_options("d");
	options.path = path;
	CHECK_EQ(ksm_domain_attach(&options, &out), -ENAMETOOLONG);
	CHECK(out == NULL);
	ksm_domain_detach(domain);
}

/* ---- a crew of processes ------------------------------------------------------------------------------------------------- */

/* Each has pages that all have, and pages that only it has, twice. */
static void work(uint32_t *steps, unsigned number)
{
	struct ksm_domain *domain = attach("d");
	struct ksm_arena *arena = arena_of(domain);
	struct ksm_block common = block(arena, PAGES, 1);
	struct ksm_block own = block(arena, PAGES, 100000 * (number + 1)),
			 twin = block(arena, PAGES, 100000 * (number + 1));
	ksm_add_seqcst(steps, 1);
	for (;;) {
		kit_check_filled(common.address, PAGES, 1);
		kit_check_filled(own.address, PAGES, 100000 * (number + 1));
		kit_check_filled(twin.address, PAGES, 100000 * (number + 1));
		ksm_add_relaxed(&steps[1 + number], 1);
		kit_sleep_ms(5);
	}
}

static void start_crew(uint32_t *steps, pid_t crew[CREW])
{
	for (unsigned i = 0; i < CREW; i++) {
		crew[i] = kit_fork();
		if (crew[i] == 0)
			work(steps, i);
	}
	KIT_WAIT(20, ksm_load_acquire(steps) == CREW);
}

static bool is_well(uint32_t *steps, unsigned number)
{
	uint32_t now = ksm_load_relaxed(&steps[1 + number]);
	KIT_WAIT(10, ksm_load_relaxed(&steps[1 + number]) > now + 1);
	return true;
}

TEST(killed_members_frames_go_and_nobody_elses)
{
	if (!kit_can_merge())
		return;
	uint32_t *steps = kit_steps();
	pid_t crew[CREW];
	kit_directory();
	start_crew(steps, crew);
	struct ksm_domain *domain = attach("d");
	CHECK_EQ(settle(domain, 20000).settled, 1);
	struct ksm_stats stats = stats_of(domain);
	CHECK_EQ(stats.peers, CREW + 1);
	CHECK_EQ(stats.pages_shared, PAGES * (1 + CREW));
	CHECK_EQ(stats.pages_merged, 3 * PAGES * CREW);
	CHECK_EQ(stats.store_bytes, PAGES * (1 + CREW) * KSM_PAGE_SIZE);
	kit_kill(crew[1]);
	kit_kill(crew[3]);
	uint64_t freed = 0;
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	CHECK_LE(freed, 2 * PAGES); /* some scanner may have been quicker */
	stats = stats_of(domain);
	CHECK_EQ(stats.store_bytes, PAGES * (1 + CREW - 2) * KSM_PAGE_SIZE);
	CHECK_EQ(stats.pages_shared, PAGES * (1 + CREW - 2));
	CHECK_EQ(stats.peers, CREW - 1);
	CHECK(is_well(steps, 0) && is_well(steps, 2));
	kit_kill(crew[0]);
	kit_kill(crew[2]);
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0);
	CHECK_LE(freed, 3 * PAGES);
	stats = stats_of(domain);
	CHECK_EQ(stats.store_bytes, 0);
	CHECK_EQ(stats.pages_merged, 0);
	ksm_domain_detach(domain);
}

TEST(a_stopped_member_holds_up_nobody)
{
	if (!kit_can_merge())
		return;
	uint32_t *steps = kit_steps();
	pid_t crew[CREW];
	kit_directory();
	start_crew(steps, crew);
	struct ksm_domain *domain = attach("d");
	CHECK_EQ(settle(domain, 20000).settled, 1);
	kit_stop(crew[0]);
	kit_stop(crew[1]);
	double start = harness_now();
	CHECK_EQ(settle(domain, 300).settled, 0);
	CHECK_LT(harness_now() - start, 5 * harness_slower());
	struct ksm_arena *arena = arena_of(domain);
	struct ksm_block mine = block(arena, PAGES, 1), one = block(arena, PAGES, 5), two = block(arena, PAGES, 5);
	struct ksm_report report;
	start = harness_now();
	CHECK_EQ(ksm_domain_scan(domain, &report), 0);
	CHECK_LT(harness_now() - start, 5 * harness_slower());
	CHECK_EQ(stats_of(domain).peers, CREW + 1);
	struct ksm_stats self;
	CHECK_EQ(ksm_domain_self_stats(domain, &self), 0);
	CHECK_EQ(self.pages_merged, 3 * PAGES);
	uint64_t freed;
	CHECK_EQ(ksm_domain_sweep(domain, &freed), 0); /* their bitmaps are at hand */
	kit_check_filled(mine.address, PAGES, 1);
	kit_check_filled(one.address, PAGES, 5);
	kit_check_filled(two.address, PAGES, 5);
	CHECK_SYS(kill(crew[0], SIGCONT));
	CHECK_SYS(kill(crew[1], SIGCONT));
	CHECK_EQ(settle(domain, 20000).settled, 1);
	for (unsigned i = 0; i < CREW; i++)
		CHECK(is_well(steps, i));
	for (unsigned i = 0; i < CREW; i++)
		kit_kill(crew[i]);
}

TEST(joining_while_a_peer_is_stopped)
{
	uint32_t *steps = kit_steps();
	pid_t crew[CREW];
	kit_directory();
	start_crew(steps, crew);
	kit_stop(crew[0]);
	kit_stop(crew[2]);
	struct ksm_domain *domain = attach_in_the_end("d"); /* through one of the others */
	CHECK_GE(stats_of(domain).peers, CREW + 1);
	ksm_domain_detach(domain);
	kit_stop(crew[1]);
	kit_stop(crew[3]);
	struct ksm_domain_options options = kit_options("d");
	CHECK_EQ(ksm_domain_attach(&options, &domain), KSM_ENOPEER); /* not a second domain beside the first */
	CHECK_SYS(kill(crew[3], SIGCONT));
	domain = attach_in_the_end("d");
	CHECK_EQ(stats_of(domain).peers, CREW + 1);
	for (unsigned i = 0; i < CREW; i++)
		kit_kill(crew[i]);
	ksm_domain_detach(domain);
}

TEST(joining_while_somebody_else_does_not_get_on_with_it)
{
	kit_directory();
	struct ksm_domain_options options = kit_options("d");
	struct ksm_rendezvous rendezvous;
	struct ksm_domain *domain;
	CHECK_EQ(ksm_rendezvous_open(&options, true, &rendezvous), 0);
	CHECK_EQ(ksm_rendezvous_lock(rendezvous.file, KSM_LOCK_JOIN, 0), 0);
	CHECK_EQ(ksm_domain_attach(&options, &domain), KSM_ENOPEER);
	struct ksm_settings settings;
	ksm_settings_default(&settings);
	CHECK_EQ(ksm_settings_write(&options, &settings), KSM_ENOPEER);
	CHECK_EQ(ksm_domain_clean(&options), -EBUSY);
	CHECK_EQ(ksm_os_unlock(rendezvous.file, KSM_LOCK_JOIN), 0);
	CHECK_EQ(ksm_settings_write(&options, &settings), 0);
	ksm_domain_detach(attach("d"));
	ksm_rendezvous_close(&rendezvous);
}

/* ---- the last one is gone --------------------------------------------------------------------------------------------------- */

static uint64_t shmem_bytes(void)
{
	char line[128];
	unsigned long long kb = 0;
	FILE *file = fopen("/proc/meminfo", "re");
	CHECK(file);
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "Shmem: %llu kB", &kb) == 1)
			break;
	fclose(file);
	return kb * 1024;
}

static uint64_t directory_bytes(const char *path)
{
	char *command = NULL, text[64] = "";
	CHECK_GT(asprintf(&command, "du -sk %s", path), 0);
	FILE *pipe = popen(command, "re");
	CHECK(pipe && fgets(text, sizeof(text), pipe));
	pclose(pipe);
	free(command);
	return strtoull(text, NULL, 10) * 1024;
}

TEST(when_all_are_killed_the_kernel_has_it_all_back)
{
	enum {
		MUCH = 30000
	}; /* 117 MiB of frames: more than what others do meanwhile */
	if (!kit_can_merge())
		return;
	uint32_t *steps = kit_steps();
	char path[128];
	snprintf(path, sizeof(path), "%s/d", kit_directory());
	uint64_t before = shmem_bytes();
	pid_t pid = kit_fork();
	if (pid == 0) {
		struct ksm_domain *domain = attach("d");
		struct ksm_arena *arena = arena_of(domain);
		block(arena, MUCH, 1);
		block(arena, MUCH, 1);
		struct ksm_report report;
		CHECK_EQ(ksm_domain_scan(domain, &report), 0);
		CHECK_EQ(stats_of(domain).store_bytes, MUCH * KSM_PAGE_SIZE);
		kit_reach(steps, 1);
		for (;;)
			pause();
	}
	KIT_WAIT(40, ksm_load_acquire(steps) == 1);
	CHECK_GT(shmem_bytes(), before + MUCH * KSM_PAGE_SIZE / 2);
	kit_kill(pid);
	KIT_WAIT(5, shmem_bytes() < before + MUCH * KSM_PAGE_SIZE / 4);
	CHECK_LE(directory_bytes(path), 64 << 10);
	struct ksm_domain *domain = attach("d"); /* a new one in the same place */
	struct ksm_stats stats = stats_of(domain);
	CHECK_EQ(stats.peers, 1);
	CHECK_EQ(stats.pages_shared, 0);
	CHECK_EQ(stats.store_bytes, 0);
	ksm_domain_detach(domain);
}

TEST(settings_hold_for_all_and_for_later)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_settings settings, read;
	uint32_t peers = 9;
	CHECK_EQ(ksm_settings_read(&options, &read, &peers), 0); /* nobody there: the defaults */
	ksm_settings_default(&settings);
	CHECK_EQ(memcmp(&settings, &read, sizeof(read)), 0);
	CHECK_EQ(peers, 0);
	settings.run = 0;
	settings.pages_to_scan = 77;
	CHECK_EQ(ksm_settings_write(&options, &settings), -EINVAL); /* the advisor chooses it */
	settings.advisor_mode = 0;
	CHECK_EQ(ksm_settings_write(&options, &settings), 0);
	struct ksm_domain *domain = attach("d");
	struct ksm_arena *arena = arena_of(domain);
	CHECK_EQ(ksm_settings_read(&options, &read, &peers), 0);
	CHECK_EQ(peers, 1);
	CHECK_EQ(memcmp(&settings, &read, sizeof(read)), 0);
	struct ksm_block one = block(arena, PAGES, 1), two = block(arena, PAGES, 1);
	kit_sleep_ms(300);
	CHECK_EQ(stats_of(domain).pages_merged, 0);
	CHECK_EQ(stats_of(domain).why_not, KSM_ESTOPPED);
	settings.run = 1;
	settings.pages_to_scan = 100000;
	settings.max_pages_to_merge = 100000;
	settings.sleep_millisecs = 1;
	CHECK_EQ(ksm_settings_write(&options, &settings), 0);
	if (kit_can_merge())
		KIT_WAIT(10, stats_of(domain).pages_merged == 2 * PAGES); /* in the background */
	settings.pages_to_scan = 0;
	CHECK_EQ(ksm_settings_write(&options, &settings), -EINVAL);
	kit_check_filled(one.address, PAGES, 1);
	kit_check_filled(two.address, PAGES, 1);
}
