/* SPDX-License-Identifier: MIT */
/*
 * DOC: Faults on demand
 *
 * In a build with KSM_FAULTS every system call of os.h asks here first whether it should fail instead of being made. The
 * tests say which: one call of a kind, so many of them, or one in N by chance. In any other build this file is empty.
 *
 * The environment can ask for chance, so that a program that knows nothing of this runs into it:
 *
 *    KSMALLOC_FAULTS=N:SEED            one call in N, of all kinds
 *    KSMALLOC_FAULTS=N:SEED:KIND,KIND  of these
 *    KSMALLOC_FAULTS_LOG=FILE          a line for each kind that failed is added to it when the process exits
 *
 * Callable from any thread and from signal handlers: counts are atomic, and nothing else is kept.
 */
#include "os.h"

#ifdef KSM_FAULTS

#include "atomic.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct kind {
	uint32_t calls, hits, skip, count;
	int error;
};

static struct kind own[KSM_OS_CALL_COUNT], *kinds = own;
static uint32_t one_in;
static uint64_t chance;
static bool spared[KSM_OS_CALL_COUNT]; /* from chance */

#define LEAST 4
/* What manual pages and the kernel's source name, without what only a wrong argument brings about. */
static const int errors[KSM_OS_CALL_COUNT][LEAST] = {
	[KSM_OS_MAP_ANON] = {-ENOMEM, -EAGAIN},
	[KSM_OS_MAP_FRAMES] = {-ENOMEM, -EAGAIN, -ENFILE},
	[KSM_OS_MAP_SHARED] = {-ENOMEM, -EAGAIN, -EPERM},
	[KSM_OS_UNMAP] = {-ENOMEM},
	[KSM_OS_PROTECT] = {-ENOMEM, -EACCES},
	[KSM_OS_ADVISE] = {-ENOMEM, -EAGAIN, -EINVAL, -EBUSY},
	[KSM_OS_REMAP] = {-ENOMEM, -EAGAIN},
	[KSM_OS_POPULATE] = {-ENOMEM},
	[KSM_OS_OPEN] = {-EMFILE, -ENOMEM, -EACCES, -ENOENT},
	[KSM_OS_PREAD] = {-EIO, -ENOMEM, -EAGAIN},
	[KSM_OS_PWRITE] = {-ENOSPC, -ENOMEM, -EIO, -EFBIG},
	[KSM_OS_STAT] = {-ENOMEM, -EIO},
	[KSM_OS_TRUNCATE] = {-ENOMEM, -EFBIG, -EPERM},
	[KSM_OS_PUNCH] = {-ENOMEM, -EOPNOTSUPP, -EPERM, -ENOSPC},
	[KSM_OS_MEMFD] = {-EMFILE, -ENFILE, -ENOMEM},
	[KSM_OS_SEAL] = {-EPERM, -EBUSY, -EINVAL},
	[KSM_OS_LOCK] = {-ENOLCK, -EAGAIN, -EINTR},
	[KSM_OS_UNLINK] = {-EBUSY, -EACCES, -ENOENT, -EIO},
	[KSM_OS_MKDIR] = {-EEXIST, -ENOSPC, -EACCES, -ENOMEM},
	[KSM_OS_LIST] = {-EMFILE, -ENOMEM, -EIO},
	[KSM_OS_UNSHARE_FILES] = {-ENOMEM, -EPERM},
	[KSM_OS_CLOSE_RANGE] = {-ENOMEM, -EMFILE, -EPERM},
	[KSM_OS_RANDOM] = {-EIO, -ENOSYS},
	[KSM_OS_THREAD] = {-EAGAIN, -ENOMEM, -EPERM},
	[KSM_OS_SIGNALFD] = {-EMFILE, -ENOMEM},
	[KSM_OS_POLL] = {-ENOMEM, -EINVAL},
	[KSM_OS_UFFD_OPEN] = {-EPERM, -EMFILE, -ENOMEM, -EINVAL},
	[KSM_OS_UFFD_REGISTER] = {-ENOMEM, -EBUSY, -EINVAL},
	[KSM_OS_UFFD_UNREGISTER] = {-ENOMEM, -EINVAL},
	[KSM_OS_UFFD_MOVE] = {-EBUSY, -EAGAIN, -ENOMEM, -EEXIST},
	[KSM_OS_UFFD_COPY] = {-EEXIST, -ENOMEM, -EAGAIN},
	[KSM_OS_UFFD_HAS] = {-ENOMEM},
	[KSM_OS_UFFD_WAKE] = {-EAGAIN, -EINVAL},
	[KSM_OS_UFFD_PROTECT] = {-EAGAIN, -ENOENT},
	[KSM_OS_UFFD_READ] = {-EAGAIN},
	[KSM_OS_RESIDENT] = {-ENOMEM, -EAGAIN},
	[KSM_OS_PAGEMAP_SCAN] = {-ENOMEM, -EIO, -EPERM},
	[KSM_OS_SOCKET] = {-EMFILE, -ENOBUFS, -ENOMEM, -EACCES},
	[KSM_OS_BIND] = {-EADDRINUSE, -ENOSPC, -EACCES, -ENOMEM},
	[KSM_OS_CONNECT] = {-ECONNREFUSED, -EAGAIN, -ENOENT, -EACCES},
	[KSM_OS_ACCEPT] = {-EMFILE, -ECONNABORTED, -ENOMEM, -EAGAIN},
	[KSM_OS_SEND] = {-EPIPE, -EAGAIN, -ENOBUFS, -ETOOMANYREFS},
	[KSM_OS_RECEIVE] = {-ECONNRESET, -EAGAIN, -ENOMEM, -EMSGSIZE},
	[KSM_OS_HANDLER] = {-EPERM, -EINVAL},
	[KSM_OS_THREAD_SIGNAL] = {-EAGAIN, -ESRCH, -EPERM},
	[KSM_OS_WORD_WAIT] = {-EAGAIN, -EINTR, -ETIMEDOUT},
	[KSM_OS_READ_LINK] = {-EACCES, -ENOENT, -ENOMEM},
	[KSM_OS_ATTRIBUTE] = {-ENODATA, -EACCES},
	[KSM_OS_COMPARE] = {-EPERM, -ENOSYS, -ESRCH},
	[KSM_OS_ALLOCATE] = {-ENOMEM},
	[KSM_OS_REOPEN] = {-EMFILE, -ENOENT, -EACCES},
	[KSM_OS_LIFT] = {-EMFILE, -ENOMEM},
	[KSM_OS_SEEK] = {-EINVAL},
	[KSM_OS_SEALS] = {-EINVAL},
	[KSM_OS_UNLOCK] = {-ENOLCK},
	[KSM_OS_LISTEN] = {-EADDRINUSE, -ENOMEM},
	[KSM_OS_PEER_USER] = {-EINVAL},
	[KSM_OS_KICK] = {-EAGAIN, -ESRCH},
	[KSM_OS_UFFD_TRY] = {-EPERM, -EMFILE},
	[KSM_OS_SIGNAL_SELF] = {-EAGAIN},
	[KSM_OS_MAP_QUERY] = {-ENOTTY, -ENOMEM, -EIO},
	[KSM_OS_READ_OWN] = {-EFAULT, -ENOMEM, -EPERM},
	[KSM_OS_PAGE_RANGES] = {-ENOMEM, -EINTR, -ENOTTY},
};

const int *ksm_os_fault_errors(enum ksm_os_call call, size_t *count)
{
	for (*count = 0; *count < LEAST && errors[call][*count];)
		++*count;
	return errors[call];
}

size_t ksm_os_fault_share(void *shared)
{
	if (shared)
		kinds = shared;
	return sizeof(own);
}

void ksm_os_fault_set(enum ksm_os_call call, uint32_t skip, uint32_t count, int error)
{
	ksm_store_relaxed(&kinds[call].error, error);
	ksm_store_release(&kinds[call].calls, 0);
	ksm_store_release(&kinds[call].hits, 0);
	ksm_store_release(&kinds[call].skip, skip);
	ksm_store_release(&kinds[call].count, count);
}

void ksm_os_fault_clear(void)
{
	for (int call = 0; call < KSM_OS_CALL_COUNT; call++)
		ksm_os_fault_set(call, 0, 0, 0);
}

uint32_t ksm_os_fault_calls(enum ksm_os_call call)
{
	return ksm_load_acquire(&kinds[call].calls);
}

uint32_t ksm_os_fault_hits(unsigned call)
{
	return call < KSM_OS_CALL_COUNT ? ksm_load_acquire(&kinds[call].hits) : 0;
}

static int by_chance(enum ksm_os_call call)
{
	uint32_t n = ksm_load_relaxed(&one_in);
	if (!n || spared[call])
		return 0;
	uint64_t z = ksm_add_relaxed(&chance, 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	z ^= z >> 31;
	size_t count;
	const int *list = ksm_os_fault_errors(call, &count);
	if ((uint32_t)z % n)
		return 0;
	return count ? list[(z >> 32) % count] : -ENOMEM;
}

int ksm_os_fault_(enum ksm_os_call call)
{
	uint32_t number = ksm_add_relaxed(&kinds[call].calls, 1);
	uint32_t count = ksm_load_acquire(&kinds[call].count);
	uint32_t skip = ksm_load_acquire(&kinds[call].skip);
	int error = count && number >= skip && number - skip < count ? ksm_load_relaxed(&kinds[call].error)
								     : by_chance(call);
	if (error)
		ksm_add_relaxed(&kinds[call].hits, 1);
	return error;
}

const char *ksm_os_call_name(unsigned call)
{
	static const char *const names[] = {
#define KSM_OS_CALL_NAME(name) #name,
		KSM_OS_CALLS(KSM_OS_CALL_NAME)
#undef KSM_OS_CALL_NAME
	};
	return call < KSM_OS_CALL_COUNT ? names[call] : NULL;
}

void ksm_os_fault_random(uint64_t seed, uint32_t n)
{
	chance = seed * 0xd1342543de82ef95ull;
	ksm_store_release(&one_in, n);
}

/* Is a name in a list with commas? */
static bool is_listed(const char *list, const char *name)
{
	size_t n = strlen(name);
	for (const char *at = list; (at = strstr(at, name)); at += n)
		if ((at == list || at[-1] == ',') && (!at[n] || at[n] == ','))
			return true;
	return false;
}

__attribute__((constructor)) static void ask_environment(void)
{
	const char *text = getenv("KSMALLOC_FAULTS");
	char *end;
	if (!text)
		return;
	uint32_t n = (uint32_t)strtoul(text, &end, 10);
	uint64_t seed = *end == ':' ? strtoull(end + 1, &end, 10) : 0;
	for (unsigned call = 0; call < KSM_OS_CALL_COUNT && *end == ':'; call++)
		spared[call] = !is_listed(end + 1, ksm_os_call_name(call));
	ksm_os_fault_random(seed, n);
}

__attribute__((destructor)) static void log_hits(void)
{
	const char *path = getenv("KSMALLOC_FAULTS_LOG");
	FILE *file = path ? fopen(path, "ae") : NULL;
	for (unsigned call = 0; file && call < KSM_OS_CALL_COUNT; call++)
		if (ksm_os_fault_hits(call))
			fprintf(file, "%s %u\n", ksm_os_call_name(call), ksm_os_fault_hits(call));
	if (file)
		fclose(file);
}

#endif
