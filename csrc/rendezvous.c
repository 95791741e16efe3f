/* SPDX-License-Identifier: MIT */
/*
 * DOC: The rendezvous
 *
 * A directory per user and domain where processes that share nothing else find one another:
 *
 *    /dev/shm/ksmalloc-UID/          base, mode 0700 (or the path given)
 *      default/                      a domain, mode 0700
 *        domain                      magic, layout, random id, settings; and the locks
 *        peer-0, peer-3, …           a socket for each peer, where it hands out its descriptors
 *
 * Only the file's page and the names take room; frames are elsewhere and go with the last process. The file is read
 * and written with pread and pwrite, never through a mapping, so that neither a full file system nor a truncation
 * can kill anybody. Locks are open file description locks far beyond its end; their place is the same in every
 * version of the layout, so that one version can tell whether another lives there.
 *
 * MEET-1. Nothing here is followed through a symbolic link, and nothing is used that another user owns, that others may
 *         open, or that has a second name elsewhere.
 * MEET-2. Listing, creating, joining and clearing happen under the join lock of the file that has the name when it is held.
 *         It is waited for, but not for ever.
 * MEET-3. Settings are one record written at once, with a check; a reader that meets a torn one reads again.
 */
#include "rendezvous.h"

#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- opening --------------------------------------------------------------------------------------- */

static bool name_is_valid(const char *name)
{
	size_t n = strlen(name);
	if (n == 0 || n > KSM_NAME_MAX || name[0] == '.')
		return false;
	for (size_t i = 0; i < n; i++) {
		char c = name[i];
		if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
		      c == '_' || c == '-'))
			return false;
	}
	return true;
}

/* MEET-1 */
static int check_owner(int fd, mode_t kind)
{
	struct stat stat;
	int r = ksm_os_stat(fd, &stat);
	if (r)
		return r;
	if ((stat.st_mode & S_IFMT) != kind)
		return kind == S_IFDIR ? -ENOTDIR : KSM_EOWNER;
	if (kind == S_IFREG && stat.st_nlink > 1) /* some other file of ours: it is not to be written over */
		return KSM_EOWNER;
	return stat.st_uid == geteuid() && (stat.st_mode & 077) == 0 ? 0 : KSM_EOWNER;
}

static int open_directory(int at, const char *name, bool create)
{
	if (create) {
		int r = ksm_os_mkdir(at, name, 0700);
		if (r && r != -EEXIST)
			return r;
	}
	int fd = ksm_os_open(at, name, O_RDONLY | O_DIRECTORY, 0);
	if (fd == -ENOTDIR) { /* a link or something else? */
		struct stat stat;
		if (!ksm_os_stat_at(at, name, &stat) && S_ISLNK(stat.st_mode))
			return -ELOOP;
	}
	if (fd < 0)
		return fd;
	int r = check_owner(fd, S_IFDIR);
	if (r) {
		ksm_os_close(fd);
		return r;
	}
	return fd;
}

static int open_file(int directory, bool create)
{
	int fd = ksm_os_open(directory, "domain", O_RDWR | O_NONBLOCK | (create ? O_CREAT : 0), 0600);
	if (fd < 0)
		return fd;
	int r = check_owner(fd, S_IFREG);
	if (r) {
		ksm_os_close(fd);
		return r;
	}
	return fd;
}

int ksm_rendezvous_open(const struct ksm_domain_options *options, bool create, struct ksm_rendezvous *out)
{
	const char *name = options && options->name ? options->name : "default";
	struct ksm_rendezvous rendezvous = {.directory = -1, .file = -1};
	char base[KSM_PATH_ROOM];
	int n;

	*out = rendezvous;
	if (!name_is_valid(name))
		return -EINVAL;
	if (options && options->path)
		n = snprintf(base, sizeof(base), "%s", options->path);
	else
		n = snprintf(base, sizeof(base), "/dev/shm/ksmalloc-%u", (unsigned)geteuid());
	if (n <= 0)
		return -EINVAL;
	if ((size_t)n + strlen(name) + 2 > sizeof(base))
		return -ENAMETOOLONG;
	snprintf(rendezvous.path, sizeof(rendezvous.path), "%.*s/%.*s", (int)(sizeof(base) - KSM_NAME_MAX - 2), base,
		 KSM_NAME_MAX, name);

	int parent = open_directory(AT_FDCWD, base, create);
	if (parent < 0)
		return parent;
	rendezvous.directory = open_directory(parent, name, create);
	ksm_os_close(parent);
	if (rendezvous.directory < 0)
		return rendezvous.directory;
	rendezvous.file = open_file(rendezvous.directory, create);
	if (rendezvous.file < 0) {
		ksm_os_close(rendezvous.directory);
		return rendezvous.file;
	}
	*out = rendezvous;
	return 0;
}

void ksm_rendezvous_close(struct ksm_rendezvous *rendezvous)
{
	ksm_os_close(rendezvous->directory);
	ksm_os_close(rendezvous->file);
	rendezvous->directory = rendezvous->file = -1;
}

bool ksm_rendezvous_is_gone(const struct ksm_rendezvous *rendezvous)
{
	struct stat opened, named;
	return ksm_os_stat(rendezvous->file, &opened) || ksm_os_stat_at(rendezvous->directory, "domain", &named) ||
	       opened.st_ino != named.st_ino || opened.st_dev != named.st_dev;
}

/* ---- locks and the head ------------------------------------------------------------------------------ */

int ksm_rendezvous_lock(int file, uint64_t byte, uint32_t timeout_ms)
{
	uint64_t deadline = ksm_os_now_ns() + timeout_ms * 1000000ull;
	for (uint64_t nap = 100000;; nap = KSM_MIN(nap * 2, 10000000ull)) {
		int r = ksm_os_lock_try(file, byte);
		if (r != -EAGAIN || ksm_os_now_ns() >= deadline)
			return r;
		ksm_os_sleep_ns(nap);
	}
}

int ksm_rendezvous_read(int file, struct ksm_domain_file *out)
{
	return ksm_os_pread(file, out, sizeof(*out), 0);
}

int ksm_rendezvous_write(int file, const uint8_t id[16], uint32_t backing)
{
	unsigned char page[KSM_PAGE_SIZE] = {0};
	struct ksm_domain_file head = {
		.magic = KSM_MAGIC,
		.version = KSM_LAYOUT_VERSION,
		.layout = ksm_layout_hash(),
		.backing = backing,
	};
	struct ksm_settings settings;
	ksm_rendezvous_settings(file, &settings);
	memcpy(head.id, id, sizeof(head.id));
	memcpy(page, &head, sizeof(head));
	int r = ksm_os_pwrite(file, page, sizeof(page), 0);
	return r ? r : ksm_rendezvous_set_settings(file, &settings);
}

int ksm_rendezvous_is_inhabited(int file)
{
	int64_t at = ksm_os_lock_find(file, KSM_LOCK_LIVENESS, KSM_PEERS_MAX);
	return at == -ENOENT ? 0 : at < 0 ? (int)at : 1;
}

/* ---- settings ---------------------------------------------------------------------------------------- */

static uint32_t settings_check(const struct ksm_settings *settings)
{
	const unsigned char *bytes = (const unsigned char *)settings;
	uint32_t sum = 2166136261u;
	for (size_t i = 0; i < sizeof(*settings); i++)
		sum = (sum ^ bytes[i]) * 16777619u;
	return sum;
}

void ksm_settings_default(struct ksm_settings *out)
{
	*out = (struct ksm_settings){
		.run = 1,
		.pages_to_scan = 2048,
		.max_pages_to_merge = 2048,
		.sleep_millisecs = 20,
		.advisor_mode = 1,
		.advisor_max_cpu = 20,
	};
}

static bool settings_are_valid(const struct ksm_settings *s)
{
	return s->run <= 1 && s->pages_to_scan >= 1 && s->pages_to_scan <= 1000000 && s->max_pages_to_merge >= 1 &&
	       s->max_pages_to_merge <= 1000000 && s->sleep_millisecs <= 60000 && s->advisor_mode <= 1 &&
	       s->advisor_max_cpu >= 1 && s->advisor_max_cpu <= 100;
}

int ksm_rendezvous_settings(int file, struct ksm_settings *out)
{
	struct ksm_settings_record record;
	ksm_settings_default(out);
	for (int attempt = 0; attempt < 8; attempt++) {
		int r = ksm_os_pread(file, &record, sizeof(record), offsetof(struct ksm_domain_file, settings));
		if (r)
			return r == -ENODATA ? 0 : r;
		if (record.check == settings_check(&record.settings) && settings_are_valid(&record.settings)) {
			*out = record.settings;
			return 0;
		}
	}
	return 0;
}

int ksm_rendezvous_set_settings(int file, const struct ksm_settings *settings)
{
	if (!settings_are_valid(settings))
		return -EINVAL;
	struct ksm_settings_record record = {.settings = *settings, .check = settings_check(settings), .version = 1};
	return ksm_os_pwrite(file, &record, sizeof(record), offsetof(struct ksm_domain_file, settings));
}

int ksm_rendezvous_enter(const struct ksm_domain_options *options, bool create, uint32_t timeout_ms,
			 struct ksm_rendezvous *out, int *lock)
{
	int r = -EAGAIN;
	for (int attempt = 0; attempt < 16; attempt++) {
		r = ksm_rendezvous_open(options, create, out);
		if (r == -ENOENT && create)
			continue; /* cleaned away this very moment */
		if (r)
			return r;
		*lock = ksm_os_reopen(out->file, out->directory, "domain");
		r = *lock < 0 ? *lock : ksm_rendezvous_lock(*lock, KSM_LOCK_JOIN, timeout_ms);
		if (!r && !ksm_rendezvous_is_gone(out))
			return 0;
		ksm_os_close(*lock);
		ksm_rendezvous_close(out);
		if (r && r != -ESTALE)
			return r;
		r = -EAGAIN; /* cleaned away while we waited */
	}
	return r;
}

void ksm_rendezvous_unlock(int lock)
{
	ksm_os_unlock(lock, KSM_LOCK_JOIN); /* the child of a fork may have the description, too */
	ksm_os_close(lock);
}

/* ---- clearing ----------------------------------------------------------------------------------------- */

static int unlink_socket(const char *name, void *context)
{
	const struct ksm_rendezvous *rendezvous = context;
	if (!strncmp(name, "peer-", 5))
		ksm_os_unlink(rendezvous->directory, name, false);
	return 0;
}

int ksm_rendezvous_clear(const struct ksm_rendezvous *rendezvous, bool everything)
{
	int r = ksm_os_list(rendezvous->directory, unlink_socket, (void *)rendezvous);
	if (r || !everything)
		return r;
	r = ksm_os_unlink(rendezvous->directory, "domain", false);
	if (r && r != -ENOENT)
		return r;
	return ksm_os_unlink(AT_FDCWD, rendezvous->path, true);
}

/* ---- for those outside ---------------------------------------------------------------------------------------- */

int ksm_settings_read(const struct ksm_domain_options *options, struct ksm_settings *out, uint32_t *peers)
{
	struct ksm_rendezvous rendezvous;
	if (peers)
		*peers = 0;
	int r = ksm_rendezvous_open(options, false, &rendezvous);
	if (r == -ENOENT) {
		ksm_settings_default(out);
		return 0;
	}
	if (r)
		return r;
	r = ksm_rendezvous_settings(rendezvous.file, out);
	for (uint64_t from = 0; !r && peers && from < KSM_PEERS_MAX; ++*peers) {
		int64_t at = ksm_os_lock_find(rendezvous.file, KSM_LOCK_LIVENESS + from, KSM_PEERS_MAX - from);
		if (at < 0)
			break;
		from = (uint64_t)at - KSM_LOCK_LIVENESS + 1;
	}
	ksm_rendezvous_close(&rendezvous);
	return r;
}

/* Kernel KSM refuses it as well: what the advisor chooses nobody sets. */
static int check_advisor(int file, const struct ksm_settings *settings)
{
	struct ksm_settings old;
	int r = settings->advisor_mode ? ksm_rendezvous_settings(file, &old) : 0;
	return !r && settings->advisor_mode && settings->pages_to_scan != old.pages_to_scan ? -EINVAL : r;
}

int ksm_settings_write(const struct ksm_domain_options *options, const struct ksm_settings *settings)
{
	struct ksm_domain_file head = {0};
	struct ksm_rendezvous rendezvous;
	int lock, r = ksm_rendezvous_enter(options, true, 10000, &rendezvous, &lock);
	if (r)
		return r == -EAGAIN ? KSM_ENOPEER : r; /* as joining says */
	if (ksm_rendezvous_read(rendezvous.file, &head) == -ENODATA)
		r = ksm_rendezvous_write(rendezvous.file, head.id, KSM_BACKING_MEMFD); /* before anybody lives there */
	if (!r)
		r = check_advisor(rendezvous.file, settings);
	if (!r)
		r = ksm_rendezvous_set_settings(rendezvous.file, settings);
	ksm_rendezvous_unlock(lock);
	ksm_rendezvous_close(&rendezvous);
	return r;
}

int ksm_domain_clean(const struct ksm_domain_options *options)
{
	struct stat stat;
	struct ksm_rendezvous rendezvous;
	int lock, r = ksm_rendezvous_enter(options, false, 1000, &rendezvous, &lock);
	if (r)
		return r == -EAGAIN ? -EBUSY : r;
	r = ksm_rendezvous_is_inhabited(rendezvous.file);
	r = r > 0 ? -EBUSY : r;
	if (!r)
		r = ksm_rendezvous_clear(&rendezvous, true);
	if (r == -ENOTEMPTY && !ksm_os_stat_at(rendezvous.directory, "domain", &stat))
		r = -EBUSY; /* somebody has come since */
	ksm_rendezvous_unlock(lock);
	ksm_rendezvous_close(&rendezvous);
	return r;
}
