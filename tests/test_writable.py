# SPDX-License-Identifier: MIT
"""arena.writable(): for system calls that write into memory whose merged pages are read-only."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from machinekit import in_child

import ksmalloc

PAGE = 4096


@pytest.fixture(params=["sigsegv", "kernel"])
def arena(rendezvous: str, request: pytest.FixtureRequest) -> Iterator[ksmalloc.Arena]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        if domain.stats().barrier == "none":
            pytest.skip(str(domain.stats().why_not))
        yield ksmalloc.Arena(domain=domain, scan=False, cow=request.param)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.settimeout(5)
        yield ours, theirs


def merged(arena: ksmalloc.Arena, pages: int = 16) -> tuple[list[ksmalloc.Block], bytes]:
    content = random.Random(pages).randbytes(pages * PAGE)
    blocks = [arena.alloc(len(content)) for _ in range(2)]
    for block in blocks:
        memoryview(block)[:] = content
    arena.scan()
    assert arena.stats().arena_pages_merged == 2 * pages
    return blocks, content


def test_a_message_arrives(arena: ksmalloc.Arena, sockets: tuple[socket.socket, socket.socket]) -> None:
    """Without it, the message is lost where pages are read-only: the kernel asks no handler."""
    ours, theirs = sockets
    blocks, content = merged(arena)
    read_only = arena.stats().cow == "sigsegv"
    theirs.send(b"first")
    with memoryview(blocks[0]) as target:
        if read_only:
            with pytest.raises(OSError, match="Bad address"):
                ours.recv_into(target)
            assert bytes(blocks[0]) == content
        else:
            ours.recv_into(target)
        theirs.send(b"second")
        with arena.writable(blocks[0]):
            assert ours.recv_into(target) == 6
    assert bytes(blocks[0]) == b"second" + content[6:]
    assert bytes(blocks[1]) == content


def test_pages_stay_private_meanwhile_and_merge_afterwards(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)
    with arena.writable(memoryview(blocks[0])[PAGE - 1 : 3 * PAGE + 1]):  # touches four pages
        for _ in range(3):
            arena.scan()
            assert arena.stats().arena_pages_merged == 28
    assert [bytes(block) for block in blocks] == [content, content]
    for _ in range(3):
        arena.scan()
    if arena.stats().cow == "sigsegv" or arena.stats().give_backs:
        assert arena.stats().arena_pages_merged == 32
    assert [bytes(block) for block in blocks] == [content, content]


def test_it_nests_and_overlaps(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)
    view = memoryview(blocks[0])
    with arena.writable(view):
        with arena.writable(view), arena.writable(view[: 2 * PAGE], view[PAGE : 4 * PAGE]):
            pass
        arena.scan()
        assert arena.stats().arena_pages_merged == 16
        reading, writing = os.pipe()
        os.write(writing, b"x" * 8192)
        assert os.readv(reading, [view]) == 8192
        os.close(reading)
        os.close(writing)
    assert bytes(view) == b"x" * 8192 + content[8192:]


def test_frozen_pages_are_thawed(arena: ksmalloc.Arena) -> None:
    blocks, _ = merged(arena)
    view = arena.freeze(blocks[0])
    assert arena.stats().arena_pages_frozen == 16
    with arena.writable(view[: 4 * PAGE]):
        assert arena.stats().arena_pages_frozen == 12
    assert arena.stats().arena_pages_frozen == 12


def test_it_ends_with_an_error(arena: ksmalloc.Arena) -> None:
    blocks, _ = merged(arena)
    with pytest.raises(KeyError), arena.writable(*blocks):
        raise KeyError
    for _ in range(3):
        arena.scan()
    if arena.stats().cow == "sigsegv" or arena.stats().give_backs:
        assert arena.stats().arena_pages_merged == 32


def test_wrong_arguments_change_nothing(arena: ksmalloc.Arena) -> None:
    blocks, _ = merged(arena)
    for wrong, error in (
        (bytearray(PAGE), ValueError),
        (None, TypeError),
        (np.zeros((9, 9))[:, ::2], BufferError),
    ):
        with pytest.raises(error), arena.writable(*blocks, wrong):  # type: ignore[arg-type]
            raise AssertionError("not reached")
    with arena.writable(), arena.writable(arena.empty(0)):
        pass
    if arena.stats().cow == "sigsegv":
        arena.scan()
        assert arena.stats().arena_pages_merged == 32
    blocks[0].free()


def test_buffers_are_kept_meanwhile(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(PAGE)
    with arena.writable(block), pytest.raises(BufferError):
        block.free()
    block.free()


def test_fork_inside(arena: ksmalloc.Arena) -> None:
    blocks, content = merged(arena)

    def child() -> None:
        arena.scan()
        reading, writing = os.pipe()
        os.write(writing, b"child")
        with memoryview(blocks[0]) as view:
            assert os.readv(reading, [view]) == 5

    with arena.writable(blocks[0]):
        assert in_child(child) == 0
    assert [bytes(block) for block in blocks] == [content, content]


def test_threads(arena: ksmalloc.Arena) -> None:
    """Each receives into its own part again and again, while everything merges."""
    threads, rounds = 4, 60
    array = arena.zeros((threads, 3 * PAGE + 100), "u1")
    twin = arena.zeros((threads, 3 * PAGE + 100), "u1")
    problems: list[BaseException] = []

    def receive(number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            with ours, theirs:
                for value in range(1, rounds + 1):
                    theirs.send(bytes([value]) * array.shape[1])
                    with arena.writable(array[number]):
                        assert ours.recv_into(array[number]) == array.shape[1]
                    assert (array[number] == value).all()
        except BaseException as error:
            problems.append(error)

    workers = [threading.Thread(target=receive, args=[number]) for number in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        arena.scan()
    assert problems == []
    assert (array == rounds).all()
    assert not twin.any()
