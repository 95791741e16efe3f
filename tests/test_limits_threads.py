# SPDX-License-Identifier: MIT
"""RLIMIT_NPROC and RLIMIT_SIGPENDING: threads that cannot be started, signals that cannot be sent."""

from __future__ import annotations

import pytest
from conftest import Processes
from limitkit import SECONDS, needs_root, run

pytestmark = pytest.mark.timeout(2 * SECONDS)

NO_THREAD = r"""
become_nobody()
limit("NPROC", 1)
open_files = len(os.listdir("/proc/self/fd"))
error = refused(join, OSError)
assert error.errno == errno.EAGAIN, error
print("no thread to be had:", error)
assert len(os.listdir("/proc/self/fd")) == open_files
assert os.listdir(PATH) == []
lift("NPROC")
arena = join()
blocks, content = two(arena, 64)
scan_until(arena, 128)
check(blocks, content)
assert merged() == 128 * PAGE

# A fork ends the scanner. There is no child, for it would be one process more, and no new scanner.
limit("NPROC", 1)
assert refused(os.fork, OSError).errno == errno.EAGAIN
assert refused(arena.scan, OSError).errno == errno.EAGAIN
check(blocks, content)
model = bytearray(content)
model[: 8 * PAGE] = memoryview(blocks[0])[: 8 * PAGE] = random.Random(9).randbytes(8 * PAGE)
more = arena.alloc(len(content))
memoryview(more)[:] = content
check(blocks[:1], model)
check([blocks[1], more], content)
blocks.pop().free()
lift("NPROC")
scan_until(arena, 64)
check(blocks, model)
check([more], content)
pid = os.fork()
if pid == 0:
    check(blocks, model)
    limit("NPROC", 1)
    with contextlib.suppress(OSError):
        arena.scan()
    check([more], content)
    lift("NPROC")
    arena.scan()
    assert arena.domain.stats().peers == 2
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
check(blocks, model)
check([more], content)
"""

NO_SIGNAL = r"""
arena = join(barrier="stop")
blocks, content = two(arena, 64)
done = threading.Event()
thread = threading.Thread(target=done.wait)
thread.start()
check(blocks, content)
limit("SIGPENDING", 0)
for _ in range(3):  # asking the scanner takes a signal, too
    report = arena.scan()
    check(blocks, content)
found = ksmalloc.capabilities(arena.domain)
assert (merged(), report.pages_merged) == (0, 0)
assert "KSM_EUNSTOPPABLE" in report.why_not, report
assert "RLIMIT_SIGPENDING" in repr(found), found
print(found)
lift("SIGPENDING")
scan_until(arena, 128)
check(blocks, content)
assert merged() == 128 * PAGE
done.set()
thread.join()
"""


@needs_root
def test_no_thread(processes: Processes, rendezvous: str) -> None:
    """Of another user's, because root may have any number: a clear error, and later it works."""
    print(run(processes, rendezvous, NO_THREAD))


def test_no_signal(processes: Processes, rendezvous: str) -> None:
    """The barrier "stop" needs a signal for each thread."""
    print(run(processes, rendezvous, NO_SIGNAL))
