# SPDX-License-Identifier: MIT
"""A plain table: first column to the left, the others to the right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

RULE: tuple[str, ...] = ()
"""A row that is drawn as a line."""


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Align `rows`; an empty one (RULE) becomes a line as wide as the table."""
    lines = [tuple(row) for row in rows]
    columns = max((len(row) for row in lines), default=0)
    widths = [max((len(row[i]) for row in lines if i < len(row)), default=0) for i in range(columns)]
    total = sum(widths) + 3 * max(0, columns - 1)
    out = []
    for row in lines:
        if not row:
            out.append(indent + "-" * total)
            continue
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        out.append((indent + "   ".join(cells)).rstrip())
    return "\n".join(out)
