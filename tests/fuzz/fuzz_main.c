/* SPDX-License-Identifier: MIT */
/*
 * target [--seed N] [--seconds S] [--keep FILE] [inputs …]
 *
 * A driver that needs no fuzzer: plays the inputs of some files, then inputs made from the seed, until the time is over: random
 * bytes, repeated pieces, and changed copies of inputs that came before. If one ends the process it is in FILE.
 */
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define MOST 2048 /* bytes of an input */
#define POOL 64   /* inputs that are changed and played again */

static uint64_t state = 1;
static const char *keep;
static struct {
	uint8_t bytes[MOST];
	size_t size;
} pool[POOL];

static uint64_t random_number(void)
{
	uint64_t z = (state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Written first: whatever happens to this process, the input is there. */
static void play(const uint8_t *bytes, size_t size)
{
	static int fd = -1;
	if (keep && fd < 0)
		fd = open(keep, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
	if (fd >= 0 && (pwrite(fd, bytes, size, 0) < 0 || ftruncate(fd, (off_t)size)))
		perror(keep);
	LLVMFuzzerTestOneInput(bytes, size);
}

static size_t make_input(uint8_t *bytes)
{
	size_t size = 1 + random_number() % (random_number() % 4 ? 256 : MOST);
	unsigned few = random_number() % 2 ? 256 : 1u << (1 + random_number() % 7);
	size_t piece = random_number() % 3 ? size : 1 + random_number() % 16;
	for (size_t i = 0; i < size; i++)
		bytes[i] = i < piece || random_number() % 8 == 0 ? (uint8_t)(random_number() % few) : bytes[i - piece];
	return size;
}

static size_t change_input(uint8_t *bytes, size_t size)
{
	for (uint64_t n = 1 + random_number() % 6; n; n--) {
		size_t at = random_number() % size, other = random_number() % size;
		size_t length = 1 + random_number() % 16, most = size - (at > other ? at : other);
		switch (random_number() % 4) {
		case 0:
			bytes[at] = (uint8_t)random_number();
			break;
		case 1:
			bytes[at] ^= (uint8_t)(1u << random_number() % 8);
			break;
		case 2:
			memmove(bytes + at, bytes + other, length < most ? length : most);
			break;
		default:
			bytes[at] += (uint8_t)(random_number() % 3) - 1u;
		}
	}
	return size;
}

/* A file of inputs, each a line of hexadecimal digits. Returns how many. */
static uint64_t play_file(const char *path)
{
	uint8_t bytes[MOST];
	char line[2 * MOST + 2];
	uint64_t count = 0;
	FILE *file = fopen(path, "re");
	if (!file) {
		fprintf(stderr, "%s: %s\n", path, strerror(errno));
		exit(2);
	}
	for (; fgets(line, sizeof(line), file); count++) {
		size_t size = 0;
		unsigned byte;
		while (sscanf(line + 2 * size, "%2x", &byte) == 1)
			bytes[size++] = (uint8_t)byte;
		play(bytes, size);
	}
	fclose(file);
	return count;
}

int main(int argc, char **argv)
{
	double seconds = 1, start = now();
	uint64_t executions = 0;
	uint8_t bytes[MOST];
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--seed") && i + 1 < argc)
			state = strtoull(argv[++i], NULL, 0);
		else if (!strcmp(argv[i], "--seconds") && i + 1 < argc)
			seconds = strtod(argv[++i], NULL);
		else if (!strcmp(argv[i], "--keep") && i + 1 < argc)
			keep = argv[++i];
		else
			executions += play_file(argv[i]);
	}
	for (; now() - start < seconds; executions++) {
		size_t which = random_number() % POOL, size;
		if (pool[which].size && random_number() % 2) {
			memcpy(bytes, pool[which].bytes, pool[which].size);
			size = change_input(bytes, pool[which].size);
		} else {
			size = make_input(bytes);
		}
		play(bytes, size);
		memcpy(pool[which].bytes, bytes, size);
		pool[which].size = size;
	}
	if (keep)
		unlink(keep);
	printf("executions=%llu seconds=%.1f\n", (unsigned long long)executions, now() - start);
	return 0;
}
