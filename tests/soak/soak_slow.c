/* SPDX-License-Identifier: MIT */
/*
 * Random pauses before and after every call that changes a mapping or a guard, a second out of four: what can happen in
 * between then does. The program is linked with --wrap for these functions. A busy machine does the same, more rarely.
 */
#include "soak.h"

#include "guard.h"
#include "os.h"

#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ONE_IN 8       /* how often there is a pause */
#define LONG_ONE_IN 64 /* of these, a long one */

static bool slow;

/* Also in signal handlers. */
void soak_linger(void)
{
	static uint32_t number;
	struct timespec moment;
	int error = errno;
	if (!slow)
		return;
	uint32_t r = __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED) * 2654435761u;
	r = (r ^ r >> 15) * 2246822519u;
	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &moment);
	if (moment.tv_sec % 4 == 0 && r % ONE_IN == 0) {
		bool is_long = (r >> 8) % LONG_ONE_IN == 0;
		moment = (struct timespec){.tv_nsec = is_long ? 1000000 : (r >> 14) % 100000};
		syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &moment, NULL);
	}
	errno = error;
}

void soak_switch_slow(void)
{
	slow = true;
}

/* The linker's names. */
#define SLOW(type, name, parameters, arguments)                                                                        \
	type __real_##name parameters;                                                                                 \
	type __wrap_##name parameters;                                                                                 \
	type __wrap_##name parameters                                                                                  \
	{                                                                                                              \
		soak_linger();                                                                                         \
		type result = __real_##name arguments;                                                                 \
		soak_linger();                                                                                         \
		return result;                                                                                         \
	}

SLOW(int, ksm_os_map_anon, (void *at, size_t n, bool fixed, bool reserve, void **out), (at, n, fixed, reserve, out))
SLOW(int, ksm_os_map_frames, (void *at, size_t n, int fd, uint64_t from, bool writable), (at, n, fd, from, writable))
SLOW(int, ksm_os_protect, (void *at, size_t n, bool writable), (at, n, writable))
SLOW(int, ksm_os_advise, (void *at, size_t n, int advice), (at, n, advice))
SLOW(int, ksm_os_remap, (void *from, void *to, size_t n), (from, to, n))
SLOW(int, ksm_os_uffd_register, (int uffd, void *at, size_t n, unsigned modes), (uffd, at, n, modes))
SLOW(int, ksm_os_uffd_unregister, (int uffd, void *at, size_t n), (uffd, at, n))
SLOW(int64_t, ksm_os_uffd_move, (int uffd, void *to, void *from, size_t n), (uffd, to, from, n))
SLOW(int, ksm_os_uffd_wake, (int uffd, void *at, size_t n), (uffd, at, n))
SLOW(int, ksm_os_uffd_protect, (int uffd, void *at, size_t n, bool on), (uffd, at, n, on))
SLOW(int, ksm_os_map_anon_sigsafe, (size_t n, void **out), (n, out))
SLOW(int, ksm_os_protect_sigsafe, (void *at, size_t n, bool writable), (at, n, writable))
SLOW(int, ksm_os_pagemap, (int fd, const void *at, size_t n, uint16_t *kinds), (fd, at, n, kinds))
SLOW(int, ksm_os_pread, (int fd, void *to, size_t n, uint64_t from), (fd, to, n, from))
SLOW(int, ksm_os_pwrite, (int fd, const void *bytes, size_t n, uint64_t to), (fd, bytes, n, to))
SLOW(int, ksm_os_punch, (int fd, uint64_t from, uint64_t n), (fd, from, n))

void __real_ksm_guard_set(struct ksm_guard *guard, size_t page, size_t count, uint8_t byte);
void __wrap_ksm_guard_set(struct ksm_guard *guard, size_t page, size_t count, uint8_t byte);

void __wrap_ksm_guard_set(struct ksm_guard *guard, size_t page, size_t count, uint8_t byte)
{
	soak_linger();
	__real_ksm_guard_set(guard, page, count, byte);
	soak_linger();
}

uint8_t __real_ksm_guard_get(const struct ksm_guard *guard, size_t page);
uint8_t __wrap_ksm_guard_get(const struct ksm_guard *guard, size_t page);

uint8_t __wrap_ksm_guard_get(const struct ksm_guard *guard, size_t page)
{
	static uint32_t number;
	uint8_t byte = __real_ksm_guard_get(guard, page);
	if (__atomic_add_fetch(&number, 1, __ATOMIC_RELAXED) % 8 == 0) /* there are so many */
		soak_linger();
	return byte;
}
