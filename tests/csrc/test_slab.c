/* SPDX-License-Identifier: MIT */
/* Small blocks: classes, and which object is next (SLAB-1). */
#include "kit.h"

#include "slab.h"

TEST(classes_fit_and_waste_little)
{
	for (size_t nbytes = 1; nbytes <= KSM_SLAB_MOST; nbytes++) {
		unsigned class = ksm_slab_class(nbytes);
		CHECK_LT(class, KSM_SLAB_CLASSES);
		CHECK_GE(ksm_slab_size(class), nbytes);
		CHECK(class == 0 || ksm_slab_size(class - 1) < nbytes);
		CHECK_EQ(ksm_slab_size(class) % 16, 0);
		CHECK(nbytes <= 128 || ksm_slab_size(class) <= nbytes + nbytes / 4 + 16);
		CHECK_GE(ksm_slab_pages(class) * KSM_PAGE_SIZE, 8 * ksm_slab_size(class));
	}
}

/* Random alloc and free in every class against a table of what is in use. */
static void play(unsigned class, uint64_t seed)
{
	enum {
		MOST = 5
	};
	struct ksm_slabs slabs = {0};
	struct ksm_slab *added[MOST] = {0}, *slab;
	size_t pages = ksm_slab_pages(class), size = ksm_slab_size(class),
	       each = KSM_MIN(pages * KSM_PAGE_SIZE / size, (size_t)KSM_SLAB_OBJECTS);
	char *base = kit_map(MOST * pages);
	static struct ksm_slab *used[MOST][KSM_SLAB_OBJECTS];
	memset(used, 0, sizeof(used));
	size_t live = 0;
	for (int step = 0; step < 4000; step++) {
		if (kit_random(&seed) % 100 < (step < 2000 ? 60u : 30u)) {
			size_t s = 0, o = 0;
			bool room = false;
			for (s = 0; s < MOST && !room; s++)
				for (o = 0; added[s] && o < each && !room; o++)
					room = !used[s][o];
			char *object = ksm_slab_alloc(&slabs, class, &slab);
			CHECK_EQ(object != NULL, room);
			if (!object) { /* add the lowest missing one; order of addresses, not of coming */
				for (s = MOST; s-- > 0;)
					if (!added[s])
						break;
				if (s >= MOST)
					continue;
				added[s] = ksm_slab_add(&slabs, class, base + s * pages * KSM_PAGE_SIZE, &slabs);
				CHECK(added[s] && added[s]->owner == &slabs && added[s]->pages == pages);
				CHECK_EQ(added[s]->objects, each);
				continue;
			}
			CHECK(object == base + (s - 1) * pages * KSM_PAGE_SIZE + (o - 1) * size); /* the lowest */
			CHECK(slab == added[s - 1]);
			used[s - 1][o - 1] = slab;
			live++;
		} else if (live) {
			size_t s, o;
			do {
				s = kit_random(&seed) % MOST;
				o = kit_random(&seed) % each;
			} while (!used[s][o]);
			bool last = true;
			for (size_t i = 0; i < each; i++)
				last &= i == o || !used[s][i];
			CHECK_EQ(ksm_slab_free(&slabs, added[s], base + s * pages * KSM_PAGE_SIZE + o * size), last);
			used[s][o] = NULL;
			live--;
			if (last) {
				free(added[s]);
				added[s] = NULL;
			}
		}
	}
	munmap(base, MOST * pages * KSM_PAGE_SIZE);
}

TEST(lowest_first_in_every_class)
{
	for (unsigned class = 0; class < KSM_SLAB_CLASSES; class ++)
		play(class, class + 1);
}

TEST(freeing_twice_ends_the_process)
{
	pid_t pid = kit_fork();
	if (pid == 0) {
		struct ksm_slabs slabs = {0};
		struct ksm_slab *slab;
		CHECK(freopen("/dev/null", "w", stderr));
		CHECK(ksm_slab_add(&slabs, 0, kit_map(1), NULL));
		void *one = ksm_slab_alloc(&slabs, 0, &slab), *two = ksm_slab_alloc(&slabs, 0, &slab);
		CHECK(two > one);
		CHECK(!ksm_slab_free(&slabs, slab, one));
		ksm_slab_free(&slabs, slab, one);
		_exit(0);
	}
	CHECK_KILLED(pid, SIGABRT);
}
