# SPDX-License-Identifier: MIT
"""For the random machine: its pages, a block with its model, and the second process: this file, when run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

import ksmalloc

PAGE = 4096
KINDS = 4  # different pages; kind 0 is all zeros
MOST_BLOCKS = 12
MOST_BYTES = 600 << 10

sizes = st.one_of(
    st.integers(1, 3 * PAGE),
    st.integers(1, 24).map(lambda pages: pages * PAGE),
    st.sampled_from([100_000, 1 << 18, MOST_BYTES]),
)
kinds = st.lists(st.sampled_from([*range(1, KINDS + 1), 0]), min_size=1, max_size=8)
places = st.integers(0, MOST_BYTES)
numbers = st.integers(0, MOST_BLOCKS)


@functools.lru_cache(maxsize=64)
def page(kind: int) -> bytes:
    return hashlib.shake_128(str(kind).encode()).digest(PAGE) if kind else bytes(PAGE)


class Peer:
    """What the second process does. It never holds a page twice, so all its merging is with others."""

    def join(self, path: str) -> None:
        self.domain = ksmalloc.Domain(path=path)
        self.arena = ksmalloc.Arena(domain=self.domain)
        self.load([])

    def load(self, kinds: list[int]) -> None:
        self.model = bytearray(b"".join(map(page, kinds)) or b"nothing")
        self.block = self.arena.alloc(len(self.model))
        memoryview(self.block)[:] = self.model

    def write(self, place: int, data: str) -> None:
        start = place % len(self.model)
        new = data.encode()[: len(self.model) - start]
        self.model[start : start + len(new)] = new
        memoryview(self.block)[start : start + len(new)] = new

    def scan(self) -> None:
        self.arena.scan()

    def is_right(self) -> bool:
        return bytes(self.block) == self.model

    def leave(self) -> int:
        [merges] = [peer.stats.merges for peer in self.domain.peers if peer.is_self]
        del self.block, self.arena
        self.domain.close()
        return merges


def serve() -> None:
    peer = Peer()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(peer, name)(*arguments)), flush=True)


def ask(process: subprocess.Popen[str], *command: Any) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(command), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def in_child(work: Callable[[], None]) -> int:
    """Run work() in a forked child; its exit status: 0 when it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass
class Held:
    """A block and what must stand in it."""

    block: ksmalloc.Block
    model: bytearray
    arena: ksmalloc.Arena

    def write(self, start: int, data: bytes) -> None:
        data = data[: len(self.model) - start]
        self.model[start : start + len(data)] = data
        memoryview(self.block)[start : start + len(data)] = data

    def receive(self, start: int, data: bytes) -> None:
        """As write(), but the kernel does it."""
        data = data[: len(self.model) - start]
        reading, writing = os.pipe()
        try:
            assert os.write(writing, data) == len(data)
            with memoryview(self.block)[start : start + len(data)] as target:
                assert os.readv(reading, [target]) == len(data)
        finally:
            os.close(reading)
            os.close(writing)
        self.model[start : start + len(data)] = data

    def check(self) -> None:
        assert bytes(self.block) == self.model


if __name__ == "__main__":
    serve()
