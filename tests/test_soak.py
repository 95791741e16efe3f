# SPDX-License-Identifier: MIT
"""The lost-write soak: tests/soak/ is one program whose processes write into merging memory and check it.

KSMALLOC_SOAK_SECONDS makes it longer (see `make soak`). The same program with its windows switched off is the
control: it must lose writes, or the soak would not notice any.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Processes

ROOT = Path(__file__).resolve().parent.parent
SOAK = ROOT / "tests" / "soak"
FILES = Path("/var/tmp")  # on a disk in most places: direct transfers need one
SECONDS = float(os.environ.get("KSMALLOC_SOAK_SECONDS", "60"))
CONTROL_SECONDS = 20
MERGES_PER_MINUTE = 100_000
NO_BARRIER = 77  # SOAK_NO_BARRIER of soak.h
BARRIERS = ("move",)
WAYS = ("store", "pipe", "tcp", "udp", "unix", "readv", "pread", "eventfd")  # and "direct", where it exists
FLAGS = shlex.split(
    "-std=gnu11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -pthread -DKSM_ASSERT_LEVEL=2 -iquote csrc"
)


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
    cc(*sorted(out.glob("*.o")), "-Wl,--wrap=ksm_barrier_create_from", "-o", out / "soak")
    return out / "soak"


def run(
    processes: Processes, program: Path, rendezvous: str, *arguments: str, limit: float
) -> tuple[int, dict[str, int], str]:
    """Status, figures, and whatever was said on the way."""
    process = processes.popen(
        program, "--rendezvous", rendezvous, "--files", FILES, *arguments, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # its processes go with it
        pytest.fail(f"no end within {limit} s\n{process.communicate()[0]}", pytrace=False)
    lines = [line for line in output.splitlines() if line.startswith("barrier=")]
    words = dict(word.split("=") for word in lines[-1].split()) if lines else {}
    return process.returncode, {name: int(word) for name, word in words.items() if word.isdigit()}, output


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("barrier", BARRIERS)
def test_no_write_is_lost(barrier: str, soak: Path, rendezvous: str, processes: Processes) -> None:
    status, figures, output = run(
        processes, soak, rendezvous, "--barrier", barrier, "--seconds", str(SECONDS), limit=SECONDS + 180
    )
    print(output)
    if status == NO_BARRIER:
        pytest.skip(f"the barrier {barrier} does not work here")
    assert status == 0, output
    assert (figures["wrong"], figures["lost"]) == (0, 0), output
    assert figures["merges"] >= MERGES_PER_MINUTE * SECONDS / 60, output
    assert all(figures[way] > 0 for way in WAYS), output
    assert all(figures[act] > 0 for act in ("breaks", "put_backs", "sweeps", "unmerges", "kills")), output
    assert figures["forks"] > 0, output


def test_control_without_windows_loses_writes(soak: Path, rendezvous: str, processes: Processes) -> None:
    status, figures, output = run(
        processes,
        soak,
        rendezvous,
        *("--barrier", "none", "--seconds", str(CONTROL_SECONDS), "--until-lost"),
        limit=CONTROL_SECONDS + 120,
    )
    print(output)
    assert status == 1, output
    assert figures["lost"] > 0, output
