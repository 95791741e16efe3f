# SPDX-License-Identifier: MIT
"""Workers that become somebody else, and masters that fork or start such workers: their own side.

Whoever has changed its user may be unable to read the interpreter and the checkout: everything that will be
needed is imported before that.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import platform
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection, Pipe
from typing import Any

from teamkit import Worker

import ksmalloc
import ksmalloc.ctl
from ksmalloc.ctl import team
from ksmalloc.ctl.team import WorkerError

NOBODY = 65534

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_USERFAULTFD = {"x86_64": (0xC000003E, 323), "aarch64": (0xC00000B7, 282)}[platform.machine()]


# ---- a process that may do little --------------------------------------------------------------------------


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jump_if", ctypes.c_uint8),
        ("jump_if_not", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _prctl(option: int, *arguments: Any) -> None:
    if _LIBC.prctl(option, *arguments, *[ctypes.c_ulong(0)] * (4 - len(arguments))):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def refuse_userfaultfd() -> None:
    """Install a seccomp filter under which userfaultfd(2) is EPERM, in this thread and those it starts."""
    architecture, number = _USERFAULTFD
    load, equal, give = 0x20, 0x15, 0x06
    steps = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 0, 3, architecture),
        (load, 0, 0, 0),  # seccomp_data.nr
        (equal, 0, 1, number),
        (give, 0, 0, 0x00050000 | 1),  # EPERM
        (give, 0, 0, 0x7FFF0000),  # allowed
    ]
    program = _Program(len(steps), (_Instruction * len(steps))(*steps))
    _prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))
    _prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(program))


def _error_of(call: Callable[[], Any]) -> int:
    """The errno that a call fails with; 0: it works."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def _userfaultfd(flags: int) -> None:
    fd = _LIBC.syscall(ctypes.c_long(_USERFAULTFD[1]), ctypes.c_long(flags | os.O_CLOEXEC))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd(2)")
    os.close(fd)


def _open(path: str, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


# ---- workers and their masters -----------------------------------------------------------------------------


class Hand(Worker):
    """A worker that can change its user, and be the master of others. What it has loaded, a fork has too."""

    def __init__(self) -> None:
        super().__init__()
        self.hands: dict[int, Connection] = {}

    def warm(self, path: str = "") -> None:
        """What is imported only when it is needed, as well; and what a collection writes to after a fork."""
        for module in pkgutil.walk_packages(ksmalloc.__path__, "ksmalloc."):
            if module.name not in ("ksmalloc.__main__", "ksmalloc.shm"):
                importlib.import_module(module.name)
        super().warm(path)
        gc.collect()

    def become_nobody(self, filtered: bool, dumpable: bool) -> None:
        """An ordinary process of nobody's is dumpable; one that has changed its user is so if it says so."""
        self.drop_root()
        if filtered:
            refuse_userfaultfd()
        if dumpable:
            _prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(1))

    def why_not(self) -> str | None:
        return self.domain.stats().why_not

    def drop_root(self) -> None:
        """As gunicorn's set_owner_process() does it."""
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    def refusals(self) -> dict[str, int]:
        """By which errors this process is refused what merging could use; 0: it is not."""
        return {
            "userfaultfd": _error_of(lambda: _userfaultfd(0)),
            "userfaultfd, user mode": _error_of(lambda: _userfaultfd(1)),
            "/dev/userfaultfd": _error_of(lambda: _open("/dev/userfaultfd", os.O_RDWR)),
            "/proc/self/pagemap": _error_of(lambda: _open("/proc/self/pagemap")),
        }

    def user(self) -> tuple[int, ...]:
        return (*os.getresuid(), *os.getresgid())

    def meet(self, name: str) -> None:
        """Join the domain of this name at this user's own place."""
        self.domain = ksmalloc.Domain(name)
        self.arena = ksmalloc.Arena(domain=self.domain)

    def capabilities(self) -> ksmalloc.Capabilities:
        return ksmalloc.capabilities(self.domain)

    def doctor(self, *arguments: str) -> dict[str, Any]:
        """What `ksmctl doctor` says in this process."""
        out = StringIO()
        with redirect_stdout(out):
            ksmalloc.ctl.main(["doctor", "--json", *arguments])
        found: dict[str, Any] = json.loads(out.getvalue())
        return found

    def fork(self, count: int, drop: bool) -> list[int]:
        """Fork workers that go on with what is here, or drop root before that; returns their pids."""
        for _ in range(count):
            ours, theirs = Pipe()
            pid = os.fork()
            if pid == 0:
                ours.close()
                for other in self.hands.values():
                    other.close()
                self.hands = {}
                try:
                    if drop:
                        self.drop_root()
                    serve(theirs, self)
                finally:
                    os._exit(0)
            theirs.close()
            self.hands[pid] = ours
        return list(self.hands)

    def start(self, count: int, python: str) -> list[int]:
        """Start workers with a Python of their own; returns their pids."""
        for _ in range(count):
            ours, theirs = Pipe()
            code = f"import handkit; handkit.serve(handkit.Connection({theirs.fileno()}))"
            process = subprocess.Popen(
                [python, "-c", code], pass_fds=[theirs.fileno()], cwd="/", stdin=subprocess.DEVNULL
            )
            process.returncode = 0  # dismiss() collects it
            theirs.close()
            self.hands[process.pid] = ours
        return list(self.hands)

    def pass_on(self, command: str, *args: Any) -> list[Any]:
        """Tell all one's workers to do something, at the same time; returns their answers."""
        return self.pass_on_each(command, [args] * len(self.hands))

    def pass_on_each(self, command: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """The same with arguments of its own for each."""
        for hand, args in zip(self.hands.values(), arguments, strict=True):
            hand.send((1, command, args))
        answers = []
        for pid, hand in self.hands.items():
            try:
                _, ok, answer = hand.recv()
            except (EOFError, ConnectionError):
                raise WorkerError(f"{command}: worker {pid} has died") from None
            if not ok:
                raise WorkerError(f"{command}: worker {pid}: {answer}")
            answers.append(answer)
        return answers

    def dismiss(self) -> None:
        """End one's workers."""
        for pid, hand in self.hands.items():
            hand.close()
            os.waitpid(pid, 0)
        self.hands = {}


def hands(hand: Hand | None = None) -> dict[str, Callable[..., Any]]:
    hand = hand or Hand()
    return {name: getattr(hand, name) for name in dir(Hand) if not name.startswith("_")}


def serve(connection: Connection, hand: Hand | None = None) -> None:
    """Do what one is told until the other side is gone."""
    team._serve(connection, lambda: hands(hand))
