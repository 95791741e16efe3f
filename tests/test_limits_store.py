# SPDX-License-Identifier: MIT
"""A store at its capacity, and full file systems: for the frames of a named object, and for the rendezvous.

Full file systems are small ones of this test's own, in a mount namespace of its own: that needs root.
"""

from __future__ import annotations

import pytest
from conftest import Processes
from limitkit import SECONDS, needs_root, run

pytestmark = pytest.mark.timeout(2 * SECONDS)

CAPACITY = r"""
FRAMES = 4096  # the least that a store holds
domain = ksmalloc.Domain("limits", path=PATH, capacity=1)
arena = ksmalloc.Arena(domain=domain, scan=False)
old, old_content = two(arena, 3000)
new, new_content = two(arena, 3000, seed=2)
report = arena.scan()
check(old, old_content)
check(new, new_content)
assert "ENOSPC" in report.why_not, report
assert merged() == 2 * FRAMES * PAGE
stats = domain.stats()
assert (stats.pages_shared, stats.store_bytes) == (FRAMES, FRAMES * PAGE)
print(f"{stats.pages_shared} frames, {stats.pages_merged} pages merged, {report.why_not}")

# Frames that are there can still be merged with.
twin = arena.alloc(len(old_content))
memoryview(twin)[:] = old_content
scan_until(arena, 3000)
check([*old, twin], old_content)
assert merged() == (2 * FRAMES + 3000) * PAGE
assert domain.stats().pages_shared == FRAMES

# What is freed makes room again.
for block in (*old, twin):
    block.free()
assert domain.sweep() == 3000
report = scan_until(arena, 6000 - 2 * (FRAMES - 3000))
check(new, new_content)
assert merged() == 6000 * PAGE
assert report.why_not is None, report
assert domain.stats().store_bytes == 3000 * PAGE
"""

MOUNT = r"""
def call(name, *arguments):
    assert getattr(libc, name)(*arguments) == 0, f"{name}: {os.strerror(ctypes.get_errno())}"

call("unshare", 0x20000)  # CLONE_NEWNS
call("mount", b"none", b"/", None, ctypes.c_ulong(0x44000), None)  # MS_REC | MS_PRIVATE

def mount(at, options, flags=0):
    call("mount", b"small", at.encode(), b"tmpfs", ctypes.c_ulong(flags), f"mode=700,{options}".encode())

def room(at):
    found = os.statvfs(at)
    return found.f_bavail * found.f_frsize
"""

SHM = (
    MOUNT
    + r"""
import posix_ipc, ksmalloc.shm
PAGES = 2048
mount("/dev/shm", "size=4m,nr_inodes=64")
domain = ksmalloc.Domain("limits", path="/dev/shm/meeting", backing="shm", capacity="64MiB")
arena = ksmalloc.Arena(domain=domain, scan=False, barrier=sys.argv[2])
blocks, content = two(arena, PAGES)
for _ in range(3):
    report = arena.scan()
    check(blocks, content)
assert "ENOSPC" in report.why_not, report
assert room("/dev/shm") < 1 << 18  # full: the rest is less than what is written at a time
stats = domain.stats()
assert 0 < stats.pages_shared < PAGES
assert merged() == stats.pages_merged * PAGE
print(f"4 MiB: {stats.pages_shared} frames, {stats.pages_merged} pages merged")
print(f"{stats.failures} failures: {report.why_not}")

# Filled up to the last byte by somebody else; written, broken and read as always.
with open("/dev/shm/ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
    while True:
        file.write(bytes(PAGE))
assert room("/dev/shm") == 0
arena.scan()
model = bytearray(content)
with memoryview(blocks[0]) as view:
    for page in range(0, PAGES, 5):
        view[page * PAGE] = model[page * PAGE] = model[page * PAGE] ^ 255
check(blocks[:1], model)
check(blocks[1:], content)
assert refused(lambda: ksmalloc.Domain("second", path="/dev/shm/meeting"), OSError).errno == errno.ENOSPC
full = refused(lambda: ksmalloc.Domain("third", path="/dev/shm/meeting", backing="shm"), OSError)
assert full.errno == errno.ENOSPC
assert len(ksmalloc.shm.objects()) == 1  # what could not be used is not left behind
arena.scan()
check(blocks[:1], model)
check(blocks[1:], content)

mount("/dev/shm", "size=64m,nr_inodes=64", 0x20)  # MS_REMOUNT
twin = arena.alloc(len(model))
memoryview(twin)[:] = model
report = arena.scan()
end = time.monotonic() + 60
while arena.stats().arena_pages_merged < 3 * PAGES - PAGES // 5 - 1 and time.monotonic() < end:
    report = arena.scan()
check([blocks[0], twin], model)
check(blocks[1:], content)
print(f"64 MiB: {arena.stats().arena_pages_merged} pages merged, {report.why_not}")
assert merged() == arena.stats().arena_pages_merged * PAGE >= (3 * PAGES - PAGES // 5 - 1) * PAGE
"""
)

RENDEZVOUS = (
    MOUNT
    + r"""
for options in ("size=16k,nr_inodes=64", "size=1m,nr_inodes=2", "size=1m,nr_inodes=3", "size=1m,nr_inodes=4"):
    mount(PATH, options)
    with contextlib.suppress(OSError):
        with open(PATH + "/ballast", "wb", buffering=0) as file:
            while "16k" in options:
                file.write(bytes(PAGE))
    error = refused(join, OSError)
    assert error.errno == errno.ENOSPC, error
    assert is_alone()
    print(f"{options}: {error}")
    os.unlink(PATH + "/ballast")
    mount(PATH, "size=1m,nr_inodes=64", 0x20)
    arena = join()
    blocks, content = two(arena)
    scan_until(arena, 32)
    check(blocks, content)
    assert merged() == 32 * PAGE
    del blocks, arena
    call("umount2", PATH.encode(), 2)
"""
)


def test_at_its_capacity(processes: Processes, rendezvous: str) -> None:
    print(run(processes, rendezvous, CAPACITY))


@needs_root
@pytest.mark.parametrize("barrier", ["move", "stop"])
def test_full_file_system_for_frames(barrier: str, processes: Processes, rendezvous: str) -> None:
    """Frames cannot be written any more: merging stops and says why. Nothing dies of SIGBUS."""
    print(run(processes, rendezvous, SHM, barrier))


@needs_root
def test_full_file_system_for_the_rendezvous(processes: Processes, rendezvous: str) -> None:
    """No blocks, or no inodes: joining fails with ENOSPC, and works once there are some."""
    print(run(processes, rendezvous, RENDEZVOUS))
