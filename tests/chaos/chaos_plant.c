/* SPDX-License-Identifier: MIT */
/*
 * Controls: bugs that are planted into the core, in this program only. It is linked with --wrap for these functions.
 * Windows that keep nobody out are the lost-write soak's.
 */
#include "chaos.h"

#include "../soak/soak.h"

#include "atomic.h"
#include "frame.h"
#include "os.h"
#include "peer.h"

#include <unistd.h>

#define FORGOTTEN_ONE_IN 1000
#define HELD_US 5000
#define HELD_ONE_IN 4

static enum chaos_plant planted;

/* The linker's names. */
uint64_t __real_ksm_bits_of_others(const struct ksm_peer *peer, ksm_frameno frame);
uint64_t __wrap_ksm_bits_of_others(const struct ksm_peer *peer, ksm_frameno frame);
int __real_ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from);
int __wrap_ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from);
bool __real_ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch);
bool __wrap_ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch);
uint32_t __real_ksm_frame_publish(struct ksm_peer *peer, ksm_frameno frame, uint64_t digest);
uint32_t __wrap_ksm_frame_publish(struct ksm_peer *peer, ksm_frameno frame, uint64_t digest);
void __real_ksm_merge_unlock(struct ksm_peer *peer);
void __wrap_ksm_merge_unlock(struct ksm_peer *peer);

uint64_t __wrap_ksm_bits_of_others(const struct ksm_peer *peer, ksm_frameno frame)
{
	if (planted != CHAOS_PLANT_PEER || peer->living_count < 2)
		return __real_ksm_bits_of_others(peer, frame);
	struct ksm_peer fewer = *peer;
	fewer.living_count--;
	return __real_ksm_bits_of_others(&fewer, frame);
}

int __wrap_ksm_seat_copy_bits(struct ksm_peer *peer, struct ksm_seat *to, const struct ksm_seat *from)
{
	if (planted != CHAOS_PLANT_FORK)
		return __real_ksm_seat_copy_bits(peer, to, from);
	ksm_add_seqcst(&peer->control->peer_epoch, 1);
	return 0;
}

bool __wrap_ksm_peer_is_living(const struct ksm_peer *peer, ksm_slotno slot, uint32_t epoch)
{
	return planted == CHAOS_PLANT_DEAD || __real_ksm_peer_is_living(peer, slot, epoch);
}

/* Few die just there. */
uint32_t __wrap_ksm_frame_publish(struct ksm_peer *peer, ksm_frameno frame, uint64_t digest)
{
	static uint32_t number;
	if (planted == CHAOS_PLANT_DEAD && ++number % HELD_ONE_IN == 0)
		usleep(HELD_US);
	return __real_ksm_frame_publish(peer, frame, digest);
}

void __wrap_ksm_merge_unlock(struct ksm_peer *peer)
{
	static uint32_t number;
	if (planted != CHAOS_PLANT_LOCK || ++number % FORGOTTEN_ONE_IN)
		__real_ksm_merge_unlock(peer);
}

void chaos_plant(void)
{
	planted = (enum chaos_plant)chaos->plant;
	if (planted == CHAOS_PLANT_WINDOW)
		soak_switch_window_off();
	if (chaos->slow)
		soak_switch_slow();
}
