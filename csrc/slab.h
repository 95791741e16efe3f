/* SPDX-License-Identifier: MIT */
/*
 * slab.h: blocks smaller than a page. Books only: which object of which slab is in use. The caller holds a lock and
 * provides the pages.
 */
#ifndef KSM_SLAB_H
#define KSM_SLAB_H

#include "base.h"

#define KSM_SLAB_MOST 2048 /* bytes; larger blocks get pages of their own */
#define KSM_SLAB_CLASSES 24
#define KSM_SLAB_OBJECTS 256

struct ksm_slab {
	struct ksm_slab *next, *previous; /* of its class, by address */
	char *base;
	void *owner; /* the caller's */
	size_t pages;
	uint32_t size;    /* of an object */
	uint32_t objects; /* that fit */
	uint32_t used;
	uint64_t taken[KSM_SLAB_OBJECTS / 64];
};

struct ksm_slabs {
	struct ksm_slab *classes[KSM_SLAB_CLASSES];
};

/* Which class serves nbytes (1 … KSM_SLAB_MOST), how large its objects are, how many pages a slab of it has. */
unsigned ksm_slab_class(size_t nbytes);
size_t ksm_slab_size(unsigned class);
size_t ksm_slab_pages(unsigned class);

/* The lowest free object of the class, or NULL: add a slab first. */
void *ksm_slab_alloc(struct ksm_slabs *slabs, unsigned class, struct ksm_slab **slab);
/* A new slab on these pages. NULL: no memory. */
struct ksm_slab *ksm_slab_add(struct ksm_slabs *slabs, unsigned class, void *base, void *owner);
/* true: that was its last object, and the slab is out of the books; the caller frees its pages and the slab. */
bool ksm_slab_free(struct ksm_slabs *slabs, struct ksm_slab *slab, void *object);
/* Are the books right? Walks all slabs. */
bool ksm_slabs_is_valid(const struct ksm_slabs *slabs);

#endif
