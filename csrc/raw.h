/* SPDX-License-Identifier: MIT */
/*
 * raw.h: a system call and nothing else, for signal handlers: no function of the C library, which another library may
 * have put its own in front of, and no errno, which belongs to the interrupted code, and which a thread that was made
 * without the C library does not have.
 */
#ifndef KSM_RAW_H
#define KSM_RAW_H

#include "base.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <errno.h>
#include <unistd.h>
#endif

/* The kernel's answer: a value, or a negative errno. */
static inline long ksm_raw_call(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
#else
	int saved = errno;
	long result = syscall(number, a, b, c, d, e, f);
	result = result < 0 ? -errno : result;
	errno = saved;
	return result;
#endif
}

#endif
