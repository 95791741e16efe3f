# SPDX-License-Identifier: MIT
"""Drive the Python interface while system calls fail by chance (KSMALLOC_FAULTS, see csrc/os_fault.c).

    python_scenarios.py RENDEZVOUS SECONDS SEED

Whatever fails, an operation ends, with a documented error or well; and every byte is what a copy in
ordinary memory says, in this process and in the children it forks. The last line of output is a JSON
object of figures.
"""

from __future__ import annotations

import collections
import json
import mmap
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import ksmalloc

PAGE = mmap.PAGESIZE
POOL = [np.frombuffer(random.Random(seed).randbytes(PAGE), np.uint8) for seed in range(6)]
POOL.append(np.zeros(PAGE, np.uint8))
DOCUMENTED = (MemoryError, OSError, ksmalloc.Error)


class Failed(Exception):
    """An operation ended with an error that it may end with."""


class Thing:
    """Memory under test, and what must be in it."""

    def __init__(self, at: Any, expected: np.ndarray, keep: Any = None, arena: Any = None) -> None:
        self.at = at
        self.bytes = np.frombuffer(at, np.uint8)
        self.expected = expected
        self.keep = keep
        self.arena = arena

    def check(self) -> int:
        if not np.array_equal(self.bytes, self.expected):
            wrong = np.flatnonzero(self.bytes != self.expected)
            sys.exit(f"wrong bytes: {len(wrong)} of {len(self.expected)}, the first at {wrong[0]}")
        return len(self.expected)


class World:
    def __init__(self, rendezvous: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.figures: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.things: list[Thing] = []
        self.domain = self.patiently(lambda: ksmalloc.Domain("faults", path=rendezvous, capacity="256MiB"))
        self.arenas = [self.patiently(lambda: ksmalloc.Arena(domain=self.domain))]
        self.file = Path(rendezvous) / f"file-{os.getpid()}.npy"
        np.save(self.file, np.concatenate(POOL))

    # ---- errors -------------------------------------------------------------------------------------------

    def may(self, operation: Callable[[], Any]) -> Any:
        """The operation's result; Failed if it ends with an error that it may end with."""
        try:
            return operation()
        except DOCUMENTED as error:
            self.errors[type(error).__name__] += 1
            raise Failed from error
        except ValueError as error:  # what the core's EINVAL becomes, and here the kernel says it, too
            if "nvalid argument" not in str(error) and "not in one live block" not in str(error):
                raise
            self.errors["EINVAL"] += 1
            raise Failed from error

    def patiently(self, operation: Callable[[], Any]) -> Any:
        for _ in range(200):
            with suppress(Failed):
                return self.may(operation)
        sys.exit("it never worked")

    # ---- operations ---------------------------------------------------------------------------------------

    def content(self, pages: int) -> np.ndarray:
        return np.concatenate([self.rng.choice(POOL) for _ in range(pages)])

    def pick(self) -> Thing:
        if not self.things:
            raise Failed
        return self.rng.choice(self.things)

    def make_array(self) -> None:
        arena, expected = self.rng.choice(self.arenas), self.content(self.rng.randint(1, 40))
        how = self.rng.randrange(3)
        if how == 0:
            at = self.may(lambda: arena.array(expected))
        elif how == 1:
            at = self.may(lambda: arena.zeros(len(expected), np.uint8))
            if at.any():
                sys.exit("fresh memory is not zero")
            at[:] = expected
        else:
            block = self.may(lambda: arena.alloc(len(expected)))
            at = np.frombuffer(block, np.uint8)
            at[:] = expected
        self.things.append(Thing(at, expected.copy(), arena=arena))

    def make_small(self) -> None:
        arena, n = self.rng.choice(self.arenas), self.rng.randint(1, 5000)
        expected = self.content(2)[:n].copy()
        self.things.append(Thing(self.may(lambda: arena.array(expected)), expected, arena=arena))

    def register(self) -> None:
        pages = self.rng.randint(1, 20)
        buffer = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        expected = self.content(pages)
        np.frombuffer(buffer, np.uint8)[:] = expected
        keep = self.may(lambda: ksmalloc.register(buffer, domain=self.domain))
        self.things.append(Thing(buffer, expected, keep=keep))

    def load(self) -> None:
        array = self.may(lambda: ksmalloc.load(self.file, arena=self.arenas[0]))
        self.things.append(Thing(array, np.concatenate(POOL), arena=self.arenas[0]))

    def write(self) -> None:
        thing = self.pick()
        at, n = self.rng.randrange(len(thing.expected)), self.rng.randint(1, 3 * PAGE)
        data = self.content(4)[: min(n, len(thing.expected) - at)]
        thing.expected[at : at + len(data)] = data
        np.frombuffer(thing.at, np.uint8)[at : at + len(data)] = data
        self.figures["writes"] += 1

    def read_into(self) -> None:
        """A system call writes: where it is prepared it works, whatever is merged."""
        thing = self.pick()
        if thing.arena is None:
            return
        data = self.content(1).tobytes()[: len(thing.expected)]

        def call() -> None:
            with thing.arena.writable(thing.at), open(os.memfd_create("data"), "w+b", buffering=0) as file:
                file.write(data)
                file.seek(0)
                if file.readinto(memoryview(thing.at)[: len(data)]) != len(data):
                    sys.exit("a short read")
                thing.expected[: len(data)] = np.frombuffer(data, np.uint8)

        self.may(call)

    def freeze(self) -> None:
        thing = self.pick()
        if thing.arena is not None:
            self.may(lambda: thing.arena.freeze(thing.at))
            if self.rng.random() < 0.5:
                self.may(lambda: thing.arena.thaw(thing.at))

    def scan(self) -> None:
        report = self.may(lambda: self.rng.choice(self.arenas).scan())
        self.figures["merged"] += report.pages_merged

    def settle(self) -> None:
        self.may(lambda: ksmalloc.settle(0.1, domain=self.domain))

    def unmerge(self) -> None:
        self.may(lambda: self.rng.choice(self.arenas).unmerge())

    def sweep(self) -> None:
        self.may(self.domain.sweep)

    def facts(self) -> None:
        stats = self.may(self.domain.stats)
        self.figures["most_merged"] = max(self.figures["most_merged"], stats.pages_merged)
        self.may(lambda: self.domain.peers)
        self.may(lambda: ksmalloc.capabilities(self.domain))

    def look_outside(self) -> None:
        """What the kernel says: pages of the store that are mapped here."""
        text = Path("/proc/self/smaps").read_text()
        maps = re.findall(r"memfd:ksmalloc store.*?\nRss: +(\d+) kB", text, re.DOTALL)
        self.figures["most_mapped"] = max(self.figures["most_mapped"], sum(map(int, maps)) // 4)

    def drop(self) -> None:
        thing = self.pick()
        if thing.keep is not None:
            self.may(thing.keep.unregister)
        thing.check()
        self.things.remove(thing)

    def another_arena(self) -> None:
        cow = self.rng.choice(["kernel", "sigsegv"])
        self.arenas.append(self.may(lambda: ksmalloc.Arena(domain=self.domain, cow=cow)))
        if len(self.arenas) > 3:
            self.arenas.pop(1).close()

    def fork(self) -> None:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self.rng.seed(os.getpid())
                for operation in (self.check_all, self.write, self.scan, self.make_array, self.check_all):
                    with suppress(Failed):
                        operation()
                code = 0
            except BaseException as error:
                print(f"in a child: {error!r}", flush=True)
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        self.figures["forks"] += 1
        if status:
            sys.exit(f"a child ended with wait status {status:#x}")

    def check_all(self) -> None:
        self.figures["checked"] += sum(thing.check() for thing in self.things)


OPERATIONS = {
    "make_array": 12,
    "make_small": 8,
    "register": 4,
    "load": 2,
    "write": 30,
    "read_into": 8,
    "freeze": 8,
    "scan": 12,
    "settle": 2,
    "unmerge": 2,
    "sweep": 3,
    "facts": 4,
    "look_outside": 2,
    "drop": 16,
    "another_arena": 1,
    "fork": 3,
    "check_all": 6,
}


def end(args: Any) -> NoReturn:
    """As sys.unraisablehook, from where an exception, that of sys.exit() too, goes nowhere."""
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback, file=sys.stdout)
    print(f"unraisable: {args.exc_value!r} {args.object!r}", flush=True)
    os._exit(1)


def main(rendezvous: str, seconds: float, seed: int) -> None:
    sys.unraisablehook = end
    world = World(rendezvous, seed)
    names, weights = list(OPERATIONS), list(OPERATIONS.values())
    until = time.monotonic() + seconds
    # Who has lost its domain after a fork merges nothing any more.
    while time.monotonic() < until and world.errors["PeerError"] < 20:
        name = world.rng.choices(names, weights)[0]
        if len(world.things) > 60:
            name = "drop"
        world.figures["operations"] += 1
        try:
            getattr(world, name)()
        except Failed:
            world.figures["failed"] += 1
    world.check_all()
    world.things.clear()
    print(json.dumps(dict(world.figures) | {"errors": dict(world.errors)}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
