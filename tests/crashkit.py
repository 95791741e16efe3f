# SPDX-License-Identifier: MIT
"""Programs that store into read-only pages, and crash: with ksmalloc's SIGSEGV handler and without."""

from __future__ import annotations

import re
import subprocess
import sys

from forkkit import environment

START = r"""
import ctypes, faulthandler, os, random, signal, sys
import ksmalloc

class Mine:
    # An arena whose merged pages are read-only; "without": nothing at all.
    arena = None

    def make(self):
        if sys.argv[2] == "with":
            domain = ksmalloc.Domain("crash", path=sys.argv[1])
            self.arena = ksmalloc.Arena(domain=domain, cow="sigsegv", scan=False)
            self.breaks = 0
            self.store()

    def store(self):
        # Both ways of being read-only, stored into; every byte is checked.
        if self.arena is None:
            return
        content = random.Random(1).randbytes(8 * 4096)
        blocks = [self.arena.alloc(len(content)) for _ in range(2)]
        for block in blocks:
            memoryview(block)[:] = content
        self.arena.scan()
        assert self.arena.stats().arena_pages_merged == 16, self.arena.stats()
        self.arena.freeze(memoryview(blocks[1])[: 4 * 4096])
        for block in blocks:
            memoryview(block)[::4096] = b"12345678"
            right = bytearray(content)
            right[::4096] = b"12345678"
            assert bytes(block) == right
        self.breaks += 16
        stats = self.arena.stats()
        # While one handler replaces another, for microseconds, the scanner may look and find ours displaced.
        assert stats.arena_cow_breaks == self.breaks or stats.suspensions, stats

heard = []

def hear(number, frame):
    heard.append(number)

mine = Mine()
"""
ENABLE, DISABLE = "faulthandler.enable()\n", "assert faulthandler.disable()\n"
MAKE, STORE = "mine.make()\n", "mine.store()\n"
HEAR, DEFAULT = "signal.signal(signal.SIGSEGV, hear)\n", "signal.signal(signal.SIGSEGV, signal.SIG_DFL)\n"
IGNORE = "signal.signal(signal.SIGSEGV, signal.SIG_IGN)\n"


def run(rendezvous: str, body: str, how: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", START + body, rendezvous, how]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def looks(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """How a process ended and what it said, without what differs from run to run."""
    return done.returncode, re.sub(r"0x[0-9a-f]{8,}", "0x…", done.stderr)
