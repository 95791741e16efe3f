# SPDX-License-Identifier: MIT
"""Real limits: small workers, swap, settings of the system; all of it put back in the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import buildkit
import forkkit
import nobodykit
import pytest
from conftest import Processes
from outside import SOURCE

PAGE = 4096
MIB = 1 << 20
LIMITS = buildkit.ROOT / "tests" / "limits"
SECONDS = 120
"""Protection against hanging, no measure of speed."""

START = (
    SOURCE
    + r"""
import contextlib, errno, mmap, resource

def limit(name, soft):
    number = getattr(resource, "RLIMIT_" + name)
    resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))

def lift(name):
    limit(name, resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1])

def status(name):
    # A line of /proc/self/status, in bytes.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def check(blocks, content):
    # Every byte, which also has every page there for merged().
    for block in blocks:  # without taking memory, of which there may be none
        with memoryview(block) as here:
            assert here == content

def write_half(block, content):
    # Into every other page; what the block then holds.
    model = bytearray(content)
    with memoryview(block) as view:
        for at in range(0, len(model), 8192):
            view[at] = model[at] = at // 4096 % 256 ^ 1
    return model

def refused(call, *kinds):
    # The error that a call must fail with.
    try:
        call()
    except kinds as error:
        return error
    raise AssertionError("it was not refused")

def scan_until(arena, pages, seconds=60):
    # Scan until so many pages have merged since; the last report.
    before, end = arena.stats().arena_pages_merged, time.monotonic() + seconds
    while True:
        report = arena.scan()
        if arena.stats().arena_pages_merged - before >= pages:
            return report
        assert time.monotonic() < end, report
        time.sleep(0.05)

def is_alone():
    # Whether this process has one thread; one that has ended may be listed a moment longer.
    return any(len(os.listdir("/proc/self/task")) == 1 or time.sleep(0.01) for _ in range(500))
"""
)


def run(processes: Processes, rendezvous: str, body: str, *arguments: Any) -> str:
    """Run a program that starts as those of nobodykit do; returns what it printed. Nothing on stderr."""
    command = [sys.executable, "-c", nobodykit.START + START + body, rendezvous, *map(str, arguments)]
    process = processes.popen(*command, env=forkkit.environment())
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, ""), f"{out}{err}ended with {process.returncode}"
    return str(out)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set this limit")


# ---- a worker in C -----------------------------------------------------------------------------------------


def build(out: Path, *without: str) -> Path:
    """The worker; a control is one without something: see the folders of tests/limits."""
    folders = [LIMITS, *(LIMITS / one for one in without)]
    return buildkit.program("limits", folders, out, *buildkit.CHECKED)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("limits"))


class Died(Exception):
    """A worker ended instead of answering; `status` as of `Popen.returncode`."""

    def __init__(self, status: int) -> None:
        super().__init__(f"ended with {status}")
        self.status = status


class Worker:
    """A process of limits.c."""

    def __init__(self, processes: Processes, program: Path) -> None:
        self.process = processes.popen(program, stderr=None)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def tell(self, *words: Any) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, str]:
        line = self.process.stdout.readline()
        if not line:
            raise Died(self.process.wait(SECONDS))
        assert line.startswith("ok"), line
        return dict(word.split("=") for word in line.split() if "=" in word)

    def ask(self, *words: Any) -> dict[str, str]:
        self.tell(*words)
        return self.answer()

    def settle(self) -> dict[str, str]:
        """The last report. On a busy machine threads may not be held for a while."""
        while (report := self.ask("settle", 1000))["settled"] != "1":
            pass
        return report

    def stats(self) -> dict[str, str]:
        return self.ask("stats")

    def count(self, name: str) -> int:
        return int(self.stats()[name])

    def is_alive(self) -> bool:
        return self.process.poll() is None


# ---- the system --------------------------------------------------------------------------------------------


@contextmanager
def settings(**values: int) -> Iterator[None]:
    """Settings below /proc/sys/vm meanwhile, in this order; they come back in the opposite one."""
    with ExitStack() as stack:
        for name, value in values.items():
            file = Path("/proc/sys/vm", name)
            stack.callback(file.write_text, file.read_text())
            file.write_text(str(value))
        yield


@contextmanager
def swap(nbytes: int) -> Iterator[Path]:
    """A swap file of one's own meanwhile."""
    file = Path(f"/var/tmp/ksmalloc-swap-{os.getpid()}")
    with ExitStack() as unused:
        unused.callback(file.unlink, missing_ok=True)
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            for _ in range(nbytes // MIB):
                out.write(bytes(MIB))
        for command in (["mkswap", file], ["swapon", file]):
            environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode != 0:
                pytest.skip(f"needs a swap file: {done.stderr}")
        unused.pop_all()
    try:
        yield file
    finally:
        _swapoff(file)  # else it stays: without a name nobody could ever switch it off
        file.unlink()


def _swapoff(file: Path) -> None:
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    for _ in range(10):
        if subprocess.run(["swapoff", file], check=False, env=environment).returncode == 0:
            return
        time.sleep(0.5)
    pytest.fail(f"{file} is still in use as swap", pytrace=False)


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024


def status(pid: int | str, name: str) -> int:
    """A line of /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) * 1024
