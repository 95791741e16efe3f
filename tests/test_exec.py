# SPDX-License-Identifier: MIT
"""`os.exec*()` while threads are held: a signal that reaches one inside exec would end the new program."""

from __future__ import annotations

import os
import sys

from conftest import Processes
from forkkit import QUIET, environment

PROGRAM = r"""
import os, sys, threading, time
import ksmalloc

left = int(sys.argv[2])
arena = ksmalloc.Arena(domain=ksmalloc.Domain("exec", path=sys.argv[1]), barrier="stop")
blocks = [arena.alloc(1 << 18) for _ in range(2)]
for block in blocks:
    memoryview(block)[:] = b"x" * len(block)

def merge():
    while True:
        arena.scan()
        memoryview(blocks[0])[::4096] = b"y" * 64

threading.Thread(target=merge, daemon=True).start()
while arena.stats().stops < 20:
    time.sleep(0.001)
if left:
    os.execv(sys.executable, [sys.executable, *sys.argv[3:], sys.argv[1], str(left - 1), *sys.argv[3:]])
print("done")
"""
EXECS = 12

FAILING = r"""
import os, sys
import ksmalloc

domain = ksmalloc.Domain("exec", path=sys.argv[1])
arena = ksmalloc.Arena(domain=domain, barrier="stop", scan=False)
blocks = [arena.alloc(1 << 18) for _ in range(2)]
for block in blocks:
    memoryview(block)[:] = b"x" * len(block)
assert arena.scan().pages_merged > 0
try:
    os.execv("/nowhere", ["nowhere"])
except FileNotFoundError:
    pass
memoryview(blocks[0])[:] = b"y" * len(blocks[0])
before = arena.stats().stops
report = arena.scan()
assert "KSM_EUNSTOPPABLE" in str(report.why_not), report
assert arena.stats().stops == before
found = ksmalloc.capabilities(domain)
assert any("exec" in line for line in str(found).splitlines()), found
assert bytes(blocks[0]) == b"y" * len(blocks[0]) and bytes(blocks[1]) == b"x" * len(blocks[1])
print("done")
"""


def test_exec_while_threads_are_held(processes: Processes, rendezvous: str, tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "program.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(PROGRAM)
    process = processes.popen(
        sys.executable, *QUIET, path, rendezvous, EXECS, *QUIET, path, env=environment()
    )
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output, errors) == (0, "done\n", "")


def test_an_exec_that_fails(processes: Processes, rendezvous: str) -> None:
    """Nobody is held for a while, and nothing else happens."""
    process = processes.python(FAILING, rendezvous, env=environment())
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (0, "done\n", "")
