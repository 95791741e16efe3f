# SPDX-License-Identifier: MIT
"""The measure of memory: what it counts, and that parking pages in a file does not pass for saving them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ksmalloc.ctl.measure import Memory, Process, measure, measure_process

MIB = 1 << 20
SIZE = 32 * MIB
SLACK = 2 * MIB


def fill(memory: mmap.mmap) -> None:
    for i in range(0, len(memory), MIB):
        memory[i : i + MIB] = os.urandom(MIB)


def read(memory: mmap.mmap) -> int:
    return sum(memory[:: mmap.PAGESIZE])


@pytest.fixture
def file() -> Iterator[int]:
    """A memory file of SIZE bytes, all of them there."""
    descriptor = os.memfd_create("measure")
    for _ in range(SIZE // MIB):
        os.write(descriptor, os.urandom(MIB))
    yield descriptor
    os.close(descriptor)


def grown(before: Process) -> Process:
    return measure_process(os.getpid()) - before


def test_private_memory_counts_when_it_is_written() -> None:
    before = measure_process(os.getpid())
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert abs(grown(before).anonymous) < SLACK
    assert abs(grown(before).pss) < SLACK
    fill(memory)
    for figure in (grown(before).anonymous, grown(before).pss, grown(before).rss):
        assert abs(figure - SIZE) < SLACK
    memory.close()
    assert abs(grown(before).anonymous) < SLACK


def test_a_frame_is_shared_until_it_is_written(file: int) -> None:
    before = measure_process(os.getpid())
    memory = mmap.mmap(file, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    read(memory)
    assert abs(grown(before).shmem - SIZE) < SLACK
    assert abs(grown(before).anonymous) < SLACK
    memory[: SIZE // 2] = os.urandom(SIZE // 2)
    assert abs(grown(before).anonymous - SIZE // 2) < SLACK
    assert abs(grown(before).shmem - SIZE // 2) < SLACK


def test_parked_pages_are_no_saving(file: int) -> None:
    """Pages in a file that nobody reads are in no PSS; the store's blocks still show them."""
    baseline = measure([os.getpid()])
    memory = mmap.mmap(file, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    parked = measure([os.getpid()], store_bytes=os.fstat(file).st_blocks * 512) - baseline
    assert parked.pss_total < SLACK
    assert abs(parked.blocks_total - SIZE) < SLACK
    assert parked.total == parked.blocks_total
    read(memory)
    honest = measure([os.getpid()], store_bytes=os.fstat(file).st_blocks * 512) - baseline
    assert abs(honest.pss_total - SIZE) < SLACK
    assert abs(honest.blocks_total - SIZE) < SLACK


READER = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
print("up", flush=True)
sys.stdin.readline()
sum(memory[::4096])
print("read", flush=True)
sys.stdin.readline()
"""


def test_processes_that_read_one_file_take_it_once(file: int) -> None:
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[file],
            text=True,
        )
        for _ in range(3)
    ]
    try:
        pids = [reader.pid for reader in readers]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "up\n"
        store = os.fstat(file).st_blocks * 512
        baseline = measure(pids)
        for reader in readers:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "read\n"
        memory = measure(pids, store) - baseline
        assert abs(memory.pss_total - SIZE) < SLACK
        assert abs(memory.blocks_total - SIZE) < SLACK
        assert [process.pid for process in memory.processes] == pids
        assert all(abs(process.pss - SIZE // 3) < SLACK for process in memory.processes)
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def test_what_a_fork_shares_counts_once() -> None:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fill(memory)
    alone = measure([os.getpid()])
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    try:
        os.close(ours)
        both = measure([os.getpid(), child])
        assert both.pss_total - alone.pss_total < SIZE // 2
        assert both.blocks_total - alone.blocks_total < SIZE // 2
    finally:
        os.close(theirs)
        os.waitpid(child, 0)


def test_a_process_that_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):  # it has no memory any more, but its parent has not waited for it
        measure_process(child.pid)
    child.wait()
    with pytest.raises(ProcessLookupError):
        measure([child.pid])


def test_a_baseline_is_of_the_same_processes() -> None:
    one, two = Process(1, 4, 3, 2, 1), Process(2, 8, 7, 6, 5)
    grown = Memory((one, two), 100) - Memory((two, one), 30)
    assert grown == Memory((Process(1, 0, 0, 0, 0), Process(2, 0, 0, 0, 0)), 70)
    with pytest.raises(ValueError):
        Memory((one,), 0) - Memory((two,), 0)
    with pytest.raises(ValueError):
        Memory((one, two), 0) - Memory((one,), 0)
    with pytest.raises(ValueError):
        one - two


def test_totals() -> None:
    memory = Memory((Process(1, 9, 7, 5, 2), Process(2, 9, 3, 1, 2)), 40)
    assert (memory.pss_total, memory.anonymous_total, memory.blocks_total) == (10, 6, 46)
    assert memory.total == 46
    assert memory.as_dict()["processes"][1] == {"pid": 2, "rss": 9, "pss": 3, "anonymous": 1, "shmem": 2}
