# SPDX-License-Identifier: MIT
"""What tests of a rendezvous in which somebody has planted something share."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Processes

import ksmalloc

LOCK_LIVENESS = (1 << 32) + 64  # of slot 0: layout.h
JOIN = """
import sys
import ksmalloc
try:
    ksmalloc.Domain(path=sys.argv[1])
except Exception as error:
    print(type(error).__name__, isinstance(error, OSError))
else:
    print("joined")
"""


@pytest.fixture
def place(rendezvous: str) -> Path:
    """A rendezvous with a domain that somebody made and left."""
    ksmalloc.Domain(path=rendezvous).close()
    return Path(rendezvous)


def joined(processes: Processes, rendezvous: Path) -> str:
    program = processes.python(JOIN, rendezvous)
    output, errors = program.communicate(timeout=120)
    assert program.returncode == 0, errors
    return str(output).strip()


def picture(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything below, and what it is: kind, mode, owner, inode, links, size, bytes."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        found[str(path)] = (status.st_mode, status.st_uid, status.st_ino, status.st_nlink, size, content)
    return found


@contextlib.contextmanager
def living(directory: Path) -> Iterator[None]:
    """Hold the lock by which the peer in slot 0 would be known to live."""
    fd = os.open(directory / "domain", os.O_RDWR | os.O_CLOEXEC)
    try:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, LOCK_LIVENESS, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        yield
    finally:
        os.close(fd)


def control_file() -> int:
    """The shared memory of the only domain of this process: its scanner's thread has it open."""
    for link in glob.iglob("/proc/self/task/*/fd/*"):
        with contextlib.suppress(OSError):
            if "ksmalloc control" in os.readlink(link):
                return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    raise AssertionError("no scanner has it open")
