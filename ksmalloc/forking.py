# SPDX-License-Identifier: MIT
"""Whether `os.fork()` is under way in this thread, so that no thread starts before it has returned.

CPython 3.12 and later warn when the process has a second thread once the parent comes back from fork. Where
other modules have Python code among their fork handlers (logging does), pending calls run there already, and
some versions count the threads after that.
"""

from __future__ import annotations

import os
import sys

_forking: tuple[int, int] | None = None  # who called os.fork(): the identity of its frame, and where it stood


def _before() -> None:
    global _forking
    frame = sys._getframe(1)
    _forking = id(frame), frame.f_lasti


def is_under_way() -> bool:
    """Whether we run inside a handler of `os.fork()`: then who called it is below us and has not moved."""
    global _forking
    frame = sys._getframe(1)
    while _forking is not None and frame.f_back is not None:
        frame = frame.f_back
        if (id(frame), frame.f_lasti) == _forking:
            return True
    _forking = None
    return False


os.register_at_fork(before=_before)
