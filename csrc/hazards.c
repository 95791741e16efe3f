/* SPDX-License-Identifier: MIT */
/*
 * DOC: Hazards
 *
 * Holding every thread does not stop what writes to memory by itself: an io_uring request that completes, asynchronous
 * I/O, a device that was told an address. This file finds out whether there is any of that, and names it.
 *
 *    descriptors       io_uring; character devices but a few harmless ones; AF_XDP sockets; shared buffers of devices;
 *                      anonymous inodes of a kind we do not know: of every table that a thread of the program has
 *    AIO contexts      the system's count of them; if it is not zero, mappings called [aio]
 *    mappings          of rings and of devices: what is left when the descriptor has been closed
 *    pinned memory     VmPin
 *
 * A look at running threads is thorough, and may be late by the time it ends. A look at held ones is exact for
 * descriptors and AIO: only a thread can make one.
 *
 * HAZ-1. A look at held threads allocates nothing, takes no lock, and waits for no server of a file system, because
 *        that server may be one of the threads (a FUSE file system's daemon).
 * HAZ-2. What is not known to be harmless is refused. A failed look is an error, not "none", unless what was to be looked
 *        at has vanished.
 * HAZ-3. Only sockets are remembered: a socket's inode number is not used again while it exists, and the kernel counts
 *        through 2^32 of them first.
 * HAZ-4. The system's AIO count is read again in a look at held threads. If it has not changed since mappings were last
 *        read, there is no new context here: another process would have had to give up exactly as many entries.
 *
 * Mappings are read while threads run, for at most a twentieth of the time. What is not seen: a ring whose descriptor was
 * closed since, or one that never had a descriptor and no mapping (IORING_SETUP_REGISTERED_FD_ONLY and _NO_MMAP
 * together); another process that writes into this one (process_vm_writev, ptrace, /proc/PID/mem).
 *
 * Called by scanners only, each with its own; a scanner that ends destroys its own.
 */
#include "hazards.h"

#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TABLES_MOST 64     /* different tables of descriptors in one process */
#define SOCKETS_MOST 4096u /* remembered */
#define BUFFER_BYTES 32768u
#define DEVICES_MOST 24
#define TEXT_BYTES 120

struct device {
	unsigned major, first, last; /* minors */
};

struct ksm_hazards {
	int self;               /* /proc/self */
	int status, maps, aio;  /* the calling thread's: the main thread may end */
	uint64_t maps_after_ns; /* not to be read again before */
	char aio_seen[24];      /* the count when mappings were last read */
	bool aio_ours;          /* and whether one of them was a context */
	size_t devices_count;
	struct device devices[DEVICES_MOST];
	/* of the look under way */
	int tid, directory; /* whose table */
	char text[TEXT_BYTES];
	/* */
	uint32_t sockets[SOCKETS_MOST]; /* inode numbers of harmless ones */
	char buffer[BUFFER_BYTES];      /* of directories; of mappings */
};

/* ---- words, without stdio ------------------------------------------------------------------------------ */

static size_t put(char *text, size_t room, size_t at, const char *what)
{
	while (*what && at + 1 < room)
		text[at++] = *what++;
	text[at] = 0;
	return at;
}

static size_t put_number(char *text, size_t room, size_t at, unsigned number)
{
	char digits[12];
	size_t i = sizeof(digits) - 1;
	digits[i] = 0;
	do
		digits[--i] = (char)('0' + number % 10);
	while (number /= 10);
	return put(text, room, at, digits + i);
}

static bool begins(const char *text, const char *with)
{
	return !strncmp(text, with, strlen(with));
}

/* A descriptor or a thread that is not there any more. Of held threads' descriptors none vanishes, but a scanner of ours
 * that has just been started may still have the program's table. */
static bool has_gone(int r)
{
	return r == -ENOENT || r == -ESRCH;
}

static int found_descriptor(struct ksm_hazards *h, const char *what, const char *more, unsigned number)
{
	size_t n = put(h->text, TEXT_BYTES, 0, what);
	if (*more) {
		n = put(h->text, TEXT_BYTES - 40, n, " ");
		n = put(h->text, TEXT_BYTES - 40, n, more);
	}
	n = put(h->text, TEXT_BYTES, n, ": descriptor ");
	n = put_number(h->text, TEXT_BYTES, n, number);
	n = put(h->text, TEXT_BYTES, n, " of thread ");
	put_number(h->text, TEXT_BYTES, n, (unsigned)h->tid);
	return KSM_EDEVICES;
}

static int found(struct ksm_hazards *h, const char *what, const char *more)
{
	put(h->text, TEXT_BYTES, put(h->text, TEXT_BYTES, 0, what), more);
	return KSM_EDEVICES;
}

/* ---- harmless devices ------------------------------------------------------------------------------------- */

static void allow(struct ksm_hazards *h, unsigned major, unsigned first, unsigned last)
{
	if (h->devices_count < DEVICES_MOST)
		h->devices[h->devices_count++] = (struct device){major, first, last};
}

/* The number before a name in /proc/misc or /proc/devices; -1: not there. */
static int number_of(const char *text, const char *name)
{
	for (const char *line = text; *line;) {
		const char *end = strchrnul(line, '\n');
		char *word;
		unsigned long number = strtoul(line, &word, 10);
		if (word != line && *word == ' ' && (size_t)(end - word - 1) == strlen(name) &&
		    !strncmp(word + 1, name, strlen(name)))
			return (int)number;
		line = *end ? end + 1 : end;
	}
	return -1;
}

/* Numbers of Documentation/admin-guide/devices.txt; those that are given out at boot, by name. */
static void allow_devices(struct ksm_hazards *h)
{
	static const char *const misc[] = {"tun", "fuse", "userfaultfd", "hw_random", "rtc"};
	allow(h, 1, 3, 3);            /* null */
	allow(h, 1, 5, 5);            /* zero */
	allow(h, 1, 7, 9);            /* full, random, urandom */
	allow(h, 1, 11, 11);          /* kmsg */
	allow(h, 4, 0, 255);          /* consoles and serial lines */
	allow(h, 5, 0, 3);            /* tty, console, ptmx */
	allow(h, 136, 0, UINT32_MAX); /* the ends of pseudo-terminals; their number is not bounded by 256 */
	for (unsigned major = 137; major < 144; major++)
		allow(h, major, 0, UINT32_MAX);
	if (ksm_os_read_file(AT_FDCWD, "/proc/misc", h->buffer, BUFFER_BYTES) > 0)
		for (size_t i = 0; i < KSM_COUNT(misc); i++) {
			int minor = number_of(h->buffer, misc[i]);
			if (minor >= 0)
				allow(h, 10, (unsigned)minor, (unsigned)minor);
		}
	if (ksm_os_read_file(AT_FDCWD, "/proc/devices", h->buffer, BUFFER_BYTES) > 0) {
		int major = number_of(h->buffer, "rtc");
		if (major >= 0)
			allow(h, (unsigned)major, 0, UINT32_MAX);
	}
}

static bool is_allowed(const struct ksm_hazards *h, unsigned major, unsigned minor)
{
	for (size_t i = 0; i < h->devices_count; i++)
		if (h->devices[i].major == major && h->devices[i].first <= minor && minor <= h->devices[i].last)
			return true;
	return false;
}

/* ---- descriptors ---------------------------------------------------------------------------------------- */

/* Kinds of anonymous inodes that write into nobody's memory but in a call that somebody makes. */
static bool anonymous_is_harmless(const char *kind)
{
	static const char *const harmless[] = {"[eventfd]",
					       "[eventpoll]",
					       "[signalfd]",
					       "[timerfd]",
					       "inotify",
					       "[fanotify]",
					       "[userfaultfd]",
					       "[pidfd]",
					       "[perf_event]",
					       "[fscontext]",
					       "[landlock-ruleset]",
					       "seccomp notify",
					       "[secretmem]",
					       "bpf",
					       "[bpf",
					       "btf",
					       "[btf",
					       "[mount",
					       "[nsfs]",
					       "[rseq",
					       "[eventfs",
					       "[lsm",
					       "sync_file"};
	for (size_t i = 0; i < KSM_COUNT(harmless); i++)
		if (begins(kind, harmless[i]))
			return true;
	return false;
}

static int look_socket(struct ksm_hazards *h, unsigned number, const char *name, uint32_t inode)
{
	char path[64], family[32];
	uint32_t *seen = &h->sockets[inode % SOCKETS_MOST];
	if (inode && *seen == inode)
		return 0; /* HAZ-3 */
	size_t n = put(path, sizeof(path), 0, "/proc/self/task/");
	n = put_number(path, sizeof(path), n, (unsigned)h->tid);
	n = put(path, sizeof(path), n, "/fd/");
	put(path, sizeof(path), n, name);
	int r = ksm_os_attribute(path, "system.sockprotoname", family, sizeof(family));
	if (r < 0)
		return has_gone(r) && has_gone(ksm_os_read_link(h->directory, name, family, sizeof(family))) ? 0 : r;
	if (begins(family, "XDP"))
		return found_descriptor(h, "AF_XDP socket", "", number);
	*seen = inode;
	return 0;
}

static int look_path(struct ksm_hazards *h, unsigned number, const char *name, const char *path)
{
	unsigned type, major, minor;
	int r = ksm_os_kind(h->directory, name, &type, &major, &minor);
	if (r)
		return has_gone(r) ? 0 : r;
	if (type == S_IFCHR && !is_allowed(h, major, minor))
		return found_descriptor(h, "device", path, number);
	if (!type) /* buffers that devices share are such files */
		return found_descriptor(h, "device's buffer", path, number);
	return 0;
}

static int look_descriptor(unsigned number, void *context)
{
	struct ksm_hazards *h = context;
	char name[12], link[256];
	put_number(name, sizeof(name), 0, number);
	int r = ksm_os_read_link(h->directory, name, link, sizeof(link));
	if (r < 0)
		return has_gone(r) ? 0 : r == -ENAMETOOLONG ? look_path(h, number, name, "") : r;
	if (begins(link, "pipe:["))
		return 0;
	if (begins(link, "socket:["))
		return look_socket(h, number, name, (uint32_t)strtoul(link + 8, NULL, 10));
	if (begins(link, "anon_inode:")) {
		const char *kind = link + strlen("anon_inode:");
		if (begins(kind, "[io_uring]"))
			return found_descriptor(h, "io_uring", "", number);
		return anonymous_is_harmless(kind) ? 0 : found_descriptor(h, "a descriptor of the kind", kind, number);
	}
	return look_path(h, number, name, link);
}

static int look_table(struct ksm_hazards *h, int tid)
{
	char path[32];
	size_t n = put(path, sizeof(path), 0, "task/");
	n = put_number(path, sizeof(path), n, (unsigned)tid);
	put(path, sizeof(path), n, "/fd");
	int directory = ksm_os_open(h->self, path, O_RDONLY | O_DIRECTORY, 0);
	if (directory < 0)
		return has_gone(directory) ? 0 : directory;
	h->tid = tid;
	h->directory = directory;
	int r = ksm_os_list_numbers(directory, h->buffer, BUFFER_BYTES, look_descriptor, h);
	ksm_os_close(directory);
	return has_gone(r) ? 0 : r;
}

/* Each table once, if the kernel lets us compare them; else each thread's. */
static int look_tables(struct ksm_hazards *h, const int *tids, size_t count)
{
	int seen[TABLES_MOST];
	size_t known = 0;
	for (size_t i = 0; i < count; i++) {
		bool again = false;
		for (size_t k = 0; k < known && !again; k++)
			again = ksm_os_same_descriptors(seen[k], tids[i]) == 1;
		if (again)
			continue;
		int r = look_table(h, tids[i]);
		if (r)
			return r;
		if (known < TABLES_MOST)
			seen[known++] = tids[i];
	}
	return 0;
}

/* ---- the process ------------------------------------------------------------------------------------------- */

static int look_mapping(struct ksm_hazards *h, const char *line)
{
	const char *path = line;
	for (int field = 0; field < 5 && path; field++) { /* addresses, access, offset, device, inode */
		path = strchr(path, ' ');
		path = path ? path + strspn(path, " ") : NULL;
	}
	if (!path)
		return 0;
	if (begins(path, "/[aio]"))
		return h->aio_ours = true, found(h, "asynchronous I/O: ", "the program has a context (io_setup)");
	if (begins(path, "anon_inode:[io_uring]"))
		return found(h, "io_uring: ", "a mapping of a ring");
	if (begins(path, "/dmabuf") || (begins(path, "anon_inode:") && !anonymous_is_harmless(path + 11)))
		return found(h, "a device's mapping: ", path);
	if (begins(path, "/dev/") && !begins(path, "/dev/shm/") && !begins(path, "/dev/zero") &&
	    !begins(path, "/dev/hugepages/") && !begins(path, "/dev/null"))
		return found(h, "a device's mapping: ", path);
	return 0;
}

/* All of them, a buffer at a time; a line that does not fit into what is left is read again. */
static int look_mappings(struct ksm_hazards *h)
{
	uint64_t offset = 0;
	h->aio_ours = false;
	for (;;) {
		int n = ksm_os_read_text(h->maps, offset, h->buffer, BUFFER_BYTES);
		if (n <= 0)
			return n;
		char *line = h->buffer;
		for (char *end; (end = strchr(line, '\n')); line = end + 1) {
			*end = 0;
			int r = look_mapping(h, line);
			if (r)
				return r;
		}
		if (line == h->buffer)
			return -EOVERFLOW; /* no line is that long */
		offset += (uint64_t)(line - h->buffer);
	}
}

static int look_pinned(struct ksm_hazards *h)
{
	int n = ksm_os_read_text(h->status, 0, h->buffer, BUFFER_BYTES);
	if (n < 0)
		return n;
	const char *field = strstr(h->buffer, "\nVmPin:");
	if (field && strtoul(field + 7, NULL, 10))
		return found(h, "memory is pinned for a device: ", "VmPin is not 0");
	return 0;
}

/* Is there an AIO context of ours, or might there be? */
static int look_aio(struct ksm_hazards *h)
{
	char count[sizeof(h->aio_seen)];
	if (h->aio < 0)
		return 0; /* a kernel without AIO */
	int n = ksm_os_read_text(h->aio, 0, count, sizeof(count));
	if (n < 0)
		return n;
	if (!strcmp(count, "0\n") || (!h->aio_ours && !strcmp(count, h->aio_seen)))
		return 0; /* HAZ-4 */
	int r = look_mappings(h);
	if (!r)
		memcpy(h->aio_seen, count, sizeof(count));
	return r;
}

static int look_running(struct ksm_hazards *h)
{
	uint64_t begin = ksm_os_now_ns();
	int r = look_pinned(h);
	if (r || begin < h->maps_after_ns)
		return r;
	r = look_mappings(h);
	uint64_t end = ksm_os_now_ns();
	h->maps_after_ns = r ? 0 : end + 20 * (end - begin);
	return r;
}

int ksm_hazards_look(struct ksm_hazards *hazards, const int *tids, size_t count, bool parked)
{
	hazards->text[0] = 0;
	int r = parked ? 0 : look_running(hazards);
	if (!r)
		r = look_aio(hazards);
	if (!r)
		r = look_tables(hazards, tids, count);
	if (r && r != KSM_EDEVICES)
		found(hazards, "the process's descriptors and mappings cannot be read", "");
	return r;
}

const char *ksm_hazards_text(const struct ksm_hazards *hazards)
{
	return hazards->text;
}

/* ---- life -------------------------------------------------------------------------------------------------- */

int ksm_hazards_create(struct ksm_hazards **out)
{
	void *at;
	int r = ksm_os_map_table(ksm_page_round_up(sizeof(struct ksm_hazards)), &at);
	if (r)
		return r;
	struct ksm_hazards *h = at;
	h->status = h->maps = h->aio = -1;
	h->self = ksm_os_open(AT_FDCWD, "/proc/self/", O_RDONLY | O_DIRECTORY, 0);
	r = h->self < 0 ? h->self : 0;
	if (!r && (h->status = ksm_os_open(AT_FDCWD, "/proc/thread-self/status", O_RDONLY, 0)) < 0)
		r = h->status;
	if (!r && (h->maps = ksm_os_open(AT_FDCWD, "/proc/thread-self/maps", O_RDONLY, 0)) < 0)
		r = h->maps;
	if (!r && (h->aio = ksm_os_open(AT_FDCWD, "/proc/sys/fs/aio-nr", O_RDONLY, 0)) < 0 && h->aio != -ENOENT)
		r = h->aio;
	if (r) {
		ksm_hazards_destroy(h);
		return r;
	}
	allow_devices(h);
	char *rest = (char *)ksm_page_round_up((uintptr_t)h->sockets); /* used for that, and perhaps never again */
	ksm_os_advise(rest, ksm_page_round_up(sizeof(*h)) - (size_t)(rest - (char *)h), MADV_DONTNEED);
	*out = h;
	return 0;
}

void ksm_hazards_destroy(struct ksm_hazards *hazards)
{
	if (!hazards)
		return;
	ksm_os_close(hazards->aio);
	ksm_os_close(hazards->maps);
	ksm_os_close(hazards->status);
	ksm_os_close(hazards->self);
	ksm_os_unmap(hazards, ksm_page_round_up(sizeof(*hazards)));
}
