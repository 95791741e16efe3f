# SPDX-License-Identifier: MIT
"""The core's own tests once more, under the address and the undefined-behaviour sanitizer, several at a time.

Of the walks, in which every system call fails once, two are walked here. `make asan` runs all cases; other
tools are `make ubsan`, `make tsan` and `make valgrind`. Each has its controls here: what it is there to find
is found, with the same flags, options and suppressions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import buildkit
import pytest
import sankit
import test_csrc

WALK = "surviv"  # is in the name of every walk
WALKED = ("merges_survive_a_descriptor_lost", "sweeps_survive_every_failing_call")
ALONE = ("when_all_are_killed_the_kernel_has_it_all_back",)  # looks at the memory of the whole machine
SOURCES = sorted(test_csrc.PROGRAMS.glob("test_*.c"))
HERE = sankit.name_here()


# ---- the core ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All test programs, built with the sanitizers."""
    out = tmp_path_factory.mktemp("sanitized")
    flags = (*test_csrc.FLAGS, *sankit.ASAN.cflags)
    core = buildkit.compile_all(buildkit.core_sources(), out, *flags)
    tests = buildkit.compile_all(SOURCES, out, *flags, "-iquote", str(test_csrc.PROGRAMS))

    def link(test: Path) -> None:
        buildkit.cc(*flags, *sankit.ASAN.programs, test, *core, "-o", test.with_suffix(""))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(link, tests))
    return out


def run_all(programs: Path, cases: list[test_csrc.Case]) -> list[str]:
    """What is wrong with which case."""

    def one(case: test_csrc.Case) -> str | None:
        program = programs / case.program.stem
        limit = case.limit * test_csrc.PATIENCE + 5
        why = test_csrc.run(program, "--run", case.name, limit=limit, under=sankit.ASAN).why_bad()
        return f"{case.name}: {why}" if why else None

    together = [case for case in cases if case.name not in ALONE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(one, together))
    found += [one(case) for case in cases if case.name in ALONE]
    return [why for why in found if why]


if not HERE:

    @pytest.mark.timeout(0)  # every case has its limit
    @pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
    def test_addresses_and_undefined_behaviour(source: Path, programs: Path) -> None:
        cases = test_csrc.cases_in(source)
        wrong = run_all(programs, [case for case in cases if WALK not in case.name or case.name in WALKED])
        if wrong:
            pytest.fail("\n".join(wrong), pytrace=False)


# ---- controls ----------------------------------------------------------------------------------------------

BUGS = """
#include "harness.h"
#include <pthread.h>
#include <stdbool.h>

TEST(after_its_end)
{
	char *volatile at = malloc(8);
	free(at);
	CHECK_EQ(at[0], 0);
}

TEST(on_a_dead_frame)
{
	int *volatile at;
	{
		int local = 3;
		at = &local;
	}
	CHECK_EQ(*at, 3);
}

TEST(too_large)
{
	volatile int most = 0x7fffffff;
	CHECK_NE(most + 1, most);
}

TEST(too_far)
{
	volatile unsigned width = 32;
	CHECK_NE(1u << width, 7);
}

TEST(never_written)
{
	int *volatile at = malloc(8);
	if (at[1] == 12345)
		puts("by chance");
}

static int shared;

static void *count(void *argument)
{
	for (int i = 0; i < 1000; i++)
		shared++;
	return argument;
}

TEST(both_at_once)
{
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, count, NULL));
	count(NULL);
	CHECK(!pthread_join(thread, NULL));
}

/* Nobody asks how the children end, and what they say goes nowhere. */
static bool is_unseen_child(void)
{
	pid_t pid = fork();
	if (pid != 0) {
		harness_wait(__FILE__, __LINE__, pid);
		return false;
	}
	close(1);
	close(2);
	return true;
}

TEST(outside_in_a_child)
{
	if (is_unseen_child()) {
		char *volatile at = malloc(8);
		_exit(at[8]);
	}
}

TEST(too_far_in_a_child)
{
	if (is_unseen_child()) {
		volatile unsigned width = 32;
		_exit(1u << width);
	}
}

TEST(both_at_once_in_a_child)
{
	if (is_unseen_child()) {
		test_both_at_once();
		_exit(0);
	}
}
"""

FOUND = {
    "asan": (
        ("after_its_end", "heap-use-after-free"),
        ("on_a_dead_frame", "stack-use-after-scope"),
        ("too_large", "signed integer overflow"),
        ("outside_in_a_child", "heap-buffer-overflow"),
        ("too_far_in_a_child", "shift exponent 32"),
    ),
    "ubsan": (("too_large", "signed integer overflow"), ("too_far_in_a_child", "shift exponent 32")),
    "tsan": (("both_at_once", "data race"), ("both_at_once_in_a_child", "data race")),
    "valgrind": (
        ("never_written", "uninitialised value"),
        ("outside_in_a_child", "Invalid read"),
    ),
}
# valgrind is not everywhere; the compiler brings the others.
CONTROLS = [
    (name, case, said)
    for name in ([HERE] if HERE else ["asan", "ubsan", "tsan"])
    for case, said in FOUND[name]
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The program above, built for a tool."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            source = folder / "test_bugs.c"
            source.write_text(BUGS, encoding="utf-8")
            used = sankit.TOOLS[name]
            flags = (*test_csrc.FLAGS, *used.cflags, *used.programs)
            # The compiler sees some of them, too.
            buildkit.cc(*flags, "-w", "-iquote", test_csrc.PROGRAMS, source, "-o", folder / "bugs")
            built[name] = folder / "bugs"
        return built[name]

    return build


@pytest.mark.parametrize(("name", "case", "said"), CONTROLS)
def test_control_is_reported(name: str, case: str, said: str, planted: Callable[[str], Path]) -> None:
    """What the tools are there to find is found, whatever the process does with its files."""
    done = test_csrc.run(planted(name), "--run", case, limit=20, under=sankit.TOOLS[name])
    assert said in (done.why_bad() or ""), done
    assert said in done.reports, done


NO_LOCK = """
struct ksm_peer;

void __wrap_ksm_merge_lock(struct ksm_peer *peer)
{
	(void)peer;
}

void __wrap_ksm_merge_unlock(struct ksm_peer *peer)
{
	(void)peer;
}
"""


if HERE == "tsan":

    def test_control_a_core_without_its_lock_is_reported(tmp_path: Path) -> None:
        """What is suppressed does not hide races of the core's own."""
        planted = tmp_path / "no_lock.c"
        planted.write_text(NO_LOCK, encoding="utf-8")
        sources = [*buildkit.core_sources(), planted, test_csrc.PROGRAMS / "test_domain.c"]
        flags = (*test_csrc.FLAGS, "-iquote", str(test_csrc.PROGRAMS))
        objects = buildkit.compile_all(sources, tmp_path, *flags)
        buildkit.cc(*objects, *sorted(buildkit.wraps([planted])), "-o", tmp_path / "domain")
        done = test_csrc.run(tmp_path / "domain", "--run", "a_process_is_in_a_domain_once", limit=60)
        assert "data race" in done.reports, done
        assert "ksm_" in done.reports, done
