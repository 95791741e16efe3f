# SPDX-License-Identifier: MIT
"""A peer that is stopped (SIGSTOP) for a while, in all that it does: the others go on, and later so does it.

tests/crash stops at chosen instructions; here whole Python programs are stopped wherever they happen to be.
"""

from __future__ import annotations

import glob
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Processes, wait_until
from outside import merged
from surroundkit import BARRIERS, BLOCK, MERGED, Program

# Does what it is told, a line each, and says when it is done.
TOLD = r"""
held = {}
say("ready")
for line in sys.stdin:
    command, _, seed = line.strip().partition(" ")
    if command == "add":
        held.setdefault(seed, []).append(block(int(seed)))
    elif command == "scan":
        for _ in range(3):
            arena.scan()
    elif command == "drop":
        held.pop(seed, None)
    elif command in ("sweep", "free"):
        try:
            domain.sweep()
        except BlockingIOError:
            pass  # somebody came or went
        if command == "free":
            say(domain.stats().store_bytes)
            continue
    elif command == "settle":
        assert ksmalloc.settle(60, domain=domain).settled, domain.peers
    elif command == "hurry":
        assert not ksmalloc.settle(0.1, domain=domain).settled
    elif command == "peers":
        say(len(domain.peers))
        continue
    assert all(right(made, int(seed)) for seed, blocks in held.items() for made in blocks)
    say("done")
"""

# What the stopped one does all the time, until somebody tells it to stop: {act} is one round.
VICTIM = (
    MERGED
    + r"""
over, rounds = threading.Event(), 0
threading.Thread(target=lambda: (sys.stdin.readline(), over.set())).start()
say("ready")
while not over.is_set():
    rounds += 1
{act}
    assert right(mine[0], 1) and right(mine[1], 1) and right(mine[2], 100)
before = own().merges
mine += [block(9), block(9)]
merge()
assert own().merges - before >= 2 * 512
ask("rounds", rounds)
assert all(right(made, seed) for made, seed in zip(mine, (1, 1, 100, 101, 9, 9)))
ask("rest")
"""
)

ACTS = {
    "rests": "    time.sleep(0.01)",
    "merges": """
    made = [block(7), block(7), block(1)]
    arena.scan()
    assert right(made[0], 7) and right(made[1], 7) and right(made[2], 1)""",
    "breaks": """
    memoryview(mine[1])[:] = noise(2)
    memoryview(mine[1])[:] = noise(1)
    arena.scan()""",
    "unmerges": """
    arena.scan()
    arena.unmerge()""",
    "sweeps": """
    made = block(10 + rounds % 3)
    twin = block(10 + rounds % 3)
    arena.scan()
    del made, twin
    try:
        domain.sweep()
    except BlockingIOError:
        pass""",
    "settles": """
    made = block(1)
    ksmalloc.settle(0.2, domain=domain)""",
    "forks": """
    ended(forked(lambda: (arena.scan(), memoryview(mine[1]).__setitem__(0, 1))))""",
    "comes and goes": """
    other = ksmalloc.Arena(domain=ksmalloc.Domain("other", path=sys.argv[1]))
    twins = [other.alloc(64 * PAGE) for _ in range(2)]
    for twin in twins:
        memoryview(twin)[:] = noise(1, 64 * PAGE)
    other.scan()
    del twin, twins, other""",
}


def states(pid: int) -> Iterator[str]:
    """Of its threads, as stat(5) says."""
    for path in glob.iglob(f"/proc/{pid}/task/*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield Path(path).read_text().rpartition(")")[2].split()[0]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Every thread of it stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait_until(lambda: set(states(pid)) == {"T"}, 60)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def told(program: Program, *commands: str) -> None:
    for command in commands:
        program.tell(command)
        program.hear("done")


def number(program: Program, command: str) -> int:
    program.tell(command)
    return int(program.hear())


class Others:
    """Two that merge with each other, whatever becomes of the third."""

    def __init__(self, processes: Processes, rendezvous: str, barrier: str) -> None:
        self.both = [Program(processes, rendezvous, barrier, TOLD) for _ in range(2)]
        for program in self.both:
            program.hear("ready")
        self.tell("add 40", "settle")  # frames that are there before
        self.old = self.fresh = 0

    def tell(self, *commands: str) -> None:
        for program in self.both:
            told(program, *commands)

    def merged(self) -> int:
        """Blocks that both have merged, and read since."""
        return min(merged(program.pid) for program in self.both) // BLOCK

    def go_on(self, seed: int) -> None:
        """One copy more of what there are frames for, and something new; then all that is given back."""
        self.tell("add 40", "scan")
        self.old = self.merged() - 1
        self.tell(f"add {seed}", "scan")
        self.tell("scan")
        self.fresh = self.merged() - 1 - self.old
        assert self.old == 1, "it merges onto frames"
        self.tell(f"drop {seed}", "sweep", "drop 40", "add 40", "scan")
        assert number(self.both[0], "peers") >= 2

    def end(self) -> None:
        """Nothing is held for anybody who is gone."""
        one = self.both[0]
        assert wait_until(lambda: number(one, "peers") == 2, 30)
        self.tell("drop 40")
        assert wait_until(lambda: number(one, "free") == 0, 30)


@pytest.mark.parametrize("act", ACTS)
@BARRIERS
def test_the_others_go_on(processes: Processes, rendezvous: str, barrier: str, act: str) -> None:
    """They merge with each other, free, and sweep, while one stands still somewhere in what it does.

    New frames have to wait while a child of its is about to come, whose references nobody has seen yet.
    """
    chance, fresh = random.Random(act), []
    others = Others(processes, rendezvous, barrier)
    victim = Program(processes, rendezvous, barrier, VICTIM.replace("{act}", ACTS[act]))
    victim.hear("ready")
    others.tell("settle")  # they know it
    for seed in range(50, 54):
        time.sleep(chance.uniform(0.01, 0.1))
        with stopped(victim.pid):
            others.go_on(seed)
            told(others.both[0], "hurry")
        fresh.append(others.fresh)
    print(f"\n{barrier}, {act}: new data merged at once {sum(fresh)} times of {len(fresh)}")
    assert min(fresh) == 1 or act == "forks"
    victim.tell()
    word, rounds = victim.hear().split()
    assert word == "rounds"
    assert int(rounds) >= 1
    others.go_on(60)
    assert others.fresh == 1
    others.tell("settle")
    victim.tell()
    victim.hear("rest")
    assert merged(victim.pid) >= 4 * BLOCK
    victim.tell()
    victim.end()
    others.end()


@BARRIERS
def test_stopped_while_it_joins(processes: Processes, rendezvous: str, barrier: str) -> None:
    """At any moment of its start. Until its references are known, new frames have to wait for it."""
    chance, fresh = random.Random(barrier), []
    others = Others(processes, rendezvous, barrier)
    for seed in range(50, 56):
        late = Program(processes, rendezvous, barrier, "say('ready')\n" + MERGED + "ask('rest')\n")
        time.sleep(chance.uniform(0.1, 0.5))
        with stopped(late.pid):
            others.go_on(seed)
        fresh.append(others.fresh)
        late.hear("ready")
        late.hear("rest")
        assert merged(late.pid) >= 2 * BLOCK
        others.tell("settle")
        others.go_on(seed)
        assert others.fresh == 1
        late.tell()
        late.end()
    print(f"\n{barrier}: new data merged at once {sum(fresh)} times of {len(fresh)}")
    others.end()
