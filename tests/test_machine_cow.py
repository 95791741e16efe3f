# SPDX-License-Identifier: MIT
"""The random machine again, with frozen memory and memory held writable, by barrier and copy-on-write."""

from __future__ import annotations

import pytest
from conftest import Processes
from hypothesis.stateful import precondition, rule
from machinekit import PAGE, kinds, numbers, places
from test_machine import Machine, run


class FreezingMachine(Machine):
    """Frozen pages are stored into like others; system calls write into memory that is prepared for them."""

    @precondition(lambda self: self.blocks)
    @rule(number=numbers)
    def freeze(self, number: int) -> None:
        held = self.pick(number)
        if not held.arena.closed:
            assert held.arena.freeze(held.block).readonly

    @precondition(lambda self: self.blocks)
    @rule(number=numbers)
    def thaw(self, number: int) -> None:
        held = self.pick(number)
        if not held.arena.closed:
            held.arena.thaw(held.block)

    @precondition(lambda self: self.blocks)
    @rule(number=numbers, place=places, kinds=kinds)
    def write_by_system_call(self, number: int, place: int, kinds: list[int]) -> None:
        held = self.pick(number)
        if held.arena.closed:
            return
        with held.arena.writable(held.block):
            held.arena.scan()
            held.receive(place % len(held.model) // PAGE * PAGE, self.pages(kinds))
            self.arenas[0].unmerge()
            held.receive(place % len(held.model) // PAGE * PAGE, self.pages(kinds))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("barrier", "cow"),
    [
        ("move", "kernel"),
        ("stop", "kernel"),
        ("segv", "kernel"),
        ("move", "sigsegv"),
        ("stop", "sigsegv"),
        ("segv", "sigsegv"),
    ],
)
def test_machine(barrier: str, cow: str, processes: Processes) -> None:
    totals = run(processes, examples=25, steps=40, machine=FreezingMachine, barrier=barrier, cow=cow)
    assert totals["merges"] > 150
    assert totals["cow_breaks"] > 0
