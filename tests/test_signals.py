# SPDX-License-Identifier: MIT
"""Storms of signals at processes that allocate, merge, break and fork: merging goes on."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from conftest import Processes, wait_until
from forkkit import QUIET, Peer
from outside import merged
from surroundkit import BARRIERS, BLOCK, GUARDED, MERGED, Program

# Handlers in Python, which write into merged memory; and what the program does until there were enough.
STORM = (
    MERGED
    + GUARDED
    + r"""
import ctypes, select
log, twin = block(3), block(3)
merge()
counts, reaped = {}, []

def on_signal(number, frame):
    # Breaks a page that is merged, and puts back what was there.
    counts[number] = count = counts.get(number, 0) + 1
    at = count % 512 * PAGE
    with memoryview(log)[at : at + 8] as place:
        before = bytes(place)
        place[:] = count.to_bytes(8, "little")
        assert int.from_bytes(place, "little") == count
        place[:] = before
    if number == signal.SIGCHLD:
        reap()

def reap():
    while children - set(reaped):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            break
        reaped.append(pid)
        if status:
            errors.append(f"child {pid}: {status}")

children = set()
OURS = (signal.SIGRTMAX - 5, ksmalloc.capabilities(domain).stop_signal)
REALTIME = [signal.SIGRTMIN + 1, signal.SIGRTMAX]
for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGUSR1, signal.SIGCHLD, *REALTIME):
    assert number not in OURS
    signal.signal(number, on_signal)
libc = ctypes.CDLL(None, use_errno=True)

def scan():
    arena.scan()
    domain.stats()
    try:
        domain.sweep()
    except BlockingIOError:
        pass  # children come and go all the time

def waits():
    # Calls that wait: they go on after a handler, as Python promises.
    begin = time.monotonic()
    time.sleep(0.02)
    assert select.select([], [], [], 0.02) == ([], [], [])
    assert time.monotonic() - begin >= 0.04
    os.write(w, noise(4, PAGE))
    assert os.read(r, PAGE) == noise(4, PAGE)

r, w = os.pipe()
threads = [guarded(scan), guarded(waits)]
for thread in threads:
    thread.start()
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
say("storm", *REALTIME)
merges, breaks, interrupted, rounds = own().merges, own().cow_breaks, 0, 0
while (rounds < 12 or len(counts) < 6 or min(counts.values()) < 5 or sum(counts.values()) < 300
       or own().merges < merges + 512 or own().cow_breaks < breaks + 512):
    rounds += 1
    made = block(1)
    memoryview(mine[0])[: 64 * PAGE] = noise(5, 64 * PAGE)
    assert bytes(mine[0]) == noise(5, 64 * PAGE) + noise(1)[64 * PAGE :]
    memoryview(mine[0])[: 64 * PAGE] = noise(1, 64 * PAGE)
    arena.scan()
    assert right(made, 1) and right(mine[0], 1) and right(mine[1], 1)
    interrupted += libc.usleep(20000) != 0
    if rounds % 2:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        children.add(forked(lambda: (right(made, 1) or os._exit(3), memoryview(made).__setitem__(0, 1))))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    del made
over.set()
for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
    signal.setitimer(timer, 0)
for thread in threads:
    thread.join()
wait_until(lambda: reap() or not children - set(reaped))
assert not errors, errors
counted = own()
merge()
assert right(log, 3) and right(twin, 3) and right(mine[0], 1) and right(mine[1], 1) and right(mine[2], 100)
say("figures", counted.merges - merges, counted.cow_breaks - breaks, interrupted, rounds, len(reaped),
    sum(counts.values()), *[counts.get(number, 0) for number in (signal.SIGUSR1, *REALTIME)])
ask("rest")
"""
)


@contextmanager
def from_outside(acts: list[Callable[[], None]], pause: float = 0.001) -> Iterator[None]:
    """Do these things in turn, from a thread, all the time."""
    over = threading.Event()

    def loop() -> None:
        while not over.is_set():
            for act in acts:
                with suppress(ProcessLookupError):
                    act()
                time.sleep(pause)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@BARRIERS
def test_a_storm(processes: Processes, rendezvous: str, barrier: str) -> None:
    """Timers, children, strangers' signals, and stops of the whole process, all at once."""
    peer = Peer(processes, rendezvous, 50)
    program = Program(processes, rendezvous, barrier, STORM, flags=QUIET)
    word, *realtime = program.hear().split()
    assert word == "storm"

    def send(number: int) -> Callable[[], None]:
        return lambda: os.kill(program.pid, number)

    def pair() -> None:
        os.kill(program.pid, signal.SIGSTOP)
        time.sleep(0.0005)
        os.kill(program.pid, signal.SIGCONT)

    usr1, realtimes = send(signal.SIGUSR1), [send(int(number)) for number in realtime]
    seen = []
    with from_outside([usr1, *realtimes, usr1, pair]):
        for seed in range(100, 103):  # of this the program has a twin: block 100
            assert peer(f"add {seed}") == "ok"
        assert program.process.stdout is not None
        while not select.select([program.process.stdout], [], [], 0.05)[0]:
            seen.append(merged(program.pid))
        figures = program.hear().split()
    assert figures[0] == "figures"
    merges, breaks, interrupted, rounds, children, signals, *outside = map(int, figures[1:])
    print(
        f"\n{barrier}: {signals} signals ({outside} from outside), {merges} merges, {breaks} breaks, ", end=""
    )
    print(f"{children} children, {rounds} rounds, {interrupted} calls of C were interrupted")
    assert interrupted > 0, "the storm was not felt"
    assert children > 0
    assert merges >= 512, "merging went on meanwhile"
    assert max(seen) >= BLOCK, seen
    program.hear("rest")
    assert merged(program.pid) >= 4 * BLOCK
    assert peer("settle") == "True"
    assert peer("check") == "True"
    program.tell()
    program.end()
    assert wait_until(lambda: peer("stats").split()[3] == "1", timeout=30)
