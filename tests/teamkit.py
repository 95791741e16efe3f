# SPDX-License-Identifier: MIT
"""Workers that load, merge, check and write data in their own processes, and the view from outside."""

from __future__ import annotations

import glob
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pace import SLOWER

import ksmalloc
from ksmalloc.ctl.measure import Memory, measure
from ksmalloc.ctl.team import Team

PAGE = 4096
MIB = 1 << 20
CHUNK = 1 << 18
NAME = "team"

Bytes = NDArray[np.uint8]


def tensors(path: str) -> dict[str, tuple[int, int]]:
    """Of each tensor in a safetensors file: where it lies in the file, and how long it is."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {name: tensor["data_offsets"] for name, tensor in header.items()}
    return {name: (8 + length + begin, end - begin) for name, (begin, end) in spans.items()}


class Worker:
    """One process's arena and data. Every method can be called through a Team."""

    def __init__(self) -> None:
        self.domain: ksmalloc.Domain
        self.arena: ksmalloc.Arena
        self.data: list[
            tuple[Bytes, str, int, int]
        ] = []  # the array; its file or "", offset; seed of the noise

    def warm(self, path: str = "") -> None:
        """Have in memory what loading and checking need beside ksmalloc, before anything is measured."""
        for at, right in _chunks(4 * CHUNK, path, 0, 1):
            assert _first_wrong(right, path, at, 0) is not None
        if path:
            tensors(path)

    def join(self, path: str, scan: bool = True, backing: str = "memfd") -> None:
        self.domain = ksmalloc.Domain(NAME, path=path, backing=backing)
        self.arena = ksmalloc.Arena(domain=self.domain, scan=scan)

    def domain_id(self) -> str:
        return self.domain.id

    def load(self, path: str, as_one: bool) -> int:
        """With ksmalloc.load()."""
        loaded = ksmalloc.load(path, arena=self.arena, as_one=as_one)
        if as_one:
            self.data.append((np.frombuffer(loaded, np.uint8), path, 0, 0))
        else:
            for name, (offset, _) in tensors(path).items():
                self.data.append((loaded[name].reshape(-1).view(np.uint8), path, offset, 0))
        return sum(piece[0].nbytes for piece in self.data)

    def load_shuffled(self, path: str, seed: int) -> None:
        """Tensor by tensor in an order of this worker's own."""
        spans = list(tensors(path).values())
        random.Random(seed).shuffle(spans)
        for span in spans:
            self._copy(path, *span, 0)

    def load_different(self, path: str, as_one: bool, seed: int) -> None:
        """What load() does, but with all bytes exclusive-or the noise of this seed."""
        spans = [(0, os.path.getsize(path))] if as_one else tensors(path).values()
        for span in spans:
            self._copy(path, *span, seed)

    def fill(self, seed: int, nbytes: int) -> None:
        """An array of noise."""
        self._copy("", 0, nbytes, seed)

    def verify(self) -> int:
        """Read every byte and compare it; returns how many bytes were right."""
        for array, path, offset, seed in self.data:
            at = _first_wrong(array, path, offset, seed)
            if at is not None:
                raise AssertionError(f"byte {at} of {array.nbytes} is wrong ({path or 'noise'} {seed})")
        return sum(piece[0].nbytes for piece in self.data)

    def drop(self) -> None:
        """Free all arrays."""
        self.data.clear()

    def scan(self) -> int:
        return self.arena.scan().pages_merged

    def settle(self, timeout: float = 30 * SLOWER) -> bool | None:
        return ksmalloc.settle(timeout, domain=self.domain).settled

    def sweep(self) -> int:
        return self.domain.sweep()

    def stats(self) -> dict[str, Any]:
        return asdict(self.domain.stats())

    def own_stats(self) -> dict[str, Any]:
        return next(asdict(peer.stats) for peer in self.domain.peers if peer.is_self)

    def peers(self) -> list[int]:
        return [peer.pid for peer in self.domain.peers]

    def _copy(self, path: str, offset: int, nbytes: int, seed: int) -> None:
        array = self.arena.empty(nbytes, np.uint8)
        _write(array, path, offset, seed)
        self.data.append((array, path, offset, seed))


def _chunks(length: int, path: str, offset: int, seed: int) -> Any:
    """(at, bytes) of what an array holds."""
    generator = np.random.Generator(np.random.SFC64(seed))
    with open(path or "/dev/zero", "rb", buffering=0) as file:
        file.seek(offset)
        for at in range(0, length, CHUNK):
            size = min(CHUNK, length - at)
            if not seed:
                yield at, np.frombuffer(file.read(size), np.uint8)
            elif not path:
                yield at, np.frombuffer(generator.bytes(size), np.uint8)
            else:
                here = np.frombuffer(file.read(size), np.uint8)
                yield at, here ^ np.frombuffer(generator.bytes(size), np.uint8)


def _write(array: Bytes, path: str, offset: int, seed: int) -> None:
    for at, right in _chunks(array.nbytes, path, offset, seed):
        array[at : at + len(right)] = right


def _first_wrong(array: Bytes, path: str, offset: int, seed: int) -> int | None:
    for at, right in _chunks(array.nbytes, path, offset, seed):
        here = array[at : at + len(right)]
        if not np.array_equal(here, right):
            return int(at + np.flatnonzero(here != right)[0])
    return None


def commands() -> dict[str, Callable[..., Any]]:
    worker = Worker()
    return {name: getattr(worker, name) for name in dir(Worker) if not name.startswith("_")}


# ---- telling a team ----------------------------------------------------------------------------------------


def join(team: Team, path: str, *arguments: Any) -> None:
    """Have all workers join; skips the test where nothing can merge."""
    team.ask("join", path, *arguments)
    stats = team.ask("stats", who=0)
    if stats["barrier"] == "none":
        import pytest  # here, because every worker imports this module

        pytest.skip(stats["why_not"])


def each(team: Team, command: str, arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Tell every worker to do the same with arguments of its own; all at the same time."""
    numbers = range(len(team))
    for number, values in zip(numbers, arguments, strict=True):
        team.tell(command, *values, numbers=[number])
    return [team.answer(number) for number in numbers]


# ---- the view from outside ---------------------------------------------------------------------------------


def store_inodes(pids: Iterable[int]) -> dict[int, int]:
    """The stores that processes have open, and the bytes each occupies, as the kernel says.

    A store's descriptors are in the scanners' own tables; mappings without one are found as well.
    """
    found = {}
    for pid in pids:
        for link in glob.glob(f"/proc/{pid}/task/*/fd/*") + glob.glob(f"/proc/{pid}/map_files/*"):
            with suppress(OSError):
                if os.readlink(link).startswith("/memfd:ksmalloc store"):
                    status = os.stat(link)
                    found[status.st_ino] = status.st_blocks * 512
    return found


def store_blocks(pids: Iterable[int]) -> int:
    """Bytes that the store of these processes occupies."""
    return sum(store_inodes(pids).values())


def measured(team: Team) -> Memory:
    """What the workers take now. The caller has had every byte read."""
    return measure(team.pids, store_blocks(team.pids))


def own(memory: Memory) -> int:
    """The sum of PSS without program files: their share depends on what else runs on the machine."""
    return sum(process.anonymous + process.shmem for process in memory.processes)


def both(memory: Memory) -> tuple[int, int]:
    """The lesser and the greater of the two sums that every claim about memory has to meet."""
    sums = (own(memory), memory.blocks_total)
    return min(sums), max(sums)


def mappings(pid: int) -> int:
    return len(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines())


def by_mapping(pids: Iterable[int], field: str = "Pss") -> Counter[str]:
    """Memory of processes by the names of their mappings; what has no name is "(anonymous)"."""
    found: Counter[str] = Counter()
    name = ""
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                fields = line.split(maxsplit=5)
                name = fields[5] if len(fields) == 6 else "(anonymous)"
            elif first == field + ":":
                found[name] += int(rest.split()[0]) * 1024
    return found


def table(growth: Counter[str]) -> str:
    """What grew, in KiB, for the message of a test that fails."""
    return ", ".join(f"{name}: {n >> 10} KiB" for name, n in growth.most_common() if abs(n) > 8192)
