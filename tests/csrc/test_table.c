/* SPDX-License-Identifier: MIT */
/* The lossy table: what is inserted is found, or lost with a reason; TABLE-1 to 3. */
#include "kit.h"

#include "table.h"

#define LEVELS 3

static struct ksm_table table;
static uint32_t levels_now = 1;

static void create(void)
{
	table.words = calloc(ksm_table_words(LEVELS), sizeof(uint64_t));
	table.touched = calloc(1 + ksm_table_words(LEVELS) * 8 / KSM_PAGE_SIZE / 64, sizeof(uint64_t));
	table.levels_now = &levels_now;
	table.levels_max = LEVELS;
}

static bool never_stale(void *context KSM_UNUSED, uint64_t word KSM_UNUSED)
{
	return false;
}

static bool odd_is_stale(void *context, uint64_t word)
{
	++*(unsigned *)context;
	return word & 1;
}

static unsigned times_there(uint64_t digest, uint64_t word)
{
	unsigned n = 0;
	for (unsigned level = 0; level < ksm_table_levels(&table); level++) {
		for (unsigned choice = 0; choice < KSM_TABLE_CHOICES; choice++) {
			uint64_t *bucket = ksm_table_bucket(&table, level, choice, digest);
			if (!bucket) /* nothing was ever there */
				continue;
			CHECK(bucket >= table.words &&
			      bucket + KSM_TABLE_BUCKET <= table.words + ksm_table_words(LEVELS));
			for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++)
				n += bucket[i] == word;
		}
	}
	return n;
}

TEST(what_is_inserted_is_found_and_levels_grow)
{
	uint64_t state = 1, many = ksm_table_words(LEVELS) / 2;
	create();
	for (uint64_t i = 0; i < many; i++) {
		uint64_t digest = kit_random(&state) >> 4;
		ksm_table_insert(&table, digest, digest << 1 | 1, never_stale, NULL);
		CHECK_GE(times_there(digest, digest << 1 | 1), 1);
	}
	CHECK_EQ(ksm_table_levels(&table), LEVELS);
	uint64_t lost = 0;
	state = 1;
	for (uint64_t i = 0; i < many; i++) {
		uint64_t digest = kit_random(&state) >> 4;
		lost += !times_there(digest, digest << 1 | 1);
	}
	CHECK_EQ(lost, 0); /* half full: nothing was pushed out */
}

TEST(small_tables_stay_small)
{
	uint64_t state = 1;
	create();
	for (int i = 0; i < 2000; i++) {
		uint64_t digest = kit_random(&state) >> 4;
		ksm_table_insert(&table, digest, digest | 1, never_stale, NULL);
	}
	CHECK_EQ(levels_now, 1);
}

TEST(the_same_word_is_there_once)
{
	create();
	for (int i = 0; i < 100; i++)
		ksm_table_insert(&table, 77, 1234, never_stale, NULL);
	CHECK_EQ(times_there(77, 1234), 1);
}

/* Another process has a table of its own on the same words. */
TEST(what_others_insert_is_seen_by_the_same_look_up)
{
	create();
	struct ksm_table other = table;
	CHECK_EQ(ksm_table_view(&table, 77)->count, 0); /* nothing was ever there */
	ksm_table_insert(&other, 77, 1234, never_stale, NULL);
	const struct ksm_table_view *view = ksm_table_view(&table, 77);
	unsigned found = 0;
	for (unsigned n = 0; n < view->count; n++)
		for (unsigned i = 0; i < KSM_TABLE_BUCKET; i++)
			found += view->buckets[n][i] == 1234;
	CHECK_EQ(found, 1);
	ksm_table_insert(&table, 77, 1234, never_stale, NULL);
	CHECK_EQ(times_there(77, 1234), 1);
}

TEST(stale_words_are_replaced_in_place)
{
	unsigned asked = 0;
	create();
	for (uint64_t i = 0; i < KSM_TABLE_CHOICES * KSM_TABLE_BUCKET; i++) /* both buckets of level 0 are full */
		ksm_table_insert(&table, 77, 1000 + 2 * i + (i == 5), never_stale, NULL);
	CHECK_EQ(levels_now, 1);
	ksm_table_insert(&table, 77, 5000, odd_is_stale, &asked);
	CHECK_EQ(levels_now, 1);
	CHECK_GT(asked, 0);
	CHECK_EQ(times_there(77, 5000), 1);
	CHECK_EQ(times_there(77, 1011), 0);
	ksm_table_insert(&table, 77, 5002, odd_is_stale, &asked); /* nothing stale any more: the next level */
	CHECK_EQ(levels_now, 2);
	CHECK_EQ(times_there(77, 5002), 1);
	CHECK_EQ(times_there(77, 1000), 1);
}

TEST(a_full_table_takes_the_newest)
{
	create();
	for (uint64_t i = 0; i < 1000; i++) { /* all of one digest */
		ksm_table_insert(&table, 77, 2 + 2 * i, never_stale, NULL);
		CHECK_EQ(times_there(77, 2 + 2 * i), 1);
	}
	CHECK_EQ(levels_now, LEVELS);
	uint64_t used = 0;
	for (uint64_t i = 0; i < ksm_table_words(LEVELS); i++)
		used += table.words[i] != 0;
	CHECK_EQ(used, LEVELS * KSM_TABLE_CHOICES * KSM_TABLE_BUCKET); /* nobody else's bucket was touched */
}

TEST(a_scribbled_level_count_is_cut)
{
	static const uint32_t scribbles[] = {0, LEVELS + 1, 1000, 0x80000000u, UINT32_MAX};
	create();
	for (size_t i = 0; i < KSM_COUNT(scribbles); i++) {
		levels_now = scribbles[i];
		CHECK_GE(ksm_table_levels(&table), 1);
		CHECK_LE(ksm_table_levels(&table), LEVELS);
		ksm_table_insert(&table, 77 + i, 9000 + i, never_stale, NULL);
		CHECK_EQ(times_there(77 + i, 9000 + i), 1);
	}
	levels_now = 0;
	for (uint64_t i = 0; i < 500; i++)
		ksm_table_insert(&table, 5, 1 + i, never_stale, NULL);
	CHECK_LE(ksm_table_levels(&table), LEVELS);
}

/* And what does not fit into the first level is found in the next one. */
TEST(a_level_count_of_zero_heals)
{
	create();
	levels_now = 0;
	for (uint64_t i = 0; i <= KSM_TABLE_CHOICES * KSM_TABLE_BUCKET; i++) {
		ksm_table_insert(&table, 77, 1000 + i, never_stale, NULL);
		CHECK_EQ(times_there(77, 1000 + i), 1);
	}
	CHECK_EQ(levels_now, 2);
}

/* When a level is new, its pages are not taken for words that have a place where memory is. */
TEST(memory_that_is_there_is_used_first)
{
	const uint64_t same_page = 78 + 512 * 3;
	create();
	for (uint64_t i = 0; i <= KSM_TABLE_CHOICES * KSM_TABLE_BUCKET; i++)
		ksm_table_insert(&table, 77, 1000 + i, never_stale, NULL);
	CHECK_EQ(levels_now, 2);
	ksm_table_insert(&table, same_page, 5000, never_stale, NULL);
	CHECK(ksm_table_bucket(&table, 0, 0, same_page) != NULL);
	CHECK(ksm_table_bucket(&table, 1, 0, same_page) == NULL);
	CHECK_EQ(times_there(same_page, 5000), 1);
}

static void *insert_many(void *argument)
{
	uint64_t state = (uintptr_t)argument;
	struct ksm_table own = table; /* each process has one */
	for (int i = 0; i < 3000; i++) {
		uint64_t digest = kit_random(&state) >> 4;
		ksm_table_insert(&own, digest, digest | 1, never_stale, NULL);
	}
	return NULL;
}

TEST(several_insert_at_once)
{
	pthread_t threads[4];
	create();
	for (uintptr_t i = 0; i < 4; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, insert_many, (void *)(i + 1)), 0);
	for (size_t i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	for (uint64_t i = 0; i < 4; i++) {
		uint64_t state = i + 1;
		for (int j = 0; j < 3000; j++) {
			uint64_t digest = kit_random(&state) >> 4;
			CHECK_GE(times_there(digest, digest | 1), 1);
		}
	}
}
