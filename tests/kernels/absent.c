/* SPDX-License-Identifier: MIT */
/*
 * absent: loaded before the C library (LD_PRELOAD). The files of ABSENT_FILES, with colons between, are not there;
 * uname() says ABSENT_RELEASE. See as_on.c.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

static bool is_absent(const char *path)
{
	const char *list = getenv("ABSENT_FILES");
	size_t n = strlen(path);
	for (const char *at = list; at && *at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL)
		if (!strncmp(at, path, n) && (at[n] == ':' || !at[n]))
			return true;
	return false;
}

int openat(int dirfd, const char *path, int flags, ...)
{
	mode_t mode = 0;
	if (flags & (O_CREAT | O_TMPFILE)) {
		va_list arguments;
		va_start(arguments, flags);
		mode = va_arg(arguments, mode_t);
		va_end(arguments);
	}
	if (is_absent(path)) {
		errno = ENOENT;
		return -1;
	}
	return (int)syscall(SYS_openat, dirfd, path, flags, mode);
}

int open(const char *path, int flags, ...)
{
	mode_t mode = 0;
	if (flags & (O_CREAT | O_TMPFILE)) {
		va_list arguments;
		va_start(arguments, flags);
		mode = va_arg(arguments, mode_t);
		va_end(arguments);
	}
	return openat(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) __attribute__((alias("open")));
int openat64(int dirfd, const char *path, int flags, ...) __attribute__((alias("openat")));

int uname(struct utsname *out)
{
	static int (*real)(struct utsname *);
	const char *release = getenv("ABSENT_RELEASE");
	if (!real)
		real = (int (*)(struct utsname *))dlsym(RTLD_NEXT, "uname");
	int r = real(out);
	if (!r && release)
		snprintf(out->release, sizeof(out->release), "%s", release);
	return r;
}
