# SPDX-License-Identifier: MIT
"""Subinterpreters: refused, with a reason; the main interpreter's arenas do not notice them.

The core is one for the process, and keeps references to objects of the interpreter that has imported it.
"""

from __future__ import annotations

import pytest
from conftest import Processes
from forkkit import QUIET, START, run
from outside import SOURCE

# Before START, which imports ksmalloc: interpreters by whatever names this Python has for them.
INTERPRETERS = r"""
import sys
try:
    import _interpreters
except ImportError:
    try:
        import _xxsubinterpreters as _interpreters
    except ImportError:
        print("skip: this Python was built without subinterpreters")
        sys.exit()

def create(kind):
    # "isolated": with a GIL of its own, from Python 3.12 on.
    if sys.version_info >= (3, 13):
        return _interpreters.create(kind)
    return _interpreters.create(isolated=kind == "isolated")

def execute(number, code):
    if sys.version_info >= (3, 13):
        failure = _interpreters.exec(number, code)
        assert failure is None, failure
    else:
        _interpreters.run_string(number, code)

KIND = sys.argv[2]
REFUSED = '''
for attempt in range(3):
    try:
        import ksmalloc
    except ImportError as error:
        assert "interpreters" in str(error), error
    else:
        raise AssertionError("it was imported")
import sys
assert not any(name.startswith("ksmalloc._core") for name in sys.modules)
'''

def refuse():
    number = create(KIND)
    execute(number, REFUSED)
    _interpreters.destroy(number)
"""
# After START: the main interpreter goes on, and so does a child of its.
GOES_ON = (
    SOURCE
    + r"""
def goes_on():
    before = own().merges
    mine = [block(7), block(7)]
    merge()
    assert own().merges >= before + 2 * 512, own()
    assert all(right(made, 7) for made in mine) and merged() >= 2 * NBYTES
    ended(forked(lambda: (arena.scan(), memoryview(mine[0]).__setitem__(slice(PAGE), bytes(PAGE)))))
    time.sleep(0.02)
    assert all(right(made, 7) for made in mine)
"""
)
KINDS = pytest.mark.parametrize("kind", ["legacy", "isolated"])


def run_all(processes: Processes, rendezvous: str, kind: str, before: str, body: str) -> None:
    start = INTERPRETERS + before + START + GOES_ON
    run(processes, rendezvous, body, *QUIET, arguments=(kind,), start=start)


@KINDS
@pytest.mark.parametrize("first", ["the main one", "a subinterpreter"])
def test_it_is_refused(processes: Processes, rendezvous: str, kind: str, first: str) -> None:
    """Whoever comes first: the main interpreter can import it afterwards, and loses nothing."""
    before = "refuse()\n" if first == "a subinterpreter" else ""
    body = """
kept = [block(1), block(1), block(2)]
merge()
for _ in range(3):
    refuse()
    assert right(kept[0], 1) and right(kept[1], 1) and right(kept[2], 2)
    assert own().pages_merged == 2 * 512 == merged() // PAGE, own()
goes_on()
"""
    run_all(processes, rendezvous, kind, before, body)


@KINDS
def test_interpreters_come_and_go(processes: Processes, rendezvous: str, kind: str) -> None:
    """They work in threads of their own, while the main one merges and rewrites what it has."""
    body = """
WORK = '''
import gc
kept = [bytearray(str(n).encode() * 100) for n in range(2000)]
kept.append(kept)
del kept
gc.collect()
'''
kept = [block(1), block(1), block(2)]
rewritten = block(3)
over, counts = threading.Event(), [0, 0, 0]

def interpreters(which):
    while not over.is_set():
        number = create(KIND)
        execute(number, WORK if counts[which] % 2 else REFUSED)
        _interpreters.destroy(number)
        counts[which] += 1

def rewrite():
    while not over.is_set():
        memoryview(rewritten)[:] = noise(1)
        arena.scan()
        memoryview(rewritten)[: 64 * PAGE] = noise(2, 64 * PAGE)
        counts[2] += 1

threads = [threading.Thread(target=interpreters, args=(which,)) for which in (0, 1)]
threads.append(threading.Thread(target=rewrite))
for thread in threads:
    thread.start()
wait_until(lambda: min(counts) >= 10, 50)
over.set()
for thread in threads:
    thread.join()
assert right(kept[0], 1) and right(kept[1], 1) and right(kept[2], 2)
assert bytes(rewritten) == noise(2, 64 * PAGE) + noise(1)[64 * PAGE:]
assert own().merges >= 2 * 512 and own().cow_breaks >= 64, own()
goes_on()
"""
    run_all(processes, rendezvous, kind, "", body)


@KINDS
def test_programs_started_by_an_interpreter(processes: Processes, rendezvous: str, kind: str) -> None:
    """A fork ends our thread, whoever forks; it starts again although the main interpreter does nothing."""
    body = """
SPAWN = '''
import subprocess, sys
subprocess._USE_VFORK = False  # then it forks, and handlers of fork run in this interpreter's thread
for _ in range(5):
    try:
        assert subprocess.run(["true"]).returncode == 0
    except RuntimeError as error:
        assert sys.version_info < (3, 12) and "isolated" in str(error)
for _ in range(10000):
    pass  # pending calls run between two bytecodes
'''
kept = [block(1), block(1)]
merge()
number = create(KIND)
for _ in range(5):
    execute(number, SPAWN)
    assert right(kept[0], 1) and right(kept[1], 1)
    wait_until(lambda: any(open(f"/proc/self/task/{tid}/comm").read() == "ksmalloc\\n"
                           for tid in os.listdir("/proc/self/task")))
_interpreters.destroy(number)
goes_on()
"""
    run_all(processes, rendezvous, kind, "", body)
