# SPDX-License-Identifier: MIT
"""A worker's copies of files: the check that finds every wrong byte, and the sample."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ksmalloc.ctl import copies
from ksmalloc.ctl.sample import make_sample

MIB = 1 << 20


def test_a_wrong_byte_is_found(tmp_path: Path) -> None:
    data = os.urandom(copies.CHUNK * 2 + 99)
    path = tmp_path / "file"
    path.write_bytes(b"head" + data)
    copy = bytearray(data)
    piece = copies.Piece("it", memoryview(copy), str(path), offset=4)
    assert piece.verify() == len(data)
    for position in (0, copies.CHUNK, copies.CHUNK + 1, len(data) - 1):
        copy[position] ^= 1
        with pytest.raises(copies.Mismatch):
            piece.verify()
        copy[position] ^= 1
    piece.flip(range(0, len(data), 5000))
    assert copy[5000] == data[5000] ^ copies.FLIP
    assert piece.verify() == len(data)
    copy[5000] ^= copies.FLIP  # a write that was lost
    with pytest.raises(copies.Mismatch):
        piece.verify()
    with path.open("r+b") as file:  # the file became shorter
        file.truncate(100)
    with pytest.raises(copies.Mismatch):
        copies.Piece("it", memoryview(data), str(path), offset=4).verify()


def test_the_sample_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = (make_sample(str(tmp_path / name), 2 * MIB) for name in ("one", "two"))
    assert [Path(path).read_bytes() for path in first] == [Path(path).read_bytes() for path in second]
    assert 2 * MIB <= sum(os.path.getsize(path) for path in first) < 2 * MIB + 4096
