/* SPDX-License-Identifier: MIT */
/*
 * parking.h: threads that do something over and over and count it, for tests that hold them. A stop may fail on a busy
 * machine; parking_stop() tries until it does not.
 */
#ifndef KSM_TESTS_PARKING_H
#define KSM_TESTS_PARKING_H

#include "kit.h"

#include "park.h"

#define PARKING_MOST 64

struct parking_thread {
	pthread_t thread;
	int (*once)(struct parking_thread *self); /* non-zero: end */
	volatile uint64_t *count;                 /* one more each time it has returned */
	int tid, in, out;                         /* two ends of something to wait on; -1: none */
	void *more;
};

static struct parking_thread parking_all[PARKING_MOST];
static uint64_t *parking_counts; /* one cache line a thread */
static size_t parking_threads;
static uint32_t parking_over;

KIT void *parking_main(void *argument)
{
	struct parking_thread *self = argument;
	ksm_store_release(&self->tid, ksm_os_tid());
	while (!ksm_load_acquire(&parking_over)) {
		int end = self->once(self);
		*self->count = *self->count + 1;
		if (end)
			break;
	}
	return NULL;
}

KIT struct parking_thread *parking_start(int (*once)(struct parking_thread *), int in, int out, void *more)
{
	CHECK_LT(parking_threads, PARKING_MOST);
	if (!parking_counts)
		parking_counts = (uint64_t *)kit_map(1);
	struct parking_thread *self = &parking_all[parking_threads];
	*self = (struct parking_thread){
		.once = once, .count = parking_counts + 8 * parking_threads, .in = in, .out = out, .more = more};
	parking_threads++;
	CHECK_EQ(pthread_create(&self->thread, NULL, parking_main, self), 0);
	KIT_WAIT(10, ksm_load_acquire(&self->tid));
	return self;
}

/* Every thread has to end by itself: what it waits for must come. */
KIT void parking_end(void)
{
	ksm_store_release(&parking_over, 1);
	for (size_t i = 0; i < parking_threads; i++)
		pthread_join(parking_all[i].thread, NULL);
	parking_threads = 0;
	ksm_store_release(&parking_over, 0);
}

KIT struct ksm_park parking_lot(void)
{
	struct ksm_park park;
	int r = ksm_park_create(&park);
	if (r)
		FAIL("no threads can be held here: %s", ksm_error_name(r));
	return park;
}

KIT void parking_stop(struct ksm_park *park)
{
	double until = harness_now() + harness_limit(30);
	int r;
	while ((r = ksm_park_begin(park))) {
		if (r != KSM_EUNSTOPPABLE || harness_now() > until)
			FAIL("%s: %s", ksm_error_name(r), park->reason);
		park->retry_at_ns = 0; /* the test is in a hurry */
		kit_sleep_ms(5);
	}
}

KIT uint64_t parking_sum(void)
{
	uint64_t sum = 0;
	for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++)
		sum += ((volatile uint64_t *)parking_counts)[i];
	return sum;
}

KIT void parking_all_moved(void)
{
	for (size_t i = 0; i < parking_threads; i++) {
		uint64_t was = *parking_all[i].count;
		KIT_WAIT(20, *parking_all[i].count > was);
	}
}

/* ---- what threads do ------------------------------------------------------------------------------------------- */

KIT int parking_spin(struct parking_thread *self KSM_UNUSED)
{
	return 0;
}

KIT int parking_nap(struct parking_thread *self KSM_UNUSED)
{
	nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
	return 0;
}

#endif
