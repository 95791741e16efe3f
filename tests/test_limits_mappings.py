# SPDX-License-Identifier: MIT
"""vm.max_map_count, used up by the program itself: then nobody gets a mapping, merging least of all."""

from __future__ import annotations

import pytest
from conftest import Processes
from limitkit import SECONDS, run

EXHAUST = r"""
MOST = int(open("/proc/sys/vm/max_map_count").read())
libc.mmap.restype = ctypes.c_void_p

def map_none(pages):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    return libc.mmap(None, ctypes.c_size_t(pages * PAGE), 0, flags, -1, 0)

class Exhausted:
    # Every mapping that this process may have: two neighbours never have the same protection.
    def __enter__(self):
        self.at, self.count = map_none(2 * MOST), 0
        for i in range(MOST):
            if libc.mprotect(ctypes.c_void_p(self.at + (2 * i + 1) * PAGE), ctypes.c_size_t(PAGE), 1):
                break
            self.count += 2
        self.single = 0
        while (at := map_none(1)) not in (None, 2**64 - 1) and self.single < 1000:
            libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), 1 if self.single % 2 else 3)
            self.single += 1
        assert ctypes.get_errno() == errno.ENOMEM
        assert refused(lambda: mmap.mmap(-1, 1 << 20), OSError).errno == errno.ENOMEM  # its own doing
        return self

    def __exit__(self, *exception):
        libc.munmap(ctypes.c_void_p(self.at), ctypes.c_size_t(2 * MOST * PAGE))

def maps():
    with open("/proc/self/maps") as file:
        return sum(1 for line in file)
"""

BEFORE_MERGING = (
    EXHAUST
    + r"""
arena = join(barrier=sys.argv[2])
blocks, content = two(arena, 512)
check(blocks, content)
with Exhausted() as exhausted:
    assert exhausted.count > MOST - 1000  # merging has kept none of them for itself
    reports = [arena.scan() for _ in range(3)]
    check(blocks, content)
    end = time.monotonic() + 60
    while sys.argv[3] not in str((report := arena.scan()).why_not):
        assert time.monotonic() < end, report
        time.sleep(0.1)
    check(blocks, content)
    assert report.pages_merged == 0
    own = arena.domain.stats()
    print(f"{maps()} of {MOST} mappings: {merged() // PAGE} pages merged")
    print(f"{own.failures} failures, {report.why_not}")
    assert own.vma_budget == 0 or sys.argv[3] != "KSM_EBUDGET"
scan_until(arena, 1024 - arena.stats().arena_pages_merged)
check(blocks, content)
assert merged() == 1024 * PAGE
print(f"{maps()} mappings: {merged() // PAGE} pages merged")
"""
)

AFTER_MERGING = (
    EXHAUST
    + r"""
arena = join(barrier=sys.argv[2], cow=sys.argv[3])
blocks, content = two(arena, 512)
scan_until(arena, 1024)
check(blocks, content)
assert merged() == 1024 * PAGE
model = bytearray(content)
with Exhausted():
    view = memoryview(blocks[0])
    for page in range(0, 512, 3):  # breaks that would each cost two mappings
        begin = slice(page * PAGE, page * PAGE + 4)
        view[begin] = model[begin] = page.to_bytes(4, "little")
    check(blocks[:1], model)
    check(blocks[1:], content)
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(AssertionError):
            check(blocks[:1], model)
            check(blocks[1:], content)
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for _ in range(3):
        arena.scan()
    check(blocks[:1], model)
    check(blocks[1:], content)
    with contextlib.suppress(MemoryError, ksmalloc.Error):
        arena.unmerge()
    check(blocks[:1], model)
    check(blocks[1:], content)
    broken = arena.domain.stats().cow_breaks
    print(f"{maps()} of {MOST} mappings: {merged() // PAGE} pages merged, {broken} broken")
    view.release()
    blocks.pop().free()
    check(blocks, model)
assert arena.unmerge() >= 0
check(blocks, model)
assert merged() == 0
twin = arena.alloc(len(model))
memoryview(twin)[:] = model
scan_until(arena, 1024)
check([*blocks, twin], model)
assert merged() == 1024 * PAGE
"""
)

pytestmark = pytest.mark.timeout(2 * SECONDS)


@pytest.mark.parametrize(
    ("barrier", "why_not"), [("move", "KSM_EBUDGET"), ("stop", "KSM_EBUDGET"), ("segv", "ENOMEM")]
)
def test_used_up_before_merging(barrier: str, why_not: str, processes: Processes, rendezvous: str) -> None:
    """Merging stops and says why (segv: the pages' guards need a mapping); it goes on when there are some."""
    print(run(processes, rendezvous, BEFORE_MERGING, barrier, why_not))


@pytest.mark.parametrize(
    ("barrier", "cow"), [("move", "kernel"), ("stop", "kernel"), ("move", "sigsegv"), ("segv", "sigsegv")]
)
def test_used_up_after_merging(barrier: str, cow: str, processes: Processes, rendezvous: str) -> None:
    """Writes, a fork, unmerging and freeing lose nothing, whatever they could not have."""
    print(run(processes, rendezvous, AFTER_MERGING, barrier, cow))
