# SPDX-License-Identifier: MIT
"""Barriers by name: which one a process gets, and that each merges and loses nothing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest

import ksmalloc

PAGE = 4096


@pytest.fixture
def domain(rendezvous: str) -> Iterator[ksmalloc.Domain]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        yield domain


@pytest.mark.parametrize("barrier", ["move", "stop", "segv"])
def test_barrier_by_name(domain: ksmalloc.Domain, barrier: str) -> None:
    """The first that is asked for by name takes the place of the one that was chosen; no later one does."""
    chosen = domain.stats().barrier
    if chosen != "move" and barrier == "move":
        with pytest.raises(ksmalloc.BarrierError, match=r"userfaultfd|UFFDIO_MOVE"):
            ksmalloc.Arena(domain=domain, barrier=barrier)
        return
    for arena in (ksmalloc.Arena(domain=domain, barrier=barrier), ksmalloc.Arena(domain=domain)):
        assert arena.stats().barrier == domain.stats().barrier == barrier
    for other in {"move", "stop", "segv"} - {barrier}:
        taken = f"this process has the barrier {barrier} in this domain"
        nowhere = chosen != "move" and other == "move"
        with pytest.raises(ksmalloc.BarrierError, match=r"userfaultfd|UFFDIO_MOVE" if nowhere else taken):
            ksmalloc.Arena(domain=domain, barrier=other)
    ksmalloc.Arena(domain=domain, barrier=barrier)


@pytest.mark.parametrize("barrier", ["move", "stop", "segv"])
def test_merging_is_not_noticed(domain: ksmalloc.Domain, barrier: str) -> None:
    """Threads store while pages merge; under "segv" only stores may write."""
    try:
        arena = ksmalloc.Arena(domain=domain, barrier=barrier, scan=False)
    except ksmalloc.BarrierError as error:
        pytest.skip(str(error))
    pages, threads, rounds = 64, 3, 40
    content = random.Random(1).randbytes(pages * PAGE)
    blocks = [arena.alloc(len(content)) for _ in range(2)]
    for block in blocks:
        memoryview(block)[:] = content
    models = [bytearray(content) for _ in blocks]
    reading, writing = os.pipe()

    def write(number: int) -> None:
        source = random.Random(number)
        for value in range(rounds):
            for which, block in enumerate(blocks):
                at = source.randrange(pages) * PAGE + 8 * number
                new = bytes([value, which, number])
                models[which][at : at + 3] = new
                with memoryview(block) as view:
                    if barrier == "segv" or value % 2:
                        view[at : at + 3] = new
                    else:
                        with lock:
                            os.write(writing, new)
                            assert os.readv(reading, [view[at : at + 3]]) == 3

    lock = threading.Lock()
    workers = [threading.Thread(target=write, args=[number]) for number in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        arena.scan()
    os.close(reading)
    os.close(writing)
    assert [bytes(block) for block in blocks] == models
    for block in blocks:
        memoryview(block)[:] = content
    for _ in range(3):
        arena.scan()
    stats = arena.stats()
    assert stats.barrier == barrier
    assert stats.merges > 0
    assert [bytes(block) for block in blocks] == [content, content]
    assert (stats.stops > 0) >= (barrier == "stop")
