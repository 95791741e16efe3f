/* SPDX-License-Identifier: MIT */
/*
 * A world: a domain of its own with a survivor, what an operation needs to be there before, and the survivor's recovery
 * after the victim's death, with everything that is checked about it.
 */
#include "crash.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- pages ------------------------------------------------------------------------------------------------------- */

void crash_fill(void *page, uint64_t seed)
{
	uint64_t z = seed * 0x9e3779b97f4a7c15ull;
	for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++) {
		z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull + i;
		((uint64_t *)page)[i] = seed ? z : 0;
	}
}

bool crash_is(const void *page, uint64_t seed)
{
	uint64_t expected[KSM_PAGE_SIZE / 8];
	crash_fill(expected, seed);
	return !memcmp(page, expected, KSM_PAGE_SIZE);
}

uint64_t crash_digest(uint64_t seed)
{
	uint64_t page[KSM_PAGE_SIZE / 8];
	crash_fill(page, seed);
	return ksm_page_digest(page);
}

char *crash_map(size_t pages)
{
	char *at = mmap(NULL, pages * KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED);
	madvise(at, pages * KSM_PAGE_SIZE, MADV_NOHUGEPAGE);
	return at;
}

/* ---- answering for the survivor -------------------------------------------------------------------------------------- */

static pthread_t server;
static uint32_t server_stop;

static void *serve(void *member)
{
	struct ksm_member *m = member;
	while (!ksm_load_acquire(&server_stop)) {
		ksm_exchange_serve(&m->exchange, &m->peer);
		ksm_os_sleep_ns(50000);
	}
	return NULL;
}

void crash_serve_begin(struct ksm_member *member)
{
	ksm_store_release(&server_stop, 0);
	CHECK(!pthread_create(&server, NULL, serve, member));
}

void crash_serve_end(void)
{
	ksm_store_release(&server_stop, 1);
	pthread_join(server, NULL);
}

/* ---- peers ------------------------------------------------------------------------------------------------------------ */

static struct ksm_member *new_member(const struct world *world)
{
	struct ksm_member *member = calloc(1, sizeof(*member));
	CHECK(member);
	ksm_member_init(member, &world->options);
	return member;
}

static void attach(struct ksm_peer *peer, ksm_slotno slot, int fd)
{
	int r = fd < 0 ? fd : ksm_peer_attach_bitmap(peer, slot, fd);
	if (r)
		FAIL("the bitmap of slot %u: %s", (unsigned)slot, ksm_error_name(r));
}

struct ksm_member *crash_join_quick(struct world *world, const struct ksm_member *from)
{
	struct ksm_member *member = new_member(world);
	struct ksm_peer *peer = &member->peer;
	struct ksm_seat seat;
	peer->fds.directory = dup(from->peer.fds.directory);
	peer->fds.file = ksm_os_reopen(from->peer.fds.file, from->peer.fds.directory, "domain");
	peer->fds.store = dup(from->peer.fds.store);
	CHECK(!ksm_peer_map_control(peer, dup(from->peer.fds.control)));
	CHECK(!ksm_seat_take(peer, false, &seat));
	ksm_peer_sit(peer, &seat);
	ksm_index_attach(&member->index, peer);
	ksm_scanner_init(&member->scanner, peer, &member->index, &member->exchange);
	member->backing = KSM_BACKING_MEMFD;
	member->user = geteuid();
	member->joined = true;
	ksm_member_remember_inodes(member);
	attach(peer, from->peer.seat.slot, dup(from->peer.seat.bitmap_fd));
	return member;
}

void crash_leave(struct ksm_member *member)
{
	ksm_member_leave(member);
	free(member);
}

ksm_frameno crash_publish(struct ksm_member *member, uint64_t seed, bool in_index)
{
	uint64_t page[KSM_PAGE_SIZE / 8];
	struct ksm_peer *peer = &member->peer;
	ksm_frameno frame;
	crash_fill(page, seed);
	int r = ksm_frame_alloc(peer, KSM_NO_FRAME, &frame);
	if (r)
		FAIL("no frame: %s", ksm_error_name(r));
	CHECK(!ksm_frame_write(peer, frame, 1, page));
	uint32_t generation = ksm_frame_publish(peer, frame, ksm_page_digest(page));
	if (in_index)
		ksm_index_insert(&member->index, peer, ksm_page_digest(page), frame, generation);
	return frame;
}

void crash_check(struct world *world, enum ksm_valid_when when, const char *at)
{
	char why[256] = "";
	int r = ksm_domain_is_valid(&world->survivor->peer, when, why, sizeof(why));
	if (r)
		FAIL("%s, %s: %s %s", world->operation->name, at, ksm_error_name(r), why);
}

/* ---- before ----------------------------------------------------------------------------------------------------------- */

static int take_fd(pid_t pid, int fd)
{
	int process = (int)syscall(SYS_pidfd_open, pid, 0);
	int ours = (int)syscall(SYS_pidfd_getfd, process, fd, 0);
	if (process < 0 || ours < 0)
		FAIL("descriptor %d of process %d: %s", fd, (int)pid, strerror(errno));
	close(process);
	return ours;
}

/* Somebody allocates a frame, writes it, and does no more. */
static void make_dead(struct world *world)
{
	struct told {
		ksm_frameno frame;
		ksm_slotno slot;
		int bitmap;
	} told;
	int ends[2];
	CHECK(!pipe(ends));
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		struct ksm_member *member = crash_join_quick(world, world->survivor);
		char page[KSM_PAGE_SIZE];
		crash_fill(page, SEED_DEAD);
		if (member->peer.seat.slot == 1)
			CHECK(!ksm_peer_refresh(&member->peer));
		else
			member->peer.living_epoch = member->peer.control->peer_epoch;
		member->peer.living_known = true;
		CHECK(!ksm_frame_alloc(&member->peer, KSM_NO_FRAME, &told.frame));
		CHECK(!ksm_frame_write(&member->peer, told.frame, 1, page));
		told.slot = member->peer.seat.slot;
		told.bitmap = member->peer.seat.bitmap_fd;
		CHECK(write(ends[1], &told, sizeof(told)) == sizeof(told));
		for (;;)
			pause();
	}
	CHECK(read(ends[0], &told, sizeof(told)) == sizeof(told));
	close(ends[0]);
	close(ends[1]);
	world->dead = pid;
	world->dead_frame = told.frame;
	world->dead_slot = told.slot;
	world->dead_bitmap = take_fd(pid, told.bitmap);
}

static void kill_dead(struct world *world)
{
	CHECK(!kill(world->dead, SIGKILL));
	CHECK(waitpid(world->dead, NULL, 0) == world->dead);
	world->dead = 0;
}

static void hold(struct world *world, size_t page, uint64_t seed)
{
	struct ksm_member *s = world->survivor;
	world->frames[page] = crash_publish(s, seed, true);
	CHECK(!ksm_os_map_frames(world->field + page * KSM_PAGE_SIZE, KSM_PAGE_SIZE, s->peer.fds.store,
				 (uint64_t)world->frames[page] << KSM_PAGE_SHIFT, true));
}

static void survivor_begin(struct world *world)
{
	struct ksm_member *s = world->survivor = new_member(world);
	int r = ksm_member_join(s);
	if (r)
		FAIL("the survivor could not join: %s", ksm_error_name(r));
	CHECK(!ksm_peer_refresh(&s->peer));
	world->field = crash_map(CRASH_PAGES);
	hold(world, 0, SEED_SHARED);
	hold(world, 1, SEED_OURS);
	ksm_candidate_add(&s->index, &s->peer, crash_digest(SEED_NEW), world->field + 2 * KSM_PAGE_SIZE);
	if (world->operation->flags & WANTS_DEAD) {
		make_dead(world);
		kill_dead(world);
	}
	if (world->operation->flags & WANTS_DYING) { /* the slot between is left to the victim */
		struct ksm_member *between = crash_join_quick(world, s);
		make_dead(world);
		crash_leave(between);
		attach(&s->peer, world->dead_slot, dup(world->dead_bitmap));
	}
	if (world->operation->flags & WANTS_MARKED) {
		CHECK(!ksm_peer_refresh(&s->peer));
		world->marked_frame = crash_publish(s, SEED_MARKED, true);
		crash_publish(s, SEED_MARKED + 1, true);
		crash_publish(s, SEED_MARKED + 2, true);
		ksm_frame_put(&s->peer, world->marked_frame, 1);
		ksm_frame_put(&s->peer, world->marked_frame + 1, 1);
		ksm_frame_put(&s->peer, world->marked_frame + 2, 1);
	}
}

void crash_world_begin(struct world *world, const struct operation *operation, const char *rendezvous)
{
	*world = (struct world){.operation = operation, .dead_bitmap = -1};
	world->dead_frame = world->marked_frame = KSM_NO_FRAME;
	world->board = mmap(NULL, KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(world->board != MAP_FAILED);
	*world->board =
		(struct board){.slot = KSM_NO_SLOT, .child_slot = KSM_NO_SLOT, .bitmap_fd = -1, .child_bitmap_fd = -1};
	/* As many letters in every round: as many steps. */
	snprintf(world->name, sizeof(world->name), "%.12s-%d", operation->name, 10000000 + (int)getpid());
	world->options = (struct ksm_domain_options){.name = world->name,
						     .path = rendezvous,
						     .store_fd = -1,
						     .barrier = operation->flags & WANTS_STOP ? KSM_BARRIER_STOP
											      : KSM_BARRIER_AUTO,
						     .capacity_bytes = 64 * KSM_PAGE_SIZE};
	if (!(operation->flags & WANTS_NOBODY))
		survivor_begin(world);
	world->theirs = crash_map(CRASH_PAGES);
	if (operation->prepare)
		operation->prepare(world);
}

void crash_world_meet(struct world *world)
{
	struct board *board = world->board;
	if (board->slot != KSM_NO_SLOT)
		attach(&world->survivor->peer, board->slot, take_fd(world->victim, board->bitmap_fd));
	if (board->child && board->child_slot != KSM_NO_SLOT)
		attach(&world->survivor->peer, board->child_slot, take_fd(board->child, board->child_bitmap_fd));
	if (board->slot != KSM_NO_SLOT)
		CHECK(!ksm_peer_refresh(&world->survivor->peer));
	if (world->dead)
		kill_dead(world);
}

/* ---- the victim -------------------------------------------------------------------------------------------------------- */

static void victim_hold(struct victim *v, size_t page, ksm_frameno frame)
{
	CHECK(!ksm_os_map_frames(v->world->theirs + page * KSM_PAGE_SIZE, KSM_PAGE_SIZE, v->member->peer.fds.store,
				 (uint64_t)frame << KSM_PAGE_SHIFT, true));
}

static void victim_settle(struct victim *v)
{
	struct world *world = v->world;
	unsigned flags = world->operation->flags;
	v->member = crash_join_quick(world, world->survivor);
	struct ksm_peer *peer = &v->member->peer;
	if (flags & WANTS_DYING)
		attach(peer, world->dead_slot, world->dead_bitmap);
	CHECK(!ksm_peer_refresh(peer));
	v->shared = ksm_index_take(&v->member->index, peer, crash_digest(SEED_SHARED), KSM_NO_FRAME);
	CHECK(v->shared == world->frames[0]);
	victim_hold(v, 0, v->shared);
	v->own = crash_publish(v->member, SEED_THEIRS, true);
	victim_hold(v, 1, v->own);
	world->board->seat = &peer->seat;
	world->board->slot = peer->seat.slot;
	world->board->bitmap_fd = peer->seat.bitmap_fd;
	if (!(flags & WANTS_SCANNER))
		return;
	CHECK(!ksm_member_settle_in(v->member, -1));
}

void crash_victim(struct world *world)
{
	struct victim victim = {.world = world};
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	crash_stop_clock();
	if (world->field) /* the survivor's: no bit of ours says that we have it */
		CHECK(!ksm_os_unmap(world->field, CRASH_PAGES * KSM_PAGE_SIZE));
	if (!(world->operation->flags & (WANTS_NOBODY | WANTS_OUTSIDE)))
		victim_settle(&victim);
	if (world->operation->settle)
		world->operation->settle(&victim);
	crash_mark();
	int r = world->operation->run(&victim);
	crash_mark();
	if (r)
		FAIL("%s: the victim's operation said %s", world->operation->name, ksm_error_name(r));
	if (world->operation->verify)
		world->operation->verify(&victim);
	ksm_store_release(&world->board->done, 1);
	_exit(0);
}

static void check_page(struct world *world, ksm_frameno frame, const struct ksm_bitmap *bitmap)
{
	const uint64_t *bits = (const uint64_t *)((const char *)bitmap + KSM_BITMAP_BITS_OFFSET);
	enum ksm_cell_state state = ksm_cell_state(ksm_load_acquire(&world->survivor->peer.cells[frame]));
	if (frame >= bitmap->high || !(bits[frame / 64] >> (frame % 64) & 1))
		FAIL("%s: a process has frame %u mapped, and its bit is not set", world->operation->name,
		     (unsigned)frame);
	if (state == KSM_CELL_FREE || state == KSM_CELL_ALLOC)
		FAIL("%s: a process has frame %u mapped, which is %s", world->operation->name, (unsigned)frame,
		     state == KSM_CELL_FREE ? "FREE" : "ALLOC");
	ksm_add_relaxed(&crash_tally->mapped, 1);
}

static void look(struct world *world, pid_t pid, const struct ksm_bitmap *bitmap)
{
	struct stat store;
	char path[40], line[512];
	CHECK(!ksm_os_stat(world->survivor->peer.fds.store, &store));
	snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	FILE *maps = fopen(path, "re");
	CHECK(maps);
	while (fgets(line, sizeof(line), maps)) {
		unsigned long from, to, offset, inode;
		unsigned major, minor;
		if (sscanf(line, "%lx-%lx %*s %lx %x:%x %lu", &from, &to, &offset, &major, &minor, &inode) == 6 &&
		    inode == store.st_ino && makedev(major, minor) == store.st_dev)
			for (; from < to; from += KSM_PAGE_SIZE, offset += KSM_PAGE_SIZE)
				check_page(world, (ksm_frameno)(offset >> KSM_PAGE_SHIFT), bitmap);
	}
	fclose(maps);
}

static bool read_there(pid_t pid, void *to, void *from, size_t nbytes)
{
	struct iovec here = {to, nbytes}, there = {from, nbytes};
	return process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)nbytes;
}

/*
 * If the victim has moved to another seat its new bitmap: by then all bits are there. NULL: it has not, or it stands in the
 * middle of writing down, or wiping out, which seat it has.
 */
static struct ksm_bitmap *read_new_bitmap(const struct world *world, pid_t pid)
{
	size_t nbytes = ksm_bitmap_bytes(world->survivor->peer.layout.frames);
	struct ksm_seat seat;
	CHECK(read_there(pid, &seat, world->board->seat, sizeof(seat)));
	if (seat.slot == world->board->slot)
		return NULL;
	struct ksm_bitmap *bitmap = malloc(nbytes);
	CHECK(bitmap);
	if (read_there(pid, bitmap, seat.bitmap, nbytes) && bitmap->magic == KSM_MAGIC && bitmap->slot == seat.slot &&
	    bitmap->nonce == seat.nonce)
		return bitmap;
	free(bitmap);
	return NULL;
}

void crash_world_look(struct world *world, pid_t pid)
{
	bool is_child = world->operation->flags & WANTS_CHILD;
	ksm_slotno slot = is_child ? world->board->child_slot : world->board->slot;
	if (!world->survivor || slot == KSM_NO_SLOT)
		return;
	struct ksm_bitmap *moved = is_child ? NULL : read_new_bitmap(world, pid);
	const struct ksm_bitmap *bitmap = moved ? moved : world->survivor->peer.others[slot].bitmap;
	if (bitmap)
		look(world, pid, bitmap);
	free(moved);
}

/* ---- after --------------------------------------------------------------------------------------------------------------- */

static void check_field(const struct world *world, const char *at)
{
	if (!crash_is(world->field, SEED_SHARED) || !crash_is(world->field + KSM_PAGE_SIZE, SEED_OURS))
		FAIL("%s, %s: the survivor's pages hold something else", world->operation->name, at);
}

/* What was found before anything was mended. */
static void count_debris(struct world *world)
{
	const struct ksm_peer *peer = &world->survivor->peer;
	bool half_written = false, half_swept = false;
	for (ksm_frameno frame = 0; frame < peer->layout.frames; frame++) {
		enum ksm_cell_state state = ksm_cell_state(ksm_load_acquire(&peer->cells[frame]));
		half_written |= state == KSM_CELL_ALLOC && frame != world->dead_frame;
		half_swept |= state == KSM_CELL_DYING || state == KSM_CELL_DYING_RAW;
	}
	ksm_add_relaxed(&crash_tally->half_written, half_written);
	ksm_add_relaxed(&crash_tally->half_swept, half_swept);
	struct ksm_index *index = &world->survivor->index;
	bool claimed = ksm_candidate_find(index, peer, crash_digest(SEED_NEW), world->field + 2 * KSM_PAGE_SIZE) ==
		       KSM_CANDIDATE_CLAIMED;
	ksm_add_relaxed(&crash_tally->claims, claimed);
}

/* One sweep, as a scanner makes it: of the marked chunks only. Everything that is FREE now takes no memory. */
static void sweep(struct world *world, const char *at)
{
	struct ksm_member *s = world->survivor;
	struct stat store;
	uint64_t frames = 0;
	crash_check(world, KSM_VALID_AT_REST, at);
	int64_t r = ksm_chunks_any(&s->peer) ? ksm_scan_sweep(&s->scanner, false, NULL) : 0;
	if (r < 0)
		FAIL("%s, %s: the sweep said %s", world->operation->name, at, ksm_error_name((int)r));
	ksm_add_relaxed(&crash_tally->freed, (uint64_t)r);
	crash_check(world, KSM_VALID_SWEPT, at);
	for (ksm_frameno frame = 0; frame < s->peer.layout.frames; frame++)
		frames += ksm_cell_state(ksm_load_acquire(&s->peer.cells[frame])) != KSM_CELL_FREE;
	CHECK(!ksm_os_stat(s->peer.fds.store, &store));
	if ((uint64_t)store.st_blocks * 512 != frames * KSM_PAGE_SIZE)
		FAIL("%s, %s: %llu frames take %llu bytes", world->operation->name, at, (unsigned long long)frames,
		     (unsigned long long)store.st_blocks * 512);
	check_field(world, at);
}

static void know(struct world *world, const char *at)
{
	int r = ksm_scan_know_peers(&world->survivor->scanner);
	if (r)
		FAIL("%s, %s: peers: %s", world->operation->name, at, ksm_error_name(r));
}

/* What the victim did, or was about to do: claim, promote, find. */
static void do_it_again(struct world *world)
{
	struct ksm_member *s = world->survivor;
	struct ksm_peer *peer = &s->peer;
	uint64_t digest = crash_digest(SEED_NEW);
	const void *page = world->field + 2 * KSM_PAGE_SIZE;
	ksm_candidate_add(&s->index, peer, digest, page);
	if (!ksm_candidate_claim(&s->index, peer, digest, page))
		FAIL("%s: a claim of the dead keeps others out", world->operation->name);
	ksm_frameno frame = crash_publish(s, SEED_NEW, true);
	ksm_candidate_unclaim(&s->index, peer, digest, page);
	ksm_frameno again = ksm_index_take(&s->index, peer, digest, frame);
	if (again != frame)
		FAIL("%s: frame %u was published, and is not found (%u)", world->operation->name, (unsigned)frame,
		     (unsigned)again);
	CHECK(!ksm_os_map_frames((void *)page, KSM_PAGE_SIZE, peer->fds.store, (uint64_t)frame << KSM_PAGE_SHIFT,
				 true));
	CHECK(crash_is(page, SEED_NEW));
	crash_check(world, KSM_VALID_AT_REST, "with one page more");
	CHECK(!ksm_os_map_anon((void *)page, KSM_PAGE_SIZE, true, false, NULL));
	ksm_frame_put(peer, frame, 1);
	ksm_frame_put(peer, frame, 1);
}

/* Somebody takes the dead one's slot before anybody has looked after the dead. */
static void newcomer(struct world *world)
{
	struct ksm_member *s = world->survivor, *n = crash_join_quick(world, s);
	attach(&s->peer, n->peer.seat.slot, dup(n->peer.seat.bitmap_fd));
	know(world, "a newcomer is there");
	sweep(world, "a newcomer is there");
	crash_leave(n);
}

/* The child that a victim has born is alive, and its pages are right. */
static void check_child(struct world *world)
{
	struct board *board = world->board;
	struct ksm_member *s = world->survivor;
	char page[2 * KSM_PAGE_SIZE];
	struct iovec here = {page, sizeof(page)}, there = {world->theirs, sizeof(page)};
	pid_t child = world->operation->flags & WANTS_CHILD ? world->victim : board->child;
	bool is_child = child == board->child;
	ksm_slotno slot = is_child ? board->child_slot : board->slot;
	if (is_child && !ksm_peer_has_bitmap(&s->peer, slot))
		attach(&s->peer, slot, take_fd(child, board->child_bitmap_fd));
	know(world, "the child is alive");
	sweep(world, "the child is alive");
	CHECK(process_vm_readv(child, &here, 1, &there, 1, 0) == sizeof(page));
	if (!crash_is(page, SEED_SHARED) || !crash_is(page + KSM_PAGE_SIZE, SEED_THEIRS))
		FAIL("%s: the %s's pages hold something else", world->operation->name, is_child ? "child" : "parent");
	if (s->peer.others[slot].bitmap)
		look(world, child, s->peer.others[slot].bitmap);
	CHECK(!kill(child, SIGKILL));
	CHECK(waitpid(child, NULL, 0) == child); /* an orphan is ours */
	ksm_add_relaxed(&crash_tally->born, 1);
}

void crash_world_recover(struct world *world)
{
	struct ksm_member *s = world->survivor;
	if (!s) { /* nobody was there: somebody comes */
		survivor_begin(world);
		s = world->survivor;
	} else {
		check_field(world, "after the death");
		if (!world->board->lenient)
			count_debris(world);
		if (s->peer.living_known)
			crash_check(world, KSM_VALID_ALWAYS, "after the death");
	}
	if (world->board->child)
		check_child(world);
	if (world->operation->flags & WANTS_DEAD)
		newcomer(world);
	know(world, "recovery");
	sweep(world, "recovery");
	do_it_again(world);
	sweep(world, "once more");
	if (world->operation->judge)
		world->operation->judge(world);
}

/* ---- while the victim is stopped ------------------------------------------------------------------------------------------ */

/* The survivor lets go of its frames; its bytes stay what they are. */
static void let_go(struct world *world)
{
	for (size_t i = 0; i < 2; i++) {
		char *at = world->field + i * KSM_PAGE_SIZE;
		CHECK(!ksm_os_map_anon(at, KSM_PAGE_SIZE, true, false, NULL));
		crash_fill(at, i ? SEED_OURS : SEED_SHARED);
		ksm_frame_put(&world->survivor->peer, world->frames[i], 1);
	}
}

/* Somebody comes through the door, looks round, and leaves. If there is no survivor only the stopped one can keep him out. */
static void visit(struct world *world)
{
	struct ksm_member *s = world->survivor, *n = new_member(world);
	struct ksm_rendezvous rendezvous;
	bool locked = false, deaf = false;
	if (!ksm_rendezvous_open(&world->options, false, &rendezvous)) {
		locked = ksm_os_lock_find(rendezvous.file, KSM_LOCK_JOIN, 1) >= 0;
		deaf = !s && ksm_rendezvous_is_inhabited(rendezvous.file) > 0;
		ksm_rendezvous_close(&rendezvous);
	}
	if (s)
		crash_serve_begin(s);
	crash_in_a_hurry = true;
	crash_expects_no_answer = deaf;
	int r = ksm_member_join(n);
	if (!r) {
		ksm_scan_know_peers(&n->scanner);
		ksm_member_leave(n);
	} else if (!(locked || deaf) || r != KSM_ENOPEER) {
		FAIL("%s: nobody can join: %s", world->operation->name, ksm_error_name(r));
	}
	crash_in_a_hurry = crash_expects_no_answer = false;
	if (s)
		crash_serve_end();
	ksm_add_relaxed(&crash_tally->refused, r != 0);
	ksm_add_relaxed(&crash_tally->join_locks, locked);
	free(n);
}

void crash_world_go_on(struct world *world)
{
	struct ksm_member *s = world->survivor;
	ksm_frameno frame;
	if (!s) {
		visit(world);
		return;
	}
	count_debris(world);
	let_go(world);
	ksm_scan_know_peers(&s->scanner);
	int64_t swept = ksm_scan_sweep(&s->scanner, true, NULL);
	if (swept < 0 && swept != -EAGAIN)
		FAIL("%s: a sweep said %s", world->operation->name, ksm_error_name((int)swept));
	int r = ksm_frame_alloc(&s->peer, KSM_NO_FRAME, &frame);
	if (!r)
		ksm_frame_abandon(&s->peer, frame);
	else if (r != -EAGAIN)
		FAIL("%s: no frame: %s", world->operation->name, ksm_error_name(r));
	ksm_add_relaxed(&crash_tally->refused, swept < 0 || r);
	visit(world);
	if (ksm_scan_know_peers(&s->scanner) == 0)
		crash_check(world, KSM_VALID_ALWAYS, "while one is stopped");
	check_field(world, "while one is stopped");
}

void crash_world_end(struct world *world)
{
	if (world->dead_bitmap >= 0)
		close(world->dead_bitmap);
	if (world->survivor) {
		CHECK(!ksm_os_unmap(world->field, CRASH_PAGES * KSM_PAGE_SIZE));
		crash_leave(world->survivor);
	}
	CHECK(!ksm_os_unmap(world->theirs, CRASH_PAGES * KSM_PAGE_SIZE));
	int r = ksm_domain_clean(&world->options);
	if (r && r != -ENOENT)
		FAIL("%s: the rendezvous cannot be removed: %s", world->operation->name, ksm_error_name(r));
	world->survivor = NULL;
}
