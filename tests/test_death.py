# SPDX-License-Identifier: MIT
"""Workers that are killed: their frames go, nobody else's bytes change, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import Processes
from forkkit import environment
from teamkit import MIB, NAME, PAGE, both, commands, each, join, measured, store_blocks, store_inodes

import ksmalloc
from ksmalloc import shm
from ksmalloc.ctl import main
from ksmalloc.ctl.team import Team


def kill(team: Team, numbers: Iterable[int]) -> None:
    """SIGKILL, all at once; returns when the kernel has them."""
    pids = [team.pids[number] for number in numbers]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def ask(team: Team, numbers: Iterable[int], command: str, *arguments: Any) -> list[Any]:
    """Ask some workers, at the same time."""
    numbers = list(numbers)
    team.tell(command, *arguments, numbers=numbers)
    return [team.answer(number) for number in numbers]


def shared_memory() -> int:
    """Bytes of shared memory in the whole machine, in whatever files."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise LookupError("Shmem")


def occupied(directory: str) -> int:
    """Bytes that everything under a directory occupies."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return sum(os.lstat(path).st_blocks * 512 for path in paths)


# ---- some die ----------------------------------------------------------------------------------------------


def test_frames_of_the_dead_go_with_one_sweep(rendezvous: str) -> None:
    with Team(4, commands) as team:
        join(team, rendezvous, False)
        team.ask("fill", 1, 8 * MIB)  # everybody's
        each(team, "fill", [(2, 16 * MIB)] * 2 + [(3, 16 * MIB)] * 2)  # the survivors', the others'
        each(team, "fill", [(10 + number, 4 * MIB) for number in range(4)])  # nobody else's
        assert team.ask("settle", who=0)
        stats = team.ask("stats", who=0)
        assert stats["pages_shared"] == 40 * MIB // PAGE
        assert stats["pages_merged"] == (4 * 8 + 4 * 16) * MIB // PAGE
        assert stats["store_bytes"] == store_blocks(team.pids) == 40 * MIB

        kill(team, [2, 3])
        team.ask("sweep", who=1)
        survivors = team.pids[:2]
        stats = team.ask("stats", who=0)
        assert stats["peers"] == 2
        assert stats["pages_shared"] == 24 * MIB // PAGE
        assert stats["pages_merged"] == 2 * 24 * MIB // PAGE
        assert stats["store_bytes"] == store_blocks(survivors) == 24 * MIB
        assert ask(team, [0, 1], "verify") == [28 * MIB] * 2

        ask(team, [0, 1], "fill", 3, 16 * MIB)  # what the dead had is merged anew, in frames they left
        assert team.ask("settle", who=0)
        stats = team.ask("stats", who=0)
        assert stats["pages_shared"] == 40 * MIB // PAGE
        assert ask(team, [0, 1], "verify") == [44 * MIB] * 2

        kill(team, [0])
        team.ask("sweep", who=1)
        assert team.ask("verify", who=1) == 44 * MIB
        stats = team.ask("stats", who=1)
        assert (stats["peers"], stats["pages_shared"]) == (1, 40 * MIB // PAGE)
        team.ask("drop", who=1)
        team.ask("sweep", who=1)
        assert team.ask("stats", who=1)["store_bytes"] == 0


def test_different_data_leaves_nothing(rendezvous: str) -> None:
    with Team(4, commands) as team:
        team.ask("warm")
        before = measured(team)
        join(team, rendezvous, False)
        each(team, "fill", [(1 + number, 16 * MIB) for number in range(4)])
        assert team.ask("settle", who=0)
        team.ask("verify")
        assert both(measured(team) - before)[0] >= 64 * MIB
        assert both(measured(team) - before)[1] <= 66 * MIB + MIB
        kill(team, [1, 3])
        assert team.ask("sweep", who=0) == 0
        assert ask(team, [0, 2], "verify") == [16 * MIB] * 2
        stats = team.ask("stats", who=2)
        names = ("pages_shared", "pages_sharing", "merges", "promotions", "store_bytes")
        assert {name: stats[name] for name in names} == dict.fromkeys(names, 0)
        assert stats["peers"] == 2
        assert store_blocks([team.pids[0]]) == 0


# ---- all die -----------------------------------------------------------------------------------------------


def test_all_killed_and_the_memory_is_back(rendezvous: str) -> None:
    nbytes, margin = 160 * MIB, 8 * MIB
    for _ in range(4):  # others use shared memory at the same time, but not always
        with Team(2, commands) as team:
            join(team, rendezvous, False)
            before = shared_memory()
            team.ask("fill", 1, nbytes)
            assert team.ask("settle", who=0)
            assert team.ask("stats", who=0)["store_bytes"] == nbytes
            inodes, during = set(store_inodes(team.pids)), shared_memory()
            assert len(inodes) == 1
            kill(team, [0, 1])
            at_once = shared_memory()
            everybody = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
            assert not inodes & set(store_inodes(everybody))  # nobody has it: it is gone
        assert occupied(rendezvous) <= 64 * 1024
        with ksmalloc.Domain(NAME, path=rendezvous) as domain:  # nobody is waited for
            stats = domain.stats()
            assert (stats.peers, stats.pages_shared, stats.store_bytes) == (1, 0, 0)
        if during - before >= nbytes - margin and at_once - before <= margin:
            return
    pytest.fail(f"shared memory before, during and after: {before}, {during}, {at_once}")


# ---- at random instants ------------------------------------------------------------------------------------

VICTIM = """
import sys
import ksmalloc
arena = ksmalloc.Arena(domain=ksmalloc.Domain(sys.argv[1], path=sys.argv[2]))
with open(sys.argv[3], "rb") as file:
    data = file.read()
print("ready", flush=True)
while True:
    blocks = [arena.alloc(len(data)) for _ in range(2)]
    for block in blocks:
        memoryview(block)[:] = data
    arena.scan()
    memoryview(blocks[0])[::8192] = bytes(len(range(0, len(data), 8192)))
    arena.scan()
"""
ROUNDS = 20


def test_killed_while_merging(processes: Processes, rendezvous: str, tmp_path: Path) -> None:
    instants = random.Random(os.environ.get("KSMALLOC_TEST_SEED", "1"))
    with Team(2, commands) as team:
        join(team, rendezvous)
        for number in range(ROUNDS):
            path = tmp_path / f"data-{number}"
            path.write_bytes(random.Random(number).randbytes(2 * MIB))
            victims = [
                processes.python(VICTIM, NAME, rendezvous, path, env=environment())
                for _ in range(1 + number % 2)
            ]
            team.ask("drop")
            team.ask("load", str(path), True)
            for victim in victims:
                assert victim.stdout is not None
                assert victim.stdout.readline() == "ready\n"
            team.tell("scan", numbers=[0, 1])
            time.sleep(instants.uniform(0, 0.06))
            for victim in victims:
                victim.kill()
            for victim in victims:
                victim.wait()
            for worker in (0, 1):
                team.answer(worker)
            assert team.ask("verify") == [2 * MIB] * 2
            team.ask("sweep", who=number % 2)
            assert team.ask("verify") == [2 * MIB] * 2
        assert team.ask("settle", who=0)
        team.ask("sweep", who=1)
        stats = team.ask("stats", who=0)
        expected = 2 * MIB // PAGE
        assert (stats["peers"], stats["pages_shared"], stats["pages_merged"]) == (2, expected, 2 * expected)
        assert stats["store_bytes"] == store_blocks(team.pids) == 2 * MIB
        assert team.ask("verify") == [2 * MIB] * 2


# ---- backing="shm" -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("remover", ["join", "clean"])
def test_a_named_object_stays_until_somebody_comes(
    rendezvous: str, remover: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = ""
    try:
        with Team(2, commands) as team:
            join(team, rendezvous, False, "shm")
            name = f"/ksmalloc-{os.geteuid()}-{team.ask('domain_id', who=0)}"
            team.ask("fill", 1, 8 * MIB)
            assert team.ask("settle", who=0)
            assert os.stat("/dev/shm" + name).st_blocks * 512 == 8 * MIB
            kill(team, [0, 1])
        assert name in shm.objects()
        assert os.stat("/dev/shm" + name).st_blocks * 512 == 8 * MIB
        if remover == "join":
            with ksmalloc.Domain(NAME, path=rendezvous, backing="shm") as domain:
                assert name not in shm.objects()
                assert (domain.stats().peers, domain.stats().store_bytes) == (1, 0)
        else:
            assert main(["clean", "--path", rendezvous]) == 0
            assert f"removed /dev/shm{name} (8" in capsys.readouterr().out
        assert name not in shm.objects()
    finally:
        if name in shm.objects():
            with contextlib.suppress(FileNotFoundError):
                os.unlink("/dev/shm" + name)


def test_a_named_object_goes_with_the_last_to_leave(rendezvous: str) -> None:
    with Team(2, commands) as team:
        join(team, rendezvous, False, "shm")
        name = f"/ksmalloc-{os.geteuid()}-{team.ask('domain_id', who=0)}"
        team.ask("fill", 1, MIB)
        assert team.ask("settle", who=0)
        kill(team, [0])
        assert team.ask("verify", who=1) == MIB
        assert name in shm.objects()
    assert name not in shm.objects()
