/* SPDX-License-Identifier: MIT */
/*
 * The operations: each is what a peer does with the memory that it shares, made of the core's own functions.
 */
#include "crash.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Somebody came while we were stopped: nothing is to be had until the living have been listed. */
static bool is_excused(const struct victim *v, int r)
{
	return v->world->board->lenient && r == -EAGAIN;
}

static struct ksm_peer *peer_of(struct victim *v)
{
	return &v->member->peer;
}

static char *page_of(struct victim *v, size_t page)
{
	return v->world->theirs + page * KSM_PAGE_SIZE;
}

static void check_held(struct victim *v)
{
	if (!crash_is(page_of(v, 0), SEED_SHARED) || !crash_is(page_of(v, 1), SEED_THEIRS))
		FAIL("%s: the victim's pages hold something else", v->world->operation->name);
}

/* ---- coming and going --------------------------------------------------------------------------------------------- */

static void settle_outside(struct victim *v)
{
	v->member = calloc(1, sizeof(*v->member));
	CHECK(v->member);
	ksm_member_init(v->member, &v->world->options);
}

static int run_join(struct victim *v)
{
	int r = ksm_member_join(v->member);
	if (!r && v->world->survivor)
		r = ksm_scan_know_peers(&v->member->scanner);
	return is_excused(v, r) ? 0 : r;
}

static void verify_join(struct victim *v)
{
	CHECK(v->member->joined || v->world->board->lenient);
	if (v->member->joined)
		ksm_member_leave(v->member);
}

/* Somebody has lived there and is dead; the names are still there. */
static void prepare_ruins(struct world *world)
{
	int status;
	fflush(NULL);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		struct victim v = {.world = world};
		settle_outside(&v);
		CHECK(!ksm_member_join(v.member));
		crash_publish(v.member, SEED_DEAD, true);
		kill(getpid(), SIGKILL);
	}
	CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
}

/* Somebody may come when the name is gone and the directory is not yet: then it stays, and that is said. */
static int run_clean(struct victim *v)
{
	int r = ksm_domain_clean(&v->world->options);
	return v->world->board->lenient && (r == -EBUSY || r == -ENOTEMPTY) ? 0 : r;
}

static int run_leave(struct victim *v)
{
	ksm_member_leave(v->member);
	return 0;
}

/* Nothing of the store stays mapped when a peer leaves. */
static void settle_leave(struct victim *v)
{
	CHECK(!ksm_os_map_anon(page_of(v, 0), 2 * KSM_PAGE_SIZE, true, false, NULL));
	ksm_frame_put(peer_of(v), v->shared, 1);
	ksm_frame_put(peer_of(v), v->own, 1);
}

static const struct ksm_settings new_settings = {
	.run = 1, .pages_to_scan = 777, .max_pages_to_merge = 888, .sleep_millisecs = 99, .advisor_max_cpu = 20};

static int run_settings(struct victim *v)
{
	return ksm_settings_write(&v->world->options, &new_settings);
}

static void judge_settings(struct world *world)
{
	struct ksm_settings settings, defaults;
	ksm_settings_default(&defaults);
	CHECK(!ksm_rendezvous_settings(world->survivor->peer.fds.file, &settings));
	CHECK(!memcmp(&settings, &defaults, sizeof(settings)) || !memcmp(&settings, &new_settings, sizeof(settings)));
}

/* ---- frames ---------------------------------------------------------------------------------------------------------- */

static int run_allocate(struct victim *v)
{
	static uint64_t page[KSM_PAGE_SIZE / 8];
	ksm_frameno frame;
	memset(page, 0x5a, sizeof(page));
	int r = ksm_frame_alloc(peer_of(v), KSM_NO_FRAME, &frame);
	if (r)
		return is_excused(v, r) ? 0 : r;
	return ksm_frame_write(peer_of(v), frame, 1, page);
}

/* A frame far away from all that were ever allocated. */
static int run_wish(struct victim *v)
{
	ksm_frameno frame;
	int r = ksm_frame_alloc(peer_of(v), 50, &frame);
	if (r)
		return is_excused(v, r) ? 0 : r;
	return frame != 50 && !v->world->board->lenient;
}

static int run_abandon(struct victim *v)
{
	ksm_frameno frame;
	int r = ksm_frame_alloc(peer_of(v), KSM_NO_FRAME, &frame);
	if (!r)
		ksm_frame_abandon(peer_of(v), frame);
	return is_excused(v, r) ? 0 : r;
}

/* What the scanner does in several places: claim, look again, allocate, write, publish, announce, unclaim. */
static int run_promote(struct victim *v)
{
	static uint64_t page[KSM_PAGE_SIZE / 8];
	struct ksm_index *index = &v->member->index;
	uint64_t digest;
	ksm_frameno frame;
	crash_fill(page, SEED_NEW);
	digest = ksm_page_digest(page);
	if (!ksm_candidate_claim(index, peer_of(v), digest, page_of(v, 2)))
		return -EBUSY;
	if (ksm_index_take(index, peer_of(v), digest, KSM_NO_FRAME) != KSM_NO_FRAME)
		return -EEXIST;
	int r = ksm_frame_alloc(peer_of(v), KSM_NO_FRAME, &frame);
	if (!r)
		r = ksm_frame_write(peer_of(v), frame, 1, page);
	if (r)
		return is_excused(v, r) ? 0 : r;
	uint32_t generation = ksm_frame_publish(peer_of(v), frame, digest);
	ksm_index_insert(index, peer_of(v), digest, frame, generation);
	ksm_candidate_unclaim(index, peer_of(v), digest, page_of(v, 2));
	return 0;
}

/* Take a frame that only the survivor has, compare, map. */
static int run_take(struct victim *v)
{
	static uint64_t page[KSM_PAGE_SIZE / 8], wanted[KSM_PAGE_SIZE / 8];
	crash_fill(wanted, SEED_OURS);
	ksm_frameno frame = ksm_index_take(&v->member->index, peer_of(v), ksm_page_digest(wanted), KSM_NO_FRAME);
	if (frame == KSM_NO_FRAME)
		return v->world->board->lenient ? 0 : -ENOENT;
	int r = ksm_frame_read(peer_of(v), frame, 1, page);
	if (r || !ksm_page_equal(page, wanted))
		return r ? r : KSM_ECORRUPT;
	return ksm_os_map_frames(page_of(v, 2), KSM_PAGE_SIZE, peer_of(v)->fds.store, (uint64_t)frame << KSM_PAGE_SHIFT,
				 true);
}

static void verify_take(struct victim *v)
{
	check_held(v);
	uint64_t zeros[KSM_PAGE_SIZE / 8] = {0};
	CHECK(crash_is(page_of(v, 2), SEED_OURS) ||
	      (v->world->board->lenient && !memcmp(page_of(v, 2), zeros, sizeof(zeros))));
}

/* ---- tables ---------------------------------------------------------------------------------------------------------- */

static int run_candidate(struct victim *v)
{
	struct ksm_index *index = &v->member->index;
	uint64_t digest = crash_digest(SEED_LONELY);
	ksm_candidate_add(index, peer_of(v), digest, page_of(v, 3));
	if (ksm_candidate_find(index, peer_of(v), digest, page_of(v, 3)) != KSM_CANDIDATE_OURS)
		return -ENOENT;
	if (!ksm_candidate_claim(index, peer_of(v), digest, page_of(v, 3)))
		return -EBUSY;
	ksm_candidate_unclaim(index, peer_of(v), digest, page_of(v, 3));
	ksm_candidate_add(index, peer_of(v), digest, page_of(v, 3));
	ksm_candidate_remove(index, peer_of(v), digest, page_of(v, 3));
	return 0;
}

/* Alike in all that says where in a table they lie. */
static uint64_t neighbour(uint64_t i)
{
	return 0x0000fedcba98765432ull + (63 * i << 32); /* see bucket_at() in table.c */
}

/* Words of living peers fill the places of a digest in the first level of both tables. */
static void prepare_full(struct world *world)
{
	struct ksm_member *s = world->survivor;
	uint32_t generation = ksm_cell_generation(s->peer.cells[world->frames[0]]);
	for (uint64_t i = 1; i < 64 && s->peer.control->index_levels == 1; i++)
		ksm_index_insert(&s->index, &s->peer, neighbour(i), world->frames[0], generation);
	for (uint64_t i = 1; i < 64 && s->peer.control->candidate_levels == 1; i++)
		ksm_candidate_add(&s->index, &s->peer, neighbour(i), world->field);
	CHECK(s->peer.control->index_levels == 2 && s->peer.control->candidate_levels == 2);
	/* The one too many has made a level: back to where the next one makes it. */
	for (unsigned i = 0; i < 2; i++) {
		struct ksm_table *table = i ? &s->index.candidates : &s->index.frames;
		for (uint64_t word = ksm_table_words(1); word < ksm_table_words(2); word++)
			table->words[word] = 0;
		*table->levels_now = 1;
	}
}

static int run_grow(struct victim *v)
{
	struct ksm_index *index = &v->member->index;
	uint32_t generation = ksm_cell_generation(peer_of(v)->cells[v->own]);
	ksm_index_insert(index, peer_of(v), neighbour(0), v->own, generation);
	ksm_candidate_add(index, peer_of(v), neighbour(0), page_of(v, 3));
	return 0;
}

static void verify_grow(struct victim *v)
{
	check_held(v);
	CHECK(v->world->board->lenient ||
	      (peer_of(v)->control->index_levels == 2 && peer_of(v)->control->candidate_levels == 2));
}

/* ---- sweeps ---------------------------------------------------------------------------------------------------------- */

/* Of three frames in a row that nobody refers to, the middle one is referred to after all. */
static void settle_sweep(struct victim *v)
{
	CHECK(ksm_frame_take(peer_of(v), v->world->marked_frame + 1, 0, 0));
}

static int run_sweep(struct victim *v)
{
	int r = ksm_sweep_chunk(peer_of(v), 0);
	if (r >= 0) /* two of the three, and the dead one's */
		return r != 3 && !v->world->board->lenient;
	return is_excused(v, r) ? 0 : r;
}

static int run_bury(struct victim *v)
{
	int r = ksm_peer_refresh(peer_of(v));
	return is_excused(v, r) ? 0 : r;
}

/* ---- fork ------------------------------------------------------------------------------------------------------------ */

static int prepare_fork(struct victim *v)
{
	struct board *board = v->world->board;
	int r = ksm_member_prepare_child(v->member);
	board->child_bitmap_fd = v->member->child.bitmap_fd;
	board->child_slot = v->member->child.slot;
	ksm_merge_lock(peer_of(v));
	ksm_member_fork_prepare(v->member);
	return r;
}

static void after_fork(struct victim *v)
{
	ksm_member_fork_parent(v->member);
	ksm_merge_unlock(peer_of(v));
}

static int run_fork(struct victim *v)
{
	int r = prepare_fork(v);
	if (r)
		return r;
	pid_t child = fork();
	if (child == 0) {
		alarm(60);
		ksm_member_fork_child(v->member);
		for (;;)
			pause();
	}
	if (child > 0)
		v->world->board->child = child;
	after_fork(v);
	return child < 0 ? -ECHILD : 0;
}

/* The parent waits, the child goes on. */
static void settle_fork_child(struct victim *v)
{
	CHECK(!prepare_fork(v));
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		alarm(60);
		return;
	}
	after_fork(v);
	crash_mark();
	for (;;)
		pause();
}

static int run_fork_child(struct victim *v)
{
	ksm_member_fork_child(v->member);
	return 0;
}

/* A new scanner's descriptors, all but the bitmap's: it moves to a new seat. */
static void settle_resume(struct victim *v)
{
	struct ksm_descriptors *fds = &peer_of(v)->fds;
	int seeds[KSM_SEEDS] = {dup(fds->directory), dup(fds->file), dup(fds->control), dup(fds->store), -1, -1, -1};
	ksm_member_forget_table(v->member);
	memcpy(v->member->seeds_here, seeds, sizeof(seeds));
}

static int run_resume(struct victim *v)
{
	return ksm_member_resume(v->member);
}

/* On its new seat: what it has mapped is covered, and its bits agree with its counts. */
static void verify_resume(struct victim *v)
{
	char why[256] = "";
	check_held(v);
	CHECK(peer_of(v)->seat.slot != v->world->board->slot);
	ksm_merge_lock(peer_of(v));
	int r = ksm_peer_refresh(peer_of(v));
	if (!r)
		r = ksm_domain_is_valid(peer_of(v), KSM_VALID_ALWAYS, why, sizeof(why));
	ksm_merge_unlock(peer_of(v));
	if (r && !is_excused(v, r))
		FAIL("%s: the victim finds: %s %s", v->world->operation->name, ksm_error_name(r), why);
}

/* ---- merging --------------------------------------------------------------------------------------------------------- */

#define A_WHILE_NS 60000000000 /* nothing that was looked at before is still believed */
#define REGION_FIRST 2
#define REGION_PAGES 4
static const uint64_t region_seeds[REGION_PAGES] = {SEED_OURS, SEED_NEW, 0, SEED_LONELY};

static void settle_merge(struct victim *v)
{
	struct ksm_region *region = v->region = calloc(1, sizeof(*region));
	for (size_t i = 0; i < REGION_PAGES; i++)
		crash_fill(page_of(v, REGION_FIRST + i), region_seeds[i]);
	/* The kernel tells what is zero from what was never written. */
	*(volatile char *)page_of(v, REGION_FIRST + 2) = 0;
	CHECK(!ksm_region_init(region, peer_of(v), &v->member->index, page_of(v, REGION_FIRST), REGION_PAGES,
			       KSM_NO_FRAME));
	region->used = REGION_PAGES;
	ksm_scanner_add(&v->member->scanner, region);
	ksm_merge_lock(peer_of(v));
	crash_pass_time(A_WHILE_NS);
}

static int run_merge(struct victim *v)
{
	struct ksm_merge_counts counts = {0};
	ksm_merge_stretch(&v->member->scanner.merger, v->region, 0, REGION_PAGES, true, &counts);
	if (v->world->board->lenient)
		return is_excused(v, counts.why_not) ? 0 : counts.why_not;
	return counts.merged == 2 && counts.dropped == 1 && counts.promoted == 1 ? 0
	       : counts.why_not                                                  ? counts.why_not
										 : -EIO;
}

static void verify_merge(struct victim *v)
{
	check_held(v);
	for (size_t i = 0; i < REGION_PAGES; i++)
		if (!crash_is(page_of(v, REGION_FIRST + i), region_seeds[i]))
			FAIL("%s: page %zu of the victim's holds something else", v->world->operation->name, i);
}

static void settle_unmerge(struct victim *v)
{
	uint32_t lenient = v->world->board->lenient;
	settle_merge(v);
	v->world->board->lenient = 0;
	CHECK(!run_merge(v));
	v->world->board->lenient = lenient;
	crash_pass_time(A_WHILE_NS);
}

static int run_unmerge(struct victim *v)
{
	struct ksm_scanner *scanner = &v->member->scanner;
	struct ksm_restore_counts counts = {0};
	return ksm_restore(v->region, &scanner->barrier, scanner->park.ready ? &scanner->park : NULL, 0, REGION_PAGES,
			   KSM_RESTORE_PARKED, &counts);
}

/* Memory that is freed. */
static int run_drop(struct victim *v)
{
	int r = ksm_os_map_anon(v->region->base, REGION_PAGES * KSM_PAGE_SIZE, true, false, NULL);
	if (!r)
		ksm_region_forget(v->region, 0, REGION_PAGES);
	return r;
}

const struct operation crash_operations[] = {
	{"create", WANTS_NOBODY, NULL, settle_outside, run_join, verify_join, NULL},
	{"create-again", WANTS_NOBODY, prepare_ruins, settle_outside, run_join, verify_join, NULL},
	{"join", WANTS_OUTSIDE | WANTS_DEAD, NULL, settle_outside, run_join, verify_join, NULL},
	{"leave", WANTS_SCANNER, NULL, settle_leave, run_leave, NULL, NULL},
	{"clean", WANTS_NOBODY, prepare_ruins, settle_outside, run_clean, NULL, NULL},
	{"settings", WANTS_OUTSIDE, NULL, NULL, run_settings, NULL, judge_settings},
	{"allocate", 0, NULL, NULL, run_allocate, check_held, NULL},
	{"wish", 0, NULL, NULL, run_wish, check_held, NULL},
	{"abandon", 0, NULL, NULL, run_abandon, check_held, NULL},
	{"promote", 0, NULL, NULL, run_promote, check_held, NULL},
	{"take", 0, NULL, NULL, run_take, verify_take, NULL},
	{"candidate", 0, NULL, NULL, run_candidate, check_held, NULL},
	{"grow", 0, prepare_full, NULL, run_grow, verify_grow, NULL},
	{"bury", WANTS_DYING, NULL, NULL, run_bury, check_held, NULL},
	{"sweep", WANTS_DYING | WANTS_MARKED, NULL, settle_sweep, run_sweep, check_held, NULL},
	{"fork", MAY_FORK, NULL, NULL, run_fork, check_held, NULL},
	{"fork-child", WANTS_CHILD, NULL, settle_fork_child, run_fork_child, check_held, NULL},
	{"resume", WANTS_SCANNER, NULL, settle_resume, run_resume, verify_resume, NULL},
	{"drop", WANTS_SCANNER, NULL, settle_unmerge, run_drop, check_held, NULL},
	{"merge", WANTS_SCANNER, NULL, settle_merge, run_merge, verify_merge, NULL},
	{"merge-stop", WANTS_SCANNER | WANTS_STOP, NULL, settle_merge, run_merge, verify_merge, NULL},
	{"unmerge", WANTS_SCANNER, NULL, settle_unmerge, run_unmerge, verify_merge, NULL},
	{"unmerge-stop", WANTS_SCANNER | WANTS_STOP, NULL, settle_unmerge, run_unmerge, verify_merge, NULL},
};
const size_t crash_operation_count = KSM_COUNT(crash_operations);
