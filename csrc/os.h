/* SPDX-License-Identifier: MIT */
/*
 * os.h: every system call of the core. Each returns 0 or a value ≥ 0, or a negative errno; none holds any
 * policy, none keeps state. In a build with KSM_FAULTS every one of them can be told to fail.
 *
 * All are safe from any thread.
 */
#ifndef KSM_OS_H
#define KSM_OS_H

#include "base.h"
#include "ksmalloc.h"

#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/types.h>

/* ---- faults on demand -------------------------------------------------------------------------- */

#define KSM_OS_CALLS(X)                                                                                                \
	X(MAP_ANON)                                                                                                    \
	X(MAP_FRAMES)                                                                                                  \
	X(MAP_SHARED)                                                                                                  \
	X(UNMAP)                                                                                                       \
	X(PROTECT)                                                                                                     \
	X(ADVISE)                                                                                                      \
	X(REMAP)                                                                                                       \
	X(POPULATE)                                                                                                    \
	X(OPEN)                                                                                                        \
	X(PREAD)                                                                                                       \
	X(PWRITE)                                                                                                      \
	X(STAT)                                                                                                        \
	X(TRUNCATE)                                                                                                    \
	X(PUNCH)                                                                                                       \
	X(MEMFD)                                                                                                       \
	X(SEAL)                                                                                                        \
	X(LOCK)                                                                                                        \
	X(UNLINK)                                                                                                      \
	X(MKDIR)                                                                                                       \
	X(LIST)                                                                                                        \
	X(UNSHARE_FILES)                                                                                               \
	X(CLOSE_RANGE)                                                                                                 \
	X(RANDOM)                                                                                                      \
	X(THREAD)                                                                                                      \
	X(SIGNALFD)                                                                                                    \
	X(POLL)                                                                                                        \
	X(UFFD_OPEN)                                                                                                   \
	X(UFFD_REGISTER)                                                                                               \
	X(UFFD_UNREGISTER)                                                                                             \
	X(UFFD_MOVE)                                                                                                   \
	X(UFFD_COPY)                                                                                                   \
	X(UFFD_HAS)                                                                                                    \
	X(UFFD_WAKE)                                                                                                   \
	X(UFFD_PROTECT)                                                                                                \
	X(UFFD_READ)                                                                                                   \
	X(RESIDENT)                                                                                                    \
	X(PAGEMAP_SCAN)                                                                                                \
	X(SOCKET)                                                                                                      \
	X(BIND)                                                                                                        \
	X(CONNECT)                                                                                                     \
	X(ACCEPT)                                                                                                      \
	X(SEND)                                                                                                        \
	X(RECEIVE)                                                                                                     \
	X(HANDLER)                                                                                                     \
	X(THREAD_SIGNAL)                                                                                               \
	X(WORD_WAIT)                                                                                                   \
	X(READ_LINK)                                                                                                   \
	X(ATTRIBUTE)                                                                                                   \
	X(COMPARE)                                                                                                     \
	X(ALLOCATE)                                                                                                    \
	X(REOPEN)                                                                                                      \
	X(LIFT)                                                                                                        \
	X(SEEK)                                                                                                        \
	X(SEALS)                                                                                                       \
	X(UNLOCK)                                                                                                      \
	X(LISTEN)                                                                                                      \
	X(PEER_USER)                                                                                                   \
	X(KICK)                                                                                                        \
	X(UFFD_TRY)                                                                                                    \
	X(SIGNAL_SELF)                                                                                                 \
	X(MAP_QUERY)                                                                                                   \
	X(READ_OWN)                                                                                                    \
	X(PAGE_RANGES)

enum ksm_os_call {
#define KSM_OS_CALL_ENUM(name) KSM_OS_##name,
	KSM_OS_CALLS(KSM_OS_CALL_ENUM)
#undef KSM_OS_CALL_ENUM
	KSM_OS_CALL_COUNT
};

#ifdef KSM_FAULTS
/* Let calls number skip … skip + count - 1 of this kind, from now, return `error` (negative) without being made. */
void ksm_os_fault_set(enum ksm_os_call call, uint32_t skip, uint32_t count, int error);
void ksm_os_fault_clear(void);
/* How often a kind was called since the last clear, and how often it was told to fail. */
uint32_t ksm_os_fault_calls(enum ksm_os_call call);
KSM_API uint32_t ksm_os_fault_hits(unsigned call);
KSM_API const char *ksm_os_call_name(unsigned call);
/* What the kernel may say when a call of this kind fails; negative. */
const int *ksm_os_fault_errors(enum ksm_os_call call, size_t *count);
/* Keep the books in memory that processes share: calls of a child are counted and fail as the parent's. NULL: how much. */
size_t ksm_os_fault_share(void *shared);
/* From now on one call in `one_in` fails by chance, of all kinds; 0: none. Also by the environment: see os_fault.c. */
KSM_API void ksm_os_fault_random(uint64_t seed, uint32_t one_in);
int ksm_os_fault_(enum ksm_os_call call);
#define KSM_FAULTED(call) ksm_os_fault_(KSM_OS_##call)
#define KSM_FAULT(call)                                                                                                \
	do {                                                                                                           \
		int fault_ = ksm_os_fault_(KSM_OS_##call);                                                             \
		if (fault_)                                                                                            \
			return fault_;                                                                                 \
	} while (0)
#else
#define KSM_FAULTED(call) 0
#define KSM_FAULT(call) ((void)0)
#endif

/* ---- memory ------------------------------------------------------------------------------------ */

/* Private anonymous memory. fixed: exactly there, whatever was mapped. reserve: no access, not accounted. */
int ksm_os_map_anon(void *at, size_t nbytes, bool fixed, bool reserve, void **out);
/* Private zeroed memory for tables: never huge pages, not in core dumps. */
int ksm_os_map_table(size_t nbytes, void **out);
/* Frames of the store over [at, at + nbytes): private, readable, maybe writable. Their order is the file's. */
int ksm_os_map_frames(void *at, size_t nbytes, int store, uint64_t offset, bool writable);
/* A shared mapping of a descriptor. */
int ksm_os_map_shared(int fd, size_t nbytes, bool writable, void **out);
int ksm_os_unmap(void *at, size_t nbytes);
int ksm_os_protect(void *at, size_t nbytes, bool writable);
int ksm_os_advise(void *at, size_t nbytes, int advice);
/* Move [from, from + nbytes) with its pages over [to, to + nbytes). */
int ksm_os_remap(void *from, void *to, size_t nbytes);
/* Make sure of the pages of a shared, writable mapping of a sparse file, as a store would, but with an error (-ENOMEM)
 * where that would end in SIGBUS. */
int ksm_os_populate(void *at, size_t nbytes);
/* Zeroed, for free(3); NULL: no memory. */
void *ksm_os_allocate(size_t nbytes);
void ksm_os_name_memory(void *at, size_t nbytes, const char *name);

/* ---- files ------------------------------------------------------------------------------------- */

/* openat(2), never following a link in the last component; close-on-exec. */
int ksm_os_open(int dirfd, const char *path, int flags, mode_t mode);
/* What a name stands for, a link not followed. */
int ksm_os_stat_at(int dirfd, const char *path, struct stat *out);
/* A new description of the same file, through /proc; or, where there is no /proc, of dirfd/name if that is it. */
int ksm_os_reopen(int fd, int dirfd, const char *name);
/* A new description of what fd is in the table of another thread of this process (never of a userfaultfd). */
int ksm_os_reopen_from(int tid, int fd, bool directory);
/* The same description under another number, above standard error's. */
int ksm_os_duplicate(int fd);
/* The same description under a number above standard error's; fd itself is closed. */
int ksm_os_lift(int fd);
void ksm_os_close(int fd);
/* All of it, or an error; a short read at the end of the file is -ENODATA. */
int ksm_os_pread(int fd, void *to, size_t nbytes, uint64_t offset);
int ksm_os_pwrite(int fd, const void *from, size_t nbytes, uint64_t offset);
int ksm_os_stat(int fd, struct stat *out);
int ksm_os_truncate(int fd, uint64_t nbytes);
int ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int ksm_os_memfd(const char *name);
/* Where data begins at or after offset (INT64_MAX: nowhere), or offset if it cannot be told. */
int64_t ksm_os_seek_data(int fd, uint64_t offset);
int ksm_os_seal(int fd, int seals);
int ksm_os_seals(int fd);
/* Is it a memory file that can be written, and never resized? */
bool ksm_os_has_fixed_size(int fd);
/* Open file description locks on one byte. try_lock: -EAGAIN if somebody else holds it. */
int ksm_os_lock_try(int fd, uint64_t byte);
int ksm_os_unlock(int fd, uint64_t byte);
/* The first byte in [from, from + nbytes) that another description holds, or -ENOENT. */
int64_t ksm_os_lock_find(int fd, uint64_t from, uint64_t nbytes);
int ksm_os_unlink(int dirfd, const char *path, bool directory);
int ksm_os_mkdir(int dirfd, const char *path, mode_t mode);
/* Calls each(name, context) for every entry except . and ..; a non-zero return ends it and is returned. */
int ksm_os_list(int dirfd, int (*each)(const char *name, void *context), void *context);

/* ---- process and time --------------------------------------------------------------------------- */

int ksm_os_unshare_files(void);
int ksm_os_close_range(unsigned first, unsigned last);
int ksm_os_random(void *to, size_t nbytes);
int ksm_os_tid(void);
/* Wait until the kernel counts a thread, joined already, no longer among this process's. */
void ksm_os_wait_thread_gone(int tid);
int ksm_os_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *), void *argument);
/* Send a signal to a thread that has not been joined. */
int ksm_os_thread_kick(pthread_t thread, int signal);
int ksm_os_dumpable(void);
uint64_t ksm_os_memory_bytes(void);
/* Is this Linux major.minor or later? What distributions have mended in earlier ones is not known. */
bool ksm_os_is_linux(unsigned major, unsigned minor);
uint64_t ksm_os_max_map_count(void);
/* Memory mappings of this process; 0: it cannot be told. */
uint64_t ksm_os_count_maps(void);
/* Largest file this process may write without SIGXFSZ. */
uint64_t ksm_os_file_size_limit(void);
/* Bytes of addresses that this process may map. */
uint64_t ksm_os_address_limit(void);
uint64_t ksm_os_now_ns(void);
/* What the calling thread has had of a processor, ever. */
uint64_t ksm_os_thread_cpu_ns(void);
void ksm_os_sleep_ns(uint64_t ns);
void ksm_os_yield(void);
/* A descriptor that becomes readable when `signal`, blocked in the calling thread, is sent to it. */
int ksm_os_signalfd(int signal);
/* Take `count` signals from it; fewer if there are not so many. */
void ksm_os_signalfd_take(int fd, uint32_t count);
struct pollfd;
/* Number of ready descriptors; EINTR counts as none. timeout_ns: UINT64_MAX waits for ever. */
int ksm_os_poll(struct pollfd *fds, size_t count, uint64_t timeout_ns);

/* ---- pagemap -------------------------------------------------------------------------------------- */

enum ksm_page_kind { /* categories of PAGEMAP_SCAN, same bits */
	KSM_PAGE_FILE = 1 << 2,
	KSM_PAGE_PRESENT = 1 << 3,
	KSM_PAGE_SWAPPED = 1 << 4,
	KSM_PAGE_ZERO = 1 << 5, /* the kernel's page of zeros */
	KSM_PAGE_HUGE = 1 << 6,
	KSM_PAGE_HELD = 1 << 14,   /* write protected by userfaultfd */
	KSM_PAGE_SHARED = 1 << 15, /* present, anonymous and mapped by another process too */
};

/* The kind of each of `npages` pages from `at` into kinds[]. fd: /proc/self/pagemap. npages ≤ 512. */
int ksm_os_pagemap(int fd, const void *at, size_t npages, uint16_t *kinds);

enum ksm_page_category {           /* further ones of PAGEMAP_SCAN */
	KSM_PAGE_WATCHED = 1 << 0, /* in a mapping whose writes a descriptor of ksm_os_uffd_open_watch() tracks */
	KSM_PAGE_WRITTEN = 1 << 1, /* since it was protected, or it never was */
};

struct ksm_os_range {
	uint64_t from, to, categories; /* addresses */
};

/* Pages in all categories of `all`, in none of `none`, and, unless it is 0, in one of `any`. */
struct ksm_os_query {
	uint64_t all, none, any;
	bool protect; /* those of them that are WATCHED, from now on, in one step */
};

/* The pages of [*at, to) that a query is about, as ranges; *at: how far it has come. The number of ranges, or an error.
 * fd: /proc/self/pagemap. Linux 6.7. Holds the lock on the program's mappings: 64 MiB or so at a time. */
int ksm_os_page_ranges(int fd, const char **at, const char *to, const struct ksm_os_query *query,
		       struct ksm_os_range *ranges, size_t room);

/* Without a pagemap: KSM_PAGE_PRESENT of what is in memory, the kernel's page of zeros too; nothing else. npages ≤ 512. */
int ksm_os_resident(const void *at, size_t npages, uint16_t *kinds);
/* Is there a mapping at every page of [at, at + nbytes)? */
bool ksm_os_is_mapped(const void *at, size_t nbytes);

/* ---- the program's mappings (os_map.c): no malloc, no stdio --------------------------------------- */

#define KSM_MAPPING_READ 1u
#define KSM_MAPPING_WRITE 2u
#define KSM_MAPPING_EXECUTE 4u
#define KSM_MAPPING_SHARED 8u

struct ksm_os_mapping {
	uintptr_t from, to;
	uint64_t offset, inode; /* inode 0: anonymous */
	uint32_t major, minor;
	unsigned access; /* KSM_MAPPING_READ … EXECUTE */
	bool shared;
};

typedef void (*ksm_os_each_mapping)(const struct ksm_os_mapping *mapping, void *context);

/* Calls each(mapping, context) for every mapping that touches [at, at + nbytes), in their order. fd: /proc/self/maps.
 * 0; 1: done, but it was dear, for the kernel had to list them all; or an error. */
int ksm_os_mappings(int fd, const void *at, size_t nbytes, ksm_os_each_mapping each, void *context);
/* Copy our own memory without faulting on it. -EFAULT: not all of it can be read. -ENOSYS, -EPERM: not allowed here. */
int ksm_os_read_own(const void *from, void *to, size_t nbytes);

/* ---- userfaultfd ----------------------------------------------------------------------------------- */

#define KSM_UFFD_MISSING 1u
#define KSM_UFFD_PROTECT 2u

/* Features a descriptor must have; see userfaultfd(2). */
#define KSM_UFFD_FEATURE_MOVE (1ull << 16)
#define KSM_UFFD_FEATURE_PROTECT_FILES (1ull << 12)
#define KSM_UFFD_FEATURE_FOLLOW (1ull << 2) /* mremap takes the registration along, and says so */

/* Through /dev/userfaultfd, else the system call; with kernel faults. -EPERM/-EACCES: not allowed; -EINVAL: too old. */
int ksm_os_uffd_open(uint64_t features);
/* One that tracks writes, for ksm_os_page_ranges(), without a right; Linux 6.7. Nobody ever waits for it. */
int ksm_os_uffd_open_watch(void);
/* Only whether it is allowed, each way alone: 0 or why not. */
int ksm_os_uffd_try_device(void);
int ksm_os_uffd_try_call(bool of_user); /* of_user: for faults of user code only, which needs no right */
int ksm_os_uffd_register(int uffd, void *at, size_t nbytes, unsigned modes);
int ksm_os_uffd_unregister(int uffd, void *at, size_t nbytes);
/* Move pages from `from` to `to`. Returns bytes moved (maybe short), or a negative errno if none was. */
int64_t ksm_os_uffd_move(int uffd, void *to, void *from, size_t nbytes);
int64_t ksm_os_uffd_copy(int uffd, void *to, const void *from, size_t nbytes);
/* Is [at, at + nbytes) inside one mapping that is registered? unreadable: as many bytes of ours that nobody may read.
 * -EAGAIN: some registered memory is being moved by mremap, and ksm_os_uffd_read() will say whereto. */
int ksm_os_uffd_has(int uffd, void *at, const void *unreadable, size_t nbytes);
int ksm_os_uffd_wake(int uffd, void *at, size_t nbytes);
int ksm_os_uffd_protect(int uffd, void *at, size_t nbytes, bool on);

enum ksm_os_uffd_kind {
	KSM_OS_UFFD_NOTHING = 0,
	KSM_OS_UFFD_SLEEPER,
	KSM_OS_UFFD_MOVED
};

struct ksm_os_uffd_event {
	void *at;      /* SLEEPER: an address in the page that somebody waits for; MOVED: where the memory was */
	void *to;      /* MOVED: where it is, still registered. Whoever moved it (mremap) goes on from here on */
	size_t nbytes; /* MOVED */
};

/* Wait for what the descriptor has to say. A kind, NOTHING if nothing comes in that time, or an error. */
int ksm_os_uffd_read(int uffd, uint64_t timeout_ns, struct ksm_os_uffd_event *event);

/* ---- sockets -------------------------------------------------------------------------------------- */

#define KSM_OS_FDS_MAX 8

/* SOCK_SEQPACKET, close-on-exec, non-blocking; the path is relative to dirfd. dirfd -1: an abstract name. */
int ksm_os_listen(int dirfd, const char *name);
int ksm_os_connect(int dirfd, const char *name);
int ksm_os_accept(int fd);
/* One message with up to KSM_OS_FDS_MAX descriptors. Receiving truncates nothing silently (-EMSGSIZE). */
int ksm_os_send(int fd, const void *message, size_t nbytes, const int *fds, size_t nfds);
/* Returns the size; *nfds is room on entry, count on return. 0: the other side has closed. */
int ksm_os_receive(int fd, void *message, size_t room, int *fds, size_t *nfds);
/* The user at the other end when it connected. */
int ksm_os_peer_uid(int fd, uid_t *uid, pid_t *pid);

/* ---- threads and signals: no malloc, no stdio -------------------------------------------------------- */

/* Sleep while *word is `value`, until it is woken or the time is over. -EAGAIN, -ETIMEDOUT, -EINTR. */
int ksm_os_word_wait(const uint32_t *word, uint32_t value, uint64_t timeout_ns);
/* For signal handlers: nothing but the system call. */
void ksm_os_word_wait_sigsafe(const uint32_t *word, uint32_t value);
void ksm_os_word_wake_sigsafe(const uint32_t *word, int count);

typedef void (*ksm_os_handler)(int, siginfo_t *, void *);

enum ksm_handler_state {
	KSM_HANDLER_NONE = 0, /* SIG_DFL */
	KSM_HANDLER_OURS,
	KSM_HANDLER_OTHER, /* SIG_IGN too */
};
/* enum ksm_handler_state, or an error. */
int ksm_os_handler_state(int signal, ksm_os_handler handler);
/* In a handler: end the process as `signal` does if nobody handles it, when the handler returns. */
void ksm_os_die_sigsafe(int signal);
/* Queue a signal to a thread of this process: si_code is SI_QUEUE, si_errno `mark`, si_value `value`. -ESRCH: it is
 * gone; -EAGAIN: too many are pending. */
int ksm_os_thread_signal(int tid, int signal, int mark, uint64_t value);
bool ksm_os_thread_exists(int tid);

/* Calls each(number, context) for the entries of a directory in /proc whose names are numbers, from its beginning. A
 * non-zero return ends it and is returned. */
int ksm_os_list_numbers(int fd, void *buffer, size_t room, int (*each)(unsigned number, void *context), void *context);
/* What one read gives, with a zero at its end. Returns its length. */
int ksm_os_read_text(int fd, uint64_t offset, char *text, size_t room);
int ksm_os_read_file(int dirfd, const char *path, char *text, size_t room);
int ksm_os_read_link(int dirfd, const char *path, char *text, size_t room);
/* What a path leads to, links followed: S_IFMT's bits and the device's number. Asks no server of a file system. */
int ksm_os_kind(int dirfd, const char *path, unsigned *type, unsigned *major, unsigned *minor);
/* An extended attribute; its length. */
int ksm_os_attribute(const char *path, const char *name, char *text, size_t room);
/* Do two threads have one table of descriptors? 1, 0, or an error. */
int ksm_os_same_descriptors(int a, int b);

/* ---- for the SIGSEGV handler: raw calls, no errno ------------------------------------------------------- */

int ksm_os_map_anon_sigsafe(size_t nbytes, void **out);
int ksm_os_protect_sigsafe(void *at, size_t nbytes, bool writable);
int ksm_os_advise_sigsafe(void *at, size_t nbytes, int advice);
int ksm_os_remap_sigsafe(void *from, void *to, size_t nbytes);
int ksm_os_unmap_sigsafe(void *at, size_t nbytes);
bool ksm_os_is_mapped_sigsafe(const void *at, size_t nbytes);

/* What a signal does, as the kernel has it. */
struct ksm_os_action {
	ksm_os_handler handler;
	unsigned long flags;
	void (*restorer)(void);
	uint64_t mask;
};
/* Either may be NULL. */
int ksm_os_action_sigsafe(int signal, const struct ksm_os_action *new, struct ksm_os_action *old);
/* Install a handler: SA_RESTART, SA_ONSTACK, and every signal blocked in it, also those that the C library never lets
 * anybody block. *old: what was there before, in one step. */
int ksm_os_action_exchange(int signal, ksm_os_handler handler, struct ksm_os_action *old);
/* The calling thread's mask of blocked signals, bit 0 for signal 1; returns the old one. */
uint64_t ksm_os_mask_sigsafe(uint64_t mask);
/* Send a signal to the calling thread, with what was known of it when it came. */
int ksm_os_signal_self_sigsafe(int signal, siginfo_t *info);
int ksm_os_tid_sigsafe(void);
void ksm_os_yield_sigsafe(void);
void ksm_os_sleep_sigsafe(uint64_t ns);

enum ksm_os_access {
	KSM_ACCESS_UNKNOWN = 0,
	KSM_ACCESS_READ, /* or an instruction */
	KSM_ACCESS_WRITE,
};
/* What kind of access met a fault: of a handler's third argument. */
enum ksm_os_access ksm_os_access_sigsafe(const void *context);

#endif
