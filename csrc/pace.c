/* SPDX-License-Identifier: MIT */
/*
 * DOC: The advisor
 *
 * Kernel KSM's advisor chooses pages_to_scan, so that a pass takes a certain time and ksmd not more of a processor than it may.
 * Here every process has a scanner, and what counts is that new data is found at once and that nobody notices who looks for
 * it. So the advisor keeps an account of processor time: so many per cent of one processor flow in, up to
 * BURST; a batch takes out what it has cost. A scanner that had nothing to do for a while has all of it, and goes through new
 * data in one go; one that always has something to do is held to the share.
 *
 *    share ──▶ ┌────────┐ ──▶ batch of credit / (cost of a page) pages, SLICE at most
 *              │ credit │                      │
 *              └────────┘ ◀── what it cost ────┘     empty: rest until there is enough for half a slice
 *
 * PACE-1. Over any stretch of time the scanner uses no more than its share of it, BURST, and what one batch costs more than
 *         was expected.
 */
#include "pace.h"

#define BURST_NS 200000000u
#define SLICE_NS 4000000u
#define FIRST_PAGE_NS 1000u /* until it is known what a page costs here */
#define LEAST_PAGE_NS 20u

void ksm_pace_init(struct ksm_pace *pace)
{
	*pace = (struct ksm_pace){.credit_ns = BURST_NS, .page_ns = FIRST_PAGE_NS, .per_mille = 200};
}

void ksm_pace_limit(struct ksm_pace *pace, uint64_t now_ns, uint32_t max_cpu)
{
	uint64_t passed = pace->at_ns && now_ns > pace->at_ns ? now_ns - pace->at_ns : 0;
	pace->per_mille = KSM_MIN(KSM_MAX(max_cpu, 1u), 100u) * 10u;
	uint64_t earned = passed / 1000 * pace->per_mille;
	uint64_t paid = KSM_MIN(earned, pace->debt_ns);
	pace->at_ns = now_ns;
	pace->debt_ns -= paid;
	pace->credit_ns = KSM_MIN(pace->credit_ns + earned - paid, (uint64_t)BURST_NS);
}

uint64_t ksm_pace_pages(const struct ksm_pace *pace)
{
	return KSM_MAX(KSM_MIN(pace->credit_ns, (uint64_t)SLICE_NS) / pace->page_ns, (uint64_t)1);
}

void ksm_pace_spent(struct ksm_pace *pace, uint64_t pages, uint64_t cpu_ns)
{
	uint64_t paid = KSM_MIN(cpu_ns, pace->credit_ns);
	pace->credit_ns -= paid;
	pace->debt_ns += cpu_ns - paid;
	if (pages) /* a quarter of it is new: one dear batch is no rule */
		pace->page_ns = KSM_MAX((3 * pace->page_ns + cpu_ns / pages) / 4, (uint64_t)LEAST_PAGE_NS);
}

uint64_t ksm_pace_rest_ns(const struct ksm_pace *pace)
{
	uint64_t enough = SLICE_NS / 2 + pace->debt_ns;
	return pace->credit_ns >= SLICE_NS / 2 && !pace->debt_ns
		       ? 0
		       : (enough - KSM_MIN(pace->credit_ns, enough)) * 1000 / pace->per_mille;
}
