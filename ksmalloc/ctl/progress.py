# SPDX-License-Identifier: MIT
"""What a command is doing just now: one line that updates itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
from types import TracebackType
from typing import TextIO

_CLEAR = "\r\x1b[K"


class Progress:
    """Writes to `stream`. `stage()` names a step, `detail()` says how far it is, on terminals only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tty = stream.isatty()
        self._stage = ""

    def stage(self, text: str) -> None:
        self._stage = text
        if self._tty:
            self._draw(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def detail(self, text: str) -> None:
        if self._tty:
            self._draw(f"{self._stage}: {text}")

    def clear(self) -> None:
        if self._tty and self._stage:
            self._stream.write(_CLEAR)
            self._stream.flush()
        self._stage = ""

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._stream.write(_CLEAR + text[: max(1, width - 1)])
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
