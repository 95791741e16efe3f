/* SPDX-License-Identifier: MIT */
/* Every code has a name and a sentence. */
#include "kit.h"

TEST(ours_have_names_and_sentences)
{
	static const struct {
		int code;
		const char *name;
	} codes[] = {
#define CODE(symbol, value, sentence) {symbol, #symbol},
		KSM_ERRORS(CODE)
#undef CODE
	};
	for (size_t i = 0; i < KSM_COUNT(codes); i++) {
		const char *message = ksm_error_message(codes[i].code);
		CHECK_STR_EQ(ksm_error_name(codes[i].code), codes[i].name);
		CHECK_LT(codes[i].code, -4096);
		CHECK_GT(strlen(message), 10);
		CHECK(message[strlen(message) - 1] != '.');
		CHECK(strcmp(message, "unknown error"));
		for (size_t j = 0; j < i; j++) {
			CHECK_NE(codes[i].code, codes[j].code);
			CHECK(strcmp(message, ksm_error_message(codes[j].code)));
		}
	}
}

TEST(the_kernels_and_others)
{
	CHECK_STR_EQ(ksm_error_name(-ENOMEM), "ENOMEM");
	CHECK_STR_EQ(ksm_error_name(-EAGAIN), "EAGAIN");
	CHECK_STR_EQ(ksm_error_message(-ENOENT), strerror(ENOENT));
	CHECK_STR_EQ(ksm_error_name(0), "OK");
	CHECK_STR_EQ(ksm_error_message(0), "success");
	static const int unknown[] = {1, 4096, -4095, -4096, -5000, -5900, INT32_MAX, INT32_MIN};
	for (size_t i = 0; i < KSM_COUNT(unknown); i++) {
		CHECK_STR_EQ(ksm_error_name(unknown[i]), "UNKNOWN");
		CHECK_STR_EQ(ksm_error_message(unknown[i]), "unknown error");
	}
}

TEST(a_panic_says_where_and_aborts)
{
	int ends[2];
	char text[256] = "";
	CHECK_SYS(pipe(ends));
	pid_t pid = kit_fork();
	if (pid == 0) {
		dup2(ends[1], STDERR_FILENO);
		ksm_ensure(1 + 1 == 2);
		ksm_ensure(1 + 1 == 3);
		_exit(0);
	}
	CHECK_KILLED(pid, SIGABRT);
	CHECK_GT(read(ends[0], text, sizeof(text) - 1), 0);
	CHECK(strstr(text, "test_error.c"));
	CHECK(strstr(text, "1 + 1 == 3"));
}
