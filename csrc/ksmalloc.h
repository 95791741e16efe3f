/* SPDX-License-Identifier: MIT */
/*
 * ksmalloc.h: the only exported header of the core.
 *
 * Every function returns 0 on success (or a count, where it says so), a negative errno of the
 * kernel's, or one of the private codes of error.h (all below -4096; ksm_error_name() and
 * ksm_error_message() know both kinds). No function prints, none raises a signal, none changes
 * errno in a way the caller may rely on.
 *
 * Threads: every function may be called from any thread unless its comment says otherwise.
 * fork: pthread_atfork handlers keep every object valid in parent and child; a bare clone() without
 * CLONE_VM runs no handlers and is unsupported while merged memory exists. Signal handlers may call
 * nothing here.
 */
#ifndef KSMALLOC_H
#define KSMALLOC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KSM_API __attribute__((visibility("default")))

#define KSM_NAME_MAX 63    /* bytes of a domain's name, without the final zero */
#define KSM_PEERS_MAX 1024 /* processes in one domain */

struct ksm_domain; /* this process's membership in one domain; counted references */
struct ksm_arena;  /* memory to allocate from; counted references: one a live block, one the creator's */
struct ksm_region; /* memory somebody else allocated, registered for merging */

/* ---- errors ---------------------------------------------------------------------------------- */

/* The symbol of a code ("ENOMEM", "KSM_ELAYOUT"); never NULL. */
KSM_API const char *ksm_error_name(int code);
/* One sentence for people, without a final full stop; never NULL. */
KSM_API const char *ksm_error_message(int code);

/* ---- domains --------------------------------------------------------------------------------- */

enum ksm_backing {
	KSM_BACKING_MEMFD = 0, /* frames vanish with the last process, whatever kills it */
	KSM_BACKING_SHM = 1,   /* frames live in a named object that outlives kill -9 until cleaned */
};

enum ksm_barrier_kind {
	KSM_BARRIER_AUTO = 0, /* the best that works here; none is no error: then nothing merges and why_not says so */
	/* asking for one by name and not getting it is an error */
	KSM_BARRIER_MOVE = 1, /* UFFDIO_MOVE */
	KSM_BARRIER_STOP = 2, /* every thread is held by a signal */
	KSM_BARRIER_SEGV = 3, /* mprotect and a SIGSEGV handler; chosen by AUTO it merges frozen memory only */
	KSM_BARRIER_NONE = -1,
};

enum ksm_tracking { /* how written pages are found */
	KSM_TRACKING_NONE = 0,
	KSM_TRACKING_PAGEMAP = 1, /* /proc/self/pagemap says which pages are broken; a digest, which are cold */
	KSM_TRACKING_DIGEST = 2,  /* no pagemap (not dumpable): pages are compared with their frames */
	KSM_TRACKING_WRITES = 3,  /* the pagemap, and the kernel says which pages were written (Linux 6.9) */
};

struct ksm_domain_options {
	const char *name;        /* NULL: "default". Letters, digits, '.', '_', '-'; not starting with '.' */
	const char *path;        /* NULL: /dev/shm/ksmalloc-UID. The rendezvous is the directory path/name */
	uint64_t capacity_bytes; /* 0: this machine's memory. Only the first peer's counts */
	int backing; /* enum ksm_backing. Only the first peer's counts; asking for another one: KSM_EBACKING */
	int barrier; /* enum ksm_barrier_kind */
	/* backing shm: a new, empty named object "/ksmalloc-UID-<32 hex digits of store_id>", made by the caller, so that
	 * the core knows no name service. The descriptor stays the caller's. If ksm_domain_id() is not store_id
	 * afterwards, the domain existed already and the object was not needed: the caller removes it. */
	int store_fd; /* -1: none */
	uint8_t store_id[16];
};

/*
 * Join a domain, or take another reference if this process already has. Creates the rendezvous and
 * the domain if nobody lives there. Starts the process's scanner thread for it.
 * Errors: EINVAL (name), EACCES, ELOOP (a symbolic link where the rendezvous should be), ENOTDIR,
 * ENAMETOOLONG, KSM_EOWNER, KSM_ELAYOUT, KSM_ENOPEER, KSM_EPEERS, KSM_EBARRIER, KSM_EBACKING,
 * KSM_EUNSUPPORTED, ENOMEM, EMFILE, ENOSPC.
 */
KSM_API int ksm_domain_attach(const struct ksm_domain_options *options, struct ksm_domain **out);
/* Drop a reference; the last one (arenas, blocks and regions hold one each) leaves the domain. */
KSM_API void ksm_domain_detach(struct ksm_domain *domain);

/* Counters in KSM's words (Documentation/admin-guide/mm/ksm.rst), then ours. Pages are of page_size bytes. */
struct ksm_stats {
	/* of the whole domain in ksm_domain_stats(), of this process in ksm_domain_self_stats() */
	uint64_t pages_shared;   /* frames in use (in self: distinct frames this process refers to) */
	uint64_t pages_sharing;  /* further pages that use them: the pages saved */
	uint64_t pages_unshared; /* looked at, unique, checked again and again */
	uint64_t pages_volatile; /* changed since they were last looked at */
	uint64_t pages_scanned;  /* pages looked at, ever */
	uint64_t pages_skipped;  /* pages that could not be merged: pinned, shared by fork, swapped */
	uint64_t full_scans;     /* complete passes (domain: the least of any peer's) */
	uint64_t ksm_zero_pages; /* pages of zeros given back; not part of pages_sharing */
	/* ksmalloc's own */
	uint64_t pages_merged;   /* pages mapped to frames now, unbroken: pages_shared + pages_sharing */
	uint64_t merges;         /* pages merged, ever */
	uint64_t promotions;     /* frames written, ever */
	uint64_t cow_breaks;     /* merged pages broken by a write, ever; exact where our handler breaks them */
	uint64_t put_backs;      /* pages whose window closed without a merge, ever */
	uint64_t failures;       /* system calls that failed inside a merge and were recovered, ever */
	uint64_t give_backs;     /* broken pages given anonymous memory again, ever */
	uint64_t stops;          /* times all threads were held, ever */
	uint64_t suspensions;    /* times our SIGSEGV handler was found displaced or masked, ever */
	uint64_t withheld;       /* stretches not looked at, so near its memory limit was a control group, ever */
	uint64_t vmas_used;      /* mappings that merging costs this process now (domain: the sum) */
	uint64_t vma_budget;     /* how many it may (domain: the sum) */
	uint64_t saved_bytes;    /* pages_sharing in bytes */
	uint64_t metadata_bytes; /* all of ksmalloc's memory that is not frames */
	uint64_t store_bytes;    /* blocks the store occupies (self: 0) */
	uint32_t peers;
	uint32_t page_size;
	int32_t barrier; /* enum ksm_barrier_kind of this process */
	int32_t why_not; /* 0, or the code of what keeps this process from merging */
};

#define KSM_WHY_MAX 128

/* What this process may do here, and why not more. Codes: 0 (works), or why it does not. */
struct ksm_capabilities {
	int32_t barrier;     /* enum ksm_barrier_kind: in force */
	int32_t tracking;    /* enum ksm_tracking: in force */
	int32_t move;        /* the barrier "move": -EPERM, -EACCES, -ENOENT: no userfaultfd; -EINVAL: kernel too old */
	int32_t uffd_device; /* opening /dev/userfaultfd */
	int32_t uffd_call;   /* userfaultfd(2) for faults of the kernel */
	int32_t uffd_user;   /* … of user code only: any process may, so EPERM means that a filter refuses it */
	int32_t stop;        /* the barrier "stop"; KSM_EUNSTOPPABLE, KSM_EDEVICES: as of the last attempt */
	int32_t stop_signal; /* in use; 0: none yet */
	int32_t segv;        /* the SIGSEGV handler: 0, KSM_EDISPLACED, KSM_EMASKED (looked up now) */
	int32_t handler;     /* 1: it is installed */
	int32_t pagemap;     /* reading /proc/self/pagemap */
	int32_t writes;      /* tracking writes: as move; -ENOTTY: kernel too old */
	int32_t dumpable;    /* PR_GET_DUMPABLE */
	int32_t why_not;     /* what keeps this process from merging */
	uint64_t stops;      /* ever */
	uint64_t stops_failed;
	uint64_t suspensions;
	char stop_reason[KSM_WHY_MAX]; /* the last failure in words: which thread, which descriptor; "" */
};

/* Looks anew at what can be looked at without changing anything. */
KSM_API int ksm_domain_capabilities(struct ksm_domain *domain, struct ksm_capabilities *out);

KSM_API int ksm_domain_stats(struct ksm_domain *domain, struct ksm_stats *out);
KSM_API int ksm_domain_self_stats(struct ksm_domain *domain, struct ksm_stats *out);

struct ksm_peer_info {
	int32_t pid; /* as the peer's own pid namespace numbers it: for people */
	uint32_t slot;
	uint32_t self; /* 1: the caller */
	struct ksm_stats stats;
};
/* Fill up to `room` entries with the living peers; returns how many there are. */
KSM_API int ksm_domain_peers(struct ksm_domain *domain, struct ksm_peer_info *out, size_t room);

/* The domain's 128-bit random id as 32 hex digits and a zero; its rendezvous directory. */
KSM_API void ksm_domain_id(struct ksm_domain *domain, char out[33]);
KSM_API const char *ksm_domain_directory(struct ksm_domain *domain);

struct ksm_report {
	uint64_t pages_scanned;
	uint64_t pages_merged;
	uint64_t zero_pages;
	uint64_t frames_written;
	uint64_t passes;
	double seconds;
	int32_t settled; /* ksm_domain_settle(): 1 nothing more can merge; 0 the timeout came first */
	int32_t why_not; /* 0, or the code of what kept pages from merging */
};

/*
 * Now, in the scanner's thread while the caller waits, age ignored: on return every duplicate within
 * this process, and of frames or candidates that peers had at call time, is merged on this side.
 */
KSM_API int ksm_domain_scan(struct ksm_domain *domain, struct ksm_report *out);
/* Ask every peer to finish; wait until nothing more can merge (settled) or timeout_ms have passed. again: go on
 * waiting for what was asked before (callers that look up now and then). */
KSM_API int ksm_domain_settle(struct ksm_domain *domain, uint32_t timeout_ms, int again, struct ksm_report *out);
/* One sweep over all frames now: free what nobody refers to. Returns 0; *freed counts frames. */
KSM_API int ksm_domain_sweep(struct ksm_domain *domain, uint64_t *freed);

/* ---- settings: kept in the rendezvous, valid for all peers, kept for later ones ---------------- */

struct ksm_settings {
	uint32_t run;                /* 0: no merging (what is merged stays); 1: merge */
	uint32_t pages_to_scan;      /* pages a batch, 1 … 1,000,000 */
	uint32_t max_pages_to_merge; /* pages merged in a batch at most, 1 … 1,000,000 */
	uint32_t sleep_millisecs;    /* between batches, 0 … 60,000 */
	uint32_t advisor_mode;       /* 1: batches and pauses are chosen, the three above are not used; 0: they are */
	uint32_t advisor_max_cpu;    /* then: per cent of one processor that a process may use for long, 1 … 100 */
};
#define KSM_SETTINGS_COUNT 6

/* Read or write them without joining (options: name and path are used). Nobody there: the defaults, and
 * writing creates the rendezvous. `peers`, if not NULL, is how many live peers there are.
 * Errors: EINVAL (out of range; or pages_to_scan, while the advisor chooses it, as in kernel KSM) and those of
 * ksm_domain_attach() that concern the rendezvous. */
KSM_API int ksm_settings_read(const struct ksm_domain_options *options, struct ksm_settings *out, uint32_t *peers);
KSM_API int ksm_settings_write(const struct ksm_domain_options *options, const struct ksm_settings *settings);
KSM_API void ksm_settings_default(struct ksm_settings *out);

/* Remove the rendezvous of a domain in which nobody lives. EBUSY: somebody does; ENOTEMPTY: something else lies there, and
 * stays, as does its directory; and the errors of opening it. */
KSM_API int ksm_domain_clean(const struct ksm_domain_options *options);

/* ---- arenas ---------------------------------------------------------------------------------- */

#define KSM_ARENA_NO_SCAN 1u /* its pages merge in ksm_domain_scan() and settle only, not in the background */
#define KSM_ARENA_SIGSEGV 2u /* merged pages are read-only; our SIGSEGV handler copies them when they are written */

/* Errors: EINVAL, ENOMEM, and of installing the handler. */
KSM_API int ksm_arena_create(struct ksm_domain *domain, unsigned flags, struct ksm_arena **out);
/* No further allocation (KSM_ECLOSED); live blocks stay valid. Idempotent. */
KSM_API void ksm_arena_close(struct ksm_arena *arena);
/* The creator's reference; closes. The memory goes with the last block. */
KSM_API void ksm_arena_release(struct ksm_arena *arena);

struct ksm_block {
	void *address; /* a page boundary where nbytes ≥ one page, else 16-byte aligned */
	size_t nbytes; /* as asked for */
	void *owner;   /* the core's; NULL: not allocated */
};

#define KSM_ALLOC_UNMERGEABLE 1u /* never looked at, never merged: for memory registered with devices */

/* Zeroed memory. Errors: EINVAL (nbytes 0), ENOMEM, KSM_ECLOSED. The block holds references on arena and domain. */
KSM_API int ksm_arena_alloc(struct ksm_arena *arena, size_t nbytes, unsigned flags, struct ksm_block *out);
/* Give it back; frames are dropped. Errors: EINVAL (not allocated). *block is cleared. */
KSM_API int ksm_arena_free(struct ksm_arena *arena, struct ksm_block *block);

/* As the ksm_domain_ functions, for the pages of one arena only. */
KSM_API int ksm_arena_scan(struct ksm_arena *arena, struct ksm_report *out);
/* Everything private again, contents unchanged; the arena is left out of background merging until the next
 * ksm_arena_scan(). *broken counts pages that were private already, by a write, and whose mappings still
 * hold their frame. */
KSM_API int ksm_arena_unmerge(struct ksm_arena *arena, uint64_t *unmerged, uint64_t *broken);

/*
 * Frozen memory: the whole pages of [address, address + nbytes) become read-only, and are merged under every barrier,
 * even where no window can be had. A store into one thaws that page, unnoticed; a system call that would write
 * gets EFAULT. The caller has no system call or direct I/O in flight that writes there. *pages: how many pages.
 * EINVAL: not inside memory the arena has handed out. KSM_EDISPLACED, KSM_EMASKED: a store would kill the process.
 * EBUSY: some of it is being held writable (below).
 */
KSM_API int ksm_arena_freeze(struct ksm_arena *arena, void *address, size_t nbytes, size_t *pages);
/* Writable again; still merged where it is. */
KSM_API int ksm_arena_thaw(struct ksm_arena *arena, void *address, size_t nbytes);

/*
 * Between begin and end every page that touches [address, address + nbytes) is private, writable, and stays so: for system
 * calls that write into memory whose merged pages are read-only. Pairs nest and may overlap. Frozen pages are thawed.
 */
KSM_API int ksm_arena_writable_begin(struct ksm_arena *arena, void *address, size_t nbytes);
KSM_API int ksm_arena_writable_end(struct ksm_arena *arena, void *address, size_t nbytes);

struct ksm_arena_stats {
	uint64_t blocks;          /* live */
	uint64_t allocated_bytes; /* asked for, live */
	uint64_t pages;           /* pages in live spans */
	uint64_t pages_merged;    /* … that are merged and unbroken */
	uint64_t pages_broken;    /* … that were merged and then written */
	uint64_t pages_zero;      /* … given back because they were zero */
	uint64_t pages_frozen;    /* … that are frozen */
	uint64_t cow_breaks;      /* merged pages our handler has copied, ever */
	uint64_t scan;            /* 1: merged in the background */
	uint64_t sigsegv;         /* 1: KSM_ARENA_SIGSEGV */
};
KSM_API int ksm_arena_stats(struct ksm_arena *arena, struct ksm_arena_stats *out);

/* ---- registered memory ----------------------------------------------------------------------- */

/*
 * Let the whole pages inside [address, address + nbytes) be merged. The caller keeps the memory mapped
 * until it has unregistered (the Python layer holds the buffer's export). *pages counts them.
 * Errors: KSM_ESMALL (no whole page inside), KSM_EMEMORY (not all of it is private, writable, anonymous
 * memory without special flags), KSM_EOVERLAP (some page is registered or an arena's already).
 */
KSM_API int ksm_region_register(struct ksm_domain *domain, void *address, size_t nbytes, struct ksm_region **out,
				size_t *pages);
/* Restores anonymous memory with the same contents, then forgets it. The caller has no direct I/O in flight
 * to it. On error the region stays registered and valid. */
KSM_API int ksm_region_unregister(struct ksm_region *region);

/* ---- signals --------------------------------------------------------------------------------- */

/* The real-time signal with which threads are held (0: the highest that is free), from the next join on. EINVAL. */
KSM_API int ksm_process_stop_signal(int signal);
/* To be called right before exec by a process whose threads are held now and then (the barrier "stop", unmerge): the
 * signal that holds one would end the new program, where nobody handles it. For 10 s no thread is held; if exec fails,
 * nothing need be undone. Not needed before vfork, posix_spawn, or in the child of a fork that has not used ksmalloc. */
KSM_API void ksm_process_before_exec(void);
/* A handler for SIGSEGV was installed after ours (faulthandler.enable(), …): stand before it again. Nothing to do: 0. */
KSM_API int ksm_process_handler_reinstall(void);
/* Whoever stood behind us last has gone (faulthandler.disable()): never call it again. */
KSM_API void ksm_process_handler_popped(void);

/* ---- the process ----------------------------------------------------------------------------- */

/* Called by the core, from any thread and inside the fork handlers of the parent, when the scanner should be
 * started again soon. It must only take note (Py_AddPendingCall) and arrange for ksm_process_resume(). */
KSM_API void ksm_process_on_wanted(void (*wanted)(void));
/* Start every scanner that a fork stopped. Cheap when there is nothing to do. Not from a fork handler. */
KSM_API void ksm_process_resume(void);
/* 0, or why ksmalloc cannot work here at all (KSM_EUNSUPPORTED: not Linux 5.10+, another page size). */
KSM_API int ksm_process_check(void);

#ifdef __cplusplus
}
#endif
#endif
