# SPDX-License-Identifier: MIT
"""One worker of the demonstration: what it can be told to do, all inside its own process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ksmalloc
from ksmalloc.ctl import copies

WRITE_EVERY = 100 * 4096
"""The writer changes a byte in every hundredth page."""

STATS = (
    "pages_shared",
    "pages_sharing",
    "ksm_zero_pages",
    "saved_bytes",
    "store_bytes",
    "metadata_bytes",
    "page_size",
    "barrier",
    "why_not",
)
"""What the demonstration wants of a domain's Stats."""


class Worker:
    """A process's arena and its copies of the files."""

    def __init__(self) -> None:
        self._domain: ksmalloc.Domain | None = None
        self._arena: ksmalloc.Arena | None = None
        self._pieces: list[copies.Piece] = []

    def join(self, domain: str, path: str | None) -> dict[str, Any]:
        """Join the domain. Pages merge on settle() only, so that there is a before to measure."""
        with suppress(ImportError):  # what loaders need counts among what a worker takes anyway
            import numpy  # noqa: F401
        self._domain = ksmalloc.Domain(domain, path=path)
        self._arena = ksmalloc.Arena(domain=self._domain, scan=False)
        return self.stats()

    def load(self, paths: list[str]) -> int:
        assert self._arena is not None
        for path in paths:
            self._pieces += copies.load(path, self._arena)
        return sum(len(piece.view) for piece in self._pieces)

    def verify(self) -> int:
        return sum(piece.verify() for piece in self._pieces)

    def settle(self, timeout: float) -> dict[str, Any]:
        assert self._domain is not None
        report = ksmalloc.settle(timeout, domain=self._domain)
        return {"settled": report.settled, "seconds": report.seconds}

    def stats(self) -> dict[str, Any]:
        assert self._domain is not None
        stats = self._domain.stats()
        return {name: getattr(stats, name) for name in STATS}

    def write(self) -> int:
        """Change one byte in every hundredth page of this copy; returns how many."""
        count = 0
        for piece in self._pieces:
            positions = range(0, len(piece.view), WRITE_EVERY)
            piece.flip(positions)
            count += len(positions)
        return count


def commands() -> dict[str, Callable[..., Any]]:
    worker = Worker()
    names = ("join", "load", "verify", "settle", "stats", "write")
    return {name: getattr(worker, name) for name in names}
