/* SPDX-License-Identifier: MIT */
/*
 * DOC: Domains
 *
 * A process is in a domain once, however many Arena() and Domain() objects name it: this file keeps the list of
 * memberships, counts references to them, and turns the public calls into calls of the scanner's thread.
 *
 * DOM-1. A membership lasts until its last reference is gone: every arena, live block and registered region holds
 *        one, so that no page is mapped to a frame when the process leaves.
 * DOM-2. Lock order: list, memory, life (worker.c), merge lock. Nothing waits for the scanner's thread while it holds
 *        the memory or the merge lock.
 */
#include "domain.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SWEEP_PATIENCE_NS 3000000000ull

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ksm_domain *list;

/* ---- references ------------------------------------------------------------------------------------------- */

static bool is_same(const struct ksm_domain *domain, const struct ksm_domain_options *options)
{
	const struct ksm_member *member = &domain->worker.member;
	const char *name = options->name ? options->name : "default";
	if (strcmp(member->name, name))
		return false;
	if (!member->options.path || !options->path)
		return !member->options.path == !options->path;
	return !strcmp(member->options.path, options->path);
}

/* The first barrier that is asked for by name takes the place of the one that was chosen. In the scanner's thread. */
static int ask_for(struct ksm_member *member, void *context)
{
	int wanted = *(const int *)context;
	struct ksm_scanner *scanner = &member->scanner;
	struct ksm_slot *self = member->peer.self;
	struct ksm_barrier fresh;
	if (ksm_load_relaxed(&self->barrier) == wanted) {
		member->options.barrier = wanted;
		return 0;
	}
	if (member->options.barrier != KSM_BARRIER_AUTO)
		return KSM_EBARRIER;
	if (ksm_barrier_create(&fresh, (enum ksm_barrier_kind)wanted, &scanner->park, -1))
		return KSM_EBARRIER;
	ksm_merge_lock(&member->peer);
	ksm_scanner_use(scanner, &fresh);
	member->options.barrier = wanted;
	ksm_store_relaxed(&self->barrier, wanted);
	ksm_store_relaxed(&self->why_not, 0);
	ksm_merge_unlock(&member->peer);
	return 0;
}

/* The same membership under other wishes. */
static int check_wishes(struct ksm_domain *domain, const struct ksm_domain_options *options)
{
	struct ksm_member *member = &domain->worker.member;
	if ((uint32_t)options->backing != member->backing)
		return KSM_EBACKING;
	if (options->barrier == KSM_BARRIER_AUTO || !member->peer.self)
		return 0;
	int barrier = options->barrier;
	return ksm_worker_call(&domain->worker, ask_for, &barrier);
}

static int make(const struct ksm_domain_options *options, struct ksm_domain **out)
{
	struct ksm_domain *domain = ksm_os_allocate(sizeof(*domain));
	if (!domain)
		return -ENOMEM;
	ksm_worker_init(&domain->worker, options);
	pthread_mutex_init(&domain->memory, NULL);
	domain->references = 1;
	int r = ksm_worker_start(&domain->worker);
	if (r) {
		ksm_worker_fini(&domain->worker);
		free(domain);
		return r;
	}
	domain->next = list;
	list = domain;
	*out = domain;
	return 0;
}

int ksm_domain_attach(const struct ksm_domain_options *options, struct ksm_domain **out)
{
	static const struct ksm_domain_options defaults = {.store_fd = -1};
	int r = 0;
	if (!options)
		options = &defaults;
	if ((options->name && strlen(options->name) > KSM_NAME_MAX) || options->barrier < 0 ||
	    options->barrier > KSM_BARRIER_SEGV || options->backing < 0 || options->backing > KSM_BACKING_SHM)
		return -EINVAL;
	if (options->path && strlen(options->path) + KSM_NAME_MAX + 2 > KSM_PATH_ROOM)
		return -ENAMETOOLONG;
	pthread_mutex_lock(&list_lock);
	struct ksm_domain *domain = list;
	while (domain && !is_same(domain, options))
		domain = domain->next;
	if (!domain) {
		r = make(options, out);
	} else {
		r = check_wishes(domain, options);
		if (!r) {
			domain->references++;
			*out = domain;
		}
	}
	pthread_mutex_unlock(&list_lock);
	return r;
}

void ksm_domain_get(struct ksm_domain *domain)
{
	pthread_mutex_lock(&list_lock);
	domain->references++;
	pthread_mutex_unlock(&list_lock);
}

static int leave(struct ksm_member *member, void *context KSM_UNUSED)
{
	ksm_member_leave(member);
	return 0;
}

void ksm_domain_detach(struct ksm_domain *domain)
{
	pthread_mutex_lock(&list_lock);
	if (--domain->references) {
		pthread_mutex_unlock(&list_lock);
		return;
	}
	struct ksm_domain **at = &list;
	while (*at != domain)
		at = &(*at)->next;
	*at = domain->next;
	if (ksm_worker_call(&domain->worker, leave, NULL)) { /* no thread to be had: its descriptors are gone anyway */
		ksm_member_drop_seeds(&domain->worker.member, true);
		ksm_peer_destroy(ksm_domain_peer(domain));
	}
	ksm_worker_stop(&domain->worker);
	pthread_mutex_unlock(&list_lock);
	ksm_worker_fini(&domain->worker);
	pthread_mutex_destroy(&domain->memory);
	free(domain);
}

void ksm_domain_id(struct ksm_domain *domain, char out[33])
{
	struct ksm_peer *peer = ksm_domain_peer(domain);
	uint8_t id[16];
	ksm_merge_lock(peer); /* the membership may be moving to another user's domain */
	memcpy(id, peer->id, sizeof(id));
	ksm_merge_unlock(peer);
	for (size_t i = 0; i < 16; i++) {
		out[2 * i] = "0123456789abcdef"[id[i] >> 4];
		out[2 * i + 1] = "0123456789abcdef"[id[i] & 15];
	}
	out[32] = 0;
}

const char *ksm_domain_directory(struct ksm_domain *domain)
{
	return domain->worker.member.directory;
}

bool ksm_domains_overlap(const void *at, size_t nbytes)
{
	bool overlaps = false;
	pthread_mutex_lock(&list_lock);
	for (struct ksm_domain *domain = list; domain && !overlaps; domain = domain->next) {
		ksm_merge_lock(ksm_domain_peer(domain));
		overlaps = ksm_scanner_overlaps(ksm_domain_scanner(domain), at, nbytes);
		ksm_merge_unlock(ksm_domain_peer(domain));
	}
	pthread_mutex_unlock(&list_lock);
	return overlaps;
}

/* ---- statistics --------------------------------------------------------------------------------------------- */

int ksm_domain_self_stats(struct ksm_domain *domain, struct ksm_stats *out)
{
	struct ksm_peer *peer = ksm_domain_peer(domain);
	ksm_merge_lock(peer);
	ksm_stats_of_slot(peer->self, out);
	ksm_merge_unlock(peer);
	if (domain->worker.member.lost)
		out->why_not = KSM_ELOST;
	return 0;
}

struct peers_request {
	struct ksm_peer_info *room;
	size_t count, space;
	struct ksm_stats sum;
};

/* Holes of the table are passed over: reading them would allocate them. */
static uint64_t frames_published(const struct ksm_peer *peer)
{
	uint64_t count = 0, high = KSM_MIN(ksm_load_acquire(&peer->control->frames_high), peer->layout.frames);
	for (uint64_t frame = 0; frame < high;) {
		uint64_t at = peer->layout.cells + frame * sizeof(uint64_t);
		int64_t data = ksm_os_seek_data(peer->fds.control, at);
		if (data >= (int64_t)(peer->layout.cells + high * sizeof(uint64_t)))
			break;
		frame = ((uint64_t)data - peer->layout.cells) / sizeof(uint64_t);
		uint64_t end = KSM_MIN(high, (frame / (KSM_PAGE_SIZE / 8) + 1) * (KSM_PAGE_SIZE / 8));
		for (; frame < end; frame++)
			count += ksm_cell_state(ksm_load_relaxed(&peer->cells[frame])) == KSM_CELL_PUBLISHED;
	}
	return count;
}

static uint64_t blocks_of(int fd)
{
	struct stat stat;
	return fd >= 0 && !ksm_os_stat(fd, &stat) ? (uint64_t)stat.st_blocks * 512 : 0;
}

static int collect(struct ksm_member *member, void *context)
{
	struct peers_request *request = context;
	struct ksm_peer *peer = &member->peer;
	ksm_count_set(peer->self, KSM_METADATA_BYTES, ksm_scan_metadata(&member->scanner));
	ksm_count_set(peer->self, KSM_STOPS, member->scanner.park.stops);
	ksm_scanner_count_breaks(&member->scanner);
	ksm_scan_know_peers(&member->scanner); /* whoever cannot be asked is counted all the same */
	for (size_t i = 0; i < peer->living_count; i++) {
		const struct ksm_slot *slot = ksm_peer_slot(peer, peer->living[i]);
		if (!slot) /* a newcomer's, and no memory to read it */
			continue;
		struct ksm_peer_info info = {.pid = slot->pid, .slot = peer->living[i], .self = slot == peer->self};
		ksm_stats_of_slot(slot, &info.stats);
		ksm_stats_add(&request->sum, &info.stats);
		if (request->count < request->space)
			request->room[request->count] = info;
		request->count++;
	}
	struct ksm_stats *sum = &request->sum;
	sum->pages_shared = frames_published(peer);
	sum->pages_sharing = sum->pages_merged > sum->pages_shared ? sum->pages_merged - sum->pages_shared : 0;
	sum->saved_bytes = sum->pages_sharing * KSM_PAGE_SIZE;
	sum->store_bytes = blocks_of(peer->fds.store);
	sum->metadata_bytes += blocks_of(peer->fds.control);
	sum->page_size = (uint32_t)KSM_PAGE_SIZE;
	sum->barrier = ksm_load_relaxed(&peer->self->barrier);
	struct ksm_settings settings;
	ksm_rendezvous_settings(peer->fds.file, &settings);
	sum->why_not = settings.run ? ksm_load_relaxed(&peer->self->why_not) : KSM_ESTOPPED;
	return 0;
}

int ksm_domain_stats(struct ksm_domain *domain, struct ksm_stats *out)
{
	struct peers_request request = {0};
	int r = ksm_worker_call(&domain->worker, collect, &request);
	if (!r)
		*out = request.sum;
	return r;
}

int ksm_domain_peers(struct ksm_domain *domain, struct ksm_peer_info *out, size_t room)
{
	struct ksm_peer_info *found = room ? ksm_os_allocate(room * sizeof(*found)) : NULL;
	struct peers_request request = {.room = found, .space = room};
	if (room && !found)
		return -ENOMEM;
	int r = ksm_worker_call(&domain->worker, collect, &request);
	if (!r && found)
		memcpy(out, found, KSM_MIN(request.count, room) * sizeof(*found));
	free(found);
	return r ? r : (int)request.count;
}

/* ---- scanning ------------------------------------------------------------------------------------------------ */

struct scan_request {
	struct ksm_region *region;
	enum ksm_restore_broken broken;
	struct ksm_report report; /* not where the caller wants it: that may be a page we have made read-only */
	struct ksm_restore_counts *restored;
	uint64_t freed;
};

static int scan(struct ksm_member *member, void *context)
{
	struct scan_request *request = context;
	struct ksm_scan_between hook = ksm_worker_between(member);
	struct ksm_merge_counts counts = {0};
	uint64_t start = ksm_os_now_ns(), passes = 0;
	ksm_scan_know_peers(&member->scanner);
	int r = ksm_scan_exhaust(&member->scanner, request->region, &hook, &counts, &passes);
	request->report = (struct ksm_report){
		.pages_scanned = counts.scanned,
		.pages_merged = counts.merged,
		.zero_pages = counts.dropped,
		.frames_written = counts.promoted,
		.passes = passes,
		.seconds = (double)(ksm_os_now_ns() - start) / 1e9,
		.why_not = counts.why_not,
	};
	return r ? -ECANCELED : 0;
}

int ksm_domain_scan_region(struct ksm_domain *domain, struct ksm_region *region, struct ksm_report *out)
{
	struct scan_request request = {.region = region};
	int r;
	do /* a fork in another thread ends the scanner half-way; the next one starts over */
		r = ksm_worker_call(&domain->worker, scan, &request);
	while (r == -ECANCELED);
	*out = request.report;
	return r;
}

int ksm_domain_scan(struct ksm_domain *domain, struct ksm_report *out)
{
	return ksm_domain_scan_region(domain, NULL, out);
}

static int see_breaks(struct ksm_member *member, void *context)
{
	struct ksm_scan_between hook = ksm_worker_between(member);
	ksm_scan_see_breaks(&member->scanner, context, &hook);
	return 0;
}

int ksm_domain_see_breaks(struct ksm_domain *domain, struct ksm_region *region)
{
	return ksm_worker_call(&domain->worker, see_breaks, region);
}

static int restore(struct ksm_member *member, void *context)
{
	struct scan_request *request = context;
	struct ksm_scan_between hook = ksm_worker_between(member);
	return ksm_scan_restore(&member->scanner, request->region, request->broken, &hook, request->restored);
}

int ksm_domain_restore_region(struct ksm_domain *domain, struct ksm_region *region, enum ksm_restore_broken broken,
			      struct ksm_restore_counts *out)
{
	struct scan_request request = {.region = region, .broken = broken, .restored = out};
	return ksm_worker_call(&domain->worker, restore, &request);
}

static int sweep(struct ksm_member *member, void *context)
{
	struct scan_request *request = context;
	struct ksm_scan_between hook = ksm_worker_between(member);
	int64_t freed = -EAGAIN;
	uint64_t give_up = ksm_os_now_ns() + SWEEP_PATIENCE_NS; /* a peer that is silent costs time at each attempt */
	for (int attempt = 0; attempt < 50 && freed == -EAGAIN; attempt++) { /* somebody comes or goes */
		if (attempt && hook.call(hook.context))
			return -ECANCELED;
		if (attempt && ksm_os_now_ns() > give_up)
			break;
		freed = ksm_scan_sweep(&member->scanner, true, &hook);
	}
	if (freed < 0)
		return (int)freed;
	request->freed = (uint64_t)freed;
	return 0;
}

int ksm_domain_sweep(struct ksm_domain *domain, uint64_t *freed)
{
	struct scan_request request = {0};
	int r;
	do /* as in ksm_domain_scan_region() */
		r = ksm_worker_call(&domain->worker, sweep, &request);
	while (r == -ECANCELED);
	if (!r && freed)
		*freed = request.freed;
	return r;
}

/* ---- the process ---------------------------------------------------------------------------------------------------- */

void ksm_domains_resume(void)
{
	pthread_mutex_lock(&list_lock);
	for (struct ksm_domain *domain = list; domain; domain = domain->next)
		if (!domain->worker.member.lost)
			ksm_worker_start(&domain->worker);
	pthread_mutex_unlock(&list_lock);
}

void ksm_domains_fork_prepare(void)
{
	pthread_mutex_lock(&list_lock);
	for (struct ksm_domain *domain = list; domain; domain = domain->next) {
		pthread_mutex_lock(&domain->memory);
		ksm_worker_fork_prepare(&domain->worker);
	}
}

void ksm_domains_fork_parent(void)
{
	for (struct ksm_domain *domain = list; domain; domain = domain->next) {
		ksm_worker_fork_parent(&domain->worker);
		pthread_mutex_unlock(&domain->memory);
	}
	pthread_mutex_unlock(&list_lock);
}

/* Held by this thread since before the fork; others may have been waiting for it, in the parent. */
static void renew(pthread_mutex_t *mutex)
{
	pthread_mutex_unlock(mutex);
	pthread_mutex_init(mutex, NULL);
}

void ksm_domains_fork_child(void)
{
	for (struct ksm_domain *domain = list; domain; domain = domain->next) {
		ksm_worker_fork_child(&domain->worker);
		renew(&domain->memory);
	}
	ksm_park_fork_child();
	ksm_guards_fork_child();
	renew(&list_lock);
}
