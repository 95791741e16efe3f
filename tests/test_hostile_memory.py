# SPDX-License-Identifier: MIT
"""A program unmaps, moves, protects, advises and locks registered memory while the scanner is at work on it.

What is mapped in its place keeps its bytes; so do neighbours, twins here and in another process, and what
was moved.
KSMALLOC_HOSTILE_SECONDS: how long each barrier is tried.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Processes
from hostilekit import ACTS, build, run_hostile

import ksmalloc

PAGE = 4096
PAGES = 64
DAMAGES = (
    *("holds other bytes", "shared memory is not shared any more"),
    "process was killed: Segmentation fault",  # a page was gone when a window looked at it, or after it
)
SECONDS = os.environ.get("KSMALLOC_HOSTILE_SECONDS", "6")
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hostile"))


# ---- at full speed -----------------------------------------------------------------------------------------


@pytest.mark.timeout(float(SECONDS) + 300)
@pytest.mark.parametrize("barrier", ["move", "stop", "segv"])
def test_nothing_else_is_damaged(barrier: str, hostile: Path, rendezvous: str, processes: Processes) -> None:
    """Under segv, which looks less closely, between stretches only; see hostile_wraps.c."""
    more = ("--alternate",) if barrier == "segv" else ()
    arguments = ("--barrier", barrier, "--seconds", SECONDS, *more)
    run = run_hostile(processes, hostile, rendezvous, *arguments, limit=float(SECONDS) + 240)
    assert run.status == 0, run.output
    assert min(run.figures["merges"], run.figures["scans"]) > 0, run.output
    assert [act for act in ACTS if not run.figures[act]] == [], run.output


@pytest.mark.timeout(300)
@pytest.mark.parametrize("act", ACTS)
def test_each_act(act: str, hostile: Path, rendezvous: str, processes: Processes) -> None:
    run = run_hostile(processes, hostile, rendezvous, "--barrier", "stop", "--act", act, "--seconds", "0.5")
    assert run.status == 0, run.output
    assert min(run.figures[act], run.figures["merges"], run.figures["scans"]) > 0, run.output


@pytest.mark.timeout(300)
@pytest.mark.parametrize("barrier", ["move", "stop"])
def test_control_without_surveys(barrier: str, hostile: Path, rendezvous: str, processes: Processes) -> None:
    arguments = ("--barrier", barrier, "--blind", "--act", "mmap_shared", "--act", "mmap_anonymous")
    # it ends with the first damage
    run = run_hostile(processes, hostile, rendezvous, *arguments, "--seconds", "60")
    assert run.status == 1, run.output
    assert any(damage in run.output for damage in DAMAGES), run.output


# ---- one by one, from Python -------------------------------------------------------------------------------


@pytest.fixture
def domain(rendezvous: str) -> Iterator[ksmalloc.Domain]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        if domain.stats().why_not is not None:
            pytest.skip(str(domain.stats().why_not))
        yield domain


class Merged:
    """Registered memory that is merged with an arena's block."""

    def __init__(self, domain: ksmalloc.Domain) -> None:
        self.domain = domain
        self.content = np.random.default_rng(1).integers(1, 255, PAGES * PAGE, np.uint8).tobytes()
        self.arena = ksmalloc.Arena(domain=domain)
        self.block = self.arena.alloc(PAGES * PAGE)
        memoryview(self.block)[:] = self.content
        self.memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory[:] = self.content
        self.registration = ksmalloc.register(self.memory, domain=domain)
        self.address = self.registration.address
        assert ksmalloc.settle(domain=domain).settled
        assert domain.stats().pages_merged == 2 * PAGES

    def page(self, number: int) -> int:
        return self.address + number * PAGE


def test_unregistering_protected_memory_is_refused(domain: ksmalloc.Domain) -> None:
    merged = Merged(domain)
    assert libc.mprotect(merged.page(3), PAGE, mmap.PROT_READ) == 0
    with pytest.raises(ksmalloc.RegisterError, match="private, writable and anonymous"):
        merged.registration.unregister()
    assert "unregistered" not in repr(merged.registration)
    assert merged.memory[:] == merged.content
    assert libc.mprotect(merged.page(3), PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    merged.registration.unregister()
    assert merged.memory[:] == merged.content == bytes(merged.block)


def test_what_is_gone_is_left_alone_and_frees_nothing(domain: ksmalloc.Domain) -> None:
    """Another mapping took a page's place; the page's frame stays, and what is there now is not touched."""
    merged = Merged(domain)
    shared = mmap.mmap(-1, PAGE)
    shared[:] = b"\x07" * PAGE
    where = np.frombuffer(shared, np.uint8).ctypes.data
    libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
    assert libc.mremap(where, 0, PAGE, 3, merged.page(5)) == merged.page(5)  # old size 0: a second view of it
    expected = bytearray(merged.content)
    expected[5 * PAGE : 6 * PAGE] = shared[:]
    report = merged.arena.scan()
    assert report.pages_merged == 0
    merged.registration.unregister()
    assert merged.memory[:] == expected
    shared[:] = b"\x08" * PAGE
    assert merged.memory[5 * PAGE : 6 * PAGE] == shared[:]  # shared still
    merged.block.free()
    domain.sweep()
    assert domain.stats().store_bytes == PAGE  # of the page that is gone


# ---- an arena's own memory: freed and handed out again under the scanner -----------------------------------


@pytest.mark.parametrize("cow", ["kernel", "sigsegv"])
def test_free_and_reallocation_race_the_scanner(domain: ksmalloc.Domain, cow: str) -> None:
    """Blocks and arrays are zero when they come, keep what was written, and go while they are merged."""
    arena = ksmalloc.Arena(domain=domain, cow=cow)  # type: ignore[arg-type]
    contents = [np.random.default_rng(seed).integers(0, 255, 16 * PAGE, np.uint8) for seed in range(4)]
    over = threading.Event()
    rounds = [0] * 5

    def scan() -> None:
        while not over.is_set():
            arena.scan()
            rounds[4] += 1

    def reallocate(number: int) -> None:
        random = np.random.default_rng(number)
        live: list[tuple[ksmalloc.Block | np.ndarray, np.ndarray]] = []
        while not over.is_set():
            content = contents[random.integers(4)][: random.integers(1, 16) * PAGE]
            if number % 2:
                block = arena.alloc(content.nbytes)
                fresh = np.frombuffer(block, np.uint8)
                assert not fresh.any()
                fresh[:] = content
                del fresh
                live.append((block, content))
            else:
                array = arena.zeros(content.shape, np.uint8)
                assert not array.any()
                array[:] = content
                live.append((array, content))
                del array
            if len(live) > 8:
                which = int(random.integers(len(live)))
                assert all((np.frombuffer(held, np.uint8) == kept).all() for held, kept in live)
                held = live.pop(which)[0]
                if isinstance(held, ksmalloc.Block):
                    held.free()
                del held
            rounds[number] += 1

    failures: list[BaseException] = []

    def guarded(function, *arguments: int) -> None:  # type: ignore[no-untyped-def]
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)
            over.set()

    threads = [threading.Thread(target=guarded, args=(scan,))]
    threads += [threading.Thread(target=guarded, args=(reallocate, number)) for number in range(4)]
    for thread in threads:
        thread.start()
    over.wait(3)
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(rounds) > 0, rounds
    assert domain.stats().merges > 0
