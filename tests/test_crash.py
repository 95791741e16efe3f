# SPDX-License-Identifier: MIT
"""Death at every instruction: tests/crash/ steps a peer through an operation, and kills or stops it there.

Every state that a death can leave is met in every run: each boundary after a system call or after a change to
memory that processes share. Of all the boundaries between two instructions there is a sample, another one in
each run; the line that is printed says which. KSMALLOC_CRASH_ALL=1 takes all of them (see `make crash`). The
same program with a bug in it is the control: the bug must be found.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import buildkit
import pytest
from conftest import Processes
from runkit import Run

CRASH = buildkit.ROOT / "tests" / "crash"
ALL = os.environ.get("KSMALLOC_CRASH_ALL") == "1"
SAMPLE = 20  # boundaries of each operation, about
LIMIT = 14_400 if ALL else 280
JOBS = str(min(os.cpu_count() or 1, 16))
ALONE = {"create", "create-again", "clean"}  # nobody is there to see what the victim has mapped
OUTSIDE = {"join", "settings", "leave"}  # it has nothing mapped
OPERATIONS = (
    "create",
    "create-again",
    "join",
    "leave",
    "clean",
    "settings",
    "allocate",
    "wish",
    "abandon",
    "promote",
    "take",
    "candidate",
    "grow",
    "bury",
    "sweep",
    "fork",
    "fork-child",
    "resume",
    "drop",
    "merge",
    "merge-stop",
    "unmerge",
    "unmerge-stop",
)
DEBRIS = {  # what the survivor must have found, or a death was not where it should be
    "allocate": {"half_written"},
    "wish": {"half_written"},
    "abandon": {"half_written"},
    "promote": {"half_written", "claims"},
    "merge": {"half_written", "claims"},
    "merge-stop": {"half_written", "claims"},
    "sweep": {"half_swept"},
    "fork": {"born"},
}
DEBRIS_OF_DEATH = {"fork-child": {"born"}}
DEBRIS_OF_STOPS = {
    name: {"join_locks", "refused"} for name in ("create", "create-again", "join", "clean", "settings")
}


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, linked with the core as it is, assertions on."""
    return buildkit.program("crash", [CRASH], tmp_path_factory.mktemp("crash"), *buildkit.CHECKED)


def run_crash(processes: Processes, program: Path, rendezvous: str, *arguments: str) -> Run:
    command = ("--rendezvous", rendezvous, "--jobs", JOBS, *arguments)
    return Run(processes, program, *command, limit=LIMIT, first="operation=")


def test_all_operations_are_here(crash: Path) -> None:
    listed = subprocess.run([crash, "--list"], capture_output=True, text=True, timeout=60, check=True)
    assert tuple(listed.stdout.split()) == OPERATIONS


def which() -> tuple[str, ...]:
    """The boundaries to take."""
    if ALL:
        return ()
    return ("--states", "--sample", str(SAMPLE), "--from", str(random.SystemRandom().randrange(1 << 30)))


def check(run: Run, operation: str, done: str, debris: set[str]) -> None:
    figures, output = run.figures, run.output
    assert run.status == 0, output
    assert figures[done] == figures["chosen"] >= min(figures["boundaries"], figures["states"]), output
    if ALL:
        assert figures[done] == figures["boundaries"], output
    assert min(figures["freed"], figures["states"]) > 0, output
    assert [name for name in debris if not figures[name]] == [], output
    if operation not in ALONE | OUTSIDE:
        assert figures["mapped"] > 0, output  # pages that were looked at from outside


@pytest.mark.timeout(LIMIT + 240)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_death_leaves_nothing(operation: str, crash: Path, rendezvous: str, processes: Processes) -> None:
    run = run_crash(processes, crash, rendezvous, "--operation", operation, *which())
    check(run, operation, "kills", DEBRIS.get(operation, set()) | DEBRIS_OF_DEATH.get(operation, set()))


@pytest.mark.timeout(LIMIT + 240)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_stopped_stop_nobody(operation: str, crash: Path, rendezvous: str, processes: Processes) -> None:
    run = run_crash(processes, crash, rendezvous, "--operation", operation, "--stop", *which())
    check(run, operation, "stops", DEBRIS.get(operation, set()) | DEBRIS_OF_STOPS.get(operation, set()))


class Control(NamedTuple):
    bug: str
    operation: str
    found: str  # a regular expression
    arguments: tuple[str, ...] = ()


CONTROLS = (
    Control("published-before-written", "promote", r"VALID-4: frame \d+ is PUBLISHED without its bytes"),
    Control("put-before-unmapped", "drop", r"has frame \d+ mapped, and its bit is not set"),
    Control("bits-not-inherited", "fork", r"mapped, and its bit is not set|pages hold something else"),
    Control("bits-not-inherited", "resume", r"has frame \d+ mapped, and its bit is not set"),
    Control("dead-taken-for-living", "abandon", r"VALID-11: frame \d+ is ALLOC after a sweep"),
    Control("freed-before-punched", "sweep", r"VALID-5: frame \d+ is FREE, but takes memory"),
    Control("waits-for-the-stopped", "allocate", "somebody waits for ever", ("--stop", "--patience", "10")),
)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{control.bug}-{control.operation}")
def test_control_is_found(control: Control, crash: Path, rendezvous: str, processes: Processes) -> None:
    arguments = ("--operation", control.operation, "--states", "--plant", control.bug, *control.arguments)
    run = run_crash(processes, crash, rendezvous, *arguments)
    assert run.status != 0, run.output
    assert re.search(control.found, run.output), run.output
    assert "boundary 0:" not in run.output, run.output  # nothing has been done there yet: it was a step
