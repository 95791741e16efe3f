# SPDX-License-Identifier: MIT
"""The measure of memory against the kernel's own count, with data that merges and data that does not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import wait_until

import ksmalloc
from ksmalloc.ctl.measure import measure
from ksmalloc.ctl.team import Team

MIB = 1 << 20
WORKERS = 3
OVERHEAD = 2 * MIB
"""What a worker may take beside the pages themselves."""


@pytest.mark.parametrize("equal", [True, False])
def test_the_measure_and_a_control_group_agree(
    rendezvous: str, control_group: Path | None, equal: bool
) -> None:
    """Both sums, and a fresh control group: one copy where all is equal, and N copies where nothing is."""
    nbytes = 16 * MIB
    with Team(WORKERS, filler_commands) as team:
        team.ask("join", rendezvous, control_group)
        baseline, group = measure(team.pids, team.ask("store_bytes", who=0)), charged(control_group)
        for number in range(WORKERS):
            team.ask("fill", nbytes, 0 if equal else number, who=number)
        assert team.ask("settle", who=0) is True
        team.ask("read")
        memory = measure(team.pids, team.ask("store_bytes", who=0)) - baseline
        group = charged(control_group) - group
    expected = nbytes if equal else WORKERS * nbytes
    assert abs(memory.pss_total - expected) < WORKERS * OVERHEAD
    assert abs(memory.blocks_total - expected) < WORKERS * OVERHEAD
    if control_group is not None:
        assert abs(group - expected) < WORKERS * OVERHEAD


@pytest.fixture
def control_group() -> Iterator[Path | None]:
    """A fresh control group that counts memory; None where none can be made."""
    group = new_control_group()
    try:
        yield group
    finally:
        if group is not None:
            procs = group / "cgroup.procs"
            wait_until(lambda: not procs.read_text())
            group.rmdir()


def new_control_group() -> Path | None:
    for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        group = Path(root) / f"ksmalloc-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / "memory.stat").exists():
                return group
            group.rmdir()
    return None


def charged(group: Path | None) -> int:
    """Bytes of anonymous and shared memory that the kernel charges to a control group of either version."""
    if group is None:
        return 0
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat["anon" if "anon" in stat else "rss"]) + int(stat["shmem"])


def filler_commands() -> dict[str, Callable[..., Any]]:
    """A worker with a block of pseudo-random bytes."""
    held: dict[str, Any] = {}

    def join(path: str, group: Path | None) -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        held["domain"] = ksmalloc.Domain("filled", path=path)

    def fill(nbytes: int, seed: int) -> None:
        source = Random(seed)
        held["view"] = memoryview(ksmalloc.Arena(domain=held["domain"], scan=False).alloc(nbytes))
        for i in range(0, nbytes, MIB):
            held["view"][i : i + MIB] = source.randbytes(MIB)

    return {
        "join": join,
        "fill": fill,
        "settle": lambda: ksmalloc.settle(60, domain=held["domain"]).settled,
        "read": lambda: sum(held["view"][::4096]),
        "store_bytes": lambda: held["domain"].stats().store_bytes,
    }
