# SPDX-License-Identifier: MIT
"""The fault walk: tests/faults/ lets every system call of the core fail, in every scenario and mode.

Here a sample: first each kind of call in each scenario, then at random, with a seed that is printed, until
KSMALLOC_FAULTS_SECONDS are over ("full": all, see `make faults`; KSMALLOC_FAULTS_PART=2/5 makes it a fifth).
KSMALLOC_FAULTS_SEED repeats a sample.
The same walk over a core with a planted bug is the control: it must find it.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

import buildkit
import pytest
from conftest import Processes

FAULTS = buildkit.ROOT / "tests" / "faults"
SECONDS = os.environ.get("KSMALLOC_FAULTS_SECONDS", "60")
SEED = os.environ.get(
    "KSMALLOC_FAULTS_SEED", "5" if SECONDS != "full" else str(random.SystemRandom().randrange(2**32))
)
FULL = SECONDS == "full"
PART = os.environ.get("KSMALLOC_FAULTS_PART", "1/1")
JOBS = 6 * (os.cpu_count() or 1)  # most of them wait most of the time
LIMIT = 24 * 3600 if FULL else 20 * float(SECONDS) + 600  # what comes first is done, however slow the machine
CANNOT = {
    "UFFD_COPY": "only a page that could not be moved back is copied back: two calls would have to fail at a "
    "time, see test_barrier_move.c",
    "SIGNAL_SELF": "only passes on a signal that somebody has sent to a program which then ends of it",
}


class Walk(NamedTuple):
    status: int
    output: str
    figures: dict[str, int]
    never: set[str]


def walk(program: Path, rendezvous: str, processes: Processes, *arguments: str, limit: float) -> Walk:
    """Run the walk. It prints one line of figures, and the kinds of calls that never failed."""
    process = processes.popen(program, "--rendezvous", rendezvous, *arguments, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # its processes go with it
        pytest.fail(f"no end within {limit} s\n{process.communicate()[0]}", pytrace=False)
    print(output)
    lines = [line for line in output.splitlines() if line.startswith("seed=")]
    figures = {name: int(word) for name, word in (pair.split("=") for line in lines for pair in line.split())}
    never = {line.split()[-1] for line in output.splitlines() if line.startswith("never failed:")}
    return Walk(process.returncode, output, figures, never)


def build(folder: Path, *extra: Path) -> Path:
    return buildkit.program("faults", [FAULTS], folder, *buildkit.SWITCHES, *buildkit.CHECKED, extra=extra)


@pytest.mark.timeout(LIMIT + 120)
def test_whatever_fails_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, rendezvous: str, processes: Processes
) -> None:
    program = build(tmp_path_factory.mktemp("faults"))
    how_long = ("--part", PART, "--jobs", str(min(JOBS, 32))) if FULL else ("--seconds", SECONDS)
    run = walk(program, rendezvous, processes, "--seed", SEED, *how_long, limit=LIMIT)
    figures = run.figures
    assert run.status == 0, run.output
    assert figures["failed"] == 0, run.output
    assert run.never <= set(CANNOT), run.output
    assert figures["kinds"] + len(run.never) > len(CANNOT), run.output
    assert figures["fired"] > figures["runs"] // 2, run.output
    assert figures["runs"] >= figures["firsts"], run.output
    assert figures["merged"] > 10 * figures["runs"], run.output  # it merges, else nothing is tested
    assert figures["said"] > 0, run.output
    if FULL:
        assert figures["runs"] > figures["all"], run.output


@pytest.mark.timeout(600)
def test_control_finds_a_planted_bug(
    tmp_path_factory: pytest.TempPathFactory, rendezvous: str, processes: Processes
) -> None:
    program = build(tmp_path_factory.mktemp("control"), FAULTS / "control" / "no_way_back.c")
    some = ("--scenario", "merge", "--mode", "move", "--call", "MAP_FRAMES", "--seconds", "10")
    run = walk(program, rendezvous, processes, *some, limit=400)
    assert run.status == 1, run.output
    assert run.figures["failed"] > 0, run.output
    assert "read wrong" in run.output, run.output
