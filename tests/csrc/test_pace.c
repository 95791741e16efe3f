/* SPDX-License-Identifier: MIT */
/* What the advisor allows: a burst, then a share. */
#include "harness.h"

#include "pace.h"

#define MS 1000000ull
#define BURST (200 * MS)

/* Everything is used as soon as it may be, for so long; a page costs so much. Returns processor time used. */
static uint64_t used(struct ksm_pace *pace, uint64_t *now, uint64_t ns, uint32_t max_cpu, uint64_t page_ns)
{
	uint64_t until = *now + ns, sum = 0;
	while (*now < until) {
		ksm_pace_limit(pace, *now, max_cpu);
		uint64_t rest = ksm_pace_rest_ns(pace);
		if (rest) {
			*now += rest;
			continue;
		}
		uint64_t pages = ksm_pace_pages(pace), cpu = pages * page_ns;
		ksm_pace_spent(pace, pages, cpu);
		*now += cpu;
		sum += cpu;
	}
	return sum;
}

TEST(a_burst_and_then_a_share)
{
	static const uint32_t shares[] = {1, 20, 50, 100};
	static const uint64_t costs[] = {50, 1000, 30000};
	for (size_t i = 0; i < KSM_COUNT(shares); i++) {
		for (size_t j = 0; j < KSM_COUNT(costs); j++) {
			struct ksm_pace pace;
			uint64_t now = 12345 * MS;
			ksm_pace_init(&pace);
			uint64_t first = used(&pace, &now, BURST, shares[i], costs[j]);
			CHECK_GE(first, BURST * 9 / 10); /* all at once */
			used(&pace, &now, 2 * BURST, shares[i], costs[j]);
			uint64_t share = 10000 * MS / 100 * shares[i];
			uint64_t sum = used(&pace, &now, 10000 * MS, shares[i], costs[j]);
			CHECK_LE(sum, share + 30 * MS);
			CHECK_GE(sum + 30 * MS, share);
		}
	}
}

TEST(who_rests_may_work_again)
{
	struct ksm_pace pace;
	uint64_t now = 1;
	ksm_pace_init(&pace);
	used(&pace, &now, 3000 * MS, 20, 1000);
	CHECK_LE(used(&pace, &now, 100 * MS, 20, 1000), 30 * MS);
	now += 60000 * MS;
	uint64_t sum = used(&pace, &now, 300 * MS, 20, 1000);
	CHECK_GE(sum, BURST);
	CHECK_LE(sum, BURST + 60 * MS + 10 * MS); /* not for the whole minute */
}

TEST(a_dear_batch_is_paid_off)
{
	struct ksm_pace pace;
	uint64_t now = 1;
	ksm_pace_init(&pace);
	ksm_pace_limit(&pace, now, 20);
	ksm_pace_spent(&pace, 10, BURST + 1000 * MS); /* it lost its processor's caches, or held a lock … */
	CHECK_GE(ksm_pace_rest_ns(&pace), 5000 * MS);
	CHECK_LE(ksm_pace_rest_ns(&pace), 5000 * MS + 20 * MS);
	now += 5020 * MS;
	ksm_pace_limit(&pace, now, 20);
	CHECK_EQ(ksm_pace_rest_ns(&pace), 0);
	CHECK_GE(ksm_pace_pages(&pace), 1);
}

TEST(clocks_and_limits_may_be_anything)
{
	struct ksm_pace pace;
	ksm_pace_init(&pace);
	static const uint64_t times[] = {0, 5, 4, UINT64_MAX, 7, 1ull << 62};
	for (size_t i = 0; i < KSM_COUNT(times); i++) {
		ksm_pace_limit(&pace, times[i], (uint32_t)(times[i] * 37));
		ksm_pace_spent(&pace, i % 2 ? 0 : UINT64_MAX, times[i] % 1000000);
		CHECK_GE(ksm_pace_pages(&pace), 1);
		CHECK_LE(ksm_pace_pages(&pace), 1000000);
		CHECK_LE(ksm_pace_rest_ns(&pace), 1000000 * MS);
	}
}
