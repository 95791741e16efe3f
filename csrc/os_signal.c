/* SPDX-License-Identifier: MIT */
/*
 * DOC: Calls of the SIGSEGV handler
 *
 * What the handler for stores into read-only pages needs: memory mapped, moved and protected, and other handlers called
 * as the kernel would call them. All of it runs in a signal handler, in the middle of whatever the program was doing,
 * malloc() and pthread_mutex_lock() included. So these are raw system calls: no function of the C library, which another
 * library may have put its own in front of, and no errno, which belongs to the interrupted code.
 */
#include "os.h"

#include "raw.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long word(const void *pointer)
{
	return (long)(uintptr_t)pointer;
}

static bool is_error(long result)
{
	return result < 0 && result > -4096;
}

/* ---- memory ---------------------------------------------------------------------------------------- */

int ksm_os_map_anon_sigsafe(size_t nbytes, void **out)
{
	KSM_FAULT(MAP_ANON);
	long at = ksm_raw_call(SYS_mmap, 0, (long)nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (is_error(at))
		return (int)at;
	*out = (void *)(uintptr_t)at;
	return 0;
}

int ksm_os_protect_sigsafe(void *at, size_t nbytes, bool writable)
{
	KSM_FAULT(PROTECT);
	return (int)ksm_raw_call(SYS_mprotect, word(at), (long)nbytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, 0,
				 0, 0);
}

int ksm_os_advise_sigsafe(void *at, size_t nbytes, int advice)
{
	KSM_FAULT(ADVISE);
	return (int)ksm_raw_call(SYS_madvise, word(at), (long)nbytes, advice, 0, 0, 0);
}

int ksm_os_remap_sigsafe(void *from, void *to, size_t nbytes)
{
	KSM_FAULT(REMAP);
	long at = ksm_raw_call(SYS_mremap, word(from), (long)nbytes, (long)nbytes, MREMAP_MAYMOVE | MREMAP_FIXED,
			       word(to), 0);
	return is_error(at) ? (int)at : 0;
}

int ksm_os_unmap_sigsafe(void *at, size_t nbytes)
{
	KSM_FAULT(UNMAP);
	return (int)ksm_raw_call(SYS_munmap, word(at), (long)nbytes, 0, 0, 0, 0);
}

bool ksm_os_is_mapped_sigsafe(const void *at, size_t nbytes)
{
	/* It needs no memory, as mincore(2) does, and does nothing but look. */
	return ksm_raw_call(SYS_msync, word(at), (long)nbytes, MS_ASYNC, 0, 0, 0) != -ENOMEM;
}

/* ---- signals --------------------------------------------------------------------------------------- */

int ksm_os_action_sigsafe(int signal, const struct ksm_os_action *new, struct ksm_os_action *old)
{
	if (new)
		KSM_FAULT(HANDLER);
	return (int)ksm_raw_call(SYS_rt_sigaction, signal, word(new), word(old), sizeof(uint64_t), 0, 0);
}

int ksm_os_action_exchange(int signal, ksm_os_handler handler, struct ksm_os_action *old)
{
	KSM_FAULT(HANDLER);
	struct sigaction new = {.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK}, was;
	struct ksm_os_action raw;
	new.sa_sigaction = handler;
	sigfillset(&new.sa_mask);
	if (sigaction(signal, &new, &was)) /* by the C library, which knows how a handler returns */
		return -errno;
	old->handler = was.sa_sigaction;
	old->flags = (unsigned long)(unsigned)was.sa_flags;
	memcpy(&old->mask, &was.sa_mask, sizeof(old->mask));
	old->restorer = was.sa_restorer;
	int r = ksm_os_action_sigsafe(signal, NULL, &raw);
#ifdef __SANITIZE_THREAD__ /* its sigaction() installs a function of its own, which is not what we look for later */
	raw.handler = signal == SIGSEGV ? handler : raw.handler;
#endif
	if (r || raw.handler != handler)
		return r;
	raw.mask = UINT64_MAX; /* the C library keeps two signals of its own out of every mask */
	return (int)ksm_raw_call(SYS_rt_sigaction, signal, word(&raw), 0, sizeof(uint64_t), 0, 0);
}

uint64_t ksm_os_mask_sigsafe(uint64_t mask)
{
	uint64_t old = 0;
	ksm_raw_call(SYS_rt_sigprocmask, SIG_SETMASK, word(&mask), word(&old), sizeof(mask), 0, 0);
	return old;
}

int ksm_os_signal_self_sigsafe(int signal, siginfo_t *info)
{
	KSM_FAULT(SIGNAL_SELF);
	long pid = ksm_raw_call(SYS_getpid, 0, 0, 0, 0, 0, 0), tid = ksm_raw_call(SYS_gettid, 0, 0, 0, 0, 0, 0);
	return (int)ksm_raw_call(SYS_rt_tgsigqueueinfo, pid, tid, signal, word(info), 0, 0);
}

int ksm_os_tid_sigsafe(void)
{
	return (int)ksm_raw_call(SYS_gettid, 0, 0, 0, 0, 0, 0);
}

void ksm_os_yield_sigsafe(void)
{
	ksm_raw_call(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
}

void ksm_os_sleep_sigsafe(uint64_t ns)
{
	struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
	ksm_raw_call(SYS_nanosleep, word(&t), 0, 0, 0, 0, 0);
}

#if defined(__aarch64__)
/* struct esr_context of asm/sigcontext.h, which goes together with signal.h only in some C libraries. */
struct fault_record {
	uint32_t magic, nbytes;
	uint64_t esr;
};
#define FAULT_RECORD_MAGIC 0x45535201u
#endif

enum ksm_os_access ksm_os_access_sigsafe(const void *context)
{
	const ucontext_t *at = context;
#if defined(__x86_64__)
	return at->uc_mcontext.gregs[REG_ERR] & 2 ? KSM_ACCESS_WRITE : KSM_ACCESS_READ;
#elif defined(__aarch64__)
	const unsigned char *record = at->uc_mcontext.__reserved;
	for (size_t done = 0; done + sizeof(struct fault_record) <= sizeof(at->uc_mcontext.__reserved);) {
		struct fault_record found;
		memcpy(&found, record + done, sizeof(found));
		if (found.magic == FAULT_RECORD_MAGIC) /* the class of a data abort from below, and "write, not read" */
			return found.esr >> 26 == 0x24 && found.esr & 1u << 6 ? KSM_ACCESS_WRITE : KSM_ACCESS_READ;
		if (!found.magic || found.nbytes < 8)
			break;
		done += found.nbytes;
	}
	return KSM_ACCESS_UNKNOWN;
#else
	(void)at;
	return KSM_ACCESS_UNKNOWN;
#endif
}
