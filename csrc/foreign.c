/* SPDX-License-Identifier: MIT */
/*
 * DOC: Registered memory
 *
 * The whole pages inside a buffer that the program already has become a region. While they are registered their owner
 * may read and write them, but must not unmap, remap, protect or madvise them: a merged page is a mapping of ours.
 *
 * FOREIGN-1. Registered: private, writable, anonymous, without flags that a new mapping would lose (locked, kept from
 *            forks, from core dumps, …) and not a stack.
 * FOREIGN-2. Unregistering gives back anonymous memory with the same contents before it is forgotten; if that fails it
 *            stays registered.
 * FOREIGN-3. What the program has unmapped or moved meanwhile is forgotten, whatever is there instead is left alone, and
 *            the references stay, so the membership must, too: SURVEY-2.
 */
#include "foreign.h"

#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* VmFlags of smaps (Documentation/filesystems/proc.rst) that a replaced mapping would lose or that make it special. */
static bool flags_are_plain(const char *flags)
{
	static const char *const special[] = {"sh", "gd", "pf", "lo", "io", "dc", "de", "ht",
					      "wf", "dd", "mm", "uw", "um", "ss", "sl", "dp"};
	for (size_t i = 0; i < KSM_COUNT(special); i++) {
		for (const char *at = flags; (at = strstr(at, special[i])); at += 2)
			if (at[-1] == ' ' && (at[2] == ' ' || at[2] == '\n' || at[2] == 0))
				return false;
	}
	return true;
}

/* One mapping's lines in smaps; the scan is over when *covered reaches the end. */
struct check {
	uintptr_t from, to, covered;
	bool inside; /* the lines now read belong to a mapping of the range */
};

static int check_head(struct check *check, const char *line)
{
	unsigned long start, end, offset, inode;
	char mode[5];
	int at = 0;
	if (sscanf(line, "%lx-%lx %4s %lx %*s %lu%n", &start, &end, mode, &offset, &inode, &at) < 5)
		return 0;
	check->inside = false;
	if (end <= check->from || start >= check->to)
		return 0;
	if (start > check->covered || strcmp(mode, "rw-p") || inode)
		return KSM_EMEMORY;
	if (strstr(line + at, "[stack]"))
		return KSM_EMEMORY;
	check->inside = true;
	check->covered = KSM_MAX(check->covered, (uintptr_t)end);
	return 0;
}

int ksm_foreign_check(const void *address, size_t nbytes)
{
	struct check check = {.from = (uintptr_t)address, .to = (uintptr_t)address + nbytes};
	check.covered = check.from;
	char line[512];
	int r = 0;
	int fd = ksm_os_open(AT_FDCWD, "/proc/self/smaps", O_RDONLY, 0);
	FILE *smaps = fd >= 0 ? fdopen(fd, "r") : NULL;
	if (!smaps) {
		ksm_os_close(fd);
		return fd < 0 ? fd : -ENOMEM;
	}
	while (!r && fgets(line, sizeof(line), smaps)) {
		if (!strncmp(line, "VmFlags:", 8)) {
			if (check.inside && !flags_are_plain(line + 8))
				r = KSM_EMEMORY;
			if (check.inside && check.covered >= check.to)
				break;
		} else {
			r = check_head(&check, line);
		}
	}
	fclose(smaps);
	return r ? r : check.covered >= check.to ? 0 : KSM_EMEMORY;
}

static struct ksm_domain *domain_of(struct ksm_region *region)
{
	return (struct ksm_domain *)((char *)region->peer - offsetof(struct ksm_domain, worker.member.peer));
}

int ksm_region_register(struct ksm_domain *domain, void *address, size_t nbytes, struct ksm_region **out, size_t *pages)
{
	uintptr_t from = ksm_page_round_up((uintptr_t)address);
	uintptr_t to = ((uintptr_t)address + nbytes) & ~(uintptr_t)(KSM_PAGE_SIZE - 1);
	struct ksm_peer *peer = ksm_domain_peer(domain);
	if (to <= from || (uintptr_t)address + nbytes < (uintptr_t)address)
		return KSM_ESMALL;
	if (ksm_domains_overlap((void *)from, to - from))
		return KSM_EOVERLAP;
	int r = ksm_foreign_check((void *)from, to - from);
	if (r)
		return r;
	struct ksm_region *region = ksm_os_allocate(sizeof(*region));
	if (!region)
		return -ENOMEM;
	r = ksm_region_init(region, peer, &domain->worker.member.index, (void *)from, (to - from) >> KSM_PAGE_SHIFT,
			    KSM_NO_FRAME);
	if (r) {
		free(region);
		return r;
	}
	region->registered = true;
	region->used = region->room;
	ksm_merge_lock(peer);
	bool overlaps = ksm_scanner_overlaps(ksm_domain_scanner(domain), (void *)from, to - from);
	if (!overlaps)
		ksm_scanner_add(ksm_domain_scanner(domain), region);
	ksm_merge_unlock(peer);
	if (overlaps) {
		ksm_region_fini(region);
		free(region);
		return KSM_EOVERLAP;
	}
	ksm_domain_get(domain);
	if (pages)
		*pages = region->room;
	*out = region;
	ksm_worker_nudge(&domain->worker);
	return 0;
}

/* Nobody watches who writes there any more. If there is no scanner's thread, nobody does. */
static int let_go(struct ksm_member *member, void *context)
{
	ksm_merge_lock(&member->peer);
	ksm_dirty_release(context);
	ksm_merge_unlock(&member->peer);
	return 0;
}

int ksm_region_unregister(struct ksm_region *region)
{
	struct ksm_domain *domain = domain_of(region);
	struct ksm_peer *peer = region->peer;
	struct ksm_restore_counts counts = {0};
	int r = 0;
	ksm_merge_lock(peer);
	region->excluded = true; /* nothing merges it again meanwhile */
	bool framed = region->states[KSM_PAGE_MERGED] + region->states[KSM_PAGE_BROKEN] > 0;
	ksm_merge_unlock(peer);
	if (framed)
		r = ksm_domain_restore_region(domain, region, KSM_RESTORE_ALWAYS, &counts);
	ksm_worker_call(&domain->worker, let_go, region);
	ksm_merge_lock(peer);
	framed = region->states[KSM_PAGE_MERGED] + region->states[KSM_PAGE_BROKEN] > 0;
	if (framed) { /* FOREIGN-2 */
		region->excluded = false;
		ksm_merge_unlock(peer);
		return r ? r : -EBUSY;
	}
	ksm_scanner_remove(ksm_domain_scanner(domain), region);
	ksm_region_forget(region, 0, region->room); /* candidates */
	ksm_region_unguard(region);
	bool strayed = region->strayed > 0;
	ksm_merge_unlock(peer);
	ksm_region_fini(region);
	free(region);
	if (!strayed) /* FOREIGN-3 */
		ksm_domain_detach(domain);
	return 0;
}
