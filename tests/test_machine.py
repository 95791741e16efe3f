# SPDX-License-Identifier: MIT
"""Hypothesis drives arenas, forks and a second process, against plain bytearrays."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import Processes
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from machinekit import KINDS, MOST_BLOCKS, PAGE, Held, ask, in_child, kinds, numbers, page, places, sizes

import ksmalloc


class Machine(RuleBasedStateMachine):
    peer: ClassVar[subprocess.Popen[str]]
    totals: ClassVar[Counter[str]]
    equal = True  # data is made of few different pages; False: no two pages are equal
    barrier = "auto"
    cow = "auto"

    def __init__(self) -> None:
        super().__init__()
        self.path = tempfile.mkdtemp(prefix="ksmalloc-test-", dir="/dev/shm")
        self.domain = ksmalloc.Domain(path=self.path)
        self.domain.settings.update({"advisor_mode": 0, "pages_to_scan": 100_000, "sleep_millisecs": 1})
        self.arenas = [self.new_arena(scan) for scan in (True, False)]
        self.blocks: list[Held] = []
        self.fresh = itertools.count(1000)
        self.steps = 0
        ask(self.peer, "join", self.path)

    def new_arena(self, scan: bool) -> ksmalloc.Arena:
        return ksmalloc.Arena(domain=self.domain, scan=scan, barrier=self.barrier, cow=self.cow)

    def pages(self, kinds: list[int]) -> bytes:
        return b"".join(page(kind if self.equal else next(self.fresh)) for kind in kinds)

    def pick(self, number: int) -> Held:
        return self.blocks[number % len(self.blocks)]

    def new_block(self, nbytes: int, arena: int, mergeable: bool) -> Held:
        home = self.arenas[arena % 2]
        held = Held(home.alloc(nbytes, mergeable), bytearray(nbytes), home)
        held.check()  # zeroed
        return held

    def check_all(self) -> None:
        assert all(bytes(held.block) == held.model for held in self.blocks)

    # ---- blocks ----------------------------------------------------------------------------------------

    @initialize(nbytes=sizes, kinds=kinds)
    def begin(self, nbytes: int, kinds: list[int]) -> None:
        for arena in (0, 1):
            self.alloc(nbytes, arena, True, kinds)
            self.alloc(20 * PAGE, arena, True, kinds)
            self.arenas[arena].scan()

    @precondition(lambda self: len(self.blocks) < MOST_BLOCKS)
    @rule(nbytes=sizes, arena=numbers, mergeable=st.sampled_from([True, True, True, False]), kinds=kinds)
    def alloc(self, nbytes: int, arena: int, mergeable: bool, kinds: list[int]) -> None:
        held = self.new_block(nbytes, arena, mergeable)
        held.write(0, self.pages((kinds * (nbytes // PAGE // len(kinds) + 1))[: nbytes // PAGE + 1]))
        self.blocks.append(held)

    @precondition(lambda self: self.blocks)
    @rule(number=numbers)
    def free(self, number: int) -> None:
        self.blocks.pop(number % len(self.blocks)).block.free()

    @precondition(lambda self: self.blocks)
    @rule(number=numbers, arena=numbers, kinds=kinds)
    def reallocate(self, number: int, arena: int, kinds: list[int]) -> None:
        old = self.pick(number)
        self.free(number)
        held = self.new_block(len(old.model), arena, True)
        self.blocks.append(held)
        held.write(0, self.pages(kinds))

    # ---- writing ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.blocks)
    @rule(number=numbers, place=places, kinds=kinds)
    def write_pages(self, number: int, place: int, kinds: list[int]) -> None:
        held = self.pick(number)
        held.write(place % len(held.model) // PAGE * PAGE, self.pages(kinds))

    @precondition(lambda self: self.blocks)
    @rule(number=numbers, place=places, data=st.binary(min_size=1, max_size=100))
    def write_bytes(self, number: int, place: int, data: bytes) -> None:
        held = self.pick(number)
        data = data if self.equal else b"%08d" % next(self.fresh)
        held.write(place % len(held.model), data)

    @precondition(lambda self: self.blocks)
    @rule(number=numbers, place=places, kinds=kinds)
    def write_by_system_call(self, number: int, place: int, kinds: list[int]) -> None:
        held = self.pick(number)
        held.receive(place % len(held.model) // PAGE * PAGE, self.pages(kinds))

    @precondition(lambda self: self.equal and len(self.blocks) > 1)
    @rule(number=numbers, other=numbers)
    def copy(self, number: int, other: int) -> None:
        self.pick(number).write(0, bytes(self.pick(other).block))

    # ---- merging ---------------------------------------------------------------------------------------

    @rule(arena=numbers)
    def scan(self, arena: int) -> None:
        self.arenas[arena % 2].scan()

    @rule(arena=numbers)
    def unmerge(self, arena: int) -> None:
        self.arenas[arena % 2].unmerge()
        self.check_all()

    @rule()
    def sweep(self) -> None:
        self.domain.sweep()

    @rule(seconds=st.sampled_from([0.002, 0.01, 0.03]))
    def wait_for_the_background(self, seconds: float) -> None:
        time.sleep(seconds)

    @rule()
    def settle(self) -> None:
        ksmalloc.settle(0.2, domain=self.domain)
        self.check_all()

    @rule(run=st.sampled_from([1, 1, 0]))
    def switch(self, run: int) -> None:
        self.domain.settings["run"] = run

    @rule(arena=numbers, scan=st.booleans())
    def close_arena(self, arena: int, scan: bool) -> None:
        old = self.arenas[arena % 2]
        self.arenas[arena % 2] = self.new_arena(scan)
        old.close()
        with pytest.raises(ksmalloc.ClosedError):
            old.alloc(1)

    # ---- other processes -------------------------------------------------------------------------------

    def be_a_child(self, place: int, kinds: list[int]) -> None:
        self.check_all()
        for held in self.blocks:
            held.write(place % len(held.model), self.pages(kinds))
        self.arenas[0].scan()
        self.check_all()
        if self.blocks:
            self.reallocate(place, 0, kinds)
        self.check_all()

    @rule(place=places, kinds=kinds)
    def fork(self, place: int, kinds: list[int]) -> None:
        assert in_child(lambda: self.be_a_child(place, kinds)) == 0
        self.check_all()

    @rule(kinds=st.lists(st.integers(1, KINDS), unique=True, max_size=KINDS))
    def peer_loads(self, kinds: list[int]) -> None:
        ask(self.peer, "load", kinds if self.equal else [next(self.fresh) for _ in kinds])

    @rule(place=places)
    def peer_writes(self, place: int) -> None:
        ask(self.peer, "write", place, f"peer {next(self.fresh)}")

    @rule()
    def peer_scans(self) -> None:
        ask(self.peer, "scan")

    # ---- after every step, and at the end ----------------------------------------------------------------

    @invariant()
    def contents_are_right(self) -> None:
        self.steps += 1
        if self.blocks:
            self.pick(self.steps).check()
        assert ask(self.peer, "is_right")

    def teardown(self) -> None:
        self.check_all()
        stats = self.domain.stats()
        for name in ("merges", "promotions", "cow_breaks", "ksm_zero_pages", "give_backs", "stops"):
            self.totals[name] += getattr(stats, name)
        self.totals["peer"] += ask(self.peer, "leave")
        self.totals["examples"] += stats.barrier != "none"
        self.blocks.clear()
        self.arenas.clear()
        self.domain.close()
        shutil.rmtree(self.path)


def run(
    processes: Processes, examples: int, steps: int, machine: type[Machine] = Machine, **attributes: Any
) -> Counter[str]:
    """What the machine's counters add up to."""
    totals: Counter[str] = Counter()
    peer = processes.popen(sys.executable, Path(__file__).with_name("machinekit.py"), stderr=None)
    machine = type("Machine", (machine,), {"peer": peer, "totals": totals, **attributes})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(totals))
    if not totals["examples"]:
        pytest.skip("no barrier works here")
    return totals


@pytest.mark.timeout(900)  # a failure is made small first, which takes up to five minutes
def test_machine(processes: Processes) -> None:
    totals = run(processes, examples=80, steps=40)
    assert totals["merges"] > 500
    assert totals["promotions"] > 0
    assert totals["cow_breaks"] > 0
    assert totals["peer"] > 0  # across processes


def test_control_where_no_two_pages_are_equal(processes: Processes) -> None:
    totals = run(processes, examples=15, steps=40, equal=False)
    assert totals["merges"] == totals["peer"] == totals["promotions"] == 0
