/* SPDX-License-Identifier: MIT */
/*
 * barrier.h: windows. While a window is open no store of any thread or system call reaches its pages; what it holds
 * can be looked at, and each page is then mapped to a frame, dropped, or put back.
 *
 *     open ─▶ look at view ─▶ map / drop some pages ─▶ close (puts back the rest, wakes whoever waits)
 *
 * One window at a time, opened and closed by the scanner's thread under the merge lock.
 */
#ifndef KSM_BARRIER_H
#define KSM_BARRIER_H

#include "base.h"
#include "ksmalloc.h"
#include "os.h"

#define KSM_WINDOW_PAGES 64 /* at most, in one window */
#define KSM_SCRATCH_BYTES (2 * KSM_WINDOW_PAGES * KSM_PAGE_SIZE)

enum ksm_window_page {
	KSM_WINDOW_OUT = 0, /* in the window, to be put back */
	KSM_WINDOW_MAPPED,
	KSM_WINDOW_DROPPED,
	KSM_WINDOW_GONE, /* registered memory that is not there any more: nothing is done to what is there instead */
};

struct ksm_barrier;
struct ksm_park;

struct ksm_barrier_ops {
	const char *name;
	enum ksm_barrier_kind kind;
	bool in_place; /* pages are not taken out: a window may as well cover pages that will only be put back */
	bool shared;   /* pages shared with another process by a fork can be had, too */
	/* Can it work in this process? 0: it is ready. -EPERM, -EACCES: not allowed; -ENOSYS, -EINVAL: kernel too old. */
	int (*create)(struct ksm_barrier *barrier);
	void (*destroy)(struct ksm_barrier *barrier);
	/* 0: barrier->at, pages and view are set, pages maybe fewer than asked for, at least one. -EBUSY: the first page
	 * cannot be had (pinned, shared by fork). After an error the pages are as they were. */
	int (*open)(struct ksm_barrier *barrier, char *at, size_t pages);
	/* Map `count` pages from `page` of the window to the store, which holds the same bytes. On error they are still in
	 * the window. */
	int (*map)(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable);
	/* Leave them empty: they read as zeros (and are). On error they are still in the window. NULL: nothing to do. */
	int (*drop)(struct ksm_barrier *barrier, size_t page, size_t count);
	/* Returns the number of calls that failed and were made good. Loses nothing, or does not return. */
	unsigned (*close)(struct ksm_barrier *barrier);
	/* Keep stores away from pages mapped to frames without moving them, and let go again (nothing replaced). */
	int (*hold)(struct ksm_barrier *barrier, char *at, size_t pages);
	int (*release)(struct ksm_barrier *barrier, char *at, size_t pages);
	/* Are all these pages still held, and nothing else in their place? NULL: nobody can tell. */
	bool (*holds)(struct ksm_barrier *barrier, char *at, size_t pages);
	/* For up to `ns`: let pages that are held go, one by one, when somebody waits to write. 0, or an error: release all.
	 * NULL: whoever waits, waits for release. */
	int (*attend)(struct ksm_barrier *barrier, uint64_t ns);
};

struct ksm_barrier {
	const struct ksm_barrier_ops *ops; /* NULL: none works */
	int error;                         /* then: why the best one does not */
	/* of the open window */
	char *at;
	size_t pages;
	const char *view;               /* the pages' bytes, exact and unchanging while it is open */
	uint8_t fate[KSM_WINDOW_PAGES]; /* enum ksm_window_page */
	/* of the implementation */
	struct ksm_park *park; /* the scanner's; NULL: no barrier that needs one */
	int uffd;
	char *scratch;                 /* move: KSM_SCRATCH_BYTES, not inherited by a child; NULL: none */
	bool tainted;                  /* the descriptor is to be replaced when the window is closed */
	bool foreign;                  /* registered memory: the program may unmap or move it at any time */
	char *moved[KSM_WINDOW_PAGES]; /* move, foreign: where mremap has taken pages meanwhile; NULL: nowhere */
	uint64_t moves;                /* move: how often memory was moved, ever */
	bool frozen_only;              /* segv: frozen pages are taken, no others */
	uint8_t was[KSM_WINDOW_PAGES]; /* segv: what the guards said before */
};

extern const struct ksm_barrier_ops ksm_barrier_move;
extern const struct ksm_barrier_ops ksm_barrier_stop;
extern const struct ksm_barrier_ops ksm_barrier_segv;

/* Every barrier there is, best first, NULL at the end. */
extern const struct ksm_barrier_ops *const ksm_barriers[];

/*
 * Choose and prepare one. AUTO: "move", else "stop", else none (ops is NULL; returns the reason of the best).
 * park: the scanner's, for barriers that hold threads (NULL: there is none). uffd: a descriptor that was made before,
 * where a new one is not allowed any more, taken over; -1: none.
 */
int ksm_barrier_create(struct ksm_barrier *barrier, enum ksm_barrier_kind kind, struct ksm_park *park, int uffd);
void ksm_barrier_destroy(struct ksm_barrier *barrier);
/* The same after a fork has ended the table its descriptor lay in. mapped: its memory is there and is given back; false, in
 * the child: it was not inherited. */
void ksm_barrier_forget(struct ksm_barrier *barrier, bool mapped);

int ksm_window_open(struct ksm_barrier *barrier, char *at, size_t pages);
int ksm_window_map(struct ksm_barrier *barrier, size_t page, size_t count, int store, uint64_t offset, bool writable);
int ksm_window_drop(struct ksm_barrier *barrier, size_t page, size_t count);
/* It is not what the window was opened on. */
void ksm_window_give_up(struct ksm_barrier *barrier, size_t page);
unsigned ksm_window_close(struct ksm_barrier *barrier);

/* ---- barrier_follow.c: what "move" does about memory that is moved or unmapped meanwhile ------------------------------ */

/* Where page `page` of the window is now, as far as is known. */
char *ksm_follow_place(const struct ksm_barrier *barrier, size_t page);
/* From here on nobody waits for us in mremap, and what was moved before is known. */
void ksm_follow(struct ksm_barrier *barrier);
/* A move that has been read of. */
void ksm_follow_note(struct ksm_barrier *barrier, const struct ksm_os_uffd_event *event);
/* Is [at, at + pages) one mapping, and what was registered? */
bool ksm_follow_is_there(struct ksm_barrier *barrier, char *at, size_t pages);
/* Has the mapping of a page that is out been unmapped? */
bool ksm_follow_is_lost(struct ksm_barrier *barrier, size_t page);
/* Unregister what of [at, at + pages) is registered; there may be anything. Returns how many calls failed. */
unsigned ksm_follow_unregister(struct ksm_barrier *barrier, char *at, size_t pages);
/* When the window is over: unregister and wake wherever pages were moved to, until nobody moves them any more. */
unsigned ksm_follow_let_go(struct ksm_barrier *barrier);

#endif
