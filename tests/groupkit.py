# SPDX-License-Identifier: MIT
"""Control groups of memory, of either version, made for a test and removed after it. Needs root."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest
from conftest import wait_until

PAGE = 4096


def _memory_root() -> tuple[Path, bool] | None:
    """Where groups that count memory can be made, and whether they are of version 2."""
    if Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists():
        return Path("/sys/fs/cgroup/memory"), False
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        if "memory" in (root / "cgroup.controllers").read_text().split():
            return root, True
    return None


class Group:
    """A control group of this test's own, removed with whatever is still in it."""

    def __init__(self, name: str = "limits") -> None:
        found = _memory_root()
        if os.geteuid() != 0 or found is None:
            pytest.skip("needs root and control groups that count memory")
        self.root, self.unified = found
        self.path = self.root / f"ksmalloc-{name}-{os.getpid()}"
        self._delegated = False

    def __enter__(self) -> Group:
        control = self.root / "cgroup.subtree_control"
        if self.unified and "memory" not in control.read_text().split():
            control.write_text("+memory")
            self._delegated = True
        self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        procs = self.path / "cgroup.procs"
        if not wait_until(lambda: not procs.read_text(), timeout=1 if error else 10):
            for pid in procs.read_text().split():  # only ours were ever put here
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            wait_until(lambda: not procs.read_text())
        self.path.rmdir()
        if self._delegated:
            (self.root / "cgroup.subtree_control").write_text("-memory")

    def _number(self, of_1: str, of_2: str) -> int:
        return int((self.path / (of_2 if self.unified else of_1)).read_text())

    def _field(self, file: str, name: str) -> int:
        lines = (self.path / file).read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.split()[0] == name))

    def set_limit(self, nbytes: int | None) -> None:
        """None: no limit."""
        if self.unified:
            (self.path / "memory.max").write_text("max" if nbytes is None else str(nbytes))
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(-1 if nbytes is None else nbytes))

    def limit_to(self, room: int) -> int:
        """So that just `room` bytes are left of what is used; returns the limit.

        Processors hold memory that is charged in advance, which a lowered limit takes from them.
        """
        limit = 0
        while limit != (limit := (self.used() + room) // PAGE * PAGE):
            self.set_limit(limit)
            time.sleep(0.05)
        return limit

    def cache(self) -> int:
        """Files in memory, which the kernel can drop."""
        names = ("inactive_file", "active_file")
        return sum(self._field("memory.stat", ("" if self.unified else "total_") + name) for name in names)

    def used(self) -> int:
        return self._number("memory.usage_in_bytes", "memory.current")

    def swapped(self) -> int:
        return self._number("memory.memsw.usage_in_bytes", "memory.swap.current") - (
            0 if self.unified else self.used()
        )

    def charged(self) -> int:
        """Anonymous and shared memory."""
        anonymous = self._field("memory.stat", "anon" if self.unified else "rss")
        return anonymous + self._field("memory.stat", "shmem")

    def kills(self) -> int:
        """Processes that the kernel has killed in it for memory."""
        return self._field("memory.events" if self.unified else "memory.oom_control", "oom_kill")

    def reclaim(self, nbytes: int) -> None:
        """Have the kernel take memory back: to swap, what is not in files."""
        with suppress(OSError):  # EAGAIN, EBUSY: it could not take as much
            if self.unified:
                (self.path / "memory.reclaim").write_text(str(nbytes))
            else:
                (self.path / "memory.force_empty").write_text("0")
