/* SPDX-License-Identifier: MIT */
/*
 * The table of words: what was inserted is found again unless something is known to have taken its place; nothing is
 * found that was not inserted; and whatever a confused peer writes over it, nothing outside is touched.
 */
#include "fuzz.h"

#include "atomic.h"
#include "table.h"

#define LEVELS 2
#define GUARD 512 /* words on either side that nobody may write */
#define GUARDED 0x5a5a5a5a5a5a5a5aull
#define DIGESTS 64 /* few, in few buckets */
#define WORDS 8    /* of one digest */

static uint64_t *memory, *touched;
static uint32_t levels_now;
static struct ksm_table table;
static bool inserted[DIGESTS][WORDS], stale[DIGESTS][WORDS];
static bool lossy; /* a word was written over another one that is needed */

static uint64_t digest_of(unsigned number)
{
	/* The same low bits, and for every four of them the same other bucket: there are 63 */
	return (uint64_t)(number % 4) << 56 | (uint64_t)(number / 4 % 4) << 40 | (uint64_t)(number / 16 * 63) << 32 | 5;
}

static uint64_t word_of(unsigned number, unsigned word)
{
	return 1 + number * WORDS + word;
}

static bool is_stale(void *context KSM_UNUSED, uint64_t word)
{
	uint64_t n = word - 1;
	return n >= DIGESTS * WORDS || stale[n / WORDS][n % WORDS];
}

static void create(void)
{
	size_t words = ksm_table_words(LEVELS), bits = words * sizeof(uint64_t) / KSM_PAGE_SIZE / 64 + 1;
	if (!memory) {
		memory = malloc((words + 2 * GUARD) * sizeof(uint64_t));
		touched = malloc(bits * sizeof(uint64_t));
	}
	memset(memory + GUARD, 0, words * sizeof(uint64_t));
	for (size_t i = 0; i < GUARD; i++)
		memory[i] = memory[GUARD + words + i] = GUARDED;
	memset(touched, 0, bits * sizeof(uint64_t));
	levels_now = 1;
	table = (struct ksm_table){
		.words = memory + GUARD, .touched = touched, .levels_now = &levels_now, .levels_max = LEVELS};
	memset(inserted, 0, sizeof(inserted));
	memset(stale, 0, sizeof(stale));
	lossy = false;
}

static unsigned found(unsigned number, uint64_t word)
{
	unsigned times = 0;
	for (unsigned level = 0; level < ksm_table_levels(&table); level++) {
		for (unsigned choice = 0; choice < KSM_TABLE_CHOICES; choice++) {
			uint64_t *bucket = ksm_table_bucket(&table, level, choice, digest_of(number));
			for (unsigned i = 0; bucket && i < KSM_TABLE_BUCKET; i++)
				times += bucket[i] == word;
		}
	}
	return times;
}

/* The words where those of a digest may lie; in levels that are not used yet there are none. */
#define REACH (LEVELS * KSM_TABLE_CHOICES * KSM_TABLE_BUCKET)
static void words_of(unsigned number, uint64_t words[REACH])
{
	memset(words, 0, REACH * sizeof(*words));
	for (unsigned at = 0; at < LEVELS * KSM_TABLE_CHOICES; at++) {
		const uint64_t *bucket =
			ksm_table_bucket(&table, at / KSM_TABLE_CHOICES, at % KSM_TABLE_CHOICES, digest_of(number));
		if (bucket)
			memcpy(words + (size_t)at * KSM_TABLE_BUCKET, bucket, KSM_TABLE_BUCKET * sizeof(*words));
	}
}

static void check_guards(void)
{
	size_t words = ksm_table_words(LEVELS);
	for (size_t i = 0; i < GUARD; i++)
		FUZZ_CHECK(memory[i] == GUARDED && memory[GUARD + words + i] == GUARDED);
}

static void step_insert(unsigned number, unsigned word, bool scribbled)
{
	uint64_t before[REACH], after[REACH];
	bool was_there = found(number, word_of(number, word)) != 0, room = false;
	unsigned changed = 0;
	words_of(number, before);
	for (unsigned i = 0; i < REACH; i++)
		room |= before[i] == 0 || is_stale(NULL, before[i]);
	ksm_table_insert(&table, digest_of(number), word_of(number, word), is_stale, NULL);
	if (scribbled)
		return;
	words_of(number, after);
	FUZZ_CHECK(found(number, word_of(number, word)) >= 1);
	for (unsigned i = 0; i < REACH; i++) {
		if (before[i] == after[i])
			continue;
		changed++;
		FUZZ_CHECK(!was_there || is_stale(NULL, before[i])); /* a stale one of its own, in a lower level */
		FUZZ_CHECK(!room || before[i] == 0 || is_stale(NULL, before[i]));
		lossy |= !room;
	}
	FUZZ_CHECK(was_there || changed >= 1); /* twice, where both buckets of a level are one */
	FUZZ_CHECK(changed <= 2);
	inserted[number][word] = true;
	stale[number][word] = false;
}

/* What a confused peer may do: anything. */
static void step_scribble(struct fuzz_input *input)
{
	switch (fuzz_byte(input) % 3) {
	case 0:
		levels_now = (uint32_t)fuzz_number(input, 4);
		break;
	case 1:
		touched[0] = fuzz_number(input, 8);
		break;
	default:
		table.words[fuzz_number(input, 2) % ksm_table_words(LEVELS)] = fuzz_number(input, 8);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input input = {data, size};
	bool may_scribble = fuzz_byte(&input) % 4 == 0, scribbled = false;
	create();
	for (unsigned step = 0; input.left && step < 300; step++) {
		uint8_t what = fuzz_byte(&input);
		unsigned number = (unsigned)fuzz_below(&input, DIGESTS), word = what / 16 % WORDS;
		if (what % 16 == 0 && may_scribble) {
			step_scribble(&input);
			scribbled = true;
		} else if (what % 16 < 3) {
			stale[number][word] = true;
		} else {
			step_insert(number, word, scribbled);
		}
		FUZZ_CHECK(ksm_table_levels(&table) >= 1 && ksm_table_levels(&table) <= LEVELS);
	}
	check_guards();
	for (unsigned n = 0; n < DIGESTS && !scribbled; n++) {
		for (unsigned w = 0; w < WORDS; w++) {
			FUZZ_CHECK(!found(n, word_of(n, w)) || inserted[n][w]);
			if (inserted[n][w] && !stale[n][w] && !lossy)
				FUZZ_CHECK(found(n, word_of(n, w)) >= 1);
		}
	}
	return 0;
}
