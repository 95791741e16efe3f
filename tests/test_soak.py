# SPDX-License-Identifier: MIT
"""The lost-write soak: tests/soak/ is one program whose processes write into merging memory and check it.

It runs under every barrier and both ways of copy-on-write. KSMALLOC_SOAK_SECONDS makes each run longer (see
`make soak`). The same program with its windows, or its claims on pages, switched off is the control: it must
lose writes, or the soak would not notice any.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Processes

ROOT = Path(__file__).resolve().parent.parent
SOAK = ROOT / "tests" / "soak"
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
NOT_HERE = 77  # SOAK_NOT_HERE of soak.h
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
FLAGS = shlex.split(
    "-std=gnu11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -pthread -DKSM_ASSERT_LEVEL=2 -iquote csrc"
)
WRAPPED = re.compile(r"__wrap_(ksm_\w+)\(|^SLOW\(\w+, (\w+)", re.MULTILINE)  # functions that the soak wraps


def cc(*arguments: str | Path) -> None:
    command = [os.environ.get("CC", "cc"), *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.fail(f"{shlex.join(command)}\n{done.stderr}", pytrace=False)


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, linked with the core as it is: nothing in the core is compiled differently for it."""
    out = tmp_path_factory.mktemp("soak")
    core = [source for source in sorted((ROOT / "csrc").glob("*.c")) if source.name != "preload.c"]
    sources = core + sorted(SOAK.glob("*.c"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: cc("-c", source, "-o", out / f"{source.stem}.o"), sources))
    found = [match for source in SOAK.glob("*.c") for match in WRAPPED.findall(source.read_text("utf-8"))]
    wraps = {f"-Wl,--wrap={first or second}" for first, second in found}
    cc(*sorted(out.glob("*.o")), *sorted(wraps), "-o", out / "soak")
    return out / "soak"


class Soak:
    """One run of the program: its status, its figures, and whatever it said."""

    def __init__(
        self, processes: Processes, program: Path, rendezvous: str, *arguments: str, limit: float
    ) -> None:
        process = processes.popen(
            program, "--rendezvous", rendezvous, "--files", FILES, *arguments, stderr=subprocess.STDOUT
        )
        try:
            self.output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()  # its processes go with it
            pytest.fail(f"no end within {limit} s\n{process.communicate()[0]}", pytrace=False)
        print(self.output)
        self.status = process.returncode
        if self.status == NOT_HERE:
            pytest.skip(f"does not work here: {shlex.join(arguments)}")
        lines = [line for line in self.output.splitlines() if line.startswith("barrier=")]
        words = dict(word.split("=") for word in lines[-1].split()) if lines else {}
        self.figures = {name: int(word) for name, word in words.items() if word.isdigit()}


@pytest.mark.timeout(LONGER * max(SECONDS.values()) + 240)
@pytest.mark.parametrize(("barrier", "cow"), SECONDS)
def test_no_write_is_lost(barrier: str, cow: str, soak: Path, rendezvous: str, processes: Processes) -> None:
    seconds = SECONDS[barrier, cow]
    exact = cow == "kernel" and barrier != "segv"
    goals = ("--writes", str(WRITES), "--merges", str(MERGES)) if exact else ()
    arguments = ("--barrier", barrier, "--cow", cow, "--seconds", str(seconds), "--slow", *goals)
    run = Soak(processes, soak, rendezvous, *arguments, limit=LONGER * seconds + 180)
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
    run = Soak(processes, soak, rendezvous, *arguments, limit=CONTROL_SECONDS + 120)
    assert run.status == 1, run.output
    assert run.figures["lost"] > 0, run.output


def test_stop_refuses_a_process_with_a_ring(soak: Path, rendezvous: str, processes: Processes) -> None:
    """What writes while threads are held: nothing merges, the reason is named, and closing it is enough."""
    run = Soak(processes, soak, rendezvous, "--barrier", "stop", "--devices", limit=120)
    assert run.status == 0, run.output
