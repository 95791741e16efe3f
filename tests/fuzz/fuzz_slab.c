/* SPDX-License-Identifier: MIT */
/* Small blocks against one flag an object: SLAB-1 after every step, in some classes at a time. */
#include "fuzz.h"

#include "slab.h"

#define SLABS 4   /* of a class, at most */
#define CLASSES 3 /* in one play */

static struct class
{
	unsigned number;
	size_t size, pages, objects;
	char *base;                    /* never touched: books only */
	struct ksm_slab *slabs[SLABS]; /* by place; NULL: not there */
	bool used[SLABS][KSM_SLAB_OBJECTS];
} classes[CLASSES];

static struct ksm_slabs slabs;

static void step_alloc(struct class *class)
{
	struct ksm_slab *slab = NULL;
	for (size_t i = 0; i < SLABS; i++) {
		for (size_t j = 0; class->slabs[i] && j < class->objects; j++) {
			if (class->used[i][j])
				continue;
			char *object = ksm_slab_alloc(&slabs, class->number, &slab);
			FUZZ_CHECK(object ==
				   class->base + i * class->pages * KSM_PAGE_SIZE + j * class->size); /* SLAB-1 */
			FUZZ_CHECK(slab == class->slabs[i]);
			class->used[i][j] = true;
			return;
		}
	}
	FUZZ_CHECK(!ksm_slab_alloc(&slabs, class->number, &slab));
}

static void step_add(struct class *class, size_t place)
{
	if (class->slabs[place])
		return;
	char *base = class->base + place * class->pages * KSM_PAGE_SIZE;
	class->slabs[place] = ksm_slab_add(&slabs, class->number, base, class);
	FUZZ_CHECK(class->slabs[place] && class->slabs[place]->objects == class->objects);
	FUZZ_CHECK(class->slabs[place]->owner == class);
	memset(class->used[place], 0, sizeof(class->used[place]));
}

static void step_free(struct class *class, size_t place, size_t object)
{
	object %= class->objects;
	if (!class->slabs[place] || !class->used[place][object])
		return;
	bool last = true;
	for (size_t i = 0; i < class->objects; i++)
		last &= i == object || !class->used[place][i];
	char *at = class->slabs[place]->base + object * class->size;
	FUZZ_CHECK(ksm_slab_free(&slabs, class->slabs[place], at) == last); /* SLAB-3: at the address it had */
	class->used[place][object] = false;
	if (!last)
		return;
	free(class->slabs[place]);
	class->slabs[place] = NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input input = {data, size};
	memset(&slabs, 0, sizeof(slabs));
	for (size_t i = 0; i < CLASSES; i++) {
		/* Of three thirds, so that no two are the same. */
		unsigned number =
			(unsigned)(i * KSM_SLAB_CLASSES / CLASSES + fuzz_below(&input, KSM_SLAB_CLASSES / CLASSES));
		classes[i] = (struct class){.number = number,
					    .size = ksm_slab_size(number),
					    .pages = ksm_slab_pages(number),
					    .base = (char *)((i + 1) << 30)};
		FUZZ_CHECK(ksm_slab_class(classes[i].size) == number);
		classes[i].objects =
			KSM_MIN(classes[i].pages * KSM_PAGE_SIZE / classes[i].size, (size_t)KSM_SLAB_OBJECTS);
	}
	while (input.left) {
		uint8_t what = fuzz_byte(&input);
		struct class *class = &classes[what / 8 % CLASSES];
		if (what % 8 == 0)
			step_add(class, fuzz_below(&input, SLABS));
		else if (what % 8 < 5)
			step_alloc(class);
		else
			step_free(class, fuzz_below(&input, SLABS), fuzz_byte(&input));
		FUZZ_CHECK(ksm_slabs_is_valid(&slabs));
	}
	for (size_t i = 0; i < CLASSES; i++)
		for (size_t place = 0; place < SLABS; place++)
			free(classes[i].slabs[place]);
	return 0;
}
