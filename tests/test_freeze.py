# SPDX-License-Identifier: MIT
"""Frozen memory: read-only views, merging under every barrier, stores through older views, thawing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Processes
from machinekit import in_child
from nobodykit import run

import ksmalloc

PAGE = 4096
BARRIERS = pytest.mark.parametrize("barrier", ["auto", "move", "stop", "segv"])


@pytest.fixture
def domain(rendezvous: str) -> Iterator[ksmalloc.Domain]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        yield domain


@pytest.fixture
def arena(domain: ksmalloc.Domain) -> ksmalloc.Arena:
    return ksmalloc.Arena(domain=domain, scan=False)


def with_barrier(domain: ksmalloc.Domain, barrier: str) -> ksmalloc.Arena:
    try:
        return ksmalloc.Arena(domain=domain, scan=False, barrier=barrier)
    except ksmalloc.BarrierError as error:
        pytest.skip(str(error))


def twins(arena: ksmalloc.Arena, pages: int = 16) -> tuple[list[ksmalloc.Block], bytes]:
    content = random.Random(pages).randbytes(pages * PAGE)
    blocks = [arena.alloc(len(content)) for _ in range(2)]
    for block in blocks:
        memoryview(block)[:] = content
    return blocks, content


# ---- views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f8", "i2", "M8[s]", [("a", "i4"), ("b", "f8")], "U3"])
def test_of_an_array_an_array(arena: ksmalloc.Arena, dtype: Any, order: Any) -> None:
    array = arena.zeros((70, 90), dtype, order)
    view = arena.freeze(array)
    assert type(view) is np.ndarray
    assert (view.shape, view.dtype, view.strides) == (array.shape, array.dtype, array.strides)
    assert view.ctypes.data == array.ctypes.data
    assert not view.flags.writeable
    with pytest.raises(ValueError):
        view[0, 0] = view[0, 1]


def test_of_anything_else_a_memoryview(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(3 * PAGE)
    memoryview(block)[:5] = b"hello"
    for given in (block, memoryview(block), memoryview(block)[: 2 * PAGE], arena.freeze(block)):
        view = arena.freeze(given)
        assert type(view) is memoryview
        assert view.readonly
        assert view[:5] == b"hello"
        assert len(view) == len(given)


def test_the_view_keeps_the_memory(arena: ksmalloc.Arena) -> None:
    view = arena.freeze(arena.full(10 * PAGE, 7, "u1"))
    other = arena.freeze(arena.alloc(PAGE))
    assert arena.stats().blocks == 2
    assert (view == 7).all()
    del view
    assert arena.stats().blocks == 1
    assert bytes(other) == bytes(PAGE)
    other.release()
    assert arena.stats().blocks == 0


def test_whole_pages_only(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(4 * PAGE)
    view = memoryview(block)
    arena.freeze(view[1 : 2 * PAGE + 1])
    assert arena.stats().arena_pages_frozen == 1
    arena.freeze(view[: PAGE - 1])
    arena.freeze(arena.alloc(100))
    arena.freeze(arena.empty(0))
    assert arena.stats().arena_pages_frozen == 1
    arena.freeze(view)
    arena.freeze(view)
    assert arena.stats().arena_pages_frozen == 4
    arena.thaw(view[PAGE : 3 * PAGE])
    assert arena.stats().arena_pages_frozen == 2
    arena.thaw(view)
    arena.thaw(view)
    assert arena.stats().arena_pages_frozen == 0


def test_wrong_arguments(arena: ksmalloc.Arena, domain: ksmalloc.Domain) -> None:
    other = ksmalloc.Arena(domain=domain)
    for call in (arena.freeze, arena.thaw):
        for foreign in (bytearray(PAGE), np.zeros(PAGE), b"read-only", other.alloc(3 * PAGE)):
            with pytest.raises(ValueError, match="not in one live block of this arena"):
                call(foreign)
        for nothing in (None, 5, [1, 2], "text"):
            with pytest.raises(TypeError):
                call(nothing)  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            call(arena.zeros((100, 100))[:, ::2])
    block = arena.alloc(PAGE)
    block.free()
    with pytest.raises(ValueError):
        arena.freeze(block)
    assert arena.stats().arena_pages_frozen == 0


# ---- merging, stores, system calls -------------------------------------------------------------------------


@BARRIERS
def test_frozen_memory_merges_and_thaws(domain: ksmalloc.Domain, barrier: str) -> None:
    arena = with_barrier(domain, barrier)
    blocks, content = twins(arena)
    views = [arena.freeze(block) for block in blocks]
    arena.scan()
    assert arena.stats().arena_pages_merged == arena.stats().arena_pages_frozen == 32
    assert views[0] == views[1] == content
    memoryview(blocks[0])[5 * PAGE + 7] ^= 1  # through an older view
    right = bytearray(content)
    right[5 * PAGE + 7] ^= 1
    assert views[0] == right
    assert views[1] == content
    stats = arena.stats()
    assert (stats.arena_pages_frozen, stats.arena_pages_merged, stats.arena_cow_breaks) == (31, 31, 1)
    for view in views:
        arena.thaw(view)
    assert arena.stats().arena_pages_frozen == 0
    for block in blocks:
        memoryview(block)[::PAGE] = bytes(16)
    assert bytes(blocks[0])[1:PAGE] == content[1:PAGE]
    assert bytes(blocks[1])[::PAGE] == bytes(16)


@BARRIERS
def test_system_calls_are_refused_and_lose_nothing(domain: ksmalloc.Domain, barrier: str) -> None:
    arena = with_barrier(domain, barrier)
    blocks, content = twins(arena)
    reading, writing = os.pipe()
    os.write(writing, b"precious")
    for merged in (False, True):
        for block in blocks:
            arena.freeze(block)
        if merged:
            arena.scan()
        with pytest.raises(OSError, match="Bad address"), memoryview(blocks[0]) as target:
            os.readv(reading, [target])
        assert bytes(blocks[0]) == content
    arena.thaw(blocks[0])
    with memoryview(blocks[0]) as target:
        assert os.readv(reading, [target[PAGE - 4 :]]) == 8  # merged still; the kernel copies
    assert bytes(blocks[0])[PAGE - 4 : PAGE + 4] == b"precious"
    assert bytes(blocks[1]) == content
    os.close(reading)
    os.close(writing)


def test_python_refuses_the_view_as_a_target(arena: ksmalloc.Arena) -> None:
    view = arena.freeze(arena.alloc(PAGE))
    with open("/dev/zero", "rb", buffering=0) as file, pytest.raises(TypeError):
        file.readinto(view)


def test_threads_store_while_it_merges(arena: ksmalloc.Arena) -> None:
    """Every store lands, whether it meets a page frozen, merged, or being changed."""
    pages, threads, rounds = 64, 4, 30
    arrays = [arena.zeros((pages, PAGE), "u1") for _ in range(2)]
    done = threading.Event()

    def store(number: int) -> None:
        for value in range(1, rounds + 1):
            for page in range(pages):
                arrays[0][page, number] = value
                assert arrays[0][page, number] == value
        done.set()

    workers = [threading.Thread(target=store, args=[number]) for number in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for array in arrays:
            arena.freeze(array)
        arena.scan()
    assert (arrays[0][:, :threads] == rounds).all()
    assert not arrays[0][:, threads:].any()
    assert not arrays[1].any()
    assert arena.stats().suspensions == 0


def test_fork(arena: ksmalloc.Arena) -> None:
    blocks, content = twins(arena)
    for block in blocks:
        arena.freeze(block)
    arena.scan()

    def child() -> None:
        memoryview(blocks[0])[0] ^= 1
        assert bytes(blocks[0]) == bytes([content[0] ^ 1]) + content[1:]
        assert bytes(blocks[1]) == content
        arena.thaw(blocks[1])
        memoryview(blocks[1])[0] ^= 1

    assert in_child(child) == 0
    assert all(bytes(block) == content for block in blocks)
    memoryview(blocks[1])[0] ^= 1
    assert bytes(blocks[0]) == content
    for block in blocks:
        block.free()
    assert bytes(arena.alloc(16 * PAGE)) == bytes(16 * PAGE)


def test_it_merges_where_nothing_else_can(processes: Processes, rendezvous: str) -> None:
    """No userfaultfd, and a ring that forbids to stop threads."""
    run(
        processes,
        rendezvous,
        r"""
ring = io_uring()
become_nobody()
arena = join()
blocks, content = two(arena)
assert arena.scan().pages_merged == 0
views = [arena.freeze(block) for block in blocks]
assert arena.scan().pages_merged == 32
memoryview(blocks[0])[0] ^= 1
assert views[1] == content and views[0][1:] == content[1:] and views[0][0] == content[0] ^ 1
assert arena.stats().arena_cow_breaks == 1
""",
    )
