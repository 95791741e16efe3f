# SPDX-License-Identifier: MIT
"""Ctrl-C, SIGTERM and SIGHUP end a command in order: as exceptions, never in the middle of a beginning."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to end, beside Ctrl-C's SIGINT."""


@contextmanager
def unwinding() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP raise SystemExit, as Ctrl-C raises KeyboardInterrupt."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Meanwhile none of them comes through; they do afterwards. A process started here has them blocked."""
    came: list[int] = []
    numbers = (signal.SIGINT, *ENDING)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    # Another thread, a library's, may take a signal that only this one blocks; so it is put off as well.
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(came[0])


def hold_interrupts_only() -> None:
    """In a process started while they were held: end when told to, but not by the parent's Ctrl-C."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
