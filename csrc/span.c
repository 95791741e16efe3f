/* SPDX-License-Identifier: MIT */
/*
 * DOC: Spans
 *
 * The free runs of an area, in a treap ordered by address: each node also knows the longest run below it, so that the
 * lowest run that is long enough is found by one walk from the root. Nodes lie in a table of their own, outside the
 * pages they describe, and refer to one another by number.
 *
 *               [ 40 … 47 ]  longest 90                 alloc(20): the left side's longest is 12, this run's 8,
 *              ╱           ╲                            so go right: [ 60 … 149 ] gives its first 20
 *      [ 3 … 14 ]        [ 60 … 149 ]
 *
 * SPAN-1. Runs do not overlap and never touch: neighbours are joined when they become free.
 * SPAN-2. Lowest address first, always.
 * SPAN-3. A run lies inside the area, and is given back once.
 */
#include "span.h"

#include "os.h"

#include <errno.h>
#include <sys/mman.h>

struct ksm_span_node {
	uint32_t left, right;
	uint32_t priority;
	uint32_t reserved;
	uint64_t page, pages;
	uint64_t longest; /* run in this subtree */
};

#define WALKED_MOST 64 /* nodes: books of more are not checked at every step, for that reads all of them */

#define NODES(pages) ((uint32_t)KSM_MIN((pages) / 2 + 16, (size_t)UINT32_MAX - 1))

static struct ksm_span_node *node(const struct ksm_spans *spans, uint32_t n)
{
	return &spans->nodes[n];
}

static void pull(struct ksm_spans *spans, uint32_t n)
{
	struct ksm_span_node *at = node(spans, n);
	at->longest = at->pages;
	if (at->left)
		at->longest = KSM_MAX(at->longest, node(spans, at->left)->longest);
	if (at->right)
		at->longest = KSM_MAX(at->longest, node(spans, at->right)->longest);
}

static uint32_t random32(struct ksm_spans *spans)
{
	spans->seed = spans->seed * 1664525u + 1013904223u;
	return spans->seed ^ spans->seed >> 16;
}

static uint32_t new_node(struct ksm_spans *spans, uint64_t page, uint64_t pages)
{
	uint32_t n = spans->unused;
	ksm_ensure(n <= spans->made);
	if (n)
		spans->unused = node(spans, n)->left;
	else if (spans->made + 1 < spans->room)
		n = ++spans->made;
	else
		return 0;
	*node(spans, n) =
		(struct ksm_span_node){.priority = random32(spans), .page = page, .pages = pages, .longest = pages};
	return n;
}

static void old_node(struct ksm_spans *spans, uint32_t n)
{
	node(spans, n)->left = spans->unused;
	spans->unused = n;
}

/* Everything below `page` to the left, the rest to the right. */
static void split(struct ksm_spans *spans, uint32_t root, uint64_t page, uint32_t *left, uint32_t *right)
{
	if (!root) {
		*left = *right = 0;
		return;
	}
	struct ksm_span_node *at = node(spans, root);
	if (at->page < page) {
		split(spans, at->right, page, &at->right, right);
		*left = root;
	} else {
		split(spans, at->left, page, left, &at->left);
		*right = root;
	}
	pull(spans, root);
}

static uint32_t join(struct ksm_spans *spans, uint32_t left, uint32_t right)
{
	if (!left || !right)
		return left ? left : right;
	if (node(spans, left)->priority > node(spans, right)->priority) {
		node(spans, left)->right = join(spans, node(spans, left)->right, right);
		pull(spans, left);
		return left;
	}
	node(spans, right)->left = join(spans, left, node(spans, right)->left);
	pull(spans, right);
	return right;
}

int ksm_spans_init(struct ksm_spans *spans, size_t pages)
{
	void *nodes;
	*spans = (struct ksm_spans){.pages = pages, .room = NODES(pages), .seed = 12345};
	int r = ksm_os_map_table(ksm_page_round_up((size_t)spans->room * sizeof(struct ksm_span_node)), &nodes);
	if (r)
		return r;
	spans->nodes = nodes;
	spans->root = new_node(spans, 0, pages);
	return 0;
}

void ksm_spans_fini(struct ksm_spans *spans)
{
	if (spans->nodes)
		ksm_os_unmap(spans->nodes, ksm_page_round_up((size_t)spans->room * sizeof(struct ksm_span_node)));
	spans->nodes = NULL;
}

int ksm_span_alloc(struct ksm_spans *spans, size_t pages, ksm_pageno *out)
{
	uint32_t n = spans->root, left, middle, right;
	if (!n || node(spans, n)->longest < pages || pages == 0)
		return -ENOMEM;
	for (;;) { /* SPAN-2 */
		struct ksm_span_node *at = node(spans, n);
		if (at->left && node(spans, at->left)->longest >= pages)
			n = at->left;
		else if (at->pages >= pages)
			break;
		else
			n = at->right;
		ksm_ensure(n); /* `longest` promised it */
	}
	uint64_t page = node(spans, n)->page;
	split(spans, spans->root, page, &left, &middle);
	split(spans, middle, page + 1, &middle, &right);
	struct ksm_span_node *run = node(spans, middle);
	ksm_ensure(middle && run->page == page && run->pages >= pages); /* SPAN-3 */
	ksm_ensure(run->pages <= spans->pages - page);
	*out = page;
	if (run->pages == pages) {
		old_node(spans, middle);
		middle = 0;
	} else {
		run->page += pages;
		run->pages -= pages;
		pull(spans, middle);
	}
	spans->root = join(spans, join(spans, left, middle), right);
	ksm_assert(spans->made > WALKED_MOST || ksm_spans_is_valid(spans));
	return 0;
}

/* The last node of a subtree. */
static uint32_t last_of(struct ksm_spans *spans, uint32_t n)
{
	while (n && node(spans, n)->right)
		n = node(spans, n)->right;
	return n;
}

static uint32_t first_of(struct ksm_spans *spans, uint32_t n)
{
	while (n && node(spans, n)->left)
		n = node(spans, n)->left;
	return n;
}

int ksm_span_free(struct ksm_spans *spans, ksm_pageno page, size_t pages)
{
	uint32_t left, right, rest, edge;
	uint64_t from = page, to = page + pages;
	ksm_ensure(pages > 0 && page < spans->pages && pages <= spans->pages - page); /* SPAN-3 */
	split(spans, spans->root, page, &left, &right);
	uint32_t before = last_of(spans, left), after = first_of(spans, right);
	ksm_ensure(!before || node(spans, before)->page + node(spans, before)->pages <= from); /* SPAN-1 */
	ksm_ensure(!after || node(spans, after)->page >= to);
	bool joins_before = before && node(spans, before)->page + node(spans, before)->pages == from;
	bool joins_after = after && node(spans, after)->page == to;
	uint32_t n = joins_before || joins_after ? 0 : new_node(spans, from, pages);
	if (!n && !joins_before && !joins_after) {
		spans->root = join(spans, left, right);
		return -ENOMEM;
	}
	if (joins_before) {
		from = node(spans, before)->page;
		split(spans, left, from, &left, &edge);
		old_node(spans, edge);
	}
	if (joins_after) {
		to = node(spans, after)->page + node(spans, after)->pages;
		split(spans, right, node(spans, after)->page + 1, &edge, &rest);
		old_node(spans, edge);
		right = rest;
	}
	if (!n)
		n = new_node(spans, from, to - from);
	spans->root = join(spans, join(spans, left, n), right);
	ksm_assert(spans->made > WALKED_MOST || ksm_spans_is_valid(spans));
	return 0;
}

static size_t sum_free(const struct ksm_spans *spans, uint32_t n)
{
	if (!n)
		return 0;
	return node(spans, n)->pages + sum_free(spans, node(spans, n)->left) + sum_free(spans, node(spans, n)->right);
}

size_t ksm_spans_free_pages(const struct ksm_spans *spans)
{
	return sum_free(spans, spans->root);
}

/* Ordered, apart, `longest` right; *end is where the last run seen so far ends. */
static bool is_valid(const struct ksm_spans *spans, uint32_t n, uint64_t *end, bool *first)
{
	if (!n)
		return true;
	const struct ksm_span_node *at = node(spans, n);
	uint64_t longest = at->pages;
	if (at->left)
		longest = KSM_MAX(longest, node(spans, at->left)->longest);
	if (at->right)
		longest = KSM_MAX(longest, node(spans, at->right)->longest);
	if (!is_valid(spans, at->left, end, first) || at->pages == 0 || longest != at->longest)
		return false;
	if (!*first && at->page <= *end) /* SPAN-1: touching runs would have been joined */
		return false;
	*first = false;
	*end = at->page + at->pages;
	return is_valid(spans, at->right, end, first);
}

bool ksm_spans_is_valid(const struct ksm_spans *spans)
{
	uint64_t end = 0;
	bool first = true;
	return is_valid(spans, spans->root, &end, &first);
}
