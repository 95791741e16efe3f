"""Arenas: making them, merging in them, leaving them; the default arena; fork."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import ksmalloc

PAGE = 4096
arena_module = sys.modules["ksmalloc.arena"]
domain_module = sys.modules["ksmalloc.domain"]


@pytest.fixture
def domain(rendezvous: str) -> Iterator[ksmalloc.Domain]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        yield domain


@pytest.fixture
def merging(domain: ksmalloc.Domain) -> ksmalloc.Arena:
    """An arena in which pages merge when told to; without a barrier the test is skipped."""
    why_not = domain.stats().why_not
    if why_not is not None:
        pytest.skip(why_not)
    return ksmalloc.Arena(domain=domain, scan=False)


@pytest.fixture
def fresh_default(domain: ksmalloc.Domain, monkeypatch: pytest.MonkeyPatch) -> ksmalloc.Domain:
    """No default arena yet, and a default domain of the test's own."""
    monkeypatch.setattr(arena_module, "_default", None)
    monkeypatch.setattr(domain_module, "_default", domain)
    return domain


def filled(arena: ksmalloc.Arena, content: bytes) -> ksmalloc.Block:
    block = arena.alloc(len(content))
    memoryview(block)[:] = content
    return block


def in_child(work: Any) -> int:
    """Run work() in a forked child; its exit status: 0 when it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_words(domain: ksmalloc.Domain) -> None:
    with pytest.raises(ValueError, match="'auto', 'move', 'stop', 'segv', not 'best'"):
        ksmalloc.Arena(domain=domain, barrier="best")
    with pytest.raises(ValueError, match="'auto', 'kernel', 'sigsegv', not 'mine'"):
        ksmalloc.Arena(domain=domain, cow="mine")
    with pytest.raises(ValueError):
        ksmalloc.Arena(domain=domain, barrier=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ksmalloc.Arena(domain=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ksmalloc.Arena("name")  # type: ignore[misc]
    for cow in ("auto", "kernel"):
        assert ksmalloc.Arena(domain=domain, cow=cow).stats().cow == "kernel"


def test_names_and_repr(domain: ksmalloc.Domain) -> None:
    arena = ksmalloc.Arena(name="weights", domain=domain)
    assert (arena.name, arena.domain, arena.closed) == ("weights", domain, False)
    assert repr(arena) == "<ksmalloc.Arena 'weights' in domain 'default'>"
    assert arena.stats().name == "weights"
    arena.close()
    assert repr(arena) == "<ksmalloc.Arena 'weights' in domain 'default', closed>"
    assert ksmalloc.Arena(domain=domain).name is None


def test_close(domain: ksmalloc.Domain) -> None:
    with ksmalloc.Arena(domain=domain) as arena:
        block = arena.alloc(PAGE)
    assert arena.closed
    arena.close()
    with pytest.raises(ksmalloc.ClosedError):
        arena.alloc(1)
    with pytest.raises(ValueError):
        arena.empty(3)
    memoryview(block)[:3] = b"abc"
    assert bytes(block)[:4] == b"abc\0"
    assert arena.stats().blocks == 1
    block.free()
    assert arena.stats().blocks == 0


def test_belongs_to_its_process(domain: ksmalloc.Domain) -> None:
    arena = ksmalloc.Arena(domain=domain)
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="belongs to its process"):
            use(arena)  # type: ignore[operator]


def test_scan_merges_and_writes_separate(merging: ksmalloc.Arena) -> None:
    content = os.urandom(50 * PAGE)
    blocks = [filled(merging, content) for _ in range(3)]
    other = filled(merging, os.urandom(50 * PAGE))
    report = merging.scan()
    assert report.why_not is None
    assert report.settled is None
    assert report.pages_merged == 150
    assert report.frames_written == 50
    stats = merging.stats()
    assert (stats.arena_pages, stats.arena_pages_merged) == (200, 150)
    assert (stats.pages_shared, stats.pages_sharing, stats.pages_merged) == (50, 100, 150)
    assert stats.saved_bytes == 100 * PAGE
    memoryview(blocks[1])[7 * PAGE] ^= 0xFF
    assert bytes(blocks[0]) == bytes(blocks[2]) == content
    assert bytes(blocks[1])[7 * PAGE + 1 :] == content[7 * PAGE + 1 :]
    assert bytes(blocks[1])[7 * PAGE] == content[7 * PAGE] ^ 0xFF
    assert merging.stats().arena_pages_broken == 1
    assert bytes(other) != content


def test_zero_pages_are_given_back(merging: ksmalloc.Arena) -> None:
    block = filled(merging, b"x" * (10 * PAGE))
    memoryview(block)[:] = bytes(10 * PAGE)
    assert merging.scan().zero_pages == 10
    assert merging.stats().arena_pages_zero == 10
    assert bytes(block) == bytes(10 * PAGE)


def test_unmergeable_blocks_stay_private(merging: ksmalloc.Arena) -> None:
    content = os.urandom(PAGE) * 4
    blocks = [merging.alloc(4 * PAGE, mergeable=False) for _ in range(3)]
    for block in blocks:
        memoryview(block)[:] = content
    assert merging.scan().pages_merged == 0


def test_unmerge(merging: ksmalloc.Arena) -> None:
    content = os.urandom(20 * PAGE)
    blocks = [filled(merging, content) for _ in range(2)]
    merging.scan()
    assert merging.unmerge() == 40
    assert merging.stats().arena_pages_merged == 0
    assert all(bytes(block) == content for block in blocks)
    assert merging.unmerge() == 0
    merging.scan()
    assert merging.stats().arena_pages_merged == 40


def test_default_arena_is_one(fresh_default: ksmalloc.Domain) -> None:
    found: list[ksmalloc.Arena] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.append(ksmalloc.arena())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(arena is found[0] for arena in found)
    assert found[0].domain is fresh_default
    assert ksmalloc.Arena().domain is fresh_default
    found[0].close()
    assert ksmalloc.arena() is not found[0]


def test_fork(fresh_default: ksmalloc.Domain) -> None:
    arena = ksmalloc.arena()
    content = os.urandom(10 * PAGE)
    block = filled(arena, content)
    twin = filled(arena, content)
    arena.scan()

    def work() -> None:
        assert ksmalloc.arena() is arena
        assert bytes(block) == content
        memoryview(block)[:5] = b"child"
        mine = filled(arena, content)
        arena.scan()
        assert bytes(mine) == bytes(twin) == content
        twin.free()
        assert fresh_default.stats().peers == 2
        assert sum(peer.is_self for peer in fresh_default.peers) == 1

    assert in_child(work) == 0
    assert bytes(block) == bytes(twin) == content
    memoryview(block)[:6] = b"parent"
    assert bytes(block)[6:] == content[6:]


def test_fork_while_another_thread_makes_the_default_arena(
    fresh_default: ksmalloc.Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child must not find the lock taken for ever by a thread that it does not have."""
    with arena_module._lock, domain_module._lock:
        monkeypatch.setattr(domain_module, "_default", fresh_default)
        assert in_child(lambda: ksmalloc.arena().alloc(10).free()) == 0


FORKS = """
import logging, os, sys, ksmalloc

def handler():
    for _ in range(100):
        len("python code runs here, so pending calls do, too")

os.register_at_fork(after_in_parent=handler)
arena = ksmalloc.Arena(domain=ksmalloc.Domain(path=sys.argv[1]))
for _ in range(20):
    arena.alloc(4096).free()
    arena.scan()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_fork_does_not_warn(rendezvous: str) -> None:
    """CPython warns when the process has a second thread by the time the parent comes back."""
    command = [sys.executable, "-W", "always", "-c", FORKS, rendezvous]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
