# SPDX-License-Identifier: MIT
"""RLIMIT_NOFILE and RLIMIT_FSIZE: descriptors, and the size of files."""

from __future__ import annotations

import pytest
from conftest import Processes
from limitkit import SECONDS, run

pytestmark = pytest.mark.timeout(2 * SECONDS)

HAVE_ALL = r"""
def have_all():
    # Every descriptor that this process may have.
    limit("NOFILE", 256)
    found = []
    try:
        while True:
            found.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE
    return found
"""

NONE_LEFT = (
    HAVE_ALL
    + r"""
import resource, threading, random  # whatever comes later must not have to be imported
if sys.argv[2] == "before":
    arena = join()
    files = have_all()
else:
    files = have_all()
    arena = join()
assert refused(lambda: os.open("/dev/null", os.O_RDONLY), OSError).errno == errno.EMFILE
blocks, content = two(arena, 256)
report = arena.scan()
for _ in range(8):  # for what looks from outside
    os.close(files.pop())
check(blocks, content)
assert merged() == 512 * PAGE, report
other = subprocess.run([sys.executable, "-c", JOIN, PATH], capture_output=True, text=True)
assert other.stdout.split() == ["joined", "2"], other
files += have_all()

# A fork ends the scanner; the next one's descriptors pass through this table, where there is no place.
pid = os.fork()
if pid == 0:
    status = 1
    with contextlib.suppress(AssertionError):
        check(blocks, content)
        memoryview(blocks[0])[:] = content[::-1]
        check(blocks[1:], content)
        status = 0
    os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
check(blocks, content)
for file in files:
    os.close(file)
more = arena.alloc(len(content))
memoryview(more)[:] = content
try:
    scan_until(arena, 256)
    print(f"{sys.argv[2]}: merging goes on after a fork")
except ksmalloc.PeerError as error:
    print(f"{sys.argv[2]}: after a fork: {error}")
check([*blocks, more], content)
for block in blocks:
    memoryview(block)[:] = content[::-1]
check(blocks, content[::-1])
"""
)

TOO_FEW = r"""
enough = []
for most in range(3, 64):
    limit("NOFILE", most)
    try:
        domain = ksmalloc.Domain("limits", path=PATH)
        assert domain.stats().peers == 1
        domain.close()
        enough.append(most)
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    finally:
        lift("NOFILE")
    assert is_alone()
assert enough[0] > 6
assert enough[-1] == 63
arena = join()
blocks, content = two(arena)
scan_until(arena, 32)
check(blocks, content)
assert merged() == 32 * PAGE
print("numbers of descriptors that are enough for a domain:", *enough[:8], "…")
"""

FILE_SIZE = r"""
def make(capacity):
    return ksmalloc.Domain("limits", path=PATH, capacity=capacity)

for most in (0, 100, 4095, 4096, 1 << 20, (64 << 20) - 1):
    limit("FSIZE", most)
    assert refused(lambda: make("64MiB"), OSError).errno == errno.EFBIG
    assert is_alone()
limit("FSIZE", 64 << 20)
domain = make("64MiB")
arena = ksmalloc.Arena(domain=domain, scan=False)
blocks, content = two(arena, 256)
first, rest = arena.scan(), two(arena, 256, seed=2)
check(blocks, content)
assert merged() == 512 * PAGE, first

# Lowered when the domain is there: frames that lie further on in the store cannot be written.
limit("FSIZE", 1 << 20)
for _ in range(3):
    report = arena.scan()
check(blocks, content)
check(*rest)
assert merged() == 512 * PAGE
assert "EFBIG" in report.why_not, report
print(f"{domain.stats().failures} failures: {report.why_not}")
other = subprocess.run([sys.executable, "-c", JOIN, PATH], capture_output=True, text=True)
print("another process under the same limit:", other.stdout, other.stderr)
assert other.returncode == 0
lift("FSIZE")
scan_until(arena, 512)
check(*rest)
assert merged() == 1024 * PAGE
"""

JOIN = r"""
import subprocess

JOIN = '''
import sys
import ksmalloc
try:
    name = sys.argv[2] if sys.argv[2:] else "nobody"
    print("joined", ksmalloc.Domain(name, path=sys.argv[1]).stats().peers)
except OSError as error:
    print(type(error).__name__, error.errno)
'''
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_no_descriptor_left(when: str, processes: Processes, rendezvous: str) -> None:
    """Before joining or after it: the scanner has a table of its own."""
    print(run(processes, rendezvous, JOIN + NONE_LEFT, when))


def test_too_few_descriptors(processes: Processes, rendezvous: str) -> None:
    """A clear error, and nothing left behind."""
    print(run(processes, rendezvous, TOO_FEW))


def test_file_size(processes: Processes, rendezvous: str) -> None:
    """An error instead of SIGXFSZ: for a store that is too large, and for frames beyond the limit."""
    print(run(processes, rendezvous, JOIN.replace('"nobody"', '"limits"') + FILE_SIZE))
