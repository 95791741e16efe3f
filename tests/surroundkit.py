# SPDX-License-Identifier: MIT
"""Whole Python programs in hostile surroundings: they say how far they are, and are watched from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Processes
from forkkit import START, environment

PAGE = 4096
BLOCK = 512 * PAGE
"""A block() of the programs."""
SECONDS = 120
"""Protection against hanging, no measure of speed."""

# After START: the barrier by name, and a word with the test now and then.
BARRIER = r"""
arena = ksmalloc.Arena(domain=domain, barrier=sys.argv[2])

def say(*what):
    print(*what, flush=True)

def ask(*what):
    # Say it, and go on when told to.
    say(*what)
    return sys.stdin.readline().strip()
"""
PROGRAM = START + BARRIER
# And something to begin with: two blocks that are one, and two that are not.
MERGED = r"""
mine = [block(1), block(1), block(100), block(101)]
merge()
assert own().pages_merged >= 2 * 512, own()
assert right(mine[0], 1) and right(mine[1], 1) and right(mine[2], 100)
"""
# Work for a thread, over and over: whatever it raises is kept.
GUARDED = r"""
over, errors = threading.Event(), []

def guarded(work):
    def loop():
        try:
            while not over.is_set():
                work()
        except BaseException as error:
            errors.append(repr(error))
    return threading.Thread(target=loop)
"""
BARRIERS = pytest.mark.parametrize("barrier", ["move", "stop"])


class Program:
    """A program that begins with PROGRAM, or what is given. Its first arguments: rendezvous and barrier."""

    def __init__(
        self,
        processes: Processes,
        rendezvous: str,
        barrier: str,
        body: str,
        *arguments: Any,
        start: str = PROGRAM,
        flags: tuple[str, ...] = (),
        python: str | Path = sys.executable,
        **options: Any,
    ) -> None:
        command = [python, *flags, "-c", start + body, rendezvous, barrier, *arguments]
        self.process: subprocess.Popen[str] = processes.popen(*command, env=environment(), **options)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def hear(self, expected: str | None = None) -> str:
        """The next line that it says; what it says on stderr instead fails the test."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline().strip()
        if line.startswith("skip:"):
            pytest.skip(line)
        if not line or (expected is not None and line != expected):
            self.process.kill()
            pytest.fail(f"it said {line!r}, not {expected}\n{self.process.stderr.read()}", pytrace=False)
        return str(line)

    def tell(self, what: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def end(self, status: int = 0) -> str:
        """It ends by itself, with this status and nothing on stderr; the rest of what it said."""
        out, err = self.process.communicate(timeout=SECONDS)
        assert (self.process.returncode, err) == (status, ""), f"{out}{err}"
        return str(out)
