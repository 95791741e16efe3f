/* SPDX-License-Identifier: MIT */
/*
 * The mad process. It joins as anybody does, and then does everything it can with what it was given, except what no
 * memory file can refuse to somebody who holds it: writing into the store itself. Now and then it puts the worst right
 * again, for where nothing works any more nothing can go wrong.
 */
#include "mad.h"

#include "member.h"
#include "os.h"

#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <signal.h>
#include <time.h>

#define HEAL_EVERY_NS 60000000ull
#define REST_NS 25000000ull

static void serve(struct mad_state *mad, uint64_t ns)
{
	for (uint64_t until = mad_now_ns() + ns; mad_now_ns() < until;) {
		ksm_exchange_serve(&mad->member->exchange, &mad->member->peer);
		ksm_os_sleep_ns(1000000);
	}
}

static void rage(struct mad_state *mad)
{
	enum mad_way way;
	do
		way = (enum mad_way)mad_below(&mad->random, MAD_WAYS);
	while (!(mad->options->ways & 1u << way));
	switch (way) {
	case MAD_FILES:
		mad_try_files(mad);
		break;
	case MAD_RENDEZVOUS:
		mad_try_rendezvous(mad);
		break;
	case MAD_CALLS:
		mad_call(mad);
		break;
	case MAD_ANSWERS:
		for (uint64_t until = mad_now_ns() + 10000000; mad_now_ns() < until;) {
			mad_answer(mad);
			ksm_os_sleep_ns(500000);
		}
		break;
	default:
		mad_scribble(mad, way);
	}
}

void mad_peer(const struct mad_options *options)
{
	struct ksm_domain_options as = {.name = options->name,
					.path = options->rendezvous,
					.capacity_bytes = 64u << 20,
					.barrier = options->barrier,
					.store_fd = -1};
	static struct mad_state mad;
	mad = (struct mad_state){.options = options, .totals = options->totals, .random = options->seed * 77};
	mad.member = calloc(1, sizeof(*mad.member));
	ksm_member_init(mad.member, &as);
	int r = ksm_member_join(mad.member);
	if (r)
		mad_die("the mad one cannot join", r);
	__atomic_store_n(&mad.totals->mad_joined, 1, __ATOMIC_RELAXED);
	while (!mad_get32(&mad.totals->mad))
		serve(&mad, 1000000);
	for (;;) {
		ksm_scan_know_peers(&mad.member->scanner);
		mad_look(&mad);
		for (uint64_t until = mad_now_ns() + HEAL_EVERY_NS; mad_now_ns() < until;) {
			rage(&mad);
			if (mad_below(&mad.random, 4))
				ksm_exchange_serve(&mad.member->exchange, &mad.member->peer);
		}
		if (mad_below(&mad.random, 4))
			mad_heal(&mad);
		serve(&mad, REST_NS);
	}
}
