/* SPDX-License-Identifier: MIT */
/*
 * rendezvous.h: the directory in which the peers of a domain find one another, and the domain file in it.
 */
#ifndef KSM_RENDEZVOUS_H
#define KSM_RENDEZVOUS_H

#include "layout.h"

#define KSM_PATH_ROOM 512

struct ksm_rendezvous {
	int directory;            /* -1: not open */
	int file;                 /* the domain file */
	char path[KSM_PATH_ROOM]; /* of the directory, for people and for named objects */
};

/*
 * Open, and if `create` make, the rendezvous of a domain. Owner, mode and kind of everything are checked; no
 * symbolic link is followed below the base. Errors: -EINVAL (name), -ENOENT (not there, not to be made), -ELOOP,
 * -ENOTDIR, -ENAMETOOLONG, KSM_EOWNER, and the kernel's.
 */
int ksm_rendezvous_open(const struct ksm_domain_options *options, bool create, struct ksm_rendezvous *out);
void ksm_rendezvous_close(struct ksm_rendezvous *rendezvous);

/* Take a lock byte of the domain file, waiting at most timeout_ms. -EAGAIN: somebody kept it all the time. */
int ksm_rendezvous_lock(int file, uint64_t byte, uint32_t timeout_ms);

/*
 * Open it, and have its join lock: of what is there then, for somebody may clean it away while it is waited for. *lock: a
 * description that is for the lock alone, so that it goes with the descriptor. -EAGAIN: others kept it for timeout_ms.
 */
int ksm_rendezvous_enter(const struct ksm_domain_options *options, bool create, uint32_t timeout_ms,
			 struct ksm_rendezvous *out, int *lock);
/* Give the join lock back. */
void ksm_rendezvous_unlock(int lock);

/* Read the file's head. -ENODATA: new and empty. */
int ksm_rendezvous_read(int file, struct ksm_domain_file *out);
/* Write the head, keeping what settings there are. */
int ksm_rendezvous_write(int file, const uint8_t id[16], uint32_t backing);
/* Has the file been removed or replaced since it was opened? */
bool ksm_rendezvous_is_gone(const struct ksm_rendezvous *rendezvous);
/* Does anybody live there? 1, 0 or an error. The place of the liveness locks never changes between layouts. */
int ksm_rendezvous_is_inhabited(int file);

/* The settings in the file; nothing there, or a scribble: the defaults. */
int ksm_rendezvous_settings(int file, struct ksm_settings *out);
/* -EINVAL: out of range. */
int ksm_rendezvous_set_settings(int file, const struct ksm_settings *settings);

/* Remove the sockets of everybody (nobody lives there), or everything with the directory itself. */
int ksm_rendezvous_clear(const struct ksm_rendezvous *rendezvous, bool everything);

#endif
