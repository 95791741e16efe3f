/* SPDX-License-Identifier: MIT */
/* What can be asked of a page's bytes. */
#include "kit.h"

#include "page.h"

static unsigned char page[KSM_PAGE_SIZE] __attribute__((aligned(64)));

TEST(zero_is_zero_whatever_byte_is_not)
{
	CHECK(ksm_page_is_zero(page));
	for (size_t i = 0; i < KSM_PAGE_SIZE; i++) {
		page[i] = (unsigned char)(1u << i % 8);
		CHECK(!ksm_page_is_zero(page));
		page[i] = 0;
	}
	CHECK(ksm_page_is_zero(page));
}

TEST(equal_means_every_byte)
{
	static unsigned char other[KSM_PAGE_SIZE];
	kit_fill(page, 3);
	kit_fill(other, 3);
	CHECK(ksm_page_equal(page, other));
	for (size_t i = 0; i < KSM_PAGE_SIZE; i++) {
		other[i] ^= 0x80;
		CHECK(!ksm_page_equal(page, other));
		other[i] ^= 0x80;
	}
}

/* Processes of different builds share one index: the same bytes have the same digest for ever. */
TEST(digests_are_what_they_always_were)
{
	static const struct {
		uint64_t seed, digest;
	} known[] = {
		{0, 0x3bd9bcb0b6fc15a},
		{1, 0x4a08d1a76421be2},
		{2, 0xe4f35804853d0d5},
		{12345678, 0x367600bacd4f47},
	};
	for (size_t i = 0; i < KSM_COUNT(known); i++) {
		kit_fill(page, known[i].seed);
		uint64_t digest = ksm_page_digest(page);
		if (digest != known[i].digest)
			FAIL("the digest of the page of seed %llu is 0x%llx", (unsigned long long)known[i].seed,
			     (unsigned long long)digest);
		CHECK_EQ(digest >> KSM_DIGEST_BITS, 0);
	}
	memset(page, 0xff, sizeof(page));
	CHECK_EQ(ksm_page_digest(page), 0x6f756de654b15f4);
}

/* On a page of zeros, of ones, of small numbers and of noise: every bit counts, and on average half of the digest's
 * bits change with it. */
TEST(every_bit_counts)
{
	uint64_t flipped = 0, cases = 0;
	for (int kind = 0; kind < 4; kind++) {
		memset(page, kind == 1 ? 0xff : 0, sizeof(page));
		for (size_t i = 0; i < KSM_PAGE_SIZE / 8 && kind == 2; i++)
			((uint64_t *)page)[i] = i;
		if (kind == 3)
			kit_fill(page, 9);
		uint64_t digest = ksm_page_digest(page);
		for (size_t bit = 0; bit < KSM_PAGE_SIZE * 8; bit++) {
			page[bit / 8] ^= (unsigned char)(1u << bit % 8);
			uint64_t other = ksm_page_digest(page);
			page[bit / 8] ^= (unsigned char)(1u << bit % 8);
			CHECK_NE(digest, other);
			int n = __builtin_popcountll(digest ^ other);
			CHECK_GT(n, 4);
			CHECK_LT(n, KSM_DIGEST_BITS - 4);
			flipped += (uint64_t)n;
			cases++;
		}
		CHECK_EQ(ksm_page_digest(page), digest);
	}
	double mean = (double)flipped / (double)cases / KSM_DIGEST_BITS;
	if (mean < 0.49 || mean > 0.51)
		FAIL("a bit changes %.3f of the digest's", mean);
}

/* Signs of floating-point numbers: two flips of top bits must not cancel, wherever they are. */
TEST(top_bits_do_not_cancel)
{
	uint64_t state = 1, *words = (uint64_t *)page;
	for (int kind = 0; kind < 2; kind++) {
		kit_fill(page, kind ? 4 : 0);
		uint64_t digest = ksm_page_digest(page);
		for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++) {
			for (size_t j = i + 1; j < KSM_PAGE_SIZE / 8; j += 1 + kit_random(&state) % 16) {
				words[i] ^= 1ull << 63;
				words[j] ^= 1ull << 63;
				CHECK_NE(ksm_page_digest(page), digest);
				words[i] ^= 1ull << 63;
				words[j] ^= 1ull << 63;
			}
		}
	}
}

/* Words that trade places, and pages that are one value throughout. */
TEST(order_and_value_count)
{
	static uint64_t seen[4096];
	uint64_t *words = (uint64_t *)page;
	kit_fill(page, 6);
	uint64_t digest = ksm_page_digest(page);
	for (size_t i = 0; i + 1 < KSM_PAGE_SIZE / 8; i++) {
		uint64_t one = words[i];
		words[i] = words[i + 1];
		words[i + 1] = one;
		CHECK_NE(ksm_page_digest(page), digest);
		words[i + 1] = words[i];
		words[i] = one;
	}
	for (size_t value = 0; value < KSM_COUNT(seen); value++) {
		for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++)
			words[i] = value;
		seen[value] = ksm_page_digest(page);
	}
	for (size_t i = 0; i < KSM_COUNT(seen); i++)
		for (size_t j = 0; j < i; j++)
			CHECK_NE(seen[i], seen[j]);
}
