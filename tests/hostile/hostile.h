/* SPDX-License-Identifier: MIT */
/*
 * hostile.h: what the parts of the stress share: a field is registered memory to which something is done.
 */
#ifndef HOSTILE_H
#define HOSTILE_H

#include "ksmalloc.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096u
#define FIELD 24 /* pages of a field; a page of the program's own on either side */
#define TWINS 48 /* pages with the same bytes as fields, registered and left alone: seeds 1 … TWINS */
#define ACTORS 4

/* What a page is expected to hold. */
#define SEED_NOTHING 0  /* it is not to be looked at */
#define SEED_NEW 100000 /* from here on: bytes that no field and no twin holds */

/* Pages that lie somewhere: the bytes that belong there. */
struct hostile_view {
	char *at;
	size_t pages;
	uint64_t seeds[FIELD];
	bool or_zero[FIELD]; /* documented: madvise brings either back */
};

struct hostile_field {
	struct hostile_view here, moved, mirror; /* mirror: the same shared memory, mapped elsewhere */
	struct ksm_region *region;
	char *aside, *spare; /* room for FIELD pages each */
	size_t spare_used;   /* of them are elsewhere, and what is there instead is not ours */
	uint64_t random;
	bool refused;    /* unregistering may be refused, until its protection is as it was */
	size_t first, n; /* what the act is done to */
};

struct hostile_act {
	const char *name;
	void (*act)(struct hostile_field *field);
	void (*undo)(struct hostile_field *field); /* before it is unregistered for good; may be NULL */
};

extern const struct hostile_act hostile_acts[];
extern const size_t hostile_act_count;

extern struct ksm_domain *hostile_domain;

uint64_t hostile_random(uint64_t *state);
void hostile_fill(char *page, uint64_t seed);
bool hostile_is(const char *page, uint64_t seed);
/* Its region. It may come to lie elsewhere; `around` pages on either side are mapped, too. */
struct ksm_region *hostile_register(char **at, size_t pages, size_t around);
/* Says so and ends the process with status 1. */
__attribute__((format(printf, 1, 2), noreturn)) void hostile_fail(const char *format, ...);

/* ---- hostile_wraps.c ---- */

extern bool hostile_blind, hostile_alternate;
/* Around a call after which something else is mapped. In between no page is touched and nothing waits for the scanner. */
void hostile_replace_begin(void);
void hostile_replace_end(void);
/* Around an act. In between no function of the core is called. */
void hostile_act_begin(void);
void hostile_act_end(void);

#endif
