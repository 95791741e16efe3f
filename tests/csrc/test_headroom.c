/* SPDX-License-Identifier: MIT */
/* How much memory control groups leave: HEADROOM-1 to 3, over hierarchies of plain files that look like the kernel's. */
#include "kit.h"

#include "headroom.h"

#define MIB (1ull << 20)
#define VERSION_1 "/memory"
#define VERSION_2 ""

/* Counted: every look at a group opens one of its files. */
static unsigned opened;

static void forget_opened(void)
{
	ksm_os_fault_clear();
	opened = 0;
}

static unsigned looks(void)
{
	unsigned now = ksm_os_fault_calls(KSM_OS_OPEN), since = now - opened;
	opened = now;
	return since;
}

/* ---- a hierarchy of files ---------------------------------------------------------------------------------------- */

static const char *at(const char *name)
{
	static char paths[4][512];
	static unsigned next;
	char *path = paths[next++ % KSM_COUNT(paths)];
	snprintf(path, sizeof(paths[0]), "%s/%s", kit_directory(), name);
	return path;
}

static void write_text(const char *name, const char *text)
{
	char parents[512];
	snprintf(parents, sizeof(parents), "%s", name);
	for (char *slash = strchr(parents, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = 0;
		CHECK(!mkdir(at(parents), 0755) || errno == EEXIST);
		*slash = '/';
	}
	FILE *file = fopen(at(name), "we");
	CHECK(file);
	CHECK(fputs(text, file) >= 0);
	CHECK_EQ(fclose(file), 0);
}

__attribute__((format(printf, 2, 3))) static void write_in(const char *name, const char *format, ...)
{
	char text[512];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	write_text(name, text);
}

/* A group of version 1; "" is where the hierarchy begins. limit 0: none. */
static void group_1(const char *group, uint64_t limit, uint64_t used)
{
	char name[256];
	snprintf(name, sizeof(name), "cgroup/memory%s/memory.limit_in_bytes", group);
	write_in(name, "%llu\n", (unsigned long long)(limit ? limit : 9223372036854771712ull));
	snprintf(name, sizeof(name), "cgroup/memory%s/memory.usage_in_bytes", group);
	write_in(name, "%llu\n", (unsigned long long)used);
}

static void group_2(const char *group, uint64_t limit, uint64_t used)
{
	char name[256];
	snprintf(name, sizeof(name), "cgroup%s/cgroup.controllers", group);
	write_text(name, "cpu memory\n");
	snprintf(name, sizeof(name), "cgroup%s/memory.max", group);
	if (limit)
		write_in(name, "%llu\n", (unsigned long long)limit);
	else
		write_text(name, "max\n");
	snprintf(name, sizeof(name), "cgroup%s/memory.current", group);
	write_in(name, "%llu\n", (unsigned long long)used);
}

static struct ksm_headroom headroom;

static void begin(const char *membership)
{
	static char root[512], file[512], meminfo[512];
	write_text("membership", membership);
	write_text("meminfo", "MemFree:  100 kB\nSwapTotal:  0 kB\nSwapFree:   0 kB\n");
	snprintf(root, sizeof(root), "%s", at("cgroup"));
	snprintf(file, sizeof(file), "%s", at("membership"));
	snprintf(meminfo, sizeof(meminfo), "%s", at("meminfo"));
	ksm_headroom_init(&headroom, root, file);
	headroom.meminfo = meminfo;
	forget_opened();
}

#define CHECK_ROOM(bytes) CHECK_EQ(ksm_headroom_now(&headroom), bytes)
#define CHECK_NO_LIMIT() CHECK_ROOM(UINT64_MAX)

/* ---- which groups ------------------------------------------------------------------------------------------------- */

static const char hybrid[] = "9:name=systemd:/\n5:cpu,cpuacct:/other\n4:memory:/a/b\n0::/\n";

TEST(version_1_beside_version_2_without_memory)
{
	group_1("", 0, 900 * MIB);
	group_1("/a", 0, 300 * MIB);
	group_1("/a/b", 100 * MIB, 70 * MIB);
	group_1("/other", 1 * MIB, 1 * MIB);
	begin(hybrid);
	CHECK_ROOM(30 * MIB);
}

TEST(version_1_with_controllers_on_one_line)
{
	group_1("/a", 100 * MIB, 60 * MIB);
	begin("3:cpu,memory,pids:/a\n");
	CHECK_ROOM(40 * MIB);
	begin("3:cpu,memory2,pids:/a\n");
	CHECK_NO_LIMIT();
}

TEST(version_2)
{
	group_2("", 0, 900 * MIB);
	group_2("/a", 200 * MIB, 150 * MIB);
	begin("0::/a\n");
	CHECK_ROOM(50 * MIB);
}

TEST(the_tightest_group_counts_wherever_it_is)
{
	group_2("", 0, 0);
	group_2("/a", 100 * MIB, 95 * MIB);
	group_2("/a/b", 0, 50 * MIB);
	group_2("/a/b/c", 60 * MIB, 40 * MIB);
	begin("0::/a/b/c\n");
	CHECK_ROOM(5 * MIB);
	group_2("/a", 100 * MIB, 50 * MIB);
	CHECK_ROOM(20 * MIB);
	group_1("", 10 * MIB, 9 * MIB);
	group_1("/a/b", 100 * MIB, 70 * MIB);
	begin(hybrid);
	CHECK_ROOM(1 * MIB);
}

TEST(more_limits_than_are_looked_at)
{
	char group[64] = "";
	group_2("", 0, 0);
	for (size_t depth = 0; depth < KSM_HEADROOM_LEVELS + 3; depth++) {
		strcat(group, "/d");
		group_2(group, 100 * MIB, 80 * MIB);
	}
	char membership[128];
	snprintf(membership, sizeof(membership), "0::%s\n", group);
	begin(membership);
	CHECK_ROOM(20 * MIB);
	CHECK_EQ(headroom.count, KSM_HEADROOM_LEVELS);
}

TEST(no_limit_anywhere)
{
	group_2("", 0, 0);
	group_2("/a", 0, 100 * MIB);
	begin("0::/a\n");
	CHECK_NO_LIMIT();
	CHECK_EQ(ksm_headroom_check(&headroom, 1ull << 40, 1ull << 40), 0);
	group_1("/a/b", 0, 100 * MIB);
	begin(hybrid);
	CHECK_NO_LIMIT();
}

TEST(a_container_sees_its_own_group_as_the_root)
{
	group_1("", 100 * MIB, 90 * MIB);
	begin("4:memory:/docker/0123456789\n");
	CHECK_ROOM(10 * MIB);
}

TEST(a_container_whose_root_has_no_files_of_its_own)
{
	write_text("cgroup/memory/tasks", "");
	begin("4:memory:/docker/0123456789\n");
	CHECK_NO_LIMIT();
}

TEST(what_cannot_be_read_is_no_limit)
{
	begin("0::/a\n"); /* nothing is mounted */
	CHECK_NO_LIMIT();
	CHECK_EQ(unlink(at("membership")), 0);
	CHECK_NO_LIMIT();
	group_2("", 0, 0);
	group_2("/a", 10 * MIB, 10 * MIB);
	begin("0::/a\n");
	CHECK_ROOM(0);
	CHECK_EQ(unlink(at("cgroup/a/memory.current")), 0);
	CHECK_NO_LIMIT();
	group_2("/a", 10 * MIB, 10 * MIB);
	write_text("cgroup/a/memory.max", "what?\n");
	CHECK_NO_LIMIT();
	write_text("cgroup/a/memory.max", "");
	CHECK_NO_LIMIT();
}

TEST(lines_that_are_none)
{
	group_2("", 0, 0);
	group_2("/a", 10 * MIB, 5 * MIB);
	begin("nonsense\n1:\n0:name=x:/\n0::/a\n");
	CHECK_ROOM(5 * MIB);
	begin("");
	CHECK_NO_LIMIT();
}

TEST(a_path_longer_than_any)
{
	static char membership[3 * KSM_HEADROOM_PATH];
	group_1("", 100 * MIB, 90 * MIB);
	strcpy(membership, "4:memory:");
	while (strlen(membership) < 2 * KSM_HEADROOM_PATH)
		strcat(membership, "/long");
	begin(membership);
	CHECK_ROOM(10 * MIB); /* as from inside a container */
}

/* ---- room ----------------------------------------------------------------------------------------------------------- */

TEST(files_in_the_cache_can_be_taken_back)
{
	group_2("", 0, 0);
	group_2("/a", 100 * MIB, 95 * MIB);
	write_in("cgroup/a/memory.stat", "anon %llu\nfile %llu\nshmem %llu\ninactive_file %llu\nactive_file %llu\n",
		 50 * MIB, 45 * MIB, 30 * MIB, 10 * MIB, 5 * MIB);
	begin("0::/a\n");
	CHECK_ROOM(20 * MIB);
	group_1("", 0, 0);
	group_1("/a/b", 100 * MIB, 95 * MIB);
	write_in("cgroup/memory/a/b/memory.stat",
		 "cache %llu\ninactive_file 1\nactive_file 1\ntotal_cache %llu\ntotal_inactive_file %llu\n"
		 "total_active_file %llu\n",
		 45 * MIB, 45 * MIB, 7 * MIB, 1 * MIB);
	begin(hybrid);
	CHECK_ROOM(13 * MIB);
}

TEST(beyond_the_limit_there_is_nothing)
{
	group_2("", 0, 0);
	group_2("/a", 100 * MIB, 130 * MIB); /* it was lowered */
	begin("0::/a\n");
	CHECK_ROOM(0);
	CHECK_EQ(ksm_headroom_check(&headroom, 4096, 0), KSM_EHEADROOM);
}

TEST(swap_as_far_as_the_group_may_use_it)
{
	group_2("", 0, 0);
	group_2("/a", 100 * MIB, 90 * MIB);
	begin("0::/a\n");
	write_in("meminfo", "SwapTotal: 9999999 kB\nSwapFree: %llu kB\n", 40 * MIB / 1024);
	CHECK_ROOM(50 * MIB);
	write_in("cgroup/a/memory.swap.max", "%llu\n", 30 * MIB);
	write_in("cgroup/a/memory.swap.current", "%llu\n", 25 * MIB);
	CHECK_ROOM(15 * MIB);
	write_text("cgroup/a/memory.swap.max", "0\n");
	CHECK_ROOM(10 * MIB);
	write_text("cgroup/a/memory.swap.max", "max\n");
	CHECK_ROOM(50 * MIB);
	CHECK_EQ(unlink(at("meminfo")), 0);
	CHECK_ROOM(10 * MIB);
}

TEST(swap_of_version_1)
{
	group_1("", 0, 0);
	group_1("/a/b", 100 * MIB, 90 * MIB);
	begin(hybrid);
	write_in("meminfo", "SwapFree: %llu kB\n", 40 * MIB / 1024);
	CHECK_ROOM(50 * MIB);
	write_text("cgroup/memory/a/b/memory.swappiness", "0\n");
	CHECK_ROOM(10 * MIB);
	write_text("cgroup/memory/a/b/memory.swappiness", "60\n");
	CHECK_ROOM(50 * MIB);
}

/* What goes to swap makes no room under a limit of both together, whether or not memory itself has some left. */
TEST(memory_and_swap_together)
{
	group_1("", 0, 0);
	group_1("/a/b", 100 * MIB, 90 * MIB);
	begin(hybrid);
	write_in("meminfo", "SwapFree: %llu kB\n", 40 * MIB / 1024);
	write_in("cgroup/memory/a/b/memory.memsw.limit_in_bytes", "%llu\n", 100 * MIB);
	write_in("cgroup/memory/a/b/memory.memsw.usage_in_bytes", "%llu\n", 90 * MIB);
	CHECK_ROOM(10 * MIB);
	write_in("cgroup/memory/a/b/memory.memsw.limit_in_bytes", "%llu\n", 120 * MIB);
	CHECK_ROOM(30 * MIB);
	group_1("/a/b", 100 * MIB, 50 * MIB);
	write_in("cgroup/memory/a/b/memory.memsw.usage_in_bytes", "%llu\n", 118 * MIB);
	CHECK_ROOM(2 * MIB);
	CHECK_EQ(ksm_headroom_check(&headroom, 1 * MIB, 4 * MIB), KSM_EHEADROOM);
	write_in("cgroup/memory/a/b/memory.stat", "total_inactive_file %llu\n", 5 * MIB);
	CHECK_ROOM(7 * MIB);
}

/* ---- how often ------------------------------------------------------------------------------------------------------ */

#define NEEDED (2 * MIB)
#define SPARE (10 * MIB)

static int ask(void)
{
	return ksm_headroom_check(&headroom, NEEDED, SPARE);
}

static void use(uint64_t used)
{
	group_2("/a", 1024 * MIB, used);
}

static void begin_asking(uint64_t used)
{
	group_2("", 0, 0);
	use(used);
	begin("0::/a\n");
}

static void age(void)
{
	headroom.looked_ns -= 1000000000; /* as if a second had passed: of the usage … */
}

TEST(nothing_is_looked_at_before_it_is_asked)
{
	begin_asking(100 * MIB);
	CHECK_EQ(looks(), 0);
	CHECK_EQ(ask(), 0);
	CHECK_GT(looks(), 0);
}

/* HEADROOM-1 */
TEST(with_plenty_left_files_are_read_seldom)
{
	begin_asking(100 * MIB);
	CHECK_EQ(ask(), 0);
	looks();
	uint64_t quarter = (924 * MIB - SPARE) / 4;
	unsigned asked = 0, read = 0;
	for (; asked < quarter / NEEDED - 1; asked++) {
		headroom.looked_ns = ksm_os_now_ns(); /* so that time has no say */
		CHECK_EQ(ask(), 0);
		read += looks();
	}
	CHECK_EQ(read, 0);
	for (asked = 0; !read && asked < 3; asked++) {
		headroom.looked_ns = ksm_os_now_ns();
		CHECK_EQ(ask(), 0);
		read += looks();
	}
	CHECK_GT(read, 0); /* a quarter has been used */
	CHECK_LE(read, 3); /* of usage only: limits are old news */
	age();
	CHECK_EQ(ask(), 0);
	read = looks();
	CHECK_GT(read, 0);
	CHECK_LE(read, 3);
}

TEST(without_limits_hardly_anything_is_read)
{
	group_2("", 0, 0);
	group_2("/a", 0, 100 * MIB);
	begin("0::/a\n");
	CHECK_EQ(ask(), 0);
	looks();
	for (unsigned i = 0; i < 1000; i++) {
		headroom.found_ns = ksm_os_now_ns();
		age();
		CHECK_EQ(ask(), 0);
	}
	CHECK_EQ(looks(), 0);
}

TEST(a_limit_that_comes_later_is_seen)
{
	group_2("", 0, 0);
	group_2("/a", 0, 100 * MIB);
	begin("0::/a\n");
	CHECK_EQ(ask(), 0);
	group_2("/a", 101 * MIB, 100 * MIB);
	KIT_WAIT(10, ask() == KSM_EHEADROOM);
	group_2("", 0, 0);
	group_2("/b", 0, 0);
	write_text("membership", "0::/b\n"); /* moved to another group */
	KIT_WAIT(10, ask() == 0);
}

TEST(a_room_that_others_use_is_seen)
{
	begin_asking(100 * MIB);
	CHECK_EQ(ask(), 0);
	use(1023 * MIB);
	KIT_WAIT(10, ask() == KSM_EHEADROOM);
}

/* HEADROOM-2 */
TEST(once_short_it_takes_more_to_be_free_again)
{
	begin_asking(1024 * MIB - (NEEDED + SPARE));
	CHECK_EQ(ask(), 0);
	use(1024 * MIB - (NEEDED + SPARE - 4096));
	age();
	headroom.credit = 0;
	CHECK_EQ(ask(), KSM_EHEADROOM);
	looks();
	headroom.looked_ns = ksm_os_now_ns();
	CHECK_EQ(ask(), KSM_EHEADROOM); /* without looking again at once */
	CHECK_EQ(looks(), 0);
	use(1024 * MIB - (NEEDED + SPARE)); /* what was enough before */
	age();
	CHECK_EQ(ask(), KSM_EHEADROOM);
	use(1024 * MIB - (NEEDED + SPARE + SPARE - 4096));
	age();
	CHECK_EQ(ask(), KSM_EHEADROOM);
	use(1024 * MIB - (NEEDED + SPARE + SPARE));
	age();
	CHECK_EQ(ask(), 0);
	use(1024 * MIB - (NEEDED + SPARE));
	age();
	CHECK_EQ(ask(), 0);
}

TEST(what_was_granted_is_used_up)
{
	begin_asking(1024 * MIB - (NEEDED + SPARE));
	CHECK_EQ(ask(), 0);
	looks();
	headroom.looked_ns = ksm_os_now_ns();
	CHECK_EQ(ask(), 0); /* there was credit for one, so this one looked */
	CHECK_GT(looks(), 0);
}

/* ---- the real ones -------------------------------------------------------------------------------------------------- */

TEST(the_groups_of_this_process)
{
	ksm_headroom_init(&headroom, NULL, NULL);
	uint64_t room = ksm_headroom_now(&headroom);
	printf("%llu bytes left, %zu limits, version %d\n", (unsigned long long)room, headroom.count,
	       headroom.unified ? 2 : 1);
	CHECK(headroom.count || room == UINT64_MAX);
	CHECK_EQ(ksm_headroom_check(&headroom, 0, 0), 0);
}
