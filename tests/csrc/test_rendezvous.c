/* SPDX-License-Identifier: MIT */
/* The place where peers meet: what is refused there (MEET-1), locks, another version's file, settings (MEET-3). */
#include "members.h"

#include <sys/socket.h>
#include <sys/un.h>

static int try_open(const char *base, const char *name, bool create)
{
	struct ksm_domain_options options = {.name = name, .path = base, .store_fd = -1};
	struct ksm_rendezvous rendezvous;
	int r = ksm_rendezvous_open(&options, create, &rendezvous);
	if (!r)
		ksm_rendezvous_close(&rendezvous);
	CHECK_EQ(rendezvous.directory, -1);
	CHECK_EQ(rendezvous.file, -1);
	return r;
}

static const char *below(const char *name)
{
	static char paths[4][256];
	static unsigned next;
	char *path = paths[next++ % 4];
	snprintf(path, 256, "%s/%s", kit_directory(), name);
	return path;
}

static int open_file(const char *name)
{
	int fd = open(below(name), O_RDWR | O_CLOEXEC);
	CHECK_SYS(fd);
	return fd;
}

TEST(names)
{
	static const char *const good[] = {"a", "default", "A-z_0.9", "-", "_", "a.."};
	static const char *const bad[] = {"", ".", "..", ".a", "a/b", "/", "a b", "a\n", "\xff", "ä"};
	char longest[KSM_NAME_MAX + 2] = "";
	for (size_t i = 0; i < KSM_COUNT(good); i++)
		CHECK_EQ(try_open(kit_directory(), good[i], true), 0);
	for (size_t i = 0; i < KSM_COUNT(bad); i++)
		CHECK_EQ(try_open(kit_directory(), bad[i], true), -EINVAL);
	memset(longest, 'n', KSM_NAME_MAX);
	CHECK_EQ(try_open(kit_directory(), longest, true), 0);
	longest[KSM_NAME_MAX] = 'n';
	CHECK_EQ(try_open(kit_directory(), longest, true), -EINVAL);
	CHECK_EQ(try_open("", "d", true), -EINVAL);
	char path[KSM_PATH_ROOM] = "/";
	memset(path + 1, 'p', sizeof(path) - 5);
	path[sizeof(path) - 4] = 0;
	CHECK_EQ(try_open(path, "d", true), -ENAMETOOLONG);
	CHECK_EQ(try_open(kit_directory(), "nobody", false), -ENOENT);
	CHECK_EQ(access(below("nobody"), F_OK), -1);
	CHECK_EQ(try_open(below("no/such"), "d", true), -ENOENT);
}

TEST(links_are_not_followed)
{
	CHECK_EQ(try_open(below("real"), "d", true), 0);
	CHECK_SYS(symlink(below("real"), below("base")));
	CHECK_EQ(try_open(below("base"), "d", true), -ELOOP);
	CHECK_EQ(try_open(below("base"), "d", false), -ELOOP);
	CHECK_SYS(symlink(below("real"), below("domain-link")));
	CHECK_EQ(try_open(kit_directory(), "domain-link", true), -ELOOP);
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	CHECK_SYS(unlink(below("d/domain")));
	CHECK_SYS(symlink(below("real/d/domain"), below("d/domain")));
	CHECK_EQ(try_open(kit_directory(), "d", true), -ELOOP);
	CHECK_SYS(unlink(below("d/domain")));
	CHECK_SYS(link(below("real/d/domain"), below("d/domain"))); /* nor is a file used that has another name */
	CHECK_EQ(try_open(kit_directory(), "d", true), KSM_EOWNER);
	CHECK_SYS(unlink(below("d/domain")));
	CHECK_SYS(symlink("/nowhere", below("dangling")));
	CHECK_EQ(try_open(kit_directory(), "dangling", true), -ELOOP);
	CHECK_EQ(access("/nowhere", F_OK), -1);
}

TEST(wrong_kinds_and_modes)
{
	int fd = open(below("file"), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
	CHECK_SYS(fd);
	close(fd);
	CHECK_EQ(try_open(below("file"), "d", true), -ENOTDIR);
	CHECK_EQ(try_open(kit_directory(), "file", true), -ENOTDIR);
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	static const mode_t loose[] = {0710, 0701, 0770, 0704, 0777};
	for (size_t i = 0; i < KSM_COUNT(loose); i++) {
		CHECK_SYS(chmod(below("d"), loose[i]));
		CHECK_EQ(try_open(kit_directory(), "d", true), KSM_EOWNER);
		CHECK_SYS(chmod(below("d"), 0700));
		CHECK_SYS(chmod(kit_directory(), loose[i]));
		CHECK_EQ(try_open(kit_directory(), "d", true), KSM_EOWNER);
		CHECK_SYS(chmod(kit_directory(), 0700));
		CHECK_SYS(chmod(below("d/domain"), loose[i] & 0666));
		CHECK_EQ(try_open(kit_directory(), "d", true), (loose[i] & 066) ? KSM_EOWNER : 0);
		CHECK_SYS(chmod(below("d/domain"), 0600));
	}
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	CHECK_SYS(unlink(below("d/domain")));
	CHECK_SYS(mkfifo(below("d/domain"), 0600));
	CHECK_EQ(try_open(kit_directory(), "d", true), KSM_EOWNER);
	CHECK_SYS(unlink(below("d/domain")));
	CHECK_SYS(mkdir(below("d/domain"), 0700));
	CHECK_LT(try_open(kit_directory(), "d", true), 0);
}

TEST(another_users_place)
{
	if (geteuid() != 0) {
		printf("only root can become another user here\n");
		return;
	}
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	/* Ours, seen by another user: the modes keep it out, and if they do not, the owner is another. */
	for (mode_t mode = 0700; mode <= 0755; mode += 055) {
		CHECK_SYS(chmod(kit_directory(), mode));
		pid_t pid = kit_fork();
		if (pid == 0) {
			CHECK_SYS(setuid(12345));
			CHECK_EQ(try_open(kit_directory(), "d", true), mode == 0700 ? -EACCES : KSM_EOWNER);
			_exit(0);
		}
		CHECK_CHILD(pid);
	}
	CHECK_SYS(chmod(kit_directory(), 0700));
	/* Another's, seen by us, who could open it. */
	CHECK_SYS(chown(below("d/domain"), 12345, (gid_t)-1));
	CHECK_EQ(try_open(kit_directory(), "d", true), KSM_EOWNER);
	CHECK_SYS(chown(below("d/domain"), 0, (gid_t)-1));
	CHECK_SYS(chown(below("d"), 12345, (gid_t)-1));
	CHECK_EQ(try_open(kit_directory(), "d", true), KSM_EOWNER);
	CHECK_SYS(chown(below("d"), 0, (gid_t)-1));
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
}

/* ---- another layout -------------------------------------------------------------------------------------------------------- */

static void write_head(int fd, uint64_t magic, uint32_t version, uint32_t layout)
{
	struct ksm_domain_file head;
	CHECK_EQ(ksm_os_pread(fd, &head, sizeof(head), 0), 0);
	head.magic = magic;
	head.version = version;
	head.layout = layout;
	CHECK_EQ(ksm_os_pwrite(fd, &head, sizeof(head), 0), 0);
}

TEST(another_layout_is_refused_while_somebody_lives_there)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_member *a = members_join("d");
	struct ksm_domain *domain = NULL;
	members_leave(a);
	int fd = open_file("d/domain");
	struct ksm_settings settings;
	ksm_settings_default(&settings);
	settings.pages_to_scan = 99;
	settings.advisor_mode = 0;
	CHECK_EQ(ksm_settings_write(&options, &settings), 0);
	const struct {
		uint64_t magic;
		uint32_t version, layout;
		int expected;
	} heads[] = {
		{KSM_MAGIC, KSM_LAYOUT_VERSION + 1, ksm_layout_hash(), KSM_ELAYOUT},
		{KSM_MAGIC, KSM_LAYOUT_VERSION, ksm_layout_hash() + 1, KSM_ELAYOUT},
		{KSM_MAGIC + 1, KSM_LAYOUT_VERSION, ksm_layout_hash(), KSM_ECORRUPT},
	};
	for (size_t i = 0; i < KSM_COUNT(heads); i++) {
		write_head(fd, heads[i].magic, heads[i].version, heads[i].layout);
		CHECK_EQ(ksm_rendezvous_is_inhabited(fd), 0);
		int living = open_file("d/domain");
		CHECK_EQ(ksm_os_lock_try(living, KSM_LOCK_LIVENESS + 500), 0);
		CHECK_EQ(ksm_rendezvous_is_inhabited(fd), 1);
		CHECK_EQ(ksm_domain_attach(&options, &domain), heads[i].expected);
		CHECK_EQ(ksm_domain_clean(&options), -EBUSY);
		close(living);
		CHECK_EQ(ksm_domain_attach(&options, &domain), 0); /* nobody there: made anew */
		struct ksm_domain_file head;
		CHECK_EQ(ksm_os_pread(fd, &head, sizeof(head), 0), 0);
		CHECK_EQ(head.magic, KSM_MAGIC);
		CHECK_EQ(head.layout, ksm_layout_hash());
		CHECK_EQ(ksm_settings_read(&options, &settings, NULL), 0);
		CHECK_EQ(settings.pages_to_scan, 99);
		ksm_domain_detach(domain);
	}
	close(fd);
}

TEST(what_the_dead_left_is_cleared)
{
	struct ksm_domain_options options = kit_options("d");
	pid_t pid = kit_fork();
	if (pid == 0) {
		members_join("d");
		kill(getpid(), SIGKILL);
	}
	CHECK_KILLED(pid, SIGKILL);
	CHECK_EQ(access(below("d/peer-0"), F_OK), 0);
	struct ksm_member *a = members_join("d");
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(a->peer.living_count, 1);
	members_leave(a);
	CHECK_EQ(access(below("d/peer-0"), F_OK), -1);
	CHECK_EQ(ksm_domain_clean(&options), 0);
	CHECK_EQ(access(below("d"), F_OK), -1);
}

/* Under another number than `number`. */
static bool has_open(pid_t pid, const struct stat *file, int number)
{
	struct stat found;
	char path[64];
	for (int other = 0; other < 64; other++) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)pid, other);
		if (other != number && !stat(path, &found) && found.st_ino == file->st_ino)
			return true;
	}
	return false;
}

/* A process that has this file open, and does something about the domain as soon as it has the join lock. */
static pid_t wait_for_lock(int file, int (*wanted)(const struct ksm_domain_options *options))
{
	struct stat stat;
	CHECK_EQ(ksm_os_lock_try(file, KSM_LOCK_JOIN), 0);
	CHECK_EQ(ksm_os_stat(file, &stat), 0);
	pid_t pid = kit_fork();
	if (pid == 0) {
		struct ksm_domain_options options = kit_options("d");
		CHECK_SYS(dup2(STDERR_FILENO, file)); /* the lock stays, for the parent has it too */
		_exit(-wanted(&options));
	}
	KIT_WAIT(20, has_open(pid, &stat, file));
	return pid;
}

static int write_settings(const struct ksm_domain_options *options)
{
	struct ksm_settings settings;
	ksm_settings_default(&settings);
	settings.max_pages_to_merge = 4321;
	return ksm_settings_write(options, &settings);
}

/* What waits for the lock of a rendezvous that goes meanwhile is about the next one: somebody may live there. */
TEST(who_waits_for_what_goes_looks_again)
{
	struct ksm_domain_options options = kit_options("d");
	struct ksm_settings settings;
	for (int round = 0; round < 2; round++) {
		CHECK_EQ(try_open(kit_directory(), "d", true), 0);
		int old = open_file("d/domain");
		pid_t pid = wait_for_lock(old, round ? write_settings : ksm_domain_clean);
		CHECK_SYS(unlink(below("d/domain"))); /* so far another cleaner has come */
		struct ksm_member *a = members_join("d");
		CHECK_EQ(access(below("d/peer-0"), F_OK), 0);
		close(old);
		CHECK_EQ(harness_wait(__FILE__, __LINE__, pid), round ? 0 : EBUSY << 8);
		CHECK_EQ(access(below("d/peer-0"), F_OK), 0);
		CHECK_EQ(ksm_settings_read(&options, &settings, NULL), 0);
		CHECK_EQ(settings.max_pages_to_merge == 4321, round);
		members_leave(a);
		CHECK_EQ(ksm_domain_clean(&options), 0);
	}
}

/* What is no business of ours keeps the directory. */
TEST(something_else_stays)
{
	struct ksm_domain_options options = kit_options("d");
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	int fd = open(below("d/else"), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
	CHECK_GE(fd, 0);
	CHECK_EQ(ksm_domain_clean(&options), -ENOTEMPTY);
	CHECK_EQ(access(below("d/else"), F_OK), 0);
	CHECK_EQ(access(below("d/domain"), F_OK), -1);
	CHECK_SYS(unlink(below("d/else")));
	close(fd);
}

/* ---- locks and settings ------------------------------------------------------------------------------------------------------- */

TEST(locks_are_waited_for_but_not_for_ever)
{
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	int one = open_file("d/domain"), two = open_file("d/domain");
	CHECK_EQ(ksm_rendezvous_lock(one, KSM_LOCK_JOIN, 0), 0);
	double start = harness_now();
	CHECK_EQ(ksm_rendezvous_lock(two, KSM_LOCK_JOIN, 50), -EAGAIN);
	CHECK_GE(harness_now() - start, 0.05);
	CHECK_LT(harness_now() - start, 3);
	CHECK_EQ(ksm_os_unlock(one, KSM_LOCK_JOIN), 0);
	CHECK_EQ(ksm_rendezvous_lock(two, KSM_LOCK_JOIN, 0), 0);
	/* The living are found in order, wherever they are and however many. */
	static const unsigned slots[] = {1023, 0, 7, 512, 8};
	static const unsigned sorted[] = {0, 7, 8, 512, 1023};
	for (size_t i = 0; i < KSM_COUNT(slots); i++)
		CHECK_EQ(ksm_os_lock_try(open_file("d/domain"), KSM_LOCK_LIVENESS + slots[i]), 0);
	uint64_t from = 0;
	for (size_t i = 0; i < KSM_COUNT(sorted); i++) {
		int64_t at = ksm_os_lock_find(one, KSM_LOCK_LIVENESS + from, KSM_PEERS_MAX - from);
		CHECK_EQ(at, KSM_LOCK_LIVENESS + sorted[i]);
		from = sorted[i] + 1;
	}
	struct ksm_domain_options options = kit_options("d");
	struct ksm_settings settings;
	uint32_t peers;
	CHECK_EQ(ksm_settings_read(&options, &settings, &peers), 0);
	CHECK_EQ(peers, KSM_COUNT(slots));
}

TEST(settings_that_are_torn_or_garbage_are_the_defaults)
{
	struct ksm_settings defaults, settings, good = {1, 1000000, 1, 60000, 0, 100};
	struct ksm_settings_record record;
	uint64_t state = 8;
	CHECK_EQ(try_open(kit_directory(), "d", true), 0);
	int fd = open_file("d/domain");
	ksm_settings_default(&defaults);
	CHECK_EQ(ksm_rendezvous_settings(fd, &settings), 0);
	CHECK_EQ(memcmp(&settings, &defaults, sizeof(settings)), 0);
	CHECK_EQ(ksm_rendezvous_set_settings(fd, &good), 0);
	CHECK_EQ(ksm_rendezvous_settings(fd, &settings), 0);
	CHECK_EQ(memcmp(&settings, &good, sizeof(settings)), 0);
	uint64_t offset = offsetof(struct ksm_domain_file, settings);
	CHECK_EQ(ksm_os_pread(fd, &record, sizeof(record), offset), 0);
	for (size_t bit = 0; bit < sizeof(record.settings) * 8; bit++) { /* half an old one, half a new one */
		struct ksm_settings_record torn = record;
		((unsigned char *)&torn)[bit / 8] ^= (unsigned char)(1u << bit % 8);
		CHECK_EQ(ksm_os_pwrite(fd, &torn, sizeof(torn), offset), 0);
		CHECK_EQ(ksm_rendezvous_settings(fd, &settings), 0);
		CHECK_EQ(memcmp(&settings, &defaults, sizeof(settings)), 0);
	}
	for (int i = 0; i < 1000; i++) {
		uint64_t garbage[sizeof(record) / 8] = {kit_random(&state), kit_random(&state), kit_random(&state),
							kit_random(&state)};
		CHECK_EQ(ksm_os_pwrite(fd, garbage, sizeof(record), offset), 0);
		CHECK_EQ(ksm_rendezvous_settings(fd, &settings), 0);
		CHECK_EQ(memcmp(&settings, &defaults, sizeof(settings)), 0);
	}
	CHECK_SYS(ftruncate(fd, (off_t)offset + 4));
	CHECK_EQ(ksm_rendezvous_settings(fd, &settings), 0);
	CHECK_EQ(memcmp(&settings, &defaults, sizeof(settings)), 0);
	static const struct ksm_settings bad[] = {
		{2, 1, 1, 0, 0, 1},       {1, 0, 1, 0, 0, 1},     {1, 1000001, 1, 0, 0, 1},    {1, 1, 0, 0, 0, 1},
		{1, 1, 1000001, 0, 0, 1}, {1, 1, 1, 60001, 0, 1}, {UINT32_MAX, 1, 1, 0, 0, 1}, {1, 1, 1, 0, 2, 1},
		{1, 1, 1, 0, 0, 0},       {1, 1, 1, 0, 1, 101},
	};
	for (size_t i = 0; i < KSM_COUNT(bad); i++)
		CHECK_EQ(ksm_rendezvous_set_settings(fd, &bad[i]), -EINVAL);
}
