# SPDX-License-Identifier: MIT
"""Programs that run in a process of their own, for what must not happen in the tests' process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import Processes
from pace import SLOWER

import ksmalloc

QUIET = ("-W", "ignore::DeprecationWarning")  # a program with threads of its own is warned by Python itself

START = (
    f"SLOWER = {SLOWER}\n"
    + r"""
import functools, os, random, signal, sys, threading, time
import ksmalloc

PAGE = 4096
NBYTES = 512 * PAGE
domain = ksmalloc.Domain("fork", path=sys.argv[1])
if domain.stats().barrier == "none":
    print("skip:", domain.stats().why_not)
    os._exit(0)
arena = ksmalloc.Arena(domain=domain)

@functools.cache
def noise(seed, nbytes=NBYTES):
    return random.Random(seed).randbytes(nbytes)

def block(seed):
    made = arena.alloc(NBYTES)
    memoryview(made)[:] = noise(seed)
    return made

def right(made, seed):
    return bytes(made) == noise(seed)

def merge():
    arena.scan()
    arena.scan()

def own():
    return next(peer.stats for peer in domain.peers if peer.is_self)

def wait_until(condition, timeout=10):
    end = time.monotonic() + SLOWER * timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(condition)
        time.sleep(0.005)

def forked(function):
    # The child ends with 0 if the function returns, the parent asserts that it did.
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(50 * SLOWER))  # does not outlive the test, whatever happens
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid

def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
)


def environment() -> dict[str, str]:
    """Programs that are files find the package where we did."""
    place = os.path.dirname(os.path.dirname(os.path.abspath(ksmalloc.__file__)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([place, *sys.path])}


def run(
    processes: Processes,
    rendezvous: str,
    body: str,
    *flags: str,
    arguments: tuple[Any, ...] = (),
    start: str = START,
) -> str:
    """Run the start and a body to the end; returns what it printed. Nothing may come on stderr."""
    command = [sys.executable, *flags, "-c", start + body, rendezvous, *arguments]
    process = processes.popen(*command, env=environment())
    out, err = process.communicate(timeout=60 * SLOWER)
    assert (process.returncode, err) == (0, ""), f"{out}{err}"
    if out.startswith("skip:"):
        pytest.skip(out)
    return str(out)


PEER = (
    START
    + r"""
mine = [block(1), block(int(sys.argv[2]))]
print("ready", flush=True)
for line in sys.stdin:
    command, _, seed = line.strip().partition(" ")
    if command == "add":
        mine.append(block(int(seed)))
        answer = "ok"
    elif command == "settle":
        answer = ksmalloc.settle(30 * SLOWER, domain=domain).settled
    elif command == "sweep":
        answer = domain.sweep()
    elif command == "check":
        answer = right(mine[0], 1) and right(mine[1], int(sys.argv[2])) and all(
            right(made, seed) for made, seed in zip(mine[2:], range(100, 200)))
    elif command == "stats":
        stats = domain.stats()
        answer = f"{stats.pages_shared} {stats.pages_merged} {stats.store_bytes} {stats.peers}"
    print(answer, flush=True)
"""
)


class Peer:
    """Another process of the domain, that does what it is told. Its second block is of its own."""

    def __init__(self, processes: Processes, rendezvous: str, seed: int) -> None:
        command = [sys.executable, "-c", PEER, rendezvous, str(seed)]
        self.process: subprocess.Popen[str] = processes.popen(*command, env=environment())
        line = self._answer()
        if line.startswith("skip:"):
            pytest.skip(line)
        assert line == "ready"

    def __call__(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        return self.process.stdout.readline().strip() or self.process.stderr.read()


# After START: a program that writes files while it merges. It says how far it is, and goes on when told to.
FILES = r"""
folder = sys.argv[2]
mine = [block(1), block(99)]
merge()
ksmalloc.settle(30 * SLOWER, domain=domain)

def say(what):
    os.write(1, f"{what}\n".encode())
    assert os.read(0, 1) == b"\n"

class Files:
    # As many descriptors as are free below 64, each a file with contents that we know.
    def __init__(self, name):
        self.contents = {}
        self.paths = {}
        while len(self.contents) < 40:
            path = f"{folder}/{name}-{len(self.contents)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            self.paths[fd], self.contents[fd] = path, b""

    def write(self):
        for fd in self.contents:
            new = os.urandom(3000) + b"end"
            assert os.write(fd, new) == len(new)
            self.contents[fd] += new

    def check(self):
        for fd, right in self.contents.items():
            assert os.pread(fd, 1 << 20, 0) == right, f"descriptor {fd} reads something else"
            assert os.lseek(fd, 0, os.SEEK_CUR) == len(right) == os.fstat(fd).st_size
            with open(self.paths[fd], "rb") as file:
                assert file.read() == right, f"{self.paths[fd]} has other contents"

def check():
    assert right(mine[0], 1) and right(mine[1], 99)
    assert all(right(made, seed) for made, seed in zip(mine[2:], range(100, 200)))

def go_on(files, first, count):
    # New data, of which the peer gets duplicates, is merged while the program uses its files.
    before = own().merges
    for seed in range(first, first + count):
        mine.append(block(seed))
        files.write()
    say(f"loaded {first} {count}")
    files.write()
    files.check()
    assert ksmalloc.settle(30 * SLOWER, domain=domain).settled
    files.check()
    assert own().merges - before >= count * 512, (before, own(), domain.peers)
    check()
    say("merged")
    files.write()
    files.check()
    check()
"""
