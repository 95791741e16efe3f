# SPDX-License-Identifier: MIT
"""Merged arrays, rewritten over and over with new data that is equal in all processes: memory does not grow.

A merged page that is written becomes private, but its mapping still holds the frame. Unless such pages are
given anonymous memory again, frames of data that nobody has any more stay for ever, and the new data never
merges. The control shows that: an open io_uring keeps broken pages from being given back.

KSMALLOC_GROWTH_SECONDS makes it longer (see `make growth`).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from teamkit import MIB, PAGE, Bytes, Worker, mappings, measured

import ksmalloc
from ksmalloc.ctl.team import Team

SECONDS = float(os.environ.get("KSMALLOC_GROWTH_SECONDS", "12"))
LEAST_ROUNDS = 10
WORKERS = 4
SIZES = (3 * MIB + 5 * PAGE, 2 * MIB, MIB + 100, 37 * PAGE)  # of a worker's arrays
ONE = sum(SIZES)
ROOM = MIB  # for what an interpreter takes and gives back by itself
IO_URING_SETUP = 425


class Rewriter(Worker):
    """A worker with a few arrays."""

    def begin(self, path: str, barrier: str, ring: bool) -> tuple[str, str]:
        """Join, allocate; open an io_uring. Returns the barrier, and why there is none or no ring."""
        domain = ksmalloc.Domain("growth", path=path)
        self.arena = ksmalloc.Arena(domain=domain, barrier=barrier)
        self.domain = domain
        self.arrays: list[Bytes] = [self.arena.empty(size, np.uint8) for size in SIZES]
        self.seeds = [0] * len(SIZES)
        stats = domain.stats()
        if ring:
            parameters = ctypes.create_string_buffer(120)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syscall(IO_URING_SETUP, 4, parameters) < 0:
                return "none", os.strerror(ctypes.get_errno())
        return stats.barrier, str(stats.why_not)

    def rewrite(self, number: int) -> None:
        """New data for all arrays, or, in two of three rounds, for some."""
        chosen = np.random.default_rng(number).random(len(SIZES)) < 0.6
        for index, array in enumerate(self.arrays):
            if number % 3 == 0 or chosen[index]:
                self.seeds[index] = number * len(SIZES) + index + 1
                array[:] = self._right(index)

    def check(self) -> int:
        """Compare every byte; returns how many there are."""
        for index, array in enumerate(self.arrays):
            assert np.array_equal(array, self._right(index)), f"array {index}"
        return sum(array.nbytes for array in self.arrays)

    def _right(self, index: int) -> Bytes:
        generator = np.random.Generator(np.random.SFC64(self.seeds[index]))
        return np.frombuffer(generator.bytes(SIZES[index]), np.uint8)


def commands() -> dict[str, Callable[..., Any]]:
    worker = Rewriter()
    return {name: getattr(worker, name) for name in dir(Rewriter) if not name.startswith("_")}


@dataclass
class Round:
    """What the workers take after a round, in bytes and mappings."""

    store: int
    private: int
    mappings: int

    def __str__(self) -> str:
        store, private = self.store / MIB, self.private / MIB
        return f"store {store:.1f} MiB, private {private:.1f} MiB, {self.mappings} mappings"


def peak(rounds: list[Round]) -> Round:
    return Round(
        max(one.store for one in rounds),
        max(one.private for one in rounds),
        max(one.mappings for one in rounds),
    )


def begin(team: Team, rendezvous: str, barrier: str, ring: bool = False) -> None:
    for at in range(WORKERS):
        got, why = team.ask("begin", rendezvous, barrier, ring, who=at)
        if got != barrier:
            pytest.skip(f"{barrier}: {why}")


def one_round(team: Team, number: int, settles: bool = True) -> Round:
    team.ask("rewrite", number)
    settled = team.ask("settle", 30.0 if settles else 1.0)
    assert all(settled) or not settles
    assert min(team.ask("check")) == ONE
    team.ask("sweep")
    memory = measured(team)
    return Round(memory.store, memory.anonymous_total, sum(mappings(pid) for pid in team.pids))


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("barrier", ["move", "stop"])
def test_rewriting_does_not_grow_memory(barrier: str, rendezvous: str) -> None:
    with Team(WORKERS, commands) as team:
        begin(team, rendezvous, barrier)
        one_round(team, 0)
        rounds: list[Round] = []
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or len(rounds) < LEAST_ROUNDS:
            rounds.append(one_round(team, len(rounds) + 1))
        half = len(rounds) // 2
        figures = team.ask("own_stats")
        first, second = peak(rounds[:half]), peak(rounds[half:])
        print(f"{barrier}: {len(rounds)} rounds; first half: {first}; second half: {second}")
        print(
            {name: [one[name] for one in figures] for name in ("merges", "give_backs", "stops", "cow_breaks")}
        )
        assert second.store <= first.store * 1.05 + ROOM
        assert second.private <= first.private * 1.05 + ROOM
        assert second.mappings <= first.mappings * 1.2 + 20
        assert min(one["give_backs"] for one in figures) > 0
        # And it is merged each time: the store holds one copy, or while the old one is on its way out, two.
        assert second.store <= 2 * ONE + ROOM


def test_calls_do_not_keep_pages_from_being_given_back(rendezvous: str) -> None:
    """Somebody who looks at statistics all the time disturbs the scanner, which has other things to do."""
    with ksmalloc.Arena(domain=ksmalloc.Domain("growth", path=rendezvous)) as arena:
        arrays = [arena.full(MIB, 1, np.uint8) for _ in range(2)]
        for number, array in enumerate(arrays):
            array[::PAGE] = np.arange(MIB // PAGE, dtype=np.uint16).astype(np.uint8)
            array[1::PAGE] = 7
            assert array[0] == 0, number
        assert arena.scan().pages_merged > 0
        for array in arrays:
            array[2::PAGE] = 9
        merged = 2 * MIB // PAGE
        end = time.monotonic() + 60
        while arena.domain.stats().give_backs < merged // 2 and time.monotonic() < end:
            time.sleep(0.003)
        assert arena.domain.stats().give_backs >= merged // 2
        for array in arrays:
            assert (array[2::PAGE] == 9).all()
            assert (array[1::PAGE] == 7).all()


def test_control_without_giving_back_memory_is_held(rendezvous: str) -> None:
    """An io_uring in each process: what is rewritten stays private, and the frames of the first data stay."""
    with Team(WORKERS, commands) as team:
        begin(team, rendezvous, "move", ring=True)
        fresh = one_round(team, 0)
        last = [one_round(team, number, settles=False) for number in range(1, LEAST_ROUNDS + 1)][-1]
        print(f"merged: {fresh}; rewritten: {last}")
        assert [one["give_backs"] for one in team.ask("own_stats")] == [0] * WORKERS
        assert last.private > fresh.private + 0.9 * WORKERS * ONE
        assert last.store > 0.9 * ONE
