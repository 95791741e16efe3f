# SPDX-License-Identifier: MIT
"""cow="sigsegv": merged pages are read-only, and ksmalloc's handler copies them when they are written."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from machinekit import in_child

import ksmalloc

PAGE = 4096
PAGES = 64


@pytest.fixture(params=["auto", "stop", "segv"])
def arena(rendezvous: str, request: pytest.FixtureRequest) -> Iterator[ksmalloc.Arena]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        try:
            arena = ksmalloc.Arena(domain=domain, scan=False, cow="sigsegv", barrier=request.param)
        except ksmalloc.BarrierError as error:
            pytest.skip(str(error))
        if domain.stats().barrier == "none":
            pytest.skip(str(domain.stats().why_not))
        yield arena


def merged(arena: ksmalloc.Arena, copies: int = 2) -> tuple[list[ksmalloc.Block], bytes]:
    content = random.Random(1).randbytes(PAGES * PAGE)
    blocks = [arena.alloc(len(content)) for _ in range(copies)]
    for block in blocks:
        memoryview(block)[:] = content
    arena.scan()
    assert arena.stats().arena_pages_merged == copies * PAGES
    return blocks, content


def permissions(address: int) -> str:
    """The mapping's, as the kernel says."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line)
        if match and int(match[1], 16) <= address < int(match[2], 16):
            return match[3]
    raise AssertionError(hex(address))


def test_it_says_so(arena: ksmalloc.Arena) -> None:
    assert arena.stats().cow == "sigsegv"
    assert ksmalloc.Arena(domain=arena.domain).stats().cow == "kernel"
    assert arena.domain.stats().cow == "kernel"
    assert ksmalloc.capabilities(arena.domain).handler == "installed"


def test_every_break_is_counted(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)
    assert permissions(blocks[0].address) == "r--p"
    right = bytearray(content)
    written = random.Random(2).sample(range(PAGES), 20)
    for page in written:
        for at in (page * PAGE + 5, page * PAGE + 4000):  # the second store finds the copy
            right[at] ^= 0xFF
            memoryview(blocks[0])[at] ^= 0xFF
    assert bytes(blocks[0]) == right
    assert bytes(blocks[1]) == content
    stats = arena.stats()
    assert stats.arena_cow_breaks == len(written)
    assert stats.arena_pages_merged == 2 * PAGES - len(written)
    assert permissions(blocks[0].address + written[0] * PAGE) == "rw-p"


def test_reading_breaks_nothing(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)
    reading, writing = os.pipe()
    assert os.write(writing, memoryview(blocks[0])[:PAGE]) == PAGE
    assert os.read(reading, PAGE) == content[:PAGE]
    os.close(reading)
    os.close(writing)
    assert bytes(blocks[0]) == bytes(blocks[1]) == content
    assert np.frombuffer(blocks[0], "u1").sum() == np.frombuffer(content, "u1").sum()
    assert (arena.stats().arena_cow_breaks, arena.stats().arena_pages_merged) == (0, 2 * PAGES)


def test_a_broken_page_merges_again(arena: ksmalloc.Arena) -> None:
    """It is anonymous memory, so no frame is kept by it."""
    blocks, content = merged(arena)
    memoryview(blocks[0])[:] = bytes(PAGE * PAGES)
    assert arena.stats().arena_cow_breaks == PAGES
    memoryview(blocks[0])[:] = content
    for _ in range(3):
        arena.scan()
    assert arena.stats().arena_pages_merged == 2 * PAGES
    assert bytes(blocks[0]) == bytes(blocks[1]) == content


def test_numpy_stores(arena: ksmalloc.Arena) -> None:
    data = np.random.default_rng(1).standard_normal((PAGES, PAGE // 8))
    arrays = [arena.array(data) for _ in range(3)]
    arena.scan()
    arrays[0] += 1
    arrays[1][:, 7] = 0
    np.multiply(arrays[2], 2, out=arrays[2])
    expected = data.copy()
    expected[:, 7] = 0
    assert (arrays[0] == data + 1).all()
    assert (arrays[1] == expected).all()
    assert (arrays[2] == data * 2).all()
    assert arena.stats().arena_cow_breaks == 3 * PAGES


def test_threads_store_into_the_same_pages(arena: ksmalloc.Arena) -> None:
    rounds, threads = 20, 4
    arrays = [arena.zeros((PAGES, PAGE), "u1") for _ in range(2)]
    for array in arrays:
        array[:, -8:] = np.random.default_rng(3).integers(1, 255, (PAGES, 8), "u1")
    tails = arrays[0][:, -8:].copy()

    def store(number: int) -> None:
        for value in range(1, rounds + 1):
            for page in range(PAGES):
                arrays[number % 2][page, number] = value

    for _ in range(3):
        for array in arrays:
            array[:, :threads] = 0
        arena.scan()
        workers = [threading.Thread(target=store, args=[number]) for number in range(threads)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            arena.scan()
        for number in range(threads):
            assert (arrays[number % 2][:, number] == rounds).all()
            assert not arrays[1 - number % 2][:, number].any()
        for array in arrays:
            assert (array[:, -8:] == tails).all()
            assert not array[:, threads:-8].any()
    assert arena.stats().suspensions == 0


def test_fork(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)

    def child() -> None:
        memoryview(blocks[0])[:3] = b"abc"
        assert bytes(blocks[0]) == b"abc" + content[3:]
        assert bytes(blocks[1]) == content
        arena.scan()
        memoryview(blocks[1])[:3] = b"def"
        assert bytes(blocks[1]) == b"def" + content[3:]

    assert in_child(child) == 0
    assert all(bytes(block) == content for block in blocks)
    memoryview(blocks[0])[:3] = b"ghi"
    assert bytes(blocks[1]) == content
    assert in_child(lambda: None) == 0


def test_unmerge_and_free(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)
    assert arena.unmerge() == 2 * PAGES
    assert permissions(blocks[0].address) == "rw-p"
    assert all(bytes(block) == content for block in blocks)
    arena.scan()
    assert arena.stats().arena_pages_merged == 2 * PAGES
    for block in blocks:
        block.free()
    again = arena.alloc(PAGES * PAGE)
    assert bytes(again) == bytes(PAGES * PAGE)
    memoryview(again)[:3] = b"abc"
    assert arena.domain.sweep() == PAGES
