# SPDX-License-Identifier: MIT
"""A process that merges, stores and checks, and tests/debugger/tracer.c, which is told what to do to it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import buildkit
from conftest import Processes, wait_until
from forkkit import Peer
from outside import merged
from surroundkit import BLOCK, GUARDED, MERGED, PAGE, Program

# A thread that stores and checks it, one that merges and breaks, one in C that has a name, and one that notes
# what the barrier complains of.
TRACED = (
    MERGED
    + GUARDED
    + r"""
import ctypes
libc = ctypes.CDLL(None)
written = block(1)
area = block(3)
merge()
reasons, beats = set(), [0, 0, 0]

def store():
    with memoryview(area) as view:
        for at in range(0, 64 * PAGE, 64):
            beats[0] += 1
            view[at : at + 8] = beats[0].to_bytes(8, "little")
            assert int.from_bytes(view[at : at + 8], "little") == beats[0]
        view[: 64 * PAGE] = noise(3, 64 * PAGE)

def break_and_merge():
    memoryview(mine[1])[: 64 * PAGE] = noise(2, 64 * PAGE)
    assert bytes(mine[1]) == noise(2, 64 * PAGE) + noise(1)[64 * PAGE :]
    memoryview(mine[1])[: 64 * PAGE] = noise(1, 64 * PAGE)
    arena.scan()
    assert right(mine[0], 1) and right(mine[1], 1)
    beats[1] += 1

def named():
    libc.prctl(15, b"held", 0, 0, 0)
    libc.usleep(20000)
    beats[2] += 1

def note():
    for one in ksmalloc.capabilities(domain).better:
        if one.name == "barrier stop":
            reasons.add(one.reason)
    time.sleep(0.02)

threads = [guarded(work) for work in (store, break_and_merge, named, note)]
for thread in threads:
    thread.start()
right(written, 1), right(mine[0], 1)  # read: the pages are there
say("traced", mine[0].address, written.address)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    if word == "end":
        break
    if word == "still":  # the domain's scanners rest: nothing merges
        domain.settings["run"] = int(rest)
    if word == "beat":  # everybody gets on
        before = list(beats)
        wait_until(lambda: all(now > then for now, then in zip(beats, before)), 60)
    if word == "reasons":
        say("said:", *reasons)
        continue
    if word == "word":
        say(int.from_bytes(memoryview(written)[int(rest) :][:8], "little"))
        continue
    found = ksmalloc.capabilities(domain)
    say(own().merges, own().cow_breaks, found.stops, found.stops_failed)
over.set()
for thread in threads:
    thread.join()
assert not errors, errors
merge()
pokes = int(rest)
words = b"".join(number.to_bytes(8, "little") for number in range(1, pokes + 1))
assert bytes(written) == words + noise(1)[len(words) :], "what the debugger wrote"
assert right(mine[0], 1) and right(mine[1], 1) and right(mine[2], 100) and right(area, 3)
ask("rest")
"""
)


def frames(pid: int, at: int) -> int:
    """How many pages of a block are frames, as the kernel says: present, and of a file."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        file.seek(at // PAGE * 8)
        entries = struct.unpack(f"{BLOCK // PAGE}Q", file.read(BLOCK // PAGE * 8))
    return sum(entry >> 63 & entry >> 61 & 1 for entry in entries)


class Scene:
    """A peer, the process, and its debugger."""

    def __init__(self, processes: Processes, rendezvous: str, barrier: str, folder: Path) -> None:
        self.content = random.Random(1).randbytes(BLOCK)
        (folder / "known").write_bytes(self.content)
        buildkit.cc("-O1", buildkit.ROOT / "tests" / "debugger" / "tracer.c", "-o", folder / "tracer")
        self.peer = Peer(processes, rendezvous, 50)
        self.program = Program(processes, rendezvous, barrier, TRACED)
        self.known, self.written = map(int, self.program.hear().split()[1:])
        self.tracer = processes.popen(
            folder / "tracer", self.program.pid, folder / "known", self.known, self.written, 7
        )

    def debugger(self, command: str) -> dict[str, int]:
        """Its figures once it has done so."""
        assert self.tracer.stdin is not None
        assert self.tracer.stdout is not None
        self.tracer.stdin.write(command + "\n")
        self.tracer.stdin.flush()
        line = self.tracer.stdout.readline()
        assert line, self.tracer.communicate()[1]
        figures = {name: int(value) for name, value in (word.split("=") for word in line.split())}
        assert figures["wrong"] == 0, figures
        return figures

    def ask(self, command: str = "figures") -> list[int]:
        self.program.tell(command)
        return list(map(int, self.program.hear().split()))

    def goes_on(self) -> None:
        """It merges and breaks, everybody in it gets on, and the peer merges with it."""
        before = self.ask()
        self.ask("beat")
        assert wait_until(
            lambda: all(now > then for now, then in zip(self.ask()[:2], before, strict=False)), 60
        )
        assert self.peer("settle") == "True"
        assert self.peer("check") == "True"

    def end(self, pokes: int) -> None:
        self.goes_on()
        assert merged(self.program.pid) >= 2 * BLOCK
        self.program.tell(f"end {pokes}")
        self.program.hear("rest")
        assert merged(self.program.pid) >= 2 * BLOCK
        self.program.tell()
        self.program.end()
        assert self.peer("check") == "True"
        assert wait_until(lambda: self.peer("stats").split()[3] == "1", timeout=30)
