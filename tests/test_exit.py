# SPDX-License-Identifier: MIT
"""Processes that end while their arenas live, in every way that Python knows: nothing is left."""

from __future__ import annotations

import os
import signal

import pytest
from conftest import Processes, wait_until
from forkkit import Peer
from outside import merged
from surroundkit import BARRIERS, BLOCK, MERGED, PROGRAM, Program

# A body each, and the status it ends with. Before it the program has merged, and was looked at from outside.
ENDINGS = {
    "by itself": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "sys.exit in a thread": (
        """
thread = threading.Thread(target=sys.exit, args=(3,))
thread.start()
thread.join()
""",
        0,
    ),
    "os._exit": ("os._exit(4)", 4),
    "killed": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "a thread that writes on": (
        """
def write():
    for number in range(200):
        memoryview(mine[1])[: 64 * PAGE] = noise(number % 3, 64 * PAGE)
        time.sleep(0.001)
    memoryview(mine[1])[:] = noise(1)
    assert right(mine[1], 1)
    arena.scan()
threading.Thread(target=write).start()
""",
        0,
    ),
    "daemons": (
        """
def write():
    while True:
        memoryview(mine[0])[: 8 * PAGE] = noise(1, 8 * PAGE)

def copy():  # without the GIL
    import numpy
    to, source = numpy.asarray(mine[1]), numpy.frombuffer(noise(1), numpy.uint8)
    while True:
        numpy.copyto(to, source)

def scan():
    while True:
        arena.scan()

def allocate():
    while True:
        memoryview(block(5))[:PAGE] = bytes(PAGE)

def receive():
    r, w = os.pipe()
    threading.Thread(target=lambda: [os.write(w, noise(1, PAGE)) for _ in iter(int, 1)], daemon=True).start()
    while True:
        os.readv(r, [memoryview(mine[2])[:PAGE]])

for work in (write, copy, scan, allocate, receive):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
""",
        0,
    ),
    "globals and cycles": (
        """
import builtins, gc, mmap, types
gc.disable()
module = types.ModuleType("keeper")
module.block, module.views, module.arena = block(1), [memoryview(mine[0]), memoryview(mine[2])], arena
builtins.kept = sys.modules["keeper"] = module

class Cycle:
    def __init__(self):
        self.me, self.block, self.arena = self, block(79), ksmalloc.Arena(domain=domain)

cycles = [Cycle() for _ in range(3)]
memory = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = noise(1)
registered = ksmalloc.register(memory, domain=domain)
domain.kept = cycles
arena.scan()
del module, cycles, memory, registered
""",
        0,
    ),
    "finalisers": (
        """
class Last:
    # Used while modules are taken apart.
    def __init__(self):
        self.arena, self.view, self.noise = arena, memoryview(mine[1]), noise(1)

    def __del__(self):
        assert bytes(self.view) == self.noise
        self.view[:4096] = bytes(4096)
        self.arena.scan()
        made = self.arena.alloc(1 << 20)
        memoryview(made)[:100] = self.noise[:100]

last = Last()
last.me = last
""",
        0,
    ),
    "frozen": (
        """
import faulthandler
faulthandler.enable()
guarded = ksmalloc.Arena(domain=domain, cow="sigsegv")
blocks = [guarded.alloc(NBYTES) for _ in range(2)]
for made in blocks:
    memoryview(made)[:] = noise(1)
view = arena.freeze(mine[0])
guarded.scan()
assert guarded.stats().arena_pages_merged == 2 * 512

def write():
    while True:
        memoryview(blocks[0])[: 8 * PAGE] = noise(1, 8 * PAGE)
        guarded.scan()
threading.Thread(target=write, daemon=True).start()
time.sleep(0.05)
""",
        0,
    ),
    "children": (
        """
def child():
    made = block(1)
    arena.scan()
    assert right(mine[1], 1) and right(made, 1)
    memoryview(mine[1])[:] = noise(2)

ended(forked(child))
pid = os.fork()
if pid:
    ended(pid)
    assert right(mine[1], 1)
else:
    child()  # and ends as its parent does
""",
        0,
    ),
}


def settled_and_alone(peer: Peer, rendezvous: str) -> None:
    """What the dead process held is given back, by a peer whose bytes are right."""
    assert wait_until(lambda: peer("stats").split()[3] == "1", timeout=30), peer("stats")
    assert peer("sweep").isdigit()
    assert peer("settle") == "True"
    shared, merged_pages, store_bytes, _ = map(int, peer("stats").split())
    assert shared == merged_pages == 512, "its frames are there, and no others"
    assert store_bytes == BLOCK
    assert peer("check") == "True"
    names = os.listdir(os.path.join(rendezvous, "fork"))
    assert len(names) <= 3, "the domain's file, and a socket for each seat, for whoever takes that next"


@pytest.mark.parametrize("ending", ENDINGS)
@BARRIERS
def test_the_end(processes: Processes, rendezvous: str, barrier: str, ending: str) -> None:
    body, status = ENDINGS[ending]
    peer = Peer(processes, rendezvous, 50)
    program = Program(processes, rendezvous, barrier, f"{MERGED}\nask('merged')\n{body}")
    program.hear("merged")
    assert peer("settle") == "True"
    assert merged(program.pid) >= 2 * BLOCK
    program.tell()
    program.end(status)
    settled_and_alone(peer, rendezvous)


def test_an_exception(processes: Processes, rendezvous: str) -> None:
    """Python says what it was, and nobody else says anything."""
    peer = Peer(processes, rendezvous, 50)
    program = Program(processes, rendezvous, "move", f"{MERGED}\nask('merged')\nraise KeyError('the end')")
    program.hear("merged")
    assert peer("settle") == "True"
    assert merged(program.pid) >= 2 * BLOCK
    out, err = program.process.communicate("\n", timeout=60)
    assert (program.process.returncode, out) == (1, "")
    assert err.startswith("Traceback"), err
    assert err.endswith("\nKeyError: 'the end'\n"), err
    assert err.count("\n") <= 4, err
    settled_and_alone(peer, rendezvous)


AT_EXIT = r"""
import atexit, sys
order = []

def fork(function):
    try:
        ended(forked(function))
    except RuntimeError as error:  # from Python 3.12 on
        assert "can't fork at interpreter shutdown" in str(error)

@atexit.register
def before():  # registered before the import: runs last
    import os
    merge()
    assert right(mine[0], 1) and own().pages_merged >= 2 * 512, own()
    memoryview(mine[0])[:PAGE] = bytes(PAGE)
    made = block(1)
    arena.scan()
    fork(lambda: arena.scan())
    assert right(made, 1) and order == ["after"]
    os.write(1, b"before\n")
"""
AFTER = r"""
@atexit.register
def after():
    order.append("after")
    assert right(mine[2], 100)
    memoryview(mine[1])[:] = noise(2)
    memoryview(mine[1])[:] = noise(1)
    fork(lambda: memoryview(mine[1]).__setitem__(slice(PAGE), bytes(PAGE)))
    assert ksmalloc.settle(30, domain=domain).settled
    assert right(mine[1], 1)
    say("after")
"""


@BARRIERS
def test_exit_handlers(processes: Processes, rendezvous: str, barrier: str) -> None:
    """Registered before ksmalloc was imported, and after."""
    peer = Peer(processes, rendezvous, 50)
    body = MERGED + AFTER + "ask('merged')\n"
    program = Program(processes, rendezvous, barrier, body, start=AT_EXIT + PROGRAM)
    program.hear("merged")
    assert peer("settle") == "True"
    assert merged(program.pid) >= 2 * BLOCK
    program.tell()
    program.hear("after")
    program.hear("before")
    program.end()
    settled_and_alone(peer, rendezvous)
