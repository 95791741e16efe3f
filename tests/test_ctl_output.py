# SPDX-License-Identifier: MIT
"""What ksmctl's output is made of: progress, sizes, tables."""

from __future__ import annotations

import io
import os
import pty

import pytest

from ksmalloc.ctl.progress import Progress
from ksmalloc.ctl.sizes import human
from ksmalloc.ctl.table import RULE, table


def test_progress_on_a_terminal_and_elsewhere() -> None:
    plain = io.StringIO()
    with Progress(plain) as progress:
        progress.stage("loading")
        progress.detail("1 of 2")
        progress.stage("merging")
    assert plain.getvalue() == "loading\nmerging\n"
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, Progress(terminal) as progress:
        progress.stage("loading")
        progress.detail("1 of 2")
        progress.clear()
        expected = b"\r\x1b[Kloading\r\x1b[Kloading: 1 of 2\r\x1b[K"
        said = b""
        while len(said) < len(expected):  # a terminal hands out what has come so far
            said += os.read(ours, 1000)
        assert said == expected
    os.close(ours)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-2048, "-2.0 KiB"),
        (1 << 20, "1.00 MiB"),
        (64 << 20, "64.0 MiB"),
        (1023 << 20, "1.00 GiB"),
        (3 << 40, "3.00 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


def test_tables() -> None:
    assert table([("a", "bb"), RULE, ("ccc", "d")]) == "  a     bb\n  --------\n  ccc    d"
