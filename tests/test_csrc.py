"""The core's own tests: every case of every tests/csrc/test_*.c is one item here, in a process of its own.

KSMALLOC_TEST_CFLAGS adds flags, for sanitizers (see `make asan`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PROGRAMS = ROOT / "tests" / "csrc"
LIMIT = 60  # HARNESS_LIMIT of harness.h
FLAGS = shlex.split(
    "-std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Werror -fvisibility=default -pthread"
    " -DKSM_FAULTS -DKSM_ASSERT_LEVEL=2"
) + shlex.split(os.environ.get("KSMALLOC_TEST_CFLAGS", ""))


class Case(NamedTuple):
    program: Path
    name: str
    limit: int


def cases_in(program: Path) -> list[Case]:
    """The cases a test program registers, read from its source so that collecting compiles nothing."""
    pattern = r"^TEST(?:_LIMIT)?\((\w+)(?:,\s*(\d+))?\)"
    found = re.findall(pattern, program.read_text(encoding="utf-8"), re.MULTILINE)
    return [Case(program, name, int(limit or LIMIT)) for name, limit in found]


def cc(*arguments: str | Path) -> None:
    command = [os.environ.get("CC", "cc"), *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        pytest.fail(f"{shlex.join(command)}\n{done.stderr}", pytrace=False)


def is_core(source: Path) -> bool:
    has_main = re.search(r"^int\s+main\s*\(", source.read_text(encoding="utf-8"), re.MULTILINE)
    return source.name != "preload.c" and not has_main


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The core's objects, with assertions and fault injection compiled in."""
    out = tmp_path_factory.mktemp("core")
    sources = [source for source in sorted(CSRC.glob("*.c")) if is_core(source)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: cc("-c", source, "-o", out / f"{source.stem}.o"), sources))
    return sorted(out.glob("*.o"))


@pytest.fixture(scope="module")
def programs() -> dict[Path, Path]:
    return {}


@pytest.fixture
def executable(
    case: Case, core: list[Path], programs: dict[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The linked program of this item's case, linked once."""
    source = case.program
    if source not in programs:
        target = tmp_path_factory.mktemp("programs") / source.stem
        cc("-iquote", CSRC, "-iquote", PROGRAMS, source, *core, "-o", target)
        programs[source] = target
    return programs[source]


def run(executable: Path, *arguments: str, limit: float) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own; kill what it leaves behind."""
    with subprocess.Popen(
        [executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nno end within {limit} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


ALL = [case for program in sorted(PROGRAMS.glob("test_*.c")) for case in cases_in(program)]


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.program.stem}-{case.name}")
def test_case(case: Case, executable: Path) -> None:
    done = run(executable, "--run", case.name, limit=case.limit + 5)
    if done.returncode < 0:
        pytest.fail(f"killed by {signal.Signals(-done.returncode).name}\n{done.stdout}", pytrace=False)
    if done.returncode != 0:
        pytest.fail(f"status {done.returncode}\n{done.stdout}", pytrace=False)


HARNESS_PROGRAM = """
#include "harness.h"

TEST(passes)
{
	size_t three = 3;
	CHECK_EQ(three, 3);
	CHECK_NE(4294967295u, -1);
}

TEST(fails)
{
	CHECK_EQ(1 + 1, 3);
}

TEST(dies)
{
	abort();
}

TEST_LIMIT(hangs, 1)
{
	for (;;)
		pause();
}

TEST(child_fails)
{
	pid_t pid = fork();
	CHECK(pid != 0);
	CHECK_CHILD(pid);
}

TEST(child_killed)
{
	pid_t pid = fork();
	if (pid == 0)
		for (;;)
			pause();
	CHECK_SYS(kill(pid, SIGKILL));
	CHECK_KILLED(pid, SIGKILL);
}
"""


@pytest.fixture(scope="module")
def harness_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    source = folder / "test_harness.c"
    source.write_text(HARNESS_PROGRAM, encoding="utf-8")
    cc("-iquote", PROGRAMS, source, "-o", folder / "test_harness")
    return folder / "test_harness"


def test_harness_lists_what_the_source_says(harness_program: Path) -> None:
    listed = run(harness_program, "--list", limit=10).stdout.split()
    found = cases_in(harness_program.with_suffix(".c"))
    assert listed == [case.name for case in found]
    assert {case.name: case.limit for case in found}["hangs"] == 1


def test_harness_runs_each_case_in_its_own_process(harness_program: Path) -> None:
    done = run(harness_program, limit=30)
    assert done.returncode == 1
    for line in (
        "ok      passes (",
        "FAILED  fails: status 1",
        "not true: 1 + 1 == 3 (2, 3)",
        "FAILED  dies: Aborted",
        "FAILED  hangs: no end within 1 s",
        "FAILED  child_fails: status 1",
        "ok      child_killed (",
        "6 cases, 4 failed",
    ):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("passes", 0),
        ("fails", 1),
        ("dies", -signal.SIGABRT),
        ("hangs", -signal.SIGALRM),
        ("unheard_of", 2),
    ],
)
def test_harness_runs_one_case(harness_program: Path, name: str, status: int) -> None:
    assert run(harness_program, "--run", name, limit=30).returncode == status
