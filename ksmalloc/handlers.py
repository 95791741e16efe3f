# SPDX-License-Identifier: MIT
"""Signals: ksmalloc's handler for SIGSEGV among others, and the signal that holds threads for "stop".

The core's handler stands before whoever was there when it was installed, and calls it for faults that are
not its own. Whoever installs one later would displace it, and a store into a read-only page would then end
the process. In Python that is `faulthandler.enable()`, `faulthandler.disable()` and
``signal.signal(SIGSEGV, …)``: from the moment there is something to lose, wrappers of these three put ours
back on top, and the other one behind it.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ksmalloc import _core

STOP_SIGNAL = "KSMALLOC_STOP_SIGNAL"
"""The environment variable that chooses the signal: a number, ``SIGRTMIN+n`` or ``SIGRTMAX-n``."""

_lock = threading.RLock()  # a Python signal handler may come in between, and call signal.signal()
_watching = False
_behind = False  # whether faulthandler was enabled after ours was installed


def _after_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_in_child)


@contextmanager
def installing(handler: bool = True) -> Iterator[None]:
    """Around a call of the core that installs the handler: who comes later is watched from then on."""
    global _watching
    if _watching or not handler:
        yield
        return
    with _lock:
        yield
        if not _watching:
            _watching = True
            _watch()


def _watch() -> None:
    faulthandler.enable = _around_enable(faulthandler.enable)
    faulthandler.disable = _around_disable(faulthandler.disable)
    signal.signal = _around_signal(signal.signal)
    _core.handler_outlives_python()


def _around_enable(enable: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(enable)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global _behind
        with _lock:
            before = faulthandler.is_enabled()
            try:
                return enable(*args, **kwargs)
            finally:
                _behind = _behind or (faulthandler.is_enabled() and not before)
                _core.handler_reinstall()

    return wrapper


def _around_disable(disable: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(disable)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global _behind
        with _lock:
            result = disable(*args, **kwargs)
            if _behind:  # it has put back what it found: ours
                _core.handler_popped()
                _behind = False
            _core.handler_reinstall()
            return result

    return wrapper


def _around_signal(install: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(install)
    def wrapper(signalnum: Any, handler: Any) -> Any:
        with _lock:
            try:
                return install(signalnum, handler)
            finally:
                if signalnum == signal.SIGSEGV:
                    _core.handler_reinstall()

    return wrapper


def number_of(text: str) -> int:
    """The number of a real-time signal: ``"40"``, ``"SIGRTMIN+6"``, ``"SIGRTMAX-2"``; else ValueError."""
    match = re.fullmatch(r"\s*(?:(SIGRTMIN|SIGRTMAX)(?:([+-])([0-9]+))?|([0-9]+))\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"a signal is a number, SIGRTMIN+n or SIGRTMAX-n, not {text!r}")
    base, sign, offset, plain = match.groups()
    number = int(plain) if base is None else int(getattr(signal, base)) + int(f"{sign or '+'}{offset or 0}")
    if not signal.SIGRTMIN <= number <= signal.SIGRTMAX:
        raise ValueError(
            f"{text.strip()} is not a real-time signal, {int(signal.SIGRTMIN)} to {int(signal.SIGRTMAX)}"
        )
    return number


def name_of(number: int) -> str:
    """A real-time signal for people, as ``"SIGRTMAX-6"``."""
    below = int(signal.SIGRTMAX) - number
    return f"SIGRTMAX-{below}" if below else "SIGRTMAX"


def choose_stop_signal(environ: Mapping[str, str] = os.environ) -> None:
    """Use the signal that the environment names, if it does; warns when that cannot be."""
    text = environ.get(STOP_SIGNAL, "")
    if text:
        try:
            _core.stop_signal(number_of(text))
        except ValueError as error:
            warnings.warn(f"{STOP_SIGNAL} is ignored: {error}", RuntimeWarning, stacklevel=2)
