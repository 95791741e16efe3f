/* SPDX-License-Identifier: MIT */
/*
 * page.h: what can be asked of one page's bytes. Pure functions; any thread. The pages may change while they
 * are read: then the answer is about some mixture, and only a window makes it exact.
 */
#ifndef KSM_PAGE_H
#define KSM_PAGE_H

#include "base.h"

/* A digest has this many bits; the rest of a page word is its state. */
#define KSM_DIGEST_BITS 60
/* The bits of it kept with a published frame. */
#define KSM_DIGEST_CHECK_SHIFT (KSM_DIGEST_BITS - 32)

/* All bytes zero? */
bool ksm_page_is_zero(const void *page);

/* Digest of a page: KSM_DIGEST_BITS bits, equal for equal bytes, on every machine of one byte order. It proposes
 * twins; it proves nothing, and no adversary is kept out. */
uint64_t ksm_page_digest(const void *page);

/* That of a page of zeros. */
uint64_t ksm_page_zero_digest(void);

/* Byte-for-byte. */
bool ksm_page_equal(const void *a, const void *b);

#endif
