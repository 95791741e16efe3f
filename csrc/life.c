/* SPDX-License-Identifier: MIT */
/*
 * DOC: The process
 *
 * What has to happen once in a process, in one ordered list: the check whether we can work here at all, and the fork
 * handlers. They are registered when the library is loaded, so that ours run in one well-known place among others':
 * prepare handlers run last registered first, the others first registered first.
 *
 *    prepare   list, memory, and for each domain: a seat for the child ▸ seeds ▸ the scanner ends ▸ merge lock
 *    parent    in turn: unmap the child's seat ▸ unlock; tell whoever asked that scanners are wanted again
 *    child     in turn: sit down ▸ new locks; nothing is started here
 *
 * LIFE-1. No thread is started in a handler: Python counts threads when os.fork() is about to return.
 */
#include "domain.h"

#include "atomic.h"
#include "error.h"

#include <pthread.h>
#include <unistd.h>

static void (*wanted)(void);

void ksm_process_on_wanted(void (*callback)(void))
{
	ksm_store_release(&wanted, callback);
}

void ksm_process_resume(void)
{
	ksm_domains_resume();
}

int ksm_process_check(void)
{
	if (sysconf(_SC_PAGESIZE) != (long)KSM_PAGE_SIZE)
		return KSM_EUNSUPPORTED;
	return ksm_os_is_linux(5, 10) ? 0 : KSM_EUNSUPPORTED;
}

static void parent(void)
{
	ksm_domains_fork_parent();
	void (*callback)(void) = ksm_load_acquire(&wanted);
	if (callback)
		callback();
}

__attribute__((constructor)) static void load(void)
{
	pthread_atfork(ksm_domains_fork_prepare, parent, ksm_domains_fork_child);
}
