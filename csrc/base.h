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

#define KSM_PRINTF(string, first) __attribute__((format(printf, string, first)))
#define KSM_UNUSED __attribute__((unused))
#define KSM_LIKELY(x) __builtin_expect(!!(x), 1)
#define KSM_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* Each argument is evaluated once: a word that peers share may be another one when it is read again. */
#define KSM_MIN(a, b)                                                                                                  \
	({                                                                                                             \
		__typeof__(1 ? (a) : (b)) ksm_min_a = (a), ksm_min_b = (b);                                            \
		ksm_min_a < ksm_min_b ? ksm_min_a : ksm_min_b;                                                         \
	})
#define KSM_MAX(a, b)                                                                                                  \
	({                                                                                                             \
		__typeof__(1 ? (a) : (b)) ksm_max_a = (a), ksm_max_b = (b);                                            \
		ksm_max_a > ksm_max_b ? ksm_max_a : ksm_max_b;                                                         \
	})
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
 * Levels of self-checking. README.md lists which invariant is checked where.
 *
 *    0   nothing. For measuring only: a level-1 check that fails means bytes that are silently wrong.
 *    1   release: ksm_ensure(). A few loads and compares before what cannot be undone: mapping a frame, putting a
 *        reference, punching a hole, giving addresses out. Never in a loop over more than the operation itself touches.
 *    2   tests: ksm_assert() too. What an operation may take for granted of its caller and of its own structure.
 *    3   tests that can afford it: ksm_audit() too, at the end of every pass: all books of the process are recounted,
 *        and compared with what the kernel says is mapped (audit.c).
 *
 * All of them are about memory that nobody else can write: private tables, and our own bitmap, which is sealed. What
 * peers can write is looked at too, but what is wrong there is refused with KSM_ECORRUPT or left alone.
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
