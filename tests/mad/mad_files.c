/* SPDX-License-Identifier: MIT */
/*
 * What can be done to the files themselves: the memory files by their descriptors, the rendezvous by its names.
 */
#include "mad.h"

#include "member.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | F_SEAL_WRITE | 0x0010)

/* ---- memory files ------------------------------------------------------------------------------------------- */

/* Must be refused: a mapping whose file shrinks kills with SIGBUS, a bitmap that others write loses frames. */
static void must_fail(struct mad_state *mad, bool happened, const char *what, const char *file)
{
	mad_add(&mad->totals->ways[MAD_FILES], 1);
	if (!happened)
		return;
	mad_add(&mad->totals->allowed, 1);
	fprintf(stderr, "%s of %s was allowed\n", what, file);
}

static void try_size(struct mad_state *mad, int fd, const char *file)
{
	struct stat stat;
	char path[48];
	if (fstat(fd, &stat))
		return;
	must_fail(mad, !ftruncate(fd, 0), "truncation", file);
	must_fail(mad, !ftruncate(fd, stat.st_size / 2), "truncation", file);
	must_fail(mad, !ftruncate(fd, stat.st_size + MAD_PAGE), "growth", file);
	must_fail(mad, !fallocate(fd, 0, stat.st_size, MAD_PAGE), "growth", file);
	must_fail(mad, pwrite(fd, "x", 1, stat.st_size) == 1, "growth", file);
	must_fail(mad, !fcntl(fd, F_ADD_SEALS, SEALS), "sealing", file);
	snprintf(path, sizeof(path), "/proc/thread-self/fd/%d", fd);
	int again = open(path, O_RDWR | O_TRUNC | O_CLOEXEC);
	must_fail(mad, again >= 0, "truncation by opening", file);
	if (again >= 0)
		close(again);
}

static void try_write(struct mad_state *mad, int fd, const void *mapped, const char *file)
{
	must_fail(mad, pwrite(fd, "x", 1, MAD_PAGE) == 1, "writing", file);
	must_fail(mad, !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, MAD_PAGE), "punching", file);
	void *at = mmap(NULL, MAD_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must_fail(mad, at != MAP_FAILED, "mapping", file);
	if (at != MAP_FAILED)
		munmap(at, MAD_PAGE);
	must_fail(mad, !mprotect((void *)(uintptr_t)mapped, MAD_PAGE, PROT_READ | PROT_WRITE), "mprotect", file);
}

void mad_try_files(struct mad_state *mad)
{
	struct ksm_peer *peer = &mad->member->peer;
	try_size(mad, peer->fds.control, "the control memory");
	try_size(mad, peer->fds.store, "the store");
	try_size(mad, peer->seat.bitmap_fd, "a bitmap of one's own");
	for (ksm_slotno slot = 0; slot < KSM_PEERS_MAX; slot++) {
		if (!peer->others[slot].bitmap)
			continue;
		try_size(mad, peer->others[slot].fd, "a bitmap");
		try_write(mad, peer->others[slot].fd, peer->others[slot].bitmap, "a bitmap");
	}
}

/* ---- the rendezvous ----------------------------------------------------------------------------------------- */

static void nap(struct mad_state *mad)
{
	ksm_os_sleep_ns(1000000 + mad_below(&mad->random, 30000000));
}

static void garble_file(struct mad_state *mad)
{
	char page[MAD_PAGE], garbage[MAD_PAGE];
	int fd = mad->member->peer.fds.file;
	if (pread(fd, page, sizeof(page), 0) != sizeof(page))
		return;
	for (size_t i = 0; i < sizeof(garbage); i++)
		garbage[i] = (char)mad_random(&mad->random);
	if (mad_below(&mad->random, 3) == 0) {
		if (ftruncate(fd, (off_t)mad_below(&mad->random, 64)))
			return;
	} else {
		size_t from = mad_below(&mad->random, sizeof(struct ksm_domain_file));
		if (pwrite(fd, garbage, 1 + mad_below(&mad->random, 64), (off_t)from) < 0)
			return;
	}
	nap(mad);
	if (pwrite(fd, page, sizeof(page), 0) != sizeof(page))
		mad_die("pwrite", errno);
}

static void hold_locks(struct mad_state *mad)
{
	struct ksm_peer *peer = &mad->member->peer;
	int fd = openat(peer->fds.directory, "domain", O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0)
		return;
	if (mad_below(&mad->random, 2))
		ksm_os_lock_try(fd, KSM_LOCK_JOIN);
	else
		for (unsigned i = 0; i < 20; i++) /* the living whom nobody has ever heard of */
			ksm_os_lock_try(fd, KSM_LOCK_LIVENESS + mad_below(&mad->random, KSM_PEERS_MAX));
	for (unsigned i = 0; i < 4; i++)
		nap(mad);
	close(fd);
}

/* Something else of that name, for a while. */
static void plant(struct mad_state *mad, int directory, const char *name, const char *aside)
{
	if (renameat(directory, name, directory, aside))
		return;
	switch (mad_below(&mad->random, 5)) {
	case 0:
		mkfifoat(directory, name, 0600);
		break;
	case 1:
		mkdirat(directory, name, 0700);
		break;
	case 2:
		symlinkat(aside, directory, name);
		break;
	case 3: {
		int fd = openat(directory, name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
		if (fd >= 0)
			close(fd);
		break;
	}
	default: /* nothing */
		break;
	}
	nap(mad);
	unlinkat(directory, name, 0);
	unlinkat(directory, name, AT_REMOVEDIR);
	renameat(directory, aside, directory, name);
}

void mad_try_rendezvous(struct mad_state *mad)
{
	int directory = mad->member->peer.fds.directory;
	int parent = open(mad->options->rendezvous, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	char name[24];
	mad_add(&mad->totals->ways[MAD_RENDEZVOUS], 1);
	switch (mad_below(&mad->random, 6)) {
	case 0:
		garble_file(mad);
		break;
	case 1:
		hold_locks(mad);
		break;
	case 2:
		snprintf(name, sizeof(name), "peer-%u", (unsigned)mad_below(&mad->random, MAD_HONEST + 2));
		plant(mad, directory, name, "aside");
		break;
	case 3:
		plant(mad, directory, "domain", "aside");
		break;
	case 4:
		fchmod(directory, 0777);
		fchmod(mad->member->peer.fds.file, 0666);
		nap(mad);
		fchmod(directory, 0700);
		fchmod(mad->member->peer.fds.file, 0600);
		break;
	default:
		plant(mad, parent, mad->options->name, "aside");
	}
	close(parent);
}
