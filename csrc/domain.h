/* SPDX-License-Identifier: MIT */
/*
 * domain.h: the public object behind a membership, its references, and the list of all in this process.
 */
#ifndef KSM_DOMAIN_H
#define KSM_DOMAIN_H

#include "worker.h"

struct ksm_domain {
	struct ksm_worker worker;
	struct ksm_domain *next; /* of the process's */
	uint64_t references;
	pthread_mutex_t memory; /* the arenas' books: spans and slabs */
	uint32_t arenas_made;   /* to place each one's frames */
};

/* One more reference. */
void ksm_domain_get(struct ksm_domain *domain);

static inline struct ksm_peer *ksm_domain_peer(struct ksm_domain *domain)
{
	return &domain->worker.member.peer;
}

static inline struct ksm_scanner *ksm_domain_scanner(struct ksm_domain *domain)
{
	return &domain->worker.member.scanner;
}

/* Does a region of any domain of this process overlap [at, at + nbytes)? */
bool ksm_domains_overlap(const void *at, size_t nbytes);

/* Scan one region (NULL: all), restore one: in the scanner's thread, waited for. */
int ksm_domain_scan_region(struct ksm_domain *domain, struct ksm_region *region, struct ksm_report *out);
int ksm_domain_see_breaks(struct ksm_domain *domain, struct ksm_region *region);
int ksm_domain_restore_region(struct ksm_domain *domain, struct ksm_region *region, enum ksm_restore_broken broken,
			      struct ksm_restore_counts *out);

/* Start all scanners that are not running. */
void ksm_domains_resume(void);
void ksm_domains_fork_prepare(void);
void ksm_domains_fork_parent(void);
void ksm_domains_fork_child(void);

#endif
