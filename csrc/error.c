/* SPDX-License-Identifier: MIT */
/*
 * DOC: Errors
 *
 * One convention everywhere: 0 (or a count) is success, a negative errno is the kernel's word, and the
 * codes of error.h are ours. This file owns their names and sentences and nothing else. Python maps the
 * same codes to exception types.
 */
#include "error.h"

#include "base.h"
#include "ksmalloc.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *ksm_error_name(int code)
{
	switch (code) {
	case 0:
		return "OK";
#define KSM_ERROR_NAME(symbol, value, sentence)                                                                        \
	case symbol:                                                                                                   \
		return #symbol;
		KSM_ERRORS(KSM_ERROR_NAME)
#undef KSM_ERROR_NAME
	default: {
		const char *name = code > -4096 && code < 0 ? strerrorname_np(-code) : NULL;
		return name ? name : "UNKNOWN";
	}
	}
}

const char *ksm_error_message(int code)
{
	switch (code) {
	case 0:
		return "success";
#define KSM_ERROR_MESSAGE(symbol, value, sentence)                                                                     \
	case symbol:                                                                                                   \
		return sentence;
		KSM_ERRORS(KSM_ERROR_MESSAGE)
#undef KSM_ERROR_MESSAGE
	default: {
		const char *text = code > -4096 && code < 0 ? strerrordesc_np(-code) : NULL;
		return text ? text : "unknown error";
	}
	}
}

/* The scanner's thread has closed standard error in its own table; the program's is found through /proc. */
void ksm_panic(const char *file, int line, const char *what)
{
	char text[256];
	int n = snprintf(text, sizeof(text), "ksmalloc: %s:%d: broken invariant: %s\n", file, line, what);
	int fd = open("/proc/self/fd/2", O_WRONLY | O_CLOEXEC | O_APPEND | O_NOCTTY);
	if (n > 0 && write(fd >= 0 ? fd : STDERR_FILENO, text, KSM_MIN((size_t)n, sizeof(text) - 1)) < 0) {
		/* nobody to tell */
	}
	abort();
}
