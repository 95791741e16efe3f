# SPDX-License-Identifier: MIT
"""A worker's copies of files in its arena, and the proof that every byte of them is still the file's.

Copies are compared in chunks with the files themselves, read by other code than loaded them; a check holds no
second copy.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import ksmalloc

CHUNK = 1 << 18
FLIP = 0xFF
"""A write of the demonstration flips all bits of a byte."""


class Mismatch(ksmalloc.Error):
    """A byte in the arena is not what it should be."""


@dataclass(frozen=True)
class Piece:
    """Some bytes in the arena, and the stretch of a file, or of a zip file's member, that they came from."""

    name: str
    view: memoryview
    path: str
    offset: int = 0
    member: str | None = None
    flipped: set[int] = field(default_factory=set)

    def verify(self) -> int:
        """Read every byte and compare it; bytes that were flipped must read as flipped. Returns how many."""
        with self._original() as file:
            for at in range(0, len(self.view), CHUNK):
                chunk = self.view[at : at + CHUNK]
                right = bytearray(file.read(len(chunk)))
                for i in self.flipped:
                    if at <= i < at + len(right):
                        right[i - at] ^= FLIP
                if right != chunk:
                    raise Mismatch(f"{self.name}: bytes {at} to {at + len(chunk) - 1} are not the file's")
        return len(self.view)

    def flip(self, positions: Collection[int]) -> None:
        """Write: flip all bits of the bytes at these positions."""
        for i in positions:
            self.view[i] ^= FLIP
        self.flipped.symmetric_difference_update(positions)

    @contextmanager
    def _original(self) -> Iterator[IO[bytes]]:
        with ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open(self.path, "rb"))
            if self.member is not None:
                archive = stack.enter_context(zipfile.ZipFile(file))
                file = stack.enter_context(archive.open(self.member))
            file.seek(self.offset)
            yield file


def load(path: str, arena: ksmalloc.Arena) -> list[Piece]:
    """Load a file into the arena as the pieces it consists of, which keep its memory alive.

    Each array of an npy, npz or safetensors file is one; other files, and without NumPy all, are one each.
    """
    pieces_of = _KINDS.get(os.path.splitext(path)[1].lower())
    if pieces_of is None or not _has_numpy():
        return [Piece(path, memoryview(ksmalloc.load(path, arena=arena, as_one=True)), path)]
    return [piece for piece in pieces_of(path, ksmalloc.load(path, arena=arena)) if len(piece.view)]


def _pieces_of_npy(path: str, array: Any) -> Iterator[Piece]:
    yield Piece(path, _bytes_of(array), path, os.path.getsize(path) - array.nbytes)


def _pieces_of_npz(path: str, arrays: dict[str, Any]) -> Iterator[Piece]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        array = arrays[member.filename.removesuffix(".npy")]
        name = f"{path}: {member.filename}"
        yield Piece(name, _bytes_of(array), path, member.file_size - array.nbytes, member.filename)


def _pieces_of_safetensors(path: str, arrays: dict[str, Any]) -> Iterator[Piece]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        view = _bytes_of(arrays[name])
        if len(view) != end - begin:
            raise Mismatch(f"{path}: {name} has {len(view)} bytes, and {end - begin} in the file")
        yield Piece(f"{path}: {name}", view, path, 8 + length + begin)


_KINDS = {".npy": _pieces_of_npy, ".npz": _pieces_of_npz, ".safetensors": _pieces_of_safetensors}


def _bytes_of(array: Any) -> memoryview:
    """The bytes of an array in the order they lie in memory, which is the file's."""
    if not array.nbytes:
        return memoryview(b"")
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    return memoryview(array.reshape(-1, order="F" if fortran else "C").view("u1"))


def _has_numpy() -> bool:
    try:
        import numpy  # noqa: F401
    except ImportError:
        return False
    return True
