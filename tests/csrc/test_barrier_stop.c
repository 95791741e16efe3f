/* SPDX-License-Identifier: MIT */
#include "parking.h"

#include "barrier.h"

#include <linux/io_uring.h>

static struct ksm_park park;
static struct ksm_barrier barrier;

static void set_up(void)
{
	park = parking_lot();
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_STOP, &park, -1), 0);
	parking_start(parking_spin, -1, -1, NULL);
	parking_start(parking_nap, -1, -1, NULL);
}

static void open_window(char *at, size_t pages)
{
	double until = harness_now() + harness_limit(30);
	while (ksm_window_open(&barrier, at, pages)) {
		CHECK_LT(harness_now(), until);
		park.retry_at_ns = 0;
		kit_sleep_ms(5);
	}
}

static void tear_down(void)
{
	parking_all_moved();
	parking_end();
	ksm_barrier_destroy(&barrier);
	ksm_park_destroy(&park);
}

TEST(without_a_park_there_is_none)
{
	struct ksm_park empty = {0};
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_STOP, NULL, -1), -ENOSYS);
	CHECK_EQ(ksm_barrier_create(&barrier, KSM_BARRIER_STOP, &empty, -1), -ENOSYS);
	CHECK(!barrier.ops);
}

TEST(a_refusal_comes_through)
{
	struct io_uring_params params = {0};
	char *at = kit_map_filled(2, 1);
	set_up();
	int ring = (int)syscall(SYS_io_uring_setup, 2, &params);
	if (ring >= 0) {
		CHECK_EQ(ksm_window_open(&barrier, at, 2), KSM_EDEVICES);
		CHECK_EQ(ksm_barrier_stop.hold(&barrier, at, 2), KSM_EDEVICES);
		close(ring);
		park.retry_at_ns = 0;
	}
	open_window(at, 2);
	CHECK(barrier.view == at);
	CHECK_EQ(ksm_window_close(&barrier), 0);
	kit_check_filled(at, 2, 1);
	tear_down();
}

/* STOP-1 */
TEST(calls_that_fail_lose_nothing)
{
	char *at = kit_map_filled(6, 1);
	int store = ksm_os_memfd("store");
	CHECK_EQ(ksm_os_pwrite(store, at, 6 * KSM_PAGE_SIZE, 0), 0);
	set_up();
	open_window(at, 6);
	ksm_os_fault_set(KSM_OS_MAP_FRAMES, 0, 1, -ENOMEM);
	CHECK_EQ(ksm_window_map(&barrier, 0, 2, store, 0, true), -ENOMEM);
	ksm_os_fault_set(KSM_OS_ADVISE, 0, 1, -ENOMEM);
	CHECK_EQ(ksm_window_drop(&barrier, 2, 1), -ENOMEM);
	ksm_os_fault_clear();
	kit_check_filled(at, 6, 1);
	CHECK_EQ(ksm_window_map(&barrier, 0, 2, store, 0, true), 0);
	CHECK_EQ(ksm_window_drop(&barrier, 2, 1), 0);
	CHECK_EQ(ksm_window_close(&barrier), 0);
	CHECK(kit_is(kit_page(at, 2), 0));
	kit_fill(kit_page(at, 2), 3);
	kit_check_filled(at, 6, 1);
	CHECK_EQ(kit_is_file(at), 1);
	tear_down();
}

/* STOP-2: mmap() has failed and left a hole. */
TEST(a_hole_is_filled)
{
	char *at = kit_map_filled(6, 1);
	int store = ksm_os_memfd("store");
	CHECK_EQ(ksm_os_pwrite(store, at, 6 * KSM_PAGE_SIZE, 0), 0);
	set_up();
	for (uint32_t failures = 0; failures < 3; failures++) {
		open_window(at, 6);
		CHECK_SYS(munmap(kit_page(at, 2), KSM_PAGE_SIZE));
		ksm_os_fault_set(KSM_OS_MAP_FRAMES, 0, 1, -ENOMEM);
		ksm_os_fault_set(KSM_OS_MAP_ANON, 0, failures, -ENOMEM); /* it takes several attempts */
		ksm_os_fault_set(KSM_OS_PREAD, 0, failures, -EIO);
		CHECK_EQ(ksm_window_map(&barrier, 1, 3, store, KSM_PAGE_SIZE, true), -ENOMEM);
		ksm_os_fault_clear();
		CHECK_EQ(ksm_window_close(&barrier), 0);
		kit_check_filled(at, 6, 1);
		CHECK_EQ(kit_is_file(kit_page(at, 2)), 0);
		kit_fill(kit_page(at, 2), 77); /* can be written */
		kit_fill(kit_page(at, 2), 3);
	}
	tear_down();
}
