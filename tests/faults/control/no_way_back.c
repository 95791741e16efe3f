/* SPDX-License-Identifier: MIT */
/*
 * A planted bug, to see that the walk finds one: after a frame could not be mapped, pages that were taken out of the
 * program's memory are not put back.
 */
#include "barrier.h"
#include "os.h"

unsigned __real_ksm_window_close(struct ksm_barrier *barrier);
unsigned __wrap_ksm_window_close(struct ksm_barrier *barrier);

unsigned __wrap_ksm_window_close(struct ksm_barrier *barrier)
{
	for (size_t page = 0; page < barrier->pages && ksm_os_fault_hits(KSM_OS_MAP_FRAMES); page++)
		if (barrier->fate[page] == KSM_WINDOW_OUT)
			barrier->fate[page] = KSM_WINDOW_DROPPED;
	return __real_ksm_window_close(barrier);
}
