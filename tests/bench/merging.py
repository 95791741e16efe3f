# SPDX-License-Identifier: MIT
"""How fast equal pages merge: duplicates a second, ours and the kernel's."""

from __future__ import annotations

import mmap
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ksmd
import numpy as np
from contest import contest
from numpy.typing import NDArray

import ksmalloc

PAGE = 4096
MIB = 1 << 20
Words = NDArray[np.uint64]


def noise(seed: int, nbytes: int) -> Words:
    return np.random.default_rng(seed).integers(0, 1 << 63, nbytes // 8, dtype=np.uint64)


def fill(to: Words, seed: int) -> None:
    """The noise of a seed, some at a time."""
    rng, step = np.random.default_rng(seed), 16 * MIB // 8
    for at in range(0, len(to), step):
        to[at : at + step] = rng.integers(0, 1 << 63, min(step, len(to) - at), dtype=np.uint64)


@contextmanager
def arena(scan: bool = False) -> Iterator[ksmalloc.Arena]:
    """In a domain of its own."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ksmalloc-bench-") as path:
        yield ksmalloc.Arena(domain=ksmalloc.Domain("bench", path=path), scan=scan)


# ---- long runs, one process -------------------------------------------------------------------------------

ONE = 512 * MIB
merge_one = contest("merge_one", "512 MiB twice in one process, long runs: duplicates merged", "MiB/s", bar=5)


@merge_one.side
def ksmalloc_scan() -> float:
    with arena() as ours:
        both = [ours.empty(ONE // 8, np.uint64) for _ in range(2)]
        for data in both:
            fill(data, 1)
        start = time.perf_counter()
        report = ours.scan()
        seconds = time.perf_counter() - start
        assert report.pages_merged == 2 * ONE // PAGE, report
        assert np.array_equal(both[0], both[1])
        return ONE / MIB / seconds


def _kernel(copies: list[mmap.mmap], duplicates: int) -> float:
    """Seconds until kernel KSM has merged so many pages of all of them."""
    before = ksmd.counter("pages_sharing")
    for copy in copies:
        copy.madvise(mmap.MADV_MERGEABLE)
    start = time.perf_counter()
    with ksmd.running(ksmd.FULL_THROTTLE):
        ksmd.wait_for("pages_sharing", before + duplicates)
        return time.perf_counter() - start


@merge_one.side
def kernel_ksm() -> float:
    copies = [ksmd.mergeable(ONE) for _ in range(2)]
    for copy in copies:
        fill(np.frombuffer(copy, np.uint64), 1)
    return ONE / MIB / _kernel(copies, ONE // PAGE)


# ---- long runs, four processes ----------------------------------------------------------------------------

MANY = 4
EACH = 512 * MIB
merge_four = contest("merge_four", "512 MiB in each of four processes: duplicates merged", "MiB/s", bar=5)


def _hear(from_fd: int, times: int, children: list[int]) -> None:
    """A byte from each child. RuntimeError: one has ended instead."""
    for _ in range(times):
        while not select.select([from_fd], [], [], 0.2)[0]:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is not None:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                raise RuntimeError(f"a child ended with status {dead.si_status}")
        os.read(from_fd, 1)


def together(how_many: int, load: Callable[[int], Any], work: Callable[[Any], None]) -> float:
    """Children load, wait for each other, work. Seconds from then until the last is done."""
    ready, go, done, end = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    children = []
    for number in range(how_many):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                loaded = load(number)
                os.write(ready[1], b"r")
                os.read(go[0], 1)
                work(loaded)
                os.write(done[1], b"d")
                os.read(end[0], 1)
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        children.append(pid)
    _hear(ready[0], how_many, children)
    start = time.perf_counter()
    os.write(go[1], b"g" * how_many)
    _hear(done[0], how_many, children)
    seconds = time.perf_counter() - start
    os.write(end[1], b"e" * how_many)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * how_many
    return seconds


@merge_four.side
def ksmalloc_settle() -> float:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ksmalloc-bench-") as path:

        def load(_: int) -> tuple[ksmalloc.Arena, Words]:
            ours = ksmalloc.Arena(domain=ksmalloc.Domain("bench", path=path), scan=False)
            data = ours.empty(EACH // 8, np.uint64)
            fill(data, 1)
            return ours, data

        def work(loaded: tuple[ksmalloc.Arena, Words]) -> None:
            domain = loaded[0].domain
            assert ksmalloc.settle(60, domain=domain).settled
            assert domain.stats().pages_merged == MANY * EACH // PAGE, domain.stats()

        return (MANY - 1) * EACH / MIB / together(MANY, load, work)


@merge_four.side
def kernel_ksm_of_four() -> float:
    duplicates = (MANY - 1) * EACH // PAGE
    before = ksmd.counter("pages_sharing")

    def load(_: int) -> mmap.mmap:
        copy = ksmd.mergeable(EACH)
        fill(np.frombuffer(copy, np.uint64), 1)
        copy.madvise(mmap.MADV_MERGEABLE)
        return copy

    def work(_: mmap.mmap) -> None:
        ksmd.wait_for("pages_sharing", before + duplicates)

    found: list[float] = []
    with ksmd.running({**ksmd.FULL_THROTTLE, "sleep_millisecs": "1000000"}):

        def start(loaded: mmap.mmap) -> None:
            (ksmd.ROOT / "sleep_millisecs").write_text("0")
            work(loaded)

        found.append(together(MANY, load, start))
    return (MANY - 1) * EACH / MIB / found[0]


# ---- scattered --------------------------------------------------------------------------------------------

SCATTERED = 16 * MIB
scattered = contest(
    "scattered",
    "every other page of 16 MiB a duplicate, in shuffled order: duplicates merged",
    "MiB/s",
    bar=1.2,
)


def _scatter(first: Words, second: Words) -> None:
    fill(first, 1)
    fill(second, 2)
    words = PAGE // 8
    order = np.random.default_rng(3).permutation(len(first) // words // 2)
    for at, to in enumerate(order):
        second[2 * to * words : (2 * to + 1) * words] = first[2 * at * words : (2 * at + 1) * words]


@scattered.side
def ksmalloc_scan_scattered() -> float:
    with arena() as ours:
        both = [ours.empty(SCATTERED // 8, np.uint64) for _ in range(2)]
        _scatter(*both)
        start = time.perf_counter()
        report = ours.scan()
        seconds = time.perf_counter() - start
        assert report.pages_merged == SCATTERED // PAGE, report
        return SCATTERED / 2 / MIB / seconds


@scattered.side
def kernel_ksm_scattered() -> float:
    copies = [ksmd.mergeable(SCATTERED) for _ in range(2)]
    _scatter(*(np.frombuffer(copy, np.uint64) for copy in copies))
    return SCATTERED / 2 / MIB / _kernel(copies, SCATTERED // PAGE // 2)
