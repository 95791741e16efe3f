/* SPDX-License-Identifier: MIT */
/*
 * member.h: this process's membership in a domain: joining, leaving, and living on through a fork.
 */
#ifndef KSM_MEMBER_H
#define KSM_MEMBER_H

#include "rendezvous.h"
#include "scan.h"

/* Descriptors that a scanner cannot do without, in the order in which they travel. */
enum ksm_seed {
	KSM_SEED_DIRECTORY,
	KSM_SEED_FILE,
	KSM_SEED_CONTROL,
	KSM_SEED_STORE,
	KSM_SEED_BITMAP, /* the seat's */
	KSM_SEED_CHILD,  /* the bitmap of the child's seat */
	KSM_SEED_UFFD,   /* last: it may be missing */
};

struct ksm_member {
	/* what was asked for */
	struct ksm_domain_options options;
	char name[KSM_NAME_MAX + 1];
	char base[KSM_PATH_ROOM];
	/* where we are */
	char directory[KSM_PATH_ROOM];
	uint32_t backing;
	uid_t user; /* whose domain it is */
	uint64_t follow_at_ns;
	bool joined;
	bool lost; /* the descriptors are gone and nobody could give them again, or there is no seat */
	struct ksm_peer peer;
	struct ksm_index index;
	struct ksm_exchange exchange;
	struct ksm_scanner scanner;
	/* across a fork */
	int tid; /* of the scanner's thread */
	uint64_t inodes[KSM_SEEDS];
	int seeds[KSM_SEEDS];      /* in the program's own table; -1: none */
	int seeds_here[KSM_SEEDS]; /* the same in the new scanner's table */
	struct ksm_seat child;     /* prepared; none: slot is KSM_NO_SLOT */
	ksm_slotno child_slot;     /* of the last child, whose bitmap a seed may be */
};

void ksm_member_init(struct ksm_member *member, const struct ksm_domain_options *options);

/* ---- the scanner's thread ------------------------------------------------------------------------------ */

/* Give the thread a descriptor table of its own that holds nothing but the seeds, if any. */
int ksm_member_own_table(struct ksm_member *member);
/* Join, creating what is not there. Errors as ksm_domain_attach(). */
int ksm_member_join(struct ksm_member *member);
/* A new scanner of a process that has joined: seeds, else the rendezvous and a peer, give the descriptors again. */
int ksm_member_resume(struct ksm_member *member);
/* Leave for good. No mapping of a frame is left. */
void ksm_member_leave(struct ksm_member *member);
/*
 * The process has changed its user, who has a domain of the same name of its own: join that, give every merged page back,
 * leave the old one. Returns 0, or why not now; then everything is as before and why_not says KSM_EUSER.
 */
bool ksm_member_user_has_changed(const struct ksm_member *member);
int ksm_member_follow_user(struct ksm_member *member);
/* No barrier could be had when the scanner started (a displaced handler, no descriptor left), or no park: try again. */
void ksm_member_retry_barrier(struct ksm_member *member);
/* Prepare a seat for the child of a fork. */
int ksm_member_prepare_child(struct ksm_member *member);

/* ---- the forking thread -------------------------------------------------------------------------------- */

/* The scanner still serves: fetch the seeds into the program's table. */
void ksm_member_fetch_seeds(struct ksm_member *member);
/* The scanner has ended, the merge lock is held: the child's bits become a copy of ours. */
void ksm_member_fork_prepare(struct ksm_member *member);
/* The thread has ended and its table is gone: no descriptor of it means anything any more. */
void ksm_member_forget_table(struct ksm_member *member);
void ksm_member_fork_parent(struct ksm_member *member);
void ksm_member_fork_child(struct ksm_member *member);
/* The new scanner has its own copies of the seeds, or has failed with an error; resumes: it was not the first. MEMBER-4 */
void ksm_member_started(struct ksm_member *member, bool resumes, int error);
/* Close the seeds in the program's table, those that still are what they were; ours: not the caller's, as the store of
 * a named object is. */
void ksm_member_drop_seeds(struct ksm_member *member, bool ours);

/* ---- shared by member.c and its parts ------------------------------------------------------------------ */

/* Device and inode in one word; 0: no such descriptor. */
uint64_t ksm_member_inode(int fd);
void ksm_member_remember_inodes(struct ksm_member *member);
/* Seated: open what a scanner needs, choose the barrier, listen. uffd: one to fall back on, or -1. */
int ksm_member_settle_in(struct ksm_member *member, int uffd);

#endif
