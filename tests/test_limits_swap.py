# SPDX-License-Identifier: MIT
"""Swap in use: merged, broken and private pages pushed out, and the frames themselves.

A page that was written after it had been merged, and then went to swap, is present nowhere: who took it for
unbroken would show stale bytes. Needs root, for a swap file of the test's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Processes
from groupkit import Group
from limitkit import MIB, PAGE, SECONDS, Worker, needs_root, program, run, status, swap
from teamkit import store_blocks

__all__ = ["program"]  # a fixture

WORKERS = 3
PAGES = 16 * MIB // PAGE
OLD, NEW = 1, 3_000_000

pytestmark = [pytest.mark.timeout(3 * SECONDS), needs_root]

PAGED_OUT = r"""
MADV_PAGEOUT = 21

def kinds(block):
    # Of its pages: how many are swapped, private and present, of the store and present.
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(block.address // PAGE * 8)
        entries = struct.unpack(f"{len(block) // PAGE}Q", file.read(len(block) // PAGE * 8))
    present = [entry for entry in entries if entry >> 63]
    swapped = sum(entry >> 62 & 1 for entry in entries)
    return swapped, sum(not entry >> 61 & 1 for entry in present), len(present)

def page_out(block):
    for _ in range(20):
        libc.madvise(ctypes.c_void_p(block.address), ctypes.c_size_t(len(block)), MADV_PAGEOUT)
        time.sleep(0.02)
    return kinds(block)

PAGES = 512
arena = join(barrier=sys.argv[2])
blocks, content = two(arena, PAGES)
private = arena.alloc(PAGES * PAGE)
memoryview(private)[:] = alone = random.Random(5).randbytes(PAGES * PAGE)
scan_until(arena, 2 * PAGES)
check(blocks, content)
assert merged() == 2 * PAGES * PAGE
model = bytearray(content)
with memoryview(blocks[0]) as view:
    for page in range(0, PAGES, 2):
        view[page * PAGE] = model[page * PAGE] = model[page * PAGE] ^ 255
swapped = [page_out(block) for block in (blocks[0], blocks[1], private)]
print("swapped, private, present:", swapped)
assert swapped[0][0] >= PAGES // 4, "broken pages"
assert swapped[2][0] >= PAGES // 2, "private pages"
before = arena.domain.stats()
for _ in range(4):
    report = arena.scan()
after = arena.domain.stats()
assert after.cow_breaks == PAGES // 2, after  # each of them, wherever it is
left = [kinds(block)[0] for block in (blocks[0], blocks[1], private)]
print(f"after four scans {left} swapped, {arena.stats().arena_pages_merged} merged")
print(f"{after.give_backs} given back")
check(blocks[:1], model)
check(blocks[1:], content)
check([private], alone)

# A twin of what was swapped: the pages are in memory again, and merge.
twin = arena.alloc(len(model))
memoryview(twin)[:] = model
page_out(blocks[0])
for _ in range(3):
    arena.scan()
check([blocks[0], twin], model)
scan_until(arena, 3 * PAGES - arena.stats().arena_pages_merged)
check([blocks[0], twin], model)
check(blocks[1:], content)
assert merged() == 3 * PAGES * PAGE
page_out(blocks[0])
assert arena.unmerge() == 3 * PAGES
check([blocks[0], twin], model)
check(blocks[1:], content)
check([private], alone)
"""


@pytest.mark.parametrize("barrier", ["move", "stop"])
def test_pages_that_a_process_pushes_out(barrier: str, processes: Processes, rendezvous: str) -> None:
    """By MADV_PAGEOUT: exactly these pages, in every state."""
    with swap(128 * MIB):
        print(run(processes, rendezvous, PAGED_OUT, barrier))


def test_a_group_whose_memory_is_taken_back(processes: Processes, program: Path, rendezvous: str) -> None:
    """Frames go to swap as well, are read for comparing from there, and are freed there."""
    with swap(256 * MIB), Group("swap") as group:
        workers = [Worker(processes, program) for _ in range(WORKERS)]
        for worker in workers:
            worker.ask("enter", group.path)
            worker.ask("join", rendezvous, "swap")
            worker.ask("fill", PAGES, OLD)
        for worker in workers:
            worker.settle()
        pids = [worker.pid for worker in workers]
        assert [worker.count("merged") for worker in workers] == [PAGES] * WORKERS
        assert store_blocks(pids) == PAGES * PAGE
        workers[0].ask("write", NEW)
        workers[1].ask("write", NEW)
        group.reclaim(256 * MIB)
        swapped = [status(pid, "VmSwap") for pid in pids]
        print(
            f"\n{group.swapped() >> 20} MiB of the group in swap,"
            f" of it broken pages of two workers: {swapped[:2]}"
        )
        assert group.swapped() > 2 * PAGES * PAGE
        assert min(swapped[:2]) > PAGES * PAGE // 2

        late = Worker(processes, program)  # takes frames that are in swap
        late.ask("join", rendezvous, "swap")
        late.ask("fill", PAGES, OLD)
        everybody = [*workers, late]
        for worker in everybody:
            worker.settle()
        assert late.count("merged") == PAGES
        for worker in everybody:
            worker.ask("verify")
        for worker in everybody:  # what was verified is in memory again, and equal
            worker.settle()
        for worker in everybody:
            worker.ask("verify")
            assert worker.count("merged") == PAGES
        assert [worker.count("breaks") for worker in everybody] == [PAGES, PAGES, 0, 0]
        group.reclaim(256 * MIB)
        print(f"merged again and pushed out: {group.swapped() >> 20} MiB in swap")
        for worker in everybody:
            worker.ask("free")
        workers[0].ask("sweep")
        assert store_blocks([late.pid]) == 0
        for worker in everybody:
            worker.process.stdin.close()
        assert [worker.process.wait(SECONDS) for worker in everybody] == [0] * (WORKERS + 1)
