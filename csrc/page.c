/* SPDX-License-Identifier: MIT */
/*
 * DOC: Pages
 *
 * The digest runs four independent lanes over a page, each folding sixteen bytes a step by one 64 × 64 → 128
 * bit multiplication (high half xor low half). Folding carries every input bit into every position, which
 * a plain multiplication does not: there, two flips of the top bit (the sign of a floating-point number)
 * cancel. Each lane's state also enters by addition, so that a zero factor cannot erase what came before.
 * A processor fetches ahead by itself, but not beyond the end of a page; so the second half of each page asks for the first
 * half of the next one. Whatever lies there, asking faults nothing.
 *
 * No special instructions: a multiplication of this kind is one or two instructions on x86-64 and aarch64.
 */
#include "page.h"

#include "atomic.h"

#include <string.h>

#define AHEAD (KSM_PAGE_SIZE / 2)

static inline uint64_t read64(const unsigned char *p)
{
	uint64_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
	unsigned __int128 product = (unsigned __int128)a * b;
	return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static const uint64_t SALT[8] = {
	0x9e3779b97f4a7c15ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull, 0xd6e8feb86659fd93ull,
	0xa0761d6478bd642full, 0xe7037ed1a0b428dbull, 0x8ebc6af09c88c6e3ull, 0x589965cc75374cc3ull,
};

bool ksm_page_is_zero(const void *page)
{
	const unsigned char *p = page;
	for (size_t at = 0; at < KSM_PAGE_SIZE; at += 64) {
		uint64_t any = 0;
		for (size_t i = 0; i < 64; i += 8)
			any |= read64(p + at + i);
		if (any)
			return false;
	}
	return true;
}

uint64_t ksm_page_digest(const void *page)
{
	const unsigned char *p = page;
	uint64_t lane[4] = {SALT[4], SALT[5], SALT[6], SALT[7]};
	for (size_t at = 0; at < KSM_PAGE_SIZE; at += 64) {
		__builtin_prefetch(p + at + AHEAD);
#pragma GCC unroll 4
		for (size_t i = 0; i < 4; i++) {
			uint64_t a = read64(p + at + 16 * i), b = read64(p + at + 16 * i + 8);
			lane[i] = fold(a ^ SALT[i], b ^ lane[i]) + (lane[i] ^ (a << 32 | a >> 32));
		}
	}
	uint64_t digest = fold(lane[0] ^ SALT[1], lane[1] + SALT[2]) + fold(lane[2] ^ SALT[3], lane[3] + SALT[4]);
	digest = fold(digest ^ SALT[5], (lane[0] ^ lane[2]) + SALT[6]) ^ (lane[1] + lane[3]);
	digest = (digest ^ (digest >> 32)) * SALT[0];
	return (digest ^ (digest >> 29)) >> (64 - KSM_DIGEST_BITS);
}

uint64_t ksm_page_zero_digest(void)
{
	static const unsigned char zeros[KSM_PAGE_SIZE];
	static uint64_t known; /* atomic; whoever computes it gets the same */
	uint64_t digest = ksm_load_relaxed(&known);
	if (!digest)
		ksm_store_relaxed(&known, digest = ksm_page_digest(zeros));
	return digest;
}

bool ksm_page_equal(const void *a, const void *b)
{
	return memcmp(a, b, KSM_PAGE_SIZE) == 0;
}
