# SPDX-License-Identifier: MIT
"""The whole life of merged memory in one small program, and somebody who looks on from outside.

    python lifekit.py [NAME=VALUE …]       run it here, and check that capabilities() says so: barrier=stop

Two processes join, merge, fork, write, freeze, unmerge, free, and check every byte all the way. The one who
looks on reads /proc/PID/smaps, which may be hidden from the program itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pace
from forkkit import environment

PAGES = 64
PAGE = 4096

PROGRAM = r"""
import json, mmap, os, random, signal, subprocess, sys, time, traceback
import ksmalloc

PAGE, PAGES = 4096, 64
role, path, merges = sys.argv[1], sys.argv[2], sys.argv[3] == "merges"
common = random.Random(1).randbytes(PAGES * PAGE)
own = random.Random(role).randbytes(PAGES * PAGE)
try:
    domain = ksmalloc.Domain("life", path=path)
    arena = ksmalloc.Arena(domain=domain, scan=False)
except Exception as error:
    print(json.dumps({"refused": f"{type(error).__name__}: {error}"}), flush=True)
    sys.exit()

def block(content):
    made = arena.alloc(len(content))
    memoryview(made)[:] = content
    return made

def tell(stage, watched=(), **more):
    # Where it is; goes on when told to.
    places = [[one.address, one.nbytes] for one in watched]
    print(json.dumps({"stage": stage, "pid": os.getpid(), "watched": places} | more), flush=True)
    assert sys.stdin.readline()

def merged():
    return arena.stats().arena_pages_merged

def scan(wanted):
    # Until so many pages of the arena are merged; nothing where nothing can.
    for _ in range(100 if merges else 3):
        arena.scan()
        if merges and merged() == wanted:
            break
    assert merged() == (wanted if merges else 0), (merged(), domain.stats(), ksmalloc.capabilities(domain))

def sweep():
    try:
        return domain.sweep()
    except OSError as error:
        return f"{type(error).__name__}: {error}"

if role == "peer":
    twin, other = block(common), block(own)
    scan(0)
    tell("there")
    scan(PAGES)
    tell("merged", [twin])
    assert bytes(twin) == common and bytes(other) == own
    tell("end")
    sys.exit()

one, two, mine, zeros = block(common), block(common), block(own), block(bytes(PAGES * PAGE))
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = common
registered = ksmalloc.register(memory, domain=domain)
scan(2 * PAGES)
for _ in range(1000 if merges else 0):  # registered memory merges in the background
    if domain.stats().pages_merged >= 3 * PAGES:
        break
    time.sleep(0.01)
first = domain.stats()
found = ksmalloc.capabilities(domain)
tell(
    "merged", [one, two, registered], barrier=found.barrier, tracking=found.tracking, why_not=found.why_not,
    said=repr(found), merged=first.pages_merged, promotions=first.promotions, zero=first.ksm_zero_pages,
)
assert bytes(one) == bytes(two) == bytes(memory) == common and bytes(mine) == own and not any(bytes(zeros))

def child():
    # Everything is there; what it writes is its own; it merges by itself.
    assert bytes(one) == bytes(two) == bytes(memory) == common and bytes(mine) == own
    memoryview(one)[: 8 * PAGE] = b"c" * (8 * PAGE)
    memory[:PAGE] = b"c" * PAGE
    assert bytes(one) == b"c" * (8 * PAGE) + common[8 * PAGE :] and bytes(two) == common
    arena.scan()
    more = [block(own[::-1]) for _ in range(2)]
    arena.scan()
    arena.scan()
    assert bytes(more[0]) == bytes(more[1]) == own[::-1]
    assert bytes(one) == b"c" * (8 * PAGE) + common[8 * PAGE :] and bytes(two) == common

pid = os.fork()
if pid == 0:
    status = 1
    try:
        child()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert bytes(one) == bytes(two) == bytes(memory) == common and bytes(mine) == own

# Writes of the program and of the kernel break what they touch, and nothing else.
fresh = random.Random("fresh").randbytes(5 * PAGE)
memoryview(one)[: 4 * PAGE] = fresh[: 4 * PAGE]
ends = os.pipe()
os.write(ends[1], fresh[4 * PAGE :])
assert os.readv(ends[0], [memoryview(one)[4 * PAGE : 5 * PAGE]]) == PAGE
now = fresh + common[5 * PAGE :]
assert bytes(one) == now and bytes(two) == bytes(memory) == common
arena.scan()
assert bytes(one) == now
tell("broken", [one, two, mine], merged=domain.stats().pages_merged)  # the child has had the same as `mine`

try:
    view = arena.freeze(two)
    assert bytes(view) == common
    arena.thaw(view)
    del view
    frozen = True
except ksmalloc.Error:
    frozen = False
memoryview(two)[-1] ^= 1
assert bytes(two) == common[:-1] + bytes([common[-1] ^ 1])
unmerged = arena.unmerge()
registered.unregister()
assert bytes(one) == now and bytes(memory) == common and bytes(mine) == own
tell("unmerged", [one, two, registered], frozen=frozen, unmerged=unmerged)
for each in (one, two, mine, zeros):
    each.free()
assert arena.stats().blocks == 0
sweep()
tell("freed", merged=merged())
tell("alone", peers=domain.stats().peers, freed=sweep(), store=domain.stats().store_bytes)
"""


def frame_bytes(pid: int, places: list[list[int]]) -> list[int]:
    """How many bytes of each place are mapped from the store, as the kernel tells others about a process."""
    found = [0] * len(places)
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +/memfd:ksmalloc store", line)
        if head:
            low, high = (int(one, 16) for one in head.groups())
            for i, (at, nbytes) in enumerate(places):
                found[i] += max(0, min(high, at + nbytes) - max(low, at))
    return found


class Actor:
    """One process of the program, stage by stage."""

    def __init__(self, under: list[str], role: str, rendezvous: str, merges: bool) -> None:
        command = [*under, sys.executable, "-W", "error", "-c", PROGRAM, role, rendezvous]
        command.append("merges" if merges else "does not")
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def next(self) -> dict[str, Any]:
        """What it says of its next stage; its places are looked at from here."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with status {self.process.wait()}"
        said: dict[str, Any] = json.loads(line)
        if "stage" in said:
            said["frames"] = [n // PAGE for n in frame_bytes(said["pid"], said["watched"])]
        return said

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Whether it came to its end by itself."""
        self.go_on()
        assert self.process.wait(pace.SLOWER * 30) == 0

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.kill()
        self.process.wait()


def live(under: list[str], rendezvous: str, merges: bool = True) -> dict[str, Any]:
    """Both processes from beginning to end, with all that must hold wherever they run.

    under: what the programs are run by. merges: whether anything can be merged there. Returns what the first
    one said of the barrier, the tracking, whether pages could be frozen …; what is on frames after everything
    was made private again ("left"); or only why it could not join ("refused").
    """
    actors: list[Actor] = []
    try:
        actors.append(peer := Actor(under, "peer", rendezvous, merges))
        there = peer.next()
        if "refused" in there:
            return there
        actors.append(first := Actor(under, "first", rendezvous, merges))
        return _live(first, peer, merges)
    finally:
        for actor in actors:
            actor.stop()


def _live(first: Actor, peer: Actor, merges: bool) -> dict[str, Any]:
    said = first.next()
    peer.go_on()
    other = peer.next()
    if merges:
        assert said["frames"] == [PAGES] * 3, said  # an own arena's two, registered memory
        assert (said["merged"], said["promotions"]) == (3 * PAGES, PAGES), said
        assert said["zero"] >= PAGES, said
        assert other["frames"] == [PAGES], other
    else:
        assert said["frames"] == [0] * 3, said
        assert said["merged"] == 0, said
        assert said["why_not"] is not None, said
    first.go_on()
    broken = first.next()
    if merges:
        assert broken["merged"] == 4 * PAGES - 5 + broken["frames"][2], broken
    first.go_on()
    unmerged = first.next()
    first.go_on()
    freed = first.next()
    assert freed["merged"] == 0, freed
    peer.go_on()
    assert peer.next()["stage"] == "end"
    peer.end()
    first.go_on()
    alone = first.next()
    assert alone["peers"] == 1, alone
    assert alone["store"] == 0 or isinstance(alone["freed"], str), alone  # unless memory cannot be given back
    first.end()
    return said | {"frozen": unmerged["frozen"], "left": unmerged["frames"], "freed": alone["freed"]}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ksmalloc-test-", dir="/dev/shm") as folder:
        said = live([], folder)
    print(said["said"])
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        assert str(said[name]) == value, (word, said)


if __name__ == "__main__":
    main()
