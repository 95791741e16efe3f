/* SPDX-License-Identifier: MIT */
/*
 * Controls: bugs that somebody might make, put in front of the core's own functions. The test must find each. And two
 * things that are no bugs: a victim has a time of its own, which passes as it asks for it, so that it goes the same way
 * every time; and who looks in while another one is stopped waits neither for the join lock nor for an answer as long as
 * it would.
 */
#include "crash.h"

#include "atomic.h"
#include "os.h"
#include "sweep.h"

#include <poll.h>

static bool plant_early, plant_put, plant_heir, plant_immortal, plant_wait, plant_free;

const struct plant crash_plants[] = {
	{"published-before-written", &plant_early}, {"put-before-unmapped", &plant_put},
	{"bits-not-inherited", &plant_heir},        {"dead-taken-for-living", &plant_immortal},
	{"freed-before-punched", &plant_free},      {"waits-for-the-stopped", &plant_wait},
};
const size_t crash_plant_count = KSM_COUNT(crash_plants);

/* ---- a victim's own time ---------------------------------------------------------------------------------------- */

#define TICK_NS 20000

static uint64_t victims_now; /* 0: this is no victim */

void crash_stop_clock(void)
{
	victims_now = ksm_os_now_ns();
}

void crash_pass_time(uint64_t ns)
{
	victims_now += ns;
}

uint64_t __real_ksm_os_now_ns(void);
uint64_t __wrap_ksm_os_now_ns(void);
uint64_t __wrap_ksm_os_now_ns(void)
{
	if (!victims_now)
		return __real_ksm_os_now_ns();
	return victims_now += TICK_NS;
}

void __real_ksm_os_sleep_ns(uint64_t ns);
void __wrap_ksm_os_sleep_ns(uint64_t ns);
void __wrap_ksm_os_sleep_ns(uint64_t ns)
{
	__real_ksm_os_sleep_ns(ns);
	if (victims_now)
		victims_now += ns;
}

int __real_ksm_os_poll(struct pollfd *fds, size_t count, uint64_t timeout_ns);
int __wrap_ksm_os_poll(struct pollfd *fds, size_t count, uint64_t timeout_ns);
int __wrap_ksm_os_poll(struct pollfd *fds, size_t count, uint64_t timeout_ns)
{
	int n = __real_ksm_os_poll(fds, count, timeout_ns);
	if (n == 0 && victims_now && timeout_ns != UINT64_MAX)
		victims_now += timeout_ns;
	return n;
}

/* ---- less patience ------------------------------------------------------------------------------------------------ */

#define HURRY_MS 20

bool crash_in_a_hurry, crash_expects_no_answer;

int __real_ksm_rendezvous_enter(const struct ksm_domain_options *options, bool create, uint32_t timeout_ms,
				struct ksm_rendezvous *out, int *lock);
int __wrap_ksm_rendezvous_enter(const struct ksm_domain_options *options, bool create, uint32_t timeout_ms,
				struct ksm_rendezvous *out, int *lock);
int __wrap_ksm_rendezvous_enter(const struct ksm_domain_options *options, bool create, uint32_t timeout_ms,
				struct ksm_rendezvous *out, int *lock)
{
	return __real_ksm_rendezvous_enter(options, create, crash_in_a_hurry ? HURRY_MS : timeout_ms, out, lock);
}

int __real_ksm_exchange_join(int directory, int file, uint32_t timeout_ms, int *control, int *store);
int __wrap_ksm_exchange_join(int directory, int file, uint32_t timeout_ms, int *control, int *store);
int __wrap_ksm_exchange_join(int directory, int file, uint32_t timeout_ms, int *control, int *store)
{
	return __real_ksm_exchange_join(directory, file, crash_expects_no_answer ? HURRY_MS : timeout_ms, control,
					store);
}

/* ---- bugs --------------------------------------------------------------------------------------------------------- */

int __real_ksm_frame_write(struct ksm_peer *peer, ksm_frameno frame, size_t count, const void *from);
int __wrap_ksm_frame_write(struct ksm_peer *peer, ksm_frameno frame, size_t count, const void *from);
int __wrap_ksm_frame_write(struct ksm_peer *peer, ksm_frameno frame, size_t count, const void *from)
{
	for (size_t i = 0; plant_early && i < count; i++)
		ksm_frame_publish(peer, frame + (ksm_frameno)i,
				  ksm_page_digest((const char *)from + i * KSM_PAGE_SIZE));
	return __real_ksm_frame_write(peer, frame, count, from);
}

/* What is mapped over a region's pages comes after their frames were given back. */
static struct ksm_region *region;

int __real_ksm_region_init(struct ksm_region *new, struct ksm_peer *peer, struct ksm_index *index, void *base,
			   size_t room, ksm_frameno home);
int __wrap_ksm_region_init(struct ksm_region *new, struct ksm_peer *peer, struct ksm_index *index, void *base,
			   size_t room, ksm_frameno home);
int __wrap_ksm_region_init(struct ksm_region *new, struct ksm_peer *peer, struct ksm_index *index, void *base,
			   size_t room, ksm_frameno home)
{
	region = new;
	return __real_ksm_region_init(new, peer, index, base, room, home);
}

int __real_ksm_os_map_anon(void *at, size_t nbytes, bool fixed, bool reserve, void **out);
int __wrap_ksm_os_map_anon(void *at, size_t nbytes, bool fixed, bool reserve, void **out);
int __wrap_ksm_os_map_anon(void *at, size_t nbytes, bool fixed, bool reserve, void **out)
{
	if (plant_put && region && fixed && at == region->base)
		ksm_region_forget(region, 0, nbytes / KSM_PAGE_SIZE);
	return __real_ksm_os_map_anon(at, nbytes, fixed, reserve, out);
}

int __real_ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from);
int __wrap_ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from);
int __wrap_ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from)
{
	if (!plant_heir)
		return __real_ksm_seat_copy_bits(peer, to, from);
	ksm_add_seqcst(&peer->control->peer_epoch, 1);
	return 0;
}

bool __real_ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch);
bool __wrap_ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch);
bool __wrap_ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch)
{
	return plant_immortal || __real_ksm_peer_is_living(peer, slot, epoch);
}

/* A sweep that does not leave a living one's frames alone, but waits until they are no more in the middle of anything. */
static struct ksm_peer *sweeper;

static bool is_anothers(const struct ksm_peer *peer, uint64_t cell)
{
	enum ksm_cell_state state = ksm_cell_state(cell);
	return state != KSM_CELL_FREE && state != KSM_CELL_PUBLISHED && ksm_cell_slot(cell) != peer->seat.slot &&
	       ksm_peer_is_living(peer, ksm_cell_slot(cell), ksm_cell_epoch(cell));
}

int __real_ksm_sweep_chunk(struct ksm_peer *peer, uint64_t chunk);
int __wrap_ksm_sweep_chunk(struct ksm_peer *peer, uint64_t chunk);
int __wrap_ksm_sweep_chunk(struct ksm_peer *peer, uint64_t chunk)
{
	sweeper = peer;
	for (uint64_t frame = 0; plant_wait && frame < peer->layout.frames; frame++)
		while (is_anothers(peer, ksm_load_acquire(&peer->cells[frame])))
			ksm_os_sleep_ns(1000000);
	return __real_ksm_sweep_chunk(peer, chunk);
}

int __real_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int __wrap_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int __wrap_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes)
{
	for (uint64_t at = offset; plant_free && at < offset + nbytes; at += KSM_PAGE_SIZE) {
		uint64_t *cell = &sweeper->cells[at >> KSM_PAGE_SHIFT];
		ksm_store_release(cell, ksm_cell_make(KSM_CELL_FREE, 0, 0, ksm_cell_generation(*cell) + 1));
	}
	return __real_ksm_os_punch(fd, offset, nbytes);
}
