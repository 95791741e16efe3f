# SPDX-License-Identifier: MIT
"""Peers that are none: a socket that answers wrongly, and figures that somebody has scribbled over.

The one who joins is another process. It is refused with an error that says so, or goes on; nothing of others
is changed. See also tests/csrc/test_exchange.c.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Processes
from plantkit import joined, living, picture, place

__all__ = ["place"]  # a fixture

MESSAGE = struct.Struct("<QIIiI16s")  # struct ksm_message
ANSWER = 4  # KSM_MESSAGE_ANSWER


# ---- a socket that answers


def memfd(nbytes: int, *, sealed: bool) -> int:
    fd = os.memfd_create("ksmalloc store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def answer(layout: int) -> bytes:
    return MESSAGE.pack(int.from_bytes(b"ksmalloc", "little"), ANSWER, 0, 0, layout, bytes(16))


def files_that_are_no_memory() -> list[int]:
    return [os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC), os.open("/", os.O_RDONLY | os.O_CLOEXEC)]


def unsealed_memory() -> list[int]:
    return [memfd(1 << 20, sealed=False), memfd(1 << 20, sealed=False)]


def memory_of_wrong_sizes() -> list[int]:
    return [memfd(1 << 20, sealed=True), memfd(1 << 12, sealed=True)]


def pipes() -> list[int]:
    return list(os.pipe2(os.O_CLOEXEC))


def too_many() -> list[int]:
    return [memfd(4096, sealed=True) for _ in range(40)]


ANSWERS: dict[str, tuple[Callable[[], list[int]], str]] = {
    "garbage": (list, "PeerError"),
    "silence": (list, "PeerError"),
    "half a message": (list, "PeerError"),
    "a message without descriptors": (list, "PeerError"),
    "one descriptor": (lambda: [memfd(4096, sealed=True)], "PeerError"),
    "too many": (too_many, "PeerError"),
    "no memory": (files_that_are_no_memory, "CorruptError"),
    "unsealed memory": (unsealed_memory, "CorruptError"),
    "memory of wrong sizes": (memory_of_wrong_sizes, "CorruptError"),
    "pipes": (pipes, "CorruptError"),
}


class Impostor:
    """Listens where a living peer would, and gives each caller the same answer."""

    def __init__(self, directory: Path, what: str) -> None:
        self.what = what
        self.layout = int.from_bytes((directory / "domain").read_bytes()[12:16], "little")
        self.fds = ANSWERS[what][0]()
        self.before = [os.fstat(fd) for fd in self.fds]
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (directory / "peer-0").unlink(missing_ok=True)
        self.socket.bind(str(directory / "peer-0"))
        self.socket.listen(64)
        self.callers = 0
        self.silent: list[socket.socket] = []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self.socket.accept()
                self.callers += 1
                if self.what == "silence":
                    self.silent.append(caller)
                    continue
                with caller, contextlib.suppress(OSError):
                    self.reply(caller)

    def reply(self, caller: socket.socket) -> None:
        caller.recv(4096)
        message = answer(self.layout)
        if self.what == "garbage":
            message = os.urandom(300)
        elif self.what == "half a message":
            message = message[:17]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.fds))] if self.fds else []
        caller.sendmsg([message], rights)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(10)
        for fd in self.fds:
            os.close(fd)
        for caller in self.silent:
            caller.close()

    def unchanged(self) -> bool:
        now = [os.fstat(fd) for fd in self.fds]
        return [(s.st_ino, s.st_size, s.st_blocks) for s in now] == [
            (s.st_ino, s.st_size, s.st_blocks) for s in self.before
        ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ANSWERS)
def test_a_socket_that_answers_wrongly(what: str, place: Path, processes: Processes) -> None:
    directory = place / "default"
    impostor = Impostor(directory, what)
    try:
        with living(directory):
            before = picture(place)
            assert joined(processes, place).split()[0] == ANSWERS[what][1]
            assert picture(place) == before
            assert impostor.callers > 0
            assert impostor.unchanged()
    finally:
        impostor.close()
    assert joined(processes, place) == "joined"  # now that nobody lives there


# ---- figures that a peer has scribbled over


SCRIBBLE = """
import os
import sys
import ksmalloc

sys.path.insert(0, sys.argv[2])
from plantkit import control_file

domain = ksmalloc.Domain(path=sys.argv[1], capacity="64MiB")
arena = ksmalloc.Arena(domain=domain, scan=False)
fd = control_file()
header, slots = 4096, 1024 * 320
for value in (b"\\0", b"\\xff", b"\\x7f", b"\\x80", None):
    for start, nbytes in ((24, 152), (header, slots)):
        os.pwrite(fd, value * nbytes if value else os.urandom(nbytes), start)
    for look in (domain.stats, arena.stats, ksmalloc.stats, lambda: domain.peers, arena.scan, domain.sweep):
        try:
            repr(look())
        except (OSError, ksmalloc.Error):
            pass
block = arena.alloc(1 << 20)
memoryview(block)[:] = bytes(range(256)) * 4096
assert bytes(block) == bytes(range(256)) * 4096
block.free()
print("well")
"""


def test_figures_that_mean_nothing(rendezvous: str, processes: Processes) -> None:
    program = processes.python(SCRIBBLE, rendezvous, Path(__file__).parent)
    output, errors = program.communicate(timeout=120)
    assert (program.returncode, output.strip()) == (0, "well"), errors
