/* SPDX-License-Identifier: MIT */
/*
 * fuzz.h: what the fuzz targets share. A target is one function that takes bytes and plays them as steps against a simple
 * model: libFuzzer calls it with inputs that reach new code (tests/fuzz/fuzz.py), fuzz_main.c with inputs from a seed.
 */
#ifndef KSM_TESTS_FUZZ_H
#define KSM_TESTS_FUZZ_H

#include "base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Something the model does not allow. abort(): both drivers then keep the input. */
#define FUZZ_CHECK(condition)                                                                                          \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                      \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

/* The input, taken from the front; zeros when it is used up. */
struct fuzz_input {
	const uint8_t *at;
	size_t left;
};

static inline uint8_t fuzz_byte(struct fuzz_input *input)
{
	if (!input->left)
		return 0;
	input->left--;
	return *input->at++;
}

static inline uint64_t fuzz_number(struct fuzz_input *input, unsigned bytes)
{
	uint64_t number = 0;
	while (bytes--)
		number = number << 8 | fuzz_byte(input);
	return number;
}

static inline uint64_t fuzz_below(struct fuzz_input *input, uint64_t n)
{
	return fuzz_number(input, n > 256 ? 2 : 1) % n;
}

#endif
