# SPDX-License-Identifier: MIT
"""How much memory a set of processes takes, so that moving pages about cannot pass for saving them.

PSS (proportional set size) divides every page among the processes that have it in their page tables. A page
that nobody has touched since it went into a file is in nobody's tables, so PSS alone falls to nothing when
pages are merely parked there. Therefore two sums are taken, and a saving is real only if both show it:

`pss_total`
    The sum of PSS of all processes, **after every process has read every byte** it means to use (the caller
    makes them read): what the processes take, as the kernel divides it.

`blocks_total`
    The blocks that the store of frames occupies (`Stats.store_bytes`), whoever has them mapped, plus the
    private anonymous memory of all processes: what would come back if they all ended. It counts frames that
    nobody reads any more, and does not depend on who has read what.

Pages that were swapped out still count, in both sums: PSS is Pss + SwapPss, anonymous memory is
Pss_Anon + SwapPss of /proc/PID/smaps_rollup. Anonymous pages shared by fork count once among those who share
them, so that workers forked after loading are measured as fairly as spawned ones.

A process takes memory before it loads anything: interpreter, libraries, their own data. Measure the same
processes before and after, and subtract: `after - before`. Measure all of them at the same moments, because
libraries count in the PSS of each process by how many run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Process:
    """The memory of one process in bytes, or, after a subtraction, by how much it grew."""

    pid: int
    rss: int
    pss: int
    """Pss + SwapPss."""
    anonymous: int
    """Pss_Anon + SwapPss: private anonymous memory, pages broken out of frames included."""
    shmem: int
    """Pss_Shmem: this process's share of the frames (and other shared memory) that it has mapped and read."""

    def __sub__(self, other: Process) -> Process:
        if self.pid != other.pid:
            raise ValueError(f"these are two processes: {self.pid} and {other.pid}")
        return Process(
            self.pid,
            self.rss - other.rss,
            self.pss - other.pss,
            self.anonymous - other.anonymous,
            self.shmem - other.shmem,
        )


@dataclass(frozen=True)
class Memory:
    """The memory of a set of processes and their store at one moment, or the difference of two."""

    processes: tuple[Process, ...]
    store: int
    """Bytes the store's blocks occupy (Stats.store_bytes)."""

    @property
    def pss_total(self) -> int:
        """Sum of PSS; means something only after every process has read every byte."""
        return sum(process.pss for process in self.processes)

    @property
    def anonymous_total(self) -> int:
        return sum(process.anonymous for process in self.processes)

    @property
    def blocks_total(self) -> int:
        """The store's blocks plus all private anonymous memory."""
        return self.store + self.anonymous_total

    @property
    def total(self) -> int:
        """The greater of the two sums: what a claim about memory may rest on."""
        return max(self.pss_total, self.blocks_total)

    def __sub__(self, baseline: Memory) -> Memory:
        """By how much this is more than `baseline`, process by process (the same ones, in any order)."""
        before = {process.pid: process for process in baseline.processes}
        if before.keys() != {process.pid for process in self.processes}:
            raise ValueError("the baseline is of other processes")
        grown = tuple(process - before[process.pid] for process in self.processes)
        return Memory(grown, self.store - baseline.store)

    def as_dict(self) -> dict[str, Any]:
        return {
            "pss_total": self.pss_total,
            "blocks_total": self.blocks_total,
            "store": self.store,
            "processes": [asdict(process) for process in self.processes],
        }


def measure_process(pid: int) -> Process:
    """Read /proc/PID/smaps_rollup. ProcessLookupError: it has ended. PermissionError: not ours to read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    field = {}
    for line in lines[1:]:
        name, _, rest = line.partition(b":")
        field[name] = int(rest.split()[0]) * 1024
    if b"Pss_Anon" not in field:  # it has ended, and only waits for its parent
        raise ProcessLookupError(f"process {pid} has ended")
    swapped = field[b"SwapPss"]
    return Process(
        pid=pid,
        rss=field[b"Rss"],
        pss=field[b"Pss"] + swapped,
        anonymous=field[b"Pss_Anon"] + swapped,
        shmem=field[b"Pss_Shmem"],
    )


def measure(pids: Iterable[int], store_bytes: int = 0) -> Memory:
    """Measure these processes now. `store_bytes` is their domain's `Stats.store_bytes`, 0 without a store."""
    return Memory(tuple(measure_process(pid) for pid in pids), store_bytes)
