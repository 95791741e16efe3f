/* SPDX-License-Identifier: MIT */
/*
 * pace.h: how much the scanner may do now, and when again. Arithmetic only: the caller brings the clock.
 */
#ifndef KSM_PACE_H
#define KSM_PACE_H

#include "base.h"

struct ksm_pace {
	uint64_t at_ns;     /* when credit was last counted; 0: never */
	uint64_t credit_ns; /* of processor time */
	uint64_t debt_ns;   /* used beyond it */
	uint64_t page_ns;   /* what a page costs, lately */
	uint64_t per_mille; /* of one processor */
};

void ksm_pace_init(struct ksm_pace *pace);
/* max_cpu: per cent of one processor, 1 … 100. */
void ksm_pace_limit(struct ksm_pace *pace, uint64_t now_ns, uint32_t max_cpu);
/* How many pages the next batch may look at, at least one. */
uint64_t ksm_pace_pages(const struct ksm_pace *pace);
/* A batch has looked at so many pages (0: at none), in so much of a processor's time. */
void ksm_pace_spent(struct ksm_pace *pace, uint64_t pages, uint64_t cpu_ns);
/* How long to wait before the next one. */
uint64_t ksm_pace_rest_ns(const struct ksm_pace *pace);

#endif
