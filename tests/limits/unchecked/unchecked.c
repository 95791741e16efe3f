/* SPDX-License-Identifier: MIT */
/* The control: linked with this the core writes frames whether or not a control group has room for them. */
#include "headroom.h"

int __wrap_ksm_headroom_check(struct ksm_headroom *headroom, uint64_t nbytes, uint64_t spare);
int __wrap_ksm_headroom_check(struct ksm_headroom *headroom KSM_UNUSED, uint64_t nbytes KSM_UNUSED,
			      uint64_t spare KSM_UNUSED)
{
	return 0;
}
