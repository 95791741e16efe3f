# SPDX-License-Identifier: MIT
"""Getting memory and giving it back, beside what everybody uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from contest import contest
from merging import arena

TIMES = 20000


def _each_us(work: Callable[[], object], times: int = TIMES) -> float:
    for _ in range(times // 10):
        work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times * 1e6


alloc = contest("alloc", "arena.alloc(65536) and free", "µs", bar=2, less_is_better=True, absolute=True)


@alloc.side
def ksmalloc_alloc() -> float:
    with arena() as ours:
        return _each_us(lambda: ours.alloc(65536).free())


empty = contest("empty", "an array of 64 KiB that is made and dropped", "µs", bar=None, less_is_better=True)


@empty.side
def ksmalloc_empty() -> float:
    with arena() as ours:
        return _each_us(lambda: ours.empty(65536, np.uint8))


@empty.side
def numpy_empty() -> float:
    return _each_us(lambda: np.empty(65536, np.uint8))


block = contest("block", "a block of 1 MiB that is made and destroyed, by the second", "1/s", bar=30)


@block.side
def ksmalloc_block() -> float:
    with arena() as ours:
        return 1e6 / _each_us(lambda: ours.alloc(1 << 20).free())


def _shared() -> None:
    memory = SharedMemory(create=True, size=1 << 20)
    memory.close()
    memory.unlink()


@block.side
def shared_memory() -> float:
    return 1e6 / _each_us(_shared, TIMES // 10)
