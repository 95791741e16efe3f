# SPDX-License-Identifier: MIT
"""Arguments that several subcommands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_domain(parser: argparse.ArgumentParser, default: str | None = "default", what: str = "") -> None:
    """--domain and --path: which domain, and where its rendezvous is."""
    what = what or f"the domain to control (default: {default})"
    parser.add_argument("--domain", metavar="NAME", default=default, help=what)
    parser.add_argument(
        "--path",
        metavar="DIR",
        default=None,
        help="where domains meet (default: /dev/shm/ksmalloc-UID)",
    )


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` to `high`."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low:,} to {high:,}")
        return int(text)

    return number


def seconds(text: str) -> float:
    """A type for argparse: a finite number of seconds, more than none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
