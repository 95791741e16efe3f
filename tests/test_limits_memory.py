# SPDX-License-Identifier: MIT
"""RLIMIT_AS, RLIMIT_DATA and RLIMIT_MEMLOCK: what a process may map, write privately, and lock."""

from __future__ import annotations

import pytest
from conftest import Processes
from limitkit import SECONDS, needs_root, run

pytestmark = pytest.mark.timeout(2 * SECONDS)

FILL = r"""
def fill(access):
    # Map until the limit is reached; what was mapped.
    found, size = [], 1 << 40
    while size >= PAGE:
        try:
            found.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, access))
        except OSError as error:
            assert error.errno in (errno.ENOMEM, errno.EAGAIN)
            size //= 2
    return found
"""

TOO_LITTLE = r"""
open_files, reasons, joined = len(os.listdir("/proc/self/fd")), set(), 0
used = {"AS": "VmSize", "DATA": "VmData"}[sys.argv[2]]
for size in [0, *(1 << shift for shift in range(12, 40))]:
    limit(sys.argv[2], status(used) + size)
    try:
        domain = ksmalloc.Domain("limits", path=PATH)
    except (MemoryError, BlockingIOError) as error:  # the latter: there is no room for a thread's stack
        reasons.add(type(error).__name__)
        assert len(os.listdir("/proc/self/fd")) == open_files
        continue
    finally:
        lift(sys.argv[2])
    joined += 1
    domain.close()
assert joined > 0
assert "MemoryError" in reasons
arena = join()
blocks, content = two(arena, 64)
scan_until(arena, 128)
check(blocks, content)
assert merged() == 128 * PAGE
print(f"{sys.argv[2]}: {sorted(reasons)}, {joined} sizes were enough")
"""

FULL = (
    FILL
    + r"""
name, barrier, cow = sys.argv[2:]
arena = join(barrier=barrier, cow=cow)
blocks, content = two(arena, 256)
kept, kept_content = two(arena, 256, seed=2)
check(blocks, content)
limit(name, status({"AS": "VmSize", "DATA": "VmData"}[name]) + (8 << 20))
ballast = fill(mmap.PROT_READ | mmap.PROT_WRITE)
if name == "DATA":  # addresses are reserved already
    refused(lambda: arena.alloc(64 << 20), MemoryError)
report = arena.scan()
check(blocks, content)
check(kept, kept_content)
pages = arena.stats().arena_pages_merged
print(f"{name}, {barrier}, {cow}: at the limit {pages} pages merged, {merged() // PAGE} as the kernel counts")
assert merged() == pages * PAGE
if cow == "kernel" or pages:
    assert pages == 1024, report
else:  # read-only pages have guards, which take memory
    assert "ENOMEM" in report.why_not
model = write_half(blocks[0], content)
check(blocks[:1], model)
check(blocks[1:], content)
blocks.pop().free()
arena.scan()
with contextlib.suppress(MemoryError, OSError, ksmalloc.Error):
    arena.unmerge()
check(blocks, model)
check(kept, kept_content)
for piece in ballast:
    piece.close()
lift(name)
twin = arena.alloc(len(model))
memoryview(twin)[:] = model
scan_until(arena, 1024 - arena.stats().arena_pages_merged)
check([*blocks, twin], model)
check(kept, kept_content)
assert merged() == 1024 * PAGE
"""
)

ROOM_FOR_OTHERS = r"""
room = 6 << 30
limit("AS", status("VmSize") + room)
arenas = [join() for _ in range(3)]
blocks = [arena.alloc(1 << 20) for arena in arenas]
mmap.mmap(-1, room // 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, 0)
print(f"{room >> 20} MiB allowed, {status('VmSize') >> 20} MiB mapped with half of them the program's")
big = arenas[0].alloc(1 << 30)  # more than one area has
assert len(big) == 1 << 30
"""

LOCKED = r"""
PATH = sys.argv[1]
become_nobody()
limit("MEMLOCK", 4 << 20)
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
arena = join(barrier="stop")
blocks, content = two(arena, 256)
check(blocks, content)
assert libc.mlockall(MCL_FUTURE | MCL_ONFAULT) == 0
refused(lambda: ksmalloc.Domain("other", path=PATH), MemoryError)
refused(lambda: mmap.mmap(-1, 32 << 20), OSError)
for _ in range(3):
    report = arena.scan()
check(blocks, content)
print(f"what is mapped gets locked, 4 MiB at most: {merged() // PAGE} of 512 pages merged, {report.why_not}")
assert libc.munlockall() == 0
scan_until(arena, 512 - arena.stats().arena_pages_merged)
check(blocks, content)
assert merged() == 512 * PAGE
"""


@pytest.mark.parametrize("name", ["AS", "DATA"])
def test_too_little_for_a_domain(name: str, processes: Processes, rendezvous: str) -> None:
    """Joining fails with a clear error, leaves nothing behind, and works once there is enough."""
    print(run(processes, rendezvous, TOO_LITTLE, name))


@pytest.mark.parametrize(
    ("name", "barrier", "cow"),
    [
        ("AS", "move", "kernel"),
        ("AS", "stop", "kernel"),
        ("AS", "move", "sigsegv"),
        ("DATA", "move", "kernel"),
        ("DATA", "stop", "kernel"),
        ("DATA", "move", "sigsegv"),
    ],
)
def test_full(name: str, barrier: str, cow: str, processes: Processes, rendezvous: str) -> None:
    """Nothing can be mapped any more: what merges needs no more than it gives back."""
    print(run(processes, rendezvous, FULL, name, barrier, cow))


def test_arenas_leave_room_for_others(processes: Processes, rendezvous: str) -> None:
    """An arena reserves addresses, but not all that a limited process may have."""
    print(run(processes, rendezvous, ROOM_FOR_OTHERS))


@needs_root
def test_locked_memory(processes: Processes, rendezvous: str) -> None:
    """Of nobody's, who may lock little: where all is to be locked that is mapped."""
    print(run(processes, rendezvous, LOCKED))
