/* SPDX-License-Identifier: MIT */
/* The control: linked with this the core touches tables without having asked for their memory. */
#include "os.h"

int __wrap_ksm_os_populate(void *at, size_t nbytes);
int __wrap_ksm_os_populate(void *at KSM_UNUSED, size_t nbytes KSM_UNUSED)
{
	return 0;
}
