# SPDX-License-Identifier: MIT
"""Storms of short children and of spawned programs, while the program merges and rewrites its memory.

Each program merges and breaks pages all the time, and checks what it holds. None may hang or lose a byte.
"""

from __future__ import annotations

from conftest import Processes
from forkkit import QUIET, START, run

# After START: a thread merges without end, another gives a block twins and takes them away again, until
# over() is called, which checks everything.
BUSY = r"""
import subprocess
kept = [(block(seed), seed) for seed in (1, 1, 2, 2)]
rewritten = block(3)
merge()
before = own()
assert before.pages_merged >= 4 * 512, before
end = threading.Event()

def scan():
    while not end.is_set():
        arena.scan()

def rewrite():
    while not end.is_set():
        merged = own().merges
        memoryview(rewritten)[:] = noise(1)
        while own().merges == merged and not end.is_set():
            time.sleep(0.002)
        memoryview(rewritten)[:] = noise(3)

threads = [threading.Thread(target=scan), threading.Thread(target=rewrite)]
for thread in threads:
    thread.start()

def over():
    end.set()
    for thread in threads:
        thread.join()
    assert all(right(*pair) for pair in kept)
    assert right(rewritten, 3)
    now = own()
    assert now.merges > before.merges and now.cow_breaks > before.cow_breaks, (before, now)
    memoryview(rewritten)[:] = noise(1)
    merge()
    assert own().pages_merged >= 5 * 512, own()
    assert all(right(*pair) for pair in kept) and right(rewritten, 1)

def until(seconds):
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        yield
"""


def test_a_storm_of_short_children(processes: Processes, rendezvous: str) -> None:
    """Some touch and write merged pages, some exec, some crash, some fork again; from two threads at once."""
    body = """
counts = [0, 0]

def child(number):
    kind = number % 5
    assert right(*kept[number % 4])
    memoryview(kept[0][0])[: PAGE * 8] = bytes(PAGE * 8)  # a child's own
    if kind == 0:
        os.execv("/bin/true", ["true"])
    if kind == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 2:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 3:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if right(*kept[1]) else 1)
        ended(pid)
    assert bytes(kept[0][0])[: PAGE * 8] == bytes(PAGE * 8) and right(*kept[1])

def storm(which):
    expected = {0: 0, 1: -signal.SIGKILL, 2: -signal.SIGSEGV, 3: 0, 4: 0}
    for _ in until(8):
        numbers = range(counts[which], counts[which] + 5)
        pids = [forked(lambda: child(number)) for number in numbers]
        for number, pid in zip(numbers, pids):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == expected[number % 5], (number % 5, code)
        counts[which] += 5

done = []
stormers = [threading.Thread(target=lambda w=w: (storm(w), done.append(w))) for w in (0, 1)]
for thread in stormers:
    thread.start()
for thread in stormers:
    thread.join()
assert len(done) == 2
over()
assert len(domain.peers) == 1
"""
    run(processes, rendezvous, body, *QUIET, start=START + BUSY)


def test_a_storm_of_spawned_programs(processes: Processes, rendezvous: str) -> None:
    """vfork, posix_spawn and fork with exec, from threads, with data in merged memory on its way."""
    body = """
counts = [0, 0, 0]

def by_vfork():  # subprocess uses vfork
    for _ in until(5):
        with memoryview(kept[0][0]) as data:
            assert subprocess.run(["cat"], input=data, capture_output=True).stdout == noise(1)
        counts[0] += 1

def by_spawn():
    for _ in until(5):
        pids = [os.posix_spawn("/bin/true", ["true"], os.environ) for _ in range(3)]
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 3
        counts[1] += 3

def by_fork():  # a preexec function makes it fork
    for _ in until(5):
        assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
        counts[2] += 1

done = []
stormers = [threading.Thread(target=lambda f=f: (f(), done.append(f))) for f in (by_vfork, by_spawn, by_fork)]
for thread in stormers:
    thread.start()
for thread in stormers:
    thread.join()
assert len(done) == 3 and min(counts) > 0, counts
over()
"""
    run(processes, rendezvous, body, *QUIET, start=START + BUSY)
