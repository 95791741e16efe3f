/* SPDX-License-Identifier: MIT */
/*
 * DOC: Slabs
 *
 * Blocks below a page come from slabs of one size class each: multiples of 16 up to 128, then four classes for each
 * doubling up to 2,048. Slabs of up to 512 bytes are one page, larger ones four. What is taken is noted in a bitmap
 * beside, never in the pages, so that equal contents give equal pages.
 *
 * SLAB-1. The lowest free object of the lowest slab, always: equal histories give equal layouts.
 * SLAB-2. A slab of a class is in its list once, by address, linked both ways; what its bitmap says is taken is what is
 *         counted, and what does not exist is taken for good.
 * SLAB-3. An object that is handed out lies in its slab and is taken; it is given back once, at the address it had.
 */
#include "slab.h"

#include "os.h"

#include <stdlib.h>
#include <string.h>

static const uint16_t sizes[KSM_SLAB_CLASSES] = {
	16,  32,  48,  64,  80,  96,  112, 128,  160,  192,  224,  256,
	320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048,
};

unsigned ksm_slab_class(size_t nbytes)
{
	unsigned class = 0;
	while (sizes[class] < nbytes)
		class ++;
	return class;
}

size_t ksm_slab_size(unsigned class)
{
	return sizes[class];
}

size_t ksm_slab_pages(unsigned class)
{
	return sizes[class] <= 512 ? 1 : 4;
}

static bool is_valid(const struct ksm_slab *slab, unsigned class)
{
	uint64_t taken = 0;
	for (size_t word = 0; word < KSM_COUNT(slab->taken); word++)
		taken += (uint64_t)__builtin_popcountll(slab->taken[word]);
	for (unsigned i = slab->objects; i < KSM_SLAB_OBJECTS; i++)
		if (!(slab->taken[i / 64] >> (i % 64) & 1))
			return false;
	return slab->size == sizes[class] && slab->pages == ksm_slab_pages(class) && slab->objects > 0 &&
	       slab->objects <= KSM_SLAB_OBJECTS &&
	       (size_t)slab->objects * slab->size <= slab->pages << KSM_PAGE_SHIFT &&
	       taken == slab->used + (KSM_SLAB_OBJECTS - slab->objects);
}

void *ksm_slab_alloc(struct ksm_slabs *slabs, unsigned class, struct ksm_slab **out)
{
	for (struct ksm_slab *slab = slabs->classes[class]; slab; slab = slab->next) {
		if (slab->used == slab->objects)
			continue;
		for (unsigned word = 0; word < KSM_COUNT(slab->taken); word++) {
			if (slab->taken[word] == UINT64_MAX)
				continue;
			unsigned bit = (unsigned)__builtin_ctzll(~slab->taken[word]);
			ksm_ensure(word * 64 + bit < slab->objects); /* SLAB-3 */
			slab->taken[word] |= 1ull << bit;
			slab->used++;
			*out = slab;
			ksm_assert(is_valid(slab, class));
			return slab->base + (size_t)(word * 64 + bit) * slab->size;
		}
	}
	return NULL;
}

struct ksm_slab *ksm_slab_add(struct ksm_slabs *slabs, unsigned class, void *base, void *owner)
{
	struct ksm_slab *slab = ksm_os_allocate(sizeof(*slab));
	if (!slab)
		return NULL;
	slab->base = base;
	slab->owner = owner;
	slab->pages = ksm_slab_pages(class);
	slab->size = sizes[class];
	slab->objects = (uint32_t)KSM_MIN((slab->pages << KSM_PAGE_SHIFT) / slab->size, (size_t)KSM_SLAB_OBJECTS);
	for (unsigned i = slab->objects; i < KSM_SLAB_OBJECTS; i++)
		slab->taken[i / 64] |= 1ull << (i % 64); /* objects that do not exist */
	struct ksm_slab **at = &slabs->classes[class], *previous = NULL;
	while (*at && (*at)->base < slab->base) {
		previous = *at;
		at = &(*at)->next;
	}
	slab->next = *at;
	slab->previous = previous;
	if (*at)
		(*at)->previous = slab;
	*at = slab;
	return slab;
}

bool ksm_slab_free(struct ksm_slabs *slabs, struct ksm_slab *slab, void *object)
{
	size_t index = (size_t)((char *)object - slab->base) / slab->size;
	uint64_t bit = 1ull << (index % 64);
	ksm_ensure((char *)object >= slab->base && index < slab->objects && slab->used > 0); /* SLAB-3 */
	ksm_ensure((char *)object == slab->base + index * slab->size && (slab->taken[index / 64] & bit));
	slab->taken[index / 64] &= ~bit;
	slab->used--;
	ksm_assert(is_valid(slab, ksm_slab_class(slab->size)));
	if (slab->used)
		return false;
	if (slab->next)
		slab->next->previous = slab->previous;
	if (slab->previous)
		slab->previous->next = slab->next;
	else
		slabs->classes[ksm_slab_class(slab->size)] = slab->next;
	return true;
}

bool ksm_slabs_is_valid(const struct ksm_slabs *slabs)
{
	for (unsigned class = 0; class < KSM_SLAB_CLASSES; class ++) {
		const struct ksm_slab *previous = NULL;
		for (const struct ksm_slab *slab = slabs->classes[class]; slab; previous = slab, slab = slab->next)
			if (!is_valid(slab, class) || slab->previous != previous || /* SLAB-2 */
			    (previous && previous->base + (previous->pages << KSM_PAGE_SHIFT) > slab->base))
				return false;
	}
	return true;
}
