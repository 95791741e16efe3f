# SPDX-License-Identifier: MIT
"""The lost-write soak: tests/soak/ is one program whose processes write into merging memory and check it.

It runs under every barrier and both ways of copy-on-write. KSMALLOC_SOAK_SECONDS makes each run longer (see
`make soak`). The same program with its windows, or its claims on pages, switched off is the control: it must
lose writes, or the soak would not notice any.
"""

from __future__ import annotations

import os
from pathlib import Path

import buildkit
import pytest
from conftest import Processes
from runkit import Run

SOAK = buildkit.ROOT / "tests" / "soak"
FILES = Path("/var/tmp")  # on a disk in most places: direct transfers need one
SECONDS = {  # of each run; at most LONGER times as long on a slow machine
    ("move", "kernel"): 20.0,
    ("stop", "kernel"): 30.0,
    ("segv", "kernel"): 15.0,
    ("move", "sigsegv"): 15.0,
    ("stop", "sigsegv"): 15.0,
    ("segv", "sigsegv"): 15.0,
}
if "KSMALLOC_SOAK_SECONDS" in os.environ:
    SECONDS = dict.fromkeys(SECONDS, float(os.environ["KSMALLOC_SOAK_SECONDS"]))
CONTROL_SECONDS = 20
WRITES = 1_000_000  # under barriers that stop system calls
MERGES = 100_000
LONGER = 4  # as in soak.c
WAYS = ("store", "pipe", "tcp", "udp", "unix", "readv", "pread", "eventfd")
SOME = ("direct", "vm", "uring", "registered")  # where the machine has them
ACTS = (
    "merges",
    "breaks",
    "put_backs",
    "sweeps",
    "unmerges",
    "kills",
    "forks",
    "prepared",
    "freezes",
    "thaws",
)


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, linked with the core as it is: nothing in the core is compiled differently for it."""
    return buildkit.program("soak", [SOAK], tmp_path_factory.mktemp("soak"), *buildkit.CHECKED)


def run_soak(processes: Processes, program: Path, rendezvous: str, *arguments: str, limit: float) -> Run:
    where = ("--rendezvous", rendezvous, "--files", FILES)
    return Run(processes, program, *where, *arguments, limit=limit, first="barrier=")


@pytest.mark.timeout(LONGER * max(SECONDS.values()) + 240)
@pytest.mark.parametrize(("barrier", "cow"), SECONDS)
def test_no_write_is_lost(barrier: str, cow: str, soak: Path, rendezvous: str, processes: Processes) -> None:
    seconds = SECONDS[barrier, cow]
    exact = cow == "kernel" and barrier != "segv"
    goals = ("--writes", str(WRITES), "--merges", str(MERGES)) if exact else ()
    arguments = ("--barrier", barrier, "--cow", cow, "--seconds", str(seconds), "--slow", *goals)
    run = run_soak(processes, soak, rendezvous, *arguments, limit=LONGER * seconds + 180)
    figures, output = run.figures, run.output
    assert run.status == 0, output
    assert (figures["wrong"], figures["lost"]) == (0, 0), output
    ways = WAYS + tuple(way for way in SOME if way in figures)
    assert [name for name in ways + ACTS if not figures[name]] == [], output
    assert min(figures["frozen_merged"], figures["thaws"]) > 0, output
    assert figures["suspensions"] == 0, output
    if cow == "kernel":
        assert figures["give_backs"] > 0, output
    if cow == "sigsegv":
        assert figures["efaults"] > figures["freezes"], output  # each tries one call
    if exact:
        assert figures["efaults"] <= figures["freezes"], output
        assert sum(figures[way] for way in ways) >= WRITES, output
        assert figures["merges"] >= MERGES, output


@pytest.mark.parametrize(("barrier", "cow"), [("none", "kernel"), ("stop", "unclaimed")])
def test_control_loses_writes(
    barrier: str, cow: str, soak: Path, rendezvous: str, processes: Processes
) -> None:
    arguments = ("--barrier", barrier, "--cow", cow, "--seconds", str(CONTROL_SECONDS), "--until-lost")
    run = run_soak(processes, soak, rendezvous, *arguments, limit=CONTROL_SECONDS + 120)
    assert run.status == 1, run.output
    assert run.figures["lost"] > 0, run.output


def test_stop_refuses_a_process_with_a_ring(soak: Path, rendezvous: str, processes: Processes) -> None:
    """What writes while threads are held: nothing merges, the reason is named, and closing it is enough."""
    run = run_soak(processes, soak, rendezvous, "--barrier", "stop", "--devices", limit=120)
    assert run.status == 0, run.output
