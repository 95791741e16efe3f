# SPDX-License-Identifier: MIT
"""Workers that become somebody else, from the tests' side: where they meet, what they may read and take."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import is_alive, wait_until
from handkit import NOBODY, hands
from teamkit import both, by_mapping, own, store_blocks, table

import ksmalloc
from ksmalloc.ctl.measure import Memory, measure
from ksmalloc.ctl.team import Team

SECONDS = 10.0
"""How long the background may take after the last load, with default settings."""


class Crew:
    """A master and the workers that it forks or starts: they are told through it."""

    def __init__(self) -> None:
        self._master = Team(1, hands)
        self.pids: list[int] = []

    @property
    def everybody(self) -> list[int]:
        return [*self._master.pids, *self.pids]

    def master(self, command: str, *args: Any) -> Any:
        """Tell the master to do something."""
        return self._master.ask(command, *args, who=0)

    def fork(self, count: int, drop: bool) -> None:
        """Let the master fork workers, which drop root at once or not."""
        self.pids = self.master("fork", count, drop)

    def start(self, count: int, python: Path) -> None:
        self.pids = self.master("start", count, str(python))

    def ask(self, command: str, *args: Any) -> list[Any]:
        """Tell all workers; returns their answers."""
        answers: list[Any] = self.master("pass_on", command, *args)
        return answers

    def ask_each(self, command: str, arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Tell every worker to do the same with arguments of its own."""
        answers: list[Any] = self.master("pass_on_each", command, list(arguments))
        return answers

    def stats(self, counter: str) -> int:
        """A counter of the workers' domain."""
        value: int = self.ask("stats")[0][counter]
        return value

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            if exception[0] is None:
                self.master("dismiss")
        finally:
            self._master.close()  # closes the workers' pipes, whatever becomes of the master
            if not wait_until(lambda: not any(map(is_alive, self.pids))):
                for pid in filter(is_alive, self.pids):
                    os.kill(pid, signal.SIGKILL)
                pytest.fail("workers did not end with their master", pytrace=False)


class Growth:
    """What processes have taken since they were made ready; `one` is the size of one copy."""

    def __init__(self, pids: Iterable[int], one: int) -> None:
        self.pids, self.one = list(pids), one
        self._before, self._by_mapping = self._measure(), by_mapping(self.pids)

    def _measure(self) -> Memory:
        return measure(self.pids, store_blocks(self.pids))

    def now(self) -> Memory:
        """By how much they have grown. The caller has had every byte read."""
        return self._measure() - self._before

    def wait_for_background(self, copies: float) -> float:
        """Until the background has merged, or its time is over; returns how many seconds that took."""
        start = time.monotonic()
        while self.now().blocks_total > copies * self.one and time.monotonic() < start + SECONDS:
            time.sleep(0.1)
        return time.monotonic() - start

    def check(self, least: float, most: float, what: str) -> None:
        """Print both sums in copies, and let neither be beyond a limit."""
        memory = self.now()
        figures = (
            f"{memory.blocks_total / self.one:.3f} copies in blocks, {own(memory) / self.one:.3f} in PSS"
        )
        print(f"{what}: {figures}")
        growth = by_mapping(self.pids)
        growth.subtract(self._by_mapping)
        assert least * self.one <= both(memory)[0], f"{figures}: {table(growth)}"
        assert both(memory)[1] <= most * self.one, f"{figures}: {table(growth)}"


# ---- what everybody may read and run -----------------------------------------------------------------------


def _is_open_to_all(folder: Path) -> bool:
    return all(place.stat().st_mode & 0o005 == 0o005 for place in (folder, *folder.parents))


@contextmanager
def public_folder() -> Iterator[Path]:
    """A directory that every user may read, and from which programs may be run."""
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    base = next(place for place in places if _is_open_to_all(Path(place).resolve()))
    folder = Path(tempfile.mkdtemp(prefix="ksmalloc-public-", dir=base))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def public_copy(folder: Path, file: Path) -> Path:
    copy = Path(shutil.copyfile(file, folder / file.name))
    copy.chmod(0o644)
    return copy


def public_python(folder: Path) -> Path:
    """A copy of this Python with NumPy, ksmalloc and the workers' side of these tests, for every user."""
    home, version = folder / "python", f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = home / "lib" / version
    site = library / "site-packages"
    unwanted = shutil.ignore_patterns(
        "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib"
    )
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=unwanted, ignore_dangling_symlinks=True)
    for package in (numpy, ksmalloc):
        origin = Path(package.__path__[0])
        for part in origin.parent.glob(f"{origin.name}*"):
            if part.name in (origin.name, f"{origin.name}.libs"):
                shutil.copytree(part, site / part.name, ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("handkit.py", "pace.py", "teamkit.py"):
        shutil.copyfile(Path(__file__).with_name(module), site / module)
    for shared in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"):
        shutil.copyfile(shared, home / "lib" / shared.name)
    (home / "bin").mkdir()
    shutil.copyfile(os.path.realpath(sys.executable), home / "bin" / version)
    start = home / "bin" / "start"
    variables = f"PYTHONHOME={home} PYTHONPATH={site} LD_LIBRARY_PATH={home}/lib"
    start.write_text(f'#!/bin/sh\n{variables} exec {home}/bin/{version} "$@"\n')
    for place in (home, *home.rglob("*")):
        place.chmod(0o755 if place.is_dir() or place.parent.name == "bin" else 0o644)
    return start


# ---- meeting -----------------------------------------------------------------------------------------------


@contextmanager
def meeting() -> Iterator[str]:
    """A name for a domain at its users' own places, where little more than the name is left in the end."""
    name = f"test-{uuid.uuid4().hex}"
    bases = [Path(f"/dev/shm/ksmalloc-{user}") for user in (os.geteuid(), NOBODY)]
    existed = [base.exists() for base in bases]
    try:
        yield name
        left = [path for base in bases for path in (base / name).glob("*")]
        assert sum(path.lstat().st_blocks * 512 for path in left) <= 2 * 4096, left
    finally:
        for base, was_there in zip(bases, existed, strict=True):
            shutil.rmtree(base / name, ignore_errors=True)
            if not was_there:
                with suppress(OSError):
                    base.rmdir()
