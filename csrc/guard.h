/* SPDX-License-Identifier: MIT */
/*
 * guard.h: pages that are mapped read-only by us, so that a store into them faults: one byte a page, read and changed by
 * the SIGSEGV handler and by whoever holds the merge lock, never waited for under a lock.
 */
#ifndef KSM_GUARD_H
#define KSM_GUARD_H

#include "base.h"

/* The low bits; KSM_GUARD_FROZEN may be set beside each of them. */
enum ksm_guard_state {
	KSM_GUARD_OPEN = 0,     /* writable; private memory as far as guards know */
	KSM_GUARD_READONLY = 1, /* private, read-only because it is frozen: a store thaws it */
	KSM_GUARD_MERGED = 2,   /* read-only, mapped to a frame: a store copies it */
	KSM_GUARD_WRITABLE = 3, /* writable, and may be mapped to a frame: the kernel's copy-on-write looks after it */
	KSM_GUARD_BUSY = 4,     /* somebody is changing its mapping: a store waits and tries again */
};
#define KSM_GUARD_FROZEN 0x80u
#define KSM_GUARD_STATE(byte) ((enum ksm_guard_state)((byte) & 0x7fu))

/* The guarded range of one region. The tables are never unmapped, so that a handler may look at a stale one. */
struct ksm_guard {
	uint32_t sequence; /* odd: being set up or taken down */
	char *base;
	size_t pages;
	uint8_t *bytes;    /* one a page; atomic */
	size_t room;       /* pages the table has room for */
	uint32_t busy;     /* atomic: at least as many as are BUSY */
	uint64_t breaks;   /* atomic: merged pages copied by the handler, ever */
	uint64_t thaws;    /* atomic: frozen pages made writable by a store, ever */
	int64_t vmas_left; /* atomic: mappings that breaks may still cost; below 2, whole runs become writable instead */
};

/* Guard [base, base + pages): all OPEN. -ENOMEM, -ENOSPC (too many guarded regions). Any thread. */
int ksm_guard_create(void *base, size_t pages, struct ksm_guard **out);
/* No page of it is protected any more. */
void ksm_guard_destroy(struct ksm_guard *guard);

/* The guard of an address and its page number, or NULL. Safe in a signal handler. */
struct ksm_guard *ksm_guard_find_sigsafe(const void *address, size_t *page);
/* How many guards have been destroyed, ever: a fault may have been on its way meanwhile. */
uint64_t ksm_guards_destroyed_sigsafe(void);

uint8_t ksm_guard_get(const struct ksm_guard *guard, size_t page);
/* Make it BUSY (FROZEN stays set if it was); *was: what it said. false: it is BUSY already. */
bool ksm_guard_claim_sigsafe(struct ksm_guard *guard, size_t page, uint8_t *was);
/* Make it BUSY if it says exactly `byte`, which is not BUSY (FROZEN stays set). What handlers and others without the merge
 * lock use: OPEN and WRITABLE pages are the lock's. */
bool ksm_guard_claim_from_sigsafe(struct ksm_guard *guard, size_t page, uint8_t byte);
/* Of a page that is claimed, or that no handler touches (OPEN, WRITABLE): release order. */
void ksm_guard_set(struct ksm_guard *guard, size_t page, size_t count, uint8_t byte);

/* In the child of a fork: what threads of the parent had claimed becomes writable and WRITABLE. Every guard. */
void ksm_guards_fork_child(void);
/*
 * Nobody answers faults any more: whatever is read-only by us becomes writable, BUSY pages excepted, in every guard.
 * Returns pages changed. Cheap when no page has become read-only since the last time. Merge locks need not be held.
 */
size_t ksm_guards_open_all(void);

#endif
