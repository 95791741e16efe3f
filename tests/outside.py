# SPDX-License-Identifier: MIT
"""What the kernel says of a process; for the tests, and as SOURCE for the programs that they start."""

from __future__ import annotations

import inspect


def merged(pid: int | str = "self") -> int:
    """Bytes that a process has mapped from a store, touched and not written."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            first, *rest = line.split()
            if not first.endswith(":"):
                inside = "ksmalloc store" in line or "/dev/shm/ksmalloc-" in line
            elif inside and first in ("Rss:", "Anonymous:"):
                total += int(rest[0]) * 1024 * (1 if first == "Rss:" else -1)
    return total


SOURCE = inspect.getsource(merged)
