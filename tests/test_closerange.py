# SPDX-License-Identifier: MIT
"""A program that closes all descriptors, as daemons do: merging goes on, and its own files stay its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Processes
from forkkit import FILES, START, Peer, environment, run


def follow(program: subprocess.Popen[str], peers: list[Peer]) -> None:
    """Let the program run to its end; at its words the first peer loads what it has loaded, and all check."""
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stderr is not None
    for line in program.stdout:
        word, *numbers = line.split()
        if word == "loaded":
            first, count = map(int, numbers)
            for seed in range(first, first + count):
                assert peers[0](f"add {seed}") == "ok"
        elif word == "merged":
            for peer in peers:
                peer("sweep")
                assert peer("check") == "True"
        else:
            assert word == "over", line
        program.stdin.write("\n")
        program.stdin.flush()
    assert (program.wait(30), program.stderr.read()) == (0, "")


def after(peers: list[Peer], added: int) -> None:
    """When the program has ended nobody has lost a frame, and only those that the peers use are left."""
    assert peers[0]("settle") == "True"
    for peer in peers:
        peer("sweep")
        assert peer("check") == "True"
    shared, merged, store, living = map(int, peers[0]("stats").split())
    assert (shared, merged, store, living) == (
        512 * (1 + added),
        512 * (2 + added),
        512 * 4096 * (1 + added),
        2,
    )


@pytest.fixture
def peers(processes: Processes, rendezvous: str) -> list[Peer]:
    """Two other processes. Both hold block 1, as the program does; nobody but themselves their other ones."""
    return [Peer(processes, rendezvous, seed) for seed in (97, 98)]


def start(processes: Processes, rendezvous: str, folder: Path, body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START + FILES + body, rendezvous, str(folder)]
    return processes.popen(*command, env=environment())


def test_merging_goes_on(processes: Processes, rendezvous: str, tmp_path: Path, peers: list[Peer]) -> None:
    body = """
assert own().pages_merged == 512, own()
os.closerange(3, 65536)
files = Files("after")
go_on(files, 100, 4)
os.closerange(3, 65536)  # once more, now the program's files go, too
files = Files("again")
go_on(files, 104, 2)
say("over")
"""
    follow(start(processes, rendezvous, tmp_path, body), peers)
    after(peers, 6)


def test_then_fork(processes: Processes, rendezvous: str, tmp_path: Path, peers: list[Peer]) -> None:
    body = """
os.closerange(3, 65536)
files = Files("parent")
go_on(files, 100, 1)

def child():
    check()
    files.check()
    others = Files("child")
    files.contents.clear()  # the offsets of inherited descriptors are shared with the parent
    go_on(others, 101, 2)
    os.closerange(3, 65536)
    others = Files("child-again")
    go_on(others, 103, 1)

ended(forked(child))
del mine[3:]
files.check()
check()
mine.extend(block(seed) for seed in (101, 102, 103))
go_on(files, 104, 1)
say("over")
"""
    follow(start(processes, rendezvous, tmp_path, body), peers)
    after(peers, 5)


def test_a_daemon(processes: Processes, rendezvous: str, tmp_path: Path, peers: list[Peer]) -> None:
    """Double fork, a session of its own, all descriptors closed: what python-daemon does."""
    body = """
files = Files("before")  # descriptors that a daemon gets rid of
r, w = os.pipe()

def first():
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.alarm(50)
    os.chdir("/")
    os.umask(0o077)
    keep = {w}
    for fd in range(3, 4096):
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass
    check()
    daemon = Files("daemon")
    go_on(daemon, 100, 3)
    os.write(w, b"done")

ended(forked(first))
os.close(w)
assert os.read(r, 4) == b"done"
files.check()
check()
say("over")
"""
    follow(start(processes, rendezvous, tmp_path, body), peers)
    after(peers, 3)


def test_different_data_is_not_merged(processes: Processes, rendezvous: str) -> None:
    body = """
a = block(1)
r, w = os.pipe()
r2, w2 = os.pipe()

def other():
    os.closerange(200, 65536)
    b = block(2)
    os.write(w, b"x")
    os.read(r2, 1)
    assert right(b, 2)

pid = forked(other)
assert os.read(r, 1)
os.dup2(w2, 199)
os.closerange(3, 199)
b, c = block(3), block(4)
assert ksmalloc.settle(30, domain=domain).settled
stats = domain.stats()
assert (stats.peers, stats.pages_shared, stats.merges, stats.store_bytes) == (2, 0, 0, 0), stats
os.write(199, b"x")
ended(pid)
assert right(a, 1) and right(b, 3) and right(c, 4)
"""
    run(processes, rendezvous, body)


AT_ONCE = """
import os, sys, time
closing = False

def close():
    if closing:
        os.closerange(3, 65536)
        for _ in range(200 if sys.argv[2] == "orphan" else 0):
            if os.getppid() != parent:
                break
            time.sleep(0.01)

os.register_at_fork(after_in_child=close)  # runs before ksmalloc may start anything in the child
"""


@pytest.mark.parametrize("parent", ["lives", "orphan"])
def test_closed_before_the_child_merges(processes: Processes, rendezvous: str, parent: str) -> None:
    """Whoever lives gives the descriptors again; if nobody does, merging stops, and nothing is lost."""
    body = """
a, b = block(1), block(1)
merge()
closing, parent = True, os.getpid()

def child():
    assert right(a, 1) and right(b, 1)
    c = block(1)
    if sys.argv[2] == "lives":
        merge()
        assert own().pages_merged == 1536 and len(domain.peers) == 2, own()
    else:
        try:
            merge()
            raise AssertionError("nobody could have given the store again")
        except ksmalloc.PeerError:
            pass
    memoryview(a)[:] = noise(2)
    d = block(3)
    a.free()
    e = block(4)
    assert right(b, 1) and right(c, 1) and right(d, 3) and right(e, 4)
    os.write(1, b"over")

pid = forked(child)
if sys.argv[2] == "lives":
    ended(pid)
    assert right(a, 1) and right(b, 1)
    domain.sweep()
    assert domain.stats().store_bytes == NBYTES
else:
    time.sleep(0.1)
    os._exit(0)
"""
    assert run(processes, rendezvous, body, arguments=(parent,), start=AT_ONCE + START) == "over"
