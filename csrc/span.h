/* SPDX-License-Identifier: MIT */
/*
 * span.h: which runs of pages of an area are free. Page numbers only; no memory of the area is touched. The caller
 * holds a lock.
 */
#ifndef KSM_SPAN_H
#define KSM_SPAN_H

#include "base.h"

struct ksm_span_node;

struct ksm_spans {
	struct ksm_span_node *nodes; /* a table of `room` nodes; node 0 is nobody */
	uint64_t pages;              /* of the area */
	uint32_t room;
	uint32_t root;
	uint32_t unused; /* list of nodes that are free to use */
	uint32_t made;   /* nodes ever used: those beyond are fresh */
	uint32_t seed;
};

/* All `pages` free. */
int ksm_spans_init(struct ksm_spans *spans, size_t pages);
void ksm_spans_fini(struct ksm_spans *spans);
/* The lowest run of `pages` free pages: equal histories give equal layouts. -ENOMEM: there is none. */
int ksm_span_alloc(struct ksm_spans *spans, size_t pages, ksm_pageno *out);
/* Give a run back; it joins its neighbours. -ENOMEM: no room to note it, nothing changed. */
int ksm_span_free(struct ksm_spans *spans, ksm_pageno page, size_t pages);
/* Pages in free runs; for tests. */
size_t ksm_spans_free_pages(const struct ksm_spans *spans);
bool ksm_spans_is_valid(const struct ksm_spans *spans);

#endif
