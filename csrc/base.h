/* SPDX-License-Identifier: MIT */
/*
 * base.h: types, attributes, assertion levels. Includes nothing of ours.
 */
#ifndef KSM_BASE_H
#define KSM_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The page size is fixed when the core is compiled; ksm_process_check() refuses another one at run time. */
#ifndef KSM_PAGE_SHIFT
#define KSM_PAGE_SHIFT 12
#endif
#define KSM_PAGE_SIZE ((size_t)1 << KSM_PAGE_SHIFT)

typedef uint32_t ksm_frameno; /* which frame of the store; KSM_NO_FRAME: none */
typedef uint32_t ksm_slotno;  /* which peer of the domain; KSM_NO_SLOT: none */
typedef size_t ksm_pageno;    /* which page of a region, from 0 */

#define KSM_NO_FRAME UINT32_MAX
#define KSM_NO_SLOT UINT32_MAX

#define KSM_PRINTF(format, first) __attribute__((format(printf, format, first)))
#define KSM_UNUSED __attribute__((unused))
#define KSM_LIKELY(x) __builtin_expect(!!(x), 1)
#define KSM_UNLIKELY(x) __builtin_expect(!!(x), 0)

#define KSM_MIN(a, b) ((a) < (b) ? (a) : (b))
#define KSM_MAX(a, b) ((a) > (b) ? (a) : (b))
#define KSM_COUNT(array) (sizeof(array) / sizeof((array)[0]))

static inline size_t ksm_page_round_up(size_t n)
{
	return (n + KSM_PAGE_SIZE - 1) & ~(KSM_PAGE_SIZE - 1);
}

static inline size_t ksm_pages_of(size_t nbytes)
{
	return ksm_page_round_up(nbytes) >> KSM_PAGE_SHIFT;
}

/*
 * Corruption of our own memory ends the process with a message: going on would hand out wrong bytes.
 * A peer's corruption is refused with KSM_ECORRUPT instead, never a panic.
 */
void ksm_panic(const char *file, int line, const char *what) __attribute__((noreturn, cold));

/*
 * Assertion levels: 0 none; 1 (release) the cheap ones that guard against silent damage; 2 (tests) all.
 */
#ifndef KSM_ASSERT_LEVEL
#define KSM_ASSERT_LEVEL 1
#endif

#define KSM_ENSURE_(condition)                                                                                         \
	do {                                                                                                           \
		if (KSM_UNLIKELY(!(condition)))                                                                        \
			ksm_panic(__FILE__, __LINE__, #condition);                                                     \
	} while (0)

#if KSM_ASSERT_LEVEL >= 1
#define ksm_ensure(condition) KSM_ENSURE_(condition)
#else
#define ksm_ensure(condition) ((void)sizeof(condition))
#endif

#if KSM_ASSERT_LEVEL >= 2
#define ksm_assert(condition) KSM_ENSURE_(condition)
#else
#define ksm_assert(condition) ((void)sizeof(condition))
#endif

#endif
