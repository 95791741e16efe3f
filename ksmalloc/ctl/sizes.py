# SPDX-License-Identifier: MIT
"""Sizes in bytes, the way people read and write them."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def human(nbytes: int) -> str:
    """`nbytes` in the largest unit that leaves at least one whole: 3.2 MiB, 512 B, -1.0 KiB."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in _UNITS:
        value /= 1024
        if abs(value) < 999.95 or unit == _UNITS[-1]:
            break
    return f"{value:.2f} {unit}" if abs(value) < 9.995 and unit != "KiB" else f"{value:.1f} {unit}"
