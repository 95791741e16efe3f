/* SPDX-License-Identifier: MIT */
/*
 * crowd.h: threads that write all over some pages, each into a word of its own in every page, and know what must be
 * there. The last of them writes with system calls; one that is refused (EFAULT) is made again, and counted.
 */
#ifndef KSM_TESTS_CROWD_H
#define KSM_TESTS_CROWD_H

#include "kit.h"

#define CROWD_MOST 4

struct crowd_writer {
	struct crowd *crowd;
	pthread_t thread;
	unsigned number;
	uint64_t *shadow;
	int file; /* -1: stores */
	uint64_t writes;
};

struct crowd {
	char *field;
	size_t pages;
	unsigned count;
	unsigned pause_us; /* between writes */
	uint32_t stop;
	bool may_refuse;   /* system calls may meet read-only pages */
	uint64_t refusals; /* how often they did */
	struct crowd_writer writers[CROWD_MOST];
};

KIT void *crowd_write(void *argument)
{
	struct crowd_writer *self = argument;
	struct crowd *crowd = self->crowd;
	uint64_t state = self->number + 1;
	while (!ksm_load_relaxed(&crowd->stop)) {
		size_t page = kit_random(&state) % crowd->pages;
		volatile uint64_t *at = (uint64_t *)kit_page(crowd->field, page) + self->number;
		self->shadow[page]++;
		if (self->file < 0) {
			*at = *at + 1;
		} else {
			CHECK_EQ(pwrite(self->file, &self->shadow[page], 8, 0), 8);
			while (pread(self->file, (void *)at, 8, 0) != 8) {
				CHECK_EQ(errno, EFAULT);
				ksm_add_relaxed(&crowd->refusals, 1);
				ksm_os_sleep_ns(20000);
				if (ksm_load_relaxed(&crowd->stop)) {
					self->shadow[page]--; /* nothing of it has arrived */
					break;
				}
			}
		}
		ksm_add_relaxed(&self->writes, 1);
		if (crowd->pause_us)
			ksm_os_sleep_ns(crowd->pause_us * 1000ull);
	}
	return NULL;
}

/* The first `count` words of every page are theirs now, and zero. */
KIT void crowd_start(struct crowd *crowd, char *field, size_t pages, unsigned count, unsigned pause_us)
{
	*crowd = (struct crowd){.field = field, .pages = pages, .count = count, .pause_us = pause_us};
	CHECK_LE(count, CROWD_MOST);
	for (size_t page = 0; page < pages; page++)
		memset(kit_page(field, page), 0, count * 8);
	for (unsigned i = 0; i < count; i++) {
		struct crowd_writer *writer = &crowd->writers[i];
		*writer = (struct crowd_writer){.crowd = crowd, .number = i, .file = -1};
		writer->shadow = calloc(pages, sizeof(uint64_t));
		if (i == count - 1)
			writer->file = ksm_os_memfd("value");
		CHECK_EQ(pthread_create(&writer->thread, NULL, crowd_write, writer), 0);
	}
	for (unsigned i = 0; i < count; i++)
		KIT_WAIT(10, ksm_load_relaxed(&crowd->writers[i].writes) > 0);
}

/* Ends them. Returns how many words are not what they should be. */
KIT size_t crowd_end(struct crowd *crowd)
{
	size_t lost = 0;
	ksm_store_release(&crowd->stop, 1);
	CHECK(crowd->may_refuse || !ksm_load_relaxed(&crowd->refusals));
	for (unsigned i = 0; i < crowd->count; i++) {
		struct crowd_writer *writer = &crowd->writers[i];
		pthread_join(writer->thread, NULL);
		for (size_t page = 0; page < crowd->pages; page++)
			lost += ((uint64_t *)kit_page(crowd->field, page))[i] != writer->shadow[page];
		free(writer->shadow);
		ksm_os_close(writer->file);
	}
	return lost;
}

/* Everything but the crowd's words is what kit_map_filled(pages, first) put there. */
KIT void crowd_check_rest(const struct crowd *crowd, uint64_t first)
{
	char expected[KSM_PAGE_SIZE];
	size_t own = crowd->count * 8;
	for (size_t page = 0; page < crowd->pages; page++) {
		kit_fill(expected, first + page);
		CHECK(!memcmp(expected + own, kit_page(crowd->field, page) + own, KSM_PAGE_SIZE - own));
	}
}

#endif
