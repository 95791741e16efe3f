/* SPDX-License-Identifier: MIT */
/* Seats, liveness, bitmaps, and what one peer knows of the others; REFS-1 to 5. */
#include "members.h"

TEST(a_seat_is_taken_and_left)
{
	struct ksm_member *a = members_join("d");
	struct ksm_seat seat, again;
	uint64_t epoch = ksm_load_seqcst(&a->peer.control->peer_epoch);
	int files = kit_open_files();
	CHECK_EQ(ksm_seat_take(&a->peer, false, &seat), 0);
	CHECK_NE(seat.slot, a->peer.seat.slot);
	CHECK_EQ(ksm_load_seqcst(&a->peer.control->peer_epoch), epoch + 1); /* REFS-3 */
	CHECK_EQ(kit_open_files(), files + 1); /* the bitmap; no descriptor keeps the lock */
	CHECK_EQ(ksm_os_lock_find(a->peer.fds.file, KSM_LOCK_LIVENESS + seat.slot, 1), KSM_LOCK_LIVENESS + seat.slot);
	CHECK_EQ(ksm_peer_slot(&a->peer, seat.slot)->pid, getpid());
	CHECK_EQ(ksm_peer_slot(&a->peer, seat.slot)->epoch, seat.epoch);
	/* Only the owner's mapping can write it. */
	struct stat stat;
	CHECK_SYS(fstat(seat.bitmap_fd, &stat));
	CHECK(mmap(NULL, KSM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, seat.bitmap_fd, 0) == MAP_FAILED);
	CHECK_EQ(pwrite(seat.bitmap_fd, "x", 1, 0), -1);
	CHECK_EQ(ftruncate(seat.bitmap_fd, 0), -1);
	ksm_slotno slot = seat.slot;
	ksm_seat_leave(&seat);
	CHECK_EQ(ksm_os_lock_find(a->peer.fds.file, KSM_LOCK_LIVENESS + slot, 1), -ENOENT);
	CHECK_EQ(ksm_seat_take(&a->peer, false, &again), 0);
	CHECK_EQ(again.slot, slot);
	CHECK_EQ(again.epoch, 2);
	ksm_seat_leave(&again);
	members_leave(a);
}

TEST(the_lock_outlives_all_descriptors_but_not_the_process)
{
	struct ksm_member *a = members_join("d");
	uint32_t *steps = kit_steps();
	for (int way = 0; way < 2; way++) {
		kit_reach(steps, 0);
		pid_t pid = kit_fork();
		if (pid == 0) {
			members_forget();
			struct ksm_member *me = members_join("d");
			CHECK_EQ(me->peer.seat.slot, 1);
			CHECK_SYS(syscall(SYS_close_range, 3u, ~0u, 0));
			kit_reach(steps, 1);
			kit_await(steps, 2);
			if (way)
				execl("/bin/sleep", "sleep", "60", (char *)NULL);
			for (;;)
				pause();
		}
		members_begin(NULL);
		kit_await(steps, 1);
		members_end();
		CHECK_EQ(ksm_os_lock_find(a->peer.fds.file, KSM_LOCK_LIVENESS + 1, 1), KSM_LOCK_LIVENESS + 1);
		kit_reach(steps, 2);
		if (way) /* exec: another program, not a peer */
			KIT_WAIT(10, ksm_os_lock_find(a->peer.fds.file, KSM_LOCK_LIVENESS + 1, 1) == -ENOENT);
		kit_kill(pid);
		CHECK_EQ(ksm_os_lock_find(a->peer.fds.file, KSM_LOCK_LIVENESS + 1, 1), -ENOENT);
	}
	members_leave(a);
}

TEST(a_child_does_not_keep_its_parents_seat)
{
	struct ksm_member *a = members_join("d");
	uint32_t *steps = kit_steps();
	pid_t child = 0;
	pid_t pid = kit_fork();
	if (pid == 0) {
		members_forget();
		members_join("d");
		pid_t own = fork(); /* without our handlers' knowledge: a member, not a domain */
		if (own == 0) {
			prctl(PR_SET_PDEATHSIG, 0);
			alarm((unsigned)harness_limit(5));
			for (;;)
				pause();
		}
		steps[1] = (uint32_t)own;
		kit_reach(steps, 1);
		for (;;)
			pause();
	}
	members_begin(NULL);
	kit_await(steps, 1);
	members_end();
	child = (pid_t)steps[1];
	kit_kill(pid);
	CHECK_EQ(kill(child, 0), 0);
	int64_t lock = ksm_os_lock_find(a->peer.fds.file, KSM_LOCK_LIVENESS + 1, 1);
	kill(child, SIGKILL);
	CHECK_EQ(lock, -ENOENT);
	members_leave(a);
}

TEST(a_domain_can_be_full)
{
	struct ksm_member *a = members_join("d");
	struct ksm_seat seat;
	int file = ksm_os_reopen(a->peer.fds.file, a->peer.fds.directory, "domain");
	CHECK_GE(file, 0);
	for (unsigned slot = 0; slot < KSM_PEERS_MAX; slot++)
		if (slot != a->peer.seat.slot)
			CHECK_EQ(ksm_os_lock_try(file, KSM_LOCK_LIVENESS + slot), 0);
	int files = kit_open_files();
	CHECK_EQ(ksm_seat_take(&a->peer, false, &seat), KSM_EPEERS);
	CHECK_EQ(kit_open_files(), files);
	CHECK_EQ(ksm_os_unlock(file, KSM_LOCK_LIVENESS + 1000), 0);
	CHECK_EQ(ksm_seat_take(&a->peer, false, &seat), 0);
	CHECK_EQ(seat.slot, 1000);
	ksm_seat_leave(&seat);
	CHECK_EQ(ksm_peer_refresh(&a->peer), -EAGAIN); /* many whose bitmaps nobody has */
	CHECK_EQ(a->peer.living_count, KSM_PEERS_MAX - 1);
	CHECK_EQ(ksm_bits_of_others(&a->peer, 0), UINT64_MAX); /* REFS-5 */
	close(file);
	CHECK_EQ(ksm_peer_refresh(&a->peer), 0);
	CHECK_EQ(ksm_bits_of_others(&a->peer, 0), 0);
	CHECK(ksm_peer_slot(&a->peer, KSM_PEERS_MAX) == NULL);
	members_leave(a);
}

TEST(bits_are_seen_by_others)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	uint64_t state = 2, bits[64] = {0};
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(a->peer.living_count, 2);
	CHECK(ksm_peer_is_living(&a->peer, b->peer.seat.slot, b->peer.seat.epoch));
	CHECK(!ksm_peer_is_living(&a->peer, b->peer.seat.slot, b->peer.seat.epoch + 1));
	CHECK(!ksm_peer_is_living(&a->peer, 700, 0));
	for (int i = 0; i < 2000; i++) {
		ksm_frameno frame = (ksm_frameno)(kit_random(&state) % (64 * 64));
		if (kit_random(&state) % 2) {
			ksm_bit_set(&b->peer, frame);
			bits[frame / 64] |= 1ull << frame % 64;
		} else {
			ksm_bit_clear(&b->peer, frame);
			bits[frame / 64] &= ~(1ull << frame % 64);
		}
		CHECK_EQ(ksm_bit_test(&b->peer, frame), bits[frame / 64] >> frame % 64 & 1);
		CHECK_EQ(ksm_bits_of_others(&a->peer, frame & ~63u), bits[frame / 64]);
		CHECK_EQ(ksm_bits_of_others(&b->peer, frame & ~63u), 0); /* ours are not others' */
	}
	/* Beyond `high` nothing is read: holes stay holes. */
	uint64_t before = kit_blocks(b->peer.seat.bitmap_fd);
	for (ksm_frameno frame = 0; frame + 64 < a->peer.layout.frames; frame += 64)
		(void)ksm_bits_of_others(&a->peer, frame);
	CHECK_EQ(kit_blocks(b->peer.seat.bitmap_fd), before);
	members_leave(b);
	CHECK_EQ(ksm_peer_refresh(&a->peer), 0);
	CHECK_EQ(a->peer.living_count, 1);
	CHECK_EQ(ksm_bits_of_others(&a->peer, 0), 0);
	CHECK(ksm_chunks_any(&a->peer) || ksm_load_relaxed(&a->peer.control->frames_high) == 0);
	members_leave(a);
}

TEST(the_dead_ones_chunks_are_marked)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	CHECK_EQ(members_know(a), 0);
	CHECK_EQ(members_know(b), 0);
	ksm_frameno frame;
	CHECK_EQ(ksm_frame_alloc(&b->peer, 3 * KSM_CHUNK + 5, &frame), 0);
	CHECK_EQ(frame, 3 * KSM_CHUNK + 5);
	for (uint64_t chunk = 0; chunk < 8; chunk++)
		ksm_chunk_unmark(&a->peer, chunk);
	CHECK(!ksm_chunks_any(&a->peer));
	members_leave(b);
	CHECK_EQ(ksm_peer_refresh(&a->peer), 0);
	CHECK(ksm_chunks_any(&a->peer));
	CHECK(ksm_chunk_unmark(&a->peer, 3));
	CHECK(!ksm_chunk_unmark(&a->peer, 3));
	CHECK_EQ(members_sweep(a), 1);
	members_leave(a);
}

TEST(a_copied_seat_has_the_same_bits)
{
	struct ksm_member *a = members_join("d");
	struct ksm_seat seat;
	uint64_t state = 2;
	for (int i = 0; i < 500; i++)
		ksm_bit_set(&a->peer, (ksm_frameno)(kit_random(&state) % 20000));
	CHECK_EQ(ksm_seat_take(&a->peer, true, &seat), 0);
	uint64_t epoch = ksm_load_seqcst(&a->peer.control->peer_epoch);
	ksm_seat_copy_bits(&a->peer, &seat, &a->peer.seat);
	CHECK_EQ(ksm_load_seqcst(&a->peer.control->peer_epoch), epoch + 1);
	CHECK_EQ(seat.bitmap->high, a->peer.seat.bitmap->high);
	CHECK_EQ(memcmp(seat.bits, a->peer.seat.bits, 20000 / 8), 0);
	ksm_seat_leave(&seat);
	members_leave(a);
}

/* ---- what is not believed ------------------------------------------------------------------------------------------------------ */

/* A descriptor like a bitmap's, with one thing wrong. */
static int make_bitmap(struct ksm_member *a, int wrong)
{
	size_t nbytes = ksm_bitmap_bytes(a->peer.layout.frames);
	int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	struct ksm_bitmap head = {.magic = KSM_MAGIC, .slot = 5, .slot_epoch = 1, .frames = a->peer.layout.frames};
	int fd = ksm_os_memfd("bitmap");
	memcpy(head.id, a->peer.control->id, 16);
	CHECK_EQ(ksm_os_truncate(fd, wrong == 1   ? nbytes - KSM_PAGE_SIZE
				     : wrong == 2 ? nbytes + KSM_PAGE_SIZE
						  : nbytes),
		 0);
	head.magic += wrong == 3;
	head.slot += wrong == 4;
	head.frames -= wrong == 5;
	head.id[7] ^= wrong == 6;
	CHECK_EQ(ksm_os_pwrite(fd, &head, sizeof(head), 0), 0);
	CHECK_EQ(ksm_os_seal(fd, seals | (wrong == 7 ? 0 : 0x10 /* F_SEAL_FUTURE_WRITE */)), 0);
	return fd;
}

TEST(bitmaps_that_are_none_are_refused)
{
	struct ksm_member *a = members_join("d");
	int files = kit_open_files();
	for (int wrong = 1; wrong <= 7; wrong++) {
		CHECK_EQ(ksm_peer_attach_bitmap(&a->peer, 5, make_bitmap(a, wrong)), KSM_ECORRUPT);
		CHECK(a->peer.others[5].bitmap == NULL);
		CHECK_EQ(kit_open_files(), files);
	}
	CHECK_EQ(ksm_peer_attach_bitmap(&a->peer, KSM_PEERS_MAX, make_bitmap(a, 0)), KSM_ECORRUPT);
	CHECK_LT(ksm_peer_attach_bitmap(&a->peer, 5, open("/dev/null", O_RDWR | O_CLOEXEC)), 0);
	CHECK_EQ(kit_open_files(), files);
	CHECK_EQ(ksm_peer_attach_bitmap(&a->peer, 5, make_bitmap(a, 0)), 0);
	CHECK_EQ(ksm_peer_attach_bitmap(&a->peer, 5, make_bitmap(a, 0)), 0); /* instead of the other */
	CHECK_EQ(kit_open_files(), files + 1);
	members_leave(a);
}

TEST(control_files_that_are_none_are_refused)
{
	struct ksm_member *a = members_join("d");
	struct ksm_control head;
	CHECK_EQ(ksm_os_pread(a->peer.fds.control, &head, sizeof(head), 0), 0);
	for (int wrong = 0; wrong <= 7; wrong++) {
		struct ksm_control bad = head;
		struct ksm_peer peer;
		uint64_t nbytes = a->peer.layout.total;
		int expected = wrong == 0 ? 0 : wrong == 2 || wrong == 3 ? KSM_ELAYOUT : KSM_ECORRUPT;
		int fd = ksm_os_memfd("control");
		bad.magic += wrong == 1;
		bad.version += wrong == 2;
		bad.layout += wrong == 3;
		bad.frames = wrong == 4 ? 0 : wrong == 5 ? UINT64_MAX : bad.frames;
		nbytes += wrong == 6 ? KSM_PAGE_SIZE : 0;
		CHECK_EQ(ksm_os_truncate(fd, nbytes), 0);
		CHECK_EQ(ksm_os_pwrite(fd, &bad, sizeof(bad), 0), 0);
		if (wrong != 7)
			CHECK_EQ(ksm_os_seal(fd, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
		ksm_peer_init(&peer);
		CHECK_EQ(ksm_peer_map_control(&peer, fd), expected);
		if (expected)
			close(fd);
		else
			ksm_peer_destroy(&peer);
	}
	members_leave(a);
}

/* ---- the merge lock -------------------------------------------------------------------------------------------------------------- */

static uint32_t lock_stop, lock_rounds;

static void *lock_often(void *argument)
{
	struct ksm_peer *peer = argument;
	while (!ksm_load_relaxed(&lock_stop)) { /* as a scanner does: gives it up only to take it again */
		ksm_merge_lock(peer);
		ksm_add_relaxed(&lock_rounds, 1);
		kit_sleep_ms(1);
		ksm_merge_unlock(peer);
	}
	return NULL;
}

TEST(the_merge_lock_starves_nobody)
{
	struct ksm_member *a = members_join("d");
	pthread_t thread;
	CHECK_EQ(pthread_create(&thread, NULL, lock_often, &a->peer), 0);
	for (int i = 0; i < 50; i++) {
		uint32_t before = ksm_load_relaxed(&lock_rounds);
		KIT_WAIT(5, ksm_load_relaxed(&lock_rounds) > before);
		before = ksm_load_relaxed(&lock_rounds);
		ksm_merge_lock(&a->peer);
		CHECK_LE(ksm_load_relaxed(&lock_rounds), before + 20); /* not after many of its turns */
		ksm_merge_unlock(&a->peer);
	}
	ksm_store_release(&lock_stop, 1);
	pthread_join(thread, NULL);
	members_leave(a);
}
