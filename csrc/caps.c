/* SPDX-License-Identifier: MIT */
/*
 * DOC: What this process may do here
 *
 * One look at everything that decides which barrier, tracking and copy-on-write a process gets, for people who want to know
 * why not a better one. Looked up anew each time, in the scanner's thread; nothing is changed by it.
 */
#include "atomic.h"
#include "domain.h"
#include "handler.h"
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

static int try_move(void)
{
	int fd = ksm_os_uffd_open(KSM_UFFD_FEATURE_MOVE | KSM_UFFD_FEATURE_PROTECT_FILES);
	ksm_os_close(fd);
	return fd < 0 ? fd : 0;
}

static int try_pagemap(void)
{
	int fd = ksm_os_open(AT_FDCWD, "/proc/self/pagemap", O_RDONLY, 0);
	ksm_os_close(fd);
	return fd < 0 ? fd : 0;
}

static enum ksm_tracking tracking(const struct ksm_scanner *scanner)
{
	if (scanner->peer->fds.pagemap < 0)
		return KSM_TRACKING_DIGEST;
	return scanner->tracker.uffd >= 0 ? KSM_TRACKING_WRITES : KSM_TRACKING_PAGEMAP;
}

static int look(struct ksm_member *member, void *context)
{
	struct ksm_capabilities *out = context;
	const struct ksm_scanner *scanner = &member->scanner;
	const struct ksm_park *park = &scanner->park;
	const struct ksm_peer *peer = &member->peer;
	*out = (struct ksm_capabilities){
		.barrier = ksm_load_relaxed(&peer->self->barrier),
		.tracking = tracking(scanner),
		.move = try_move(),
		.uffd_device = ksm_os_uffd_try_device(),
		.uffd_call = ksm_os_uffd_try_call(false),
		.uffd_user = ksm_os_uffd_try_call(true),
		.stop = park->why,
		.stop_signal = ksm_park_signal(),
		.segv = ksm_handler_is_installed() ? ksm_handler_check() : 0,
		.handler = ksm_handler_is_installed(),
		.pagemap = try_pagemap(),
		.writes = scanner->tracker.error,
		.dumpable = ksm_os_dumpable(),
		.why_not = ksm_load_relaxed(&peer->self->why_not),
		.stops = park->stops,
		.stops_failed = park->failures,
		.suspensions = ksm_handler_suspensions(),
	};
	snprintf(out->stop_reason, sizeof(out->stop_reason), "%s", park->reason);
	return 0;
}

int ksm_domain_capabilities(struct ksm_domain *domain, struct ksm_capabilities *out)
{
	struct ksm_capabilities found = {0};
	int r = ksm_worker_call(&domain->worker, look, &found);
	*out = found;
	return r;
}

int ksm_process_stop_signal(int signal)
{
	return ksm_park_choose_signal(signal);
}

void ksm_process_before_exec(void)
{
	ksm_park_before_exec();
}

int ksm_process_handler_reinstall(void)
{
	return ksm_handler_is_installed() ? ksm_handler_reinstall() : 0;
}

void ksm_process_handler_popped(void)
{
	if (ksm_handler_is_installed())
		ksm_handler_popped();
}
