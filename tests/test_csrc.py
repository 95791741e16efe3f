"""The core's own tests: every case of every tests/csrc/test_*.c is one item here, in a process of its own.

Under a sanitizer, or valgrind, if KSMALLOC_SANITIZER says so (see sankit.py, `make asan`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import buildkit
import pytest
import sankit
from pace import SLOWER

CSRC = buildkit.CSRC
PROGRAMS = buildkit.ROOT / "tests" / "csrc"
LIMIT = 60  # HARNESS_LIMIT of harness.h
PATIENCE = 4  # HARNESS_PATIENCE
HERE = sankit.tool()  # everything runs under it
PACE = max(SLOWER, HERE.slower if HERE else 1)
FLAGS = ("-O1", "-fvisibility=default", *buildkit.SWITCHES, *buildkit.AUDITED)


class Case(NamedTuple):
    program: Path
    name: str
    limit: int


def cases_in(program: Path) -> list[Case]:
    """The cases a test program registers, read from its source so that collecting compiles nothing."""
    pattern = r"^TEST(?:_LIMIT)?\((\w+)(?:,\s*(\d+))?\)"
    found = re.findall(pattern, program.read_text(encoding="utf-8"), re.MULTILINE)
    return [Case(program, name, int(limit or LIMIT)) for name, limit in found]


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The core's objects, with assertions and fault injection compiled in."""
    return buildkit.compile_all(buildkit.core_sources(), tmp_path_factory.mktemp("core"), *FLAGS)


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
        buildkit.cc(*FLAGS, "-iquote", CSRC, "-iquote", PROGRAMS, source, *core, "-o", target)
        programs[source] = target
    return programs[source]


class Done(NamedTuple):
    returncode: int
    stdout: str
    reports: str  # of a sanitizer

    def why_bad(self) -> str | None:
        if self.returncode < 0:
            why = f"killed by {signal.Signals(-self.returncode).name}"
        elif self.returncode:
            why = f"status {self.returncode}"
        else:
            why = "a report" if self.reports or "runtime error:" in self.stdout else ""
        return f"{why}\n{self.stdout}{self.reports}" if why else None


def run(executable: Path, *arguments: str, limit: float, under: sankit.Tool | None = HERE) -> Done:
    """Run a program in a session of its own; kill what it leaves behind."""
    reports = sankit.Reports(under)
    limit *= max(SLOWER, under.slower if under else 1)
    with subprocess.Popen(
        reports.command(executable, *arguments),
        env=reports.environment(),
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
    return Done(process.returncode, output, reports.collect())


ALL = [case for program in sorted(PROGRAMS.glob("test_*.c")) for case in cases_in(program)]
RUN = [case for case in ALL if not sankit.why_left_out(HERE, case.program.stem, case.name)]


@pytest.mark.timeout(0)  # every case has its limit
@pytest.mark.parametrize("case", RUN, ids=lambda case: f"{case.program.stem}-{case.name}")
def test_case(case: Case, executable: Path) -> None:
    if why := run(executable, "--run", case.name, limit=case.limit * PATIENCE + 5).why_bad():
        pytest.fail(why, pytrace=False)


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
    buildkit.cc(*FLAGS, "-iquote", PROGRAMS, source, "-o", folder / "test_harness")
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
        f"FAILED  hangs: no end within {PATIENCE * PACE:g} s",
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
