# SPDX-License-Identifier: MIT
"""`load()`: data files read straight into an arena.

Processes that load the same file get the same bytes at the same offsets into their pages, so all of it
merges. Every array lies in a block of its own: a tensor keeps merging when others are replaced, and merges
with an equal tensor from another file.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

from ksmalloc.arena import Arena
from ksmalloc.arena import arena as default_arena
from ksmalloc.formats import READERS, Source, Target, read_raw

_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".joblib"}


def load(
    file: str | os.PathLike[str] | BinaryIO,
    *,
    arena: Arena | None = None,
    mergeable: bool = True,
    format: str | None = None,
    as_one: bool = False,
) -> Any:
    """Read a data file straight into an arena, with no copy in between.

    file: a path, or a binary file that can seek and has ``readinto``; it is read from where it stands, and
    stays open. arena: None the default one. mergeable: as in `Arena.alloc()`.
    format: ``"safetensors"``, ``"npy"``, ``"npz"``; None: what the suffix of the file's name says.
    as_one: the whole file as one `Block`, whatever its suffix.

    Returns for safetensors a dict of arrays by name, in the header's order (``__metadata__`` is left out);
    for npy an array; for npz a dict of arrays by name; for any other suffix one `Block` with the whole file.
    Shapes and dtypes are the file's, but safetensors' BF16 arrives as uint16 and its F8 as uint8: the bits,
    which ``array.view(ml_dtypes.bfloat16)``, or ``view(torch.bfloat16)`` of a tensor, reads as numbers
    without a copy. Arrays need NumPy. All are writable, and private to the process.

    Errors: ValueError (the file is malformed, cut short, a pickle or has Python objects in it; it is empty
    where a block is wanted; it has no name and no format), TypeError (neither path nor binary file), OSError,
    MemoryError, ClosedError, ImportError (no NumPy).
    Threads: any may call it; the GIL is released while reading. fork: nothing special.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb", buffering=0) as opened:
            return load(opened, arena=arena, mergeable=mergeable, format=format, as_one=as_one)
    if not hasattr(file, "readinto"):
        raise TypeError(f"load() takes a path or a binary file, not {type(file).__name__}")
    read = _reader(file, format, as_one)
    return read(Source(file), Target(default_arena() if arena is None else arena, mergeable))


def _reader(file: BinaryIO, format: str | None, as_one: bool) -> Any:
    if format is not None:
        if as_one:
            raise ValueError("format= and as_one=True contradict each other")
        if format not in READERS:
            raise ValueError(f"format is one of {', '.join(map(repr, READERS))}, not {format!r}")
        return READERS[format]
    if as_one:
        return read_raw
    name = getattr(file, "name", None)
    if not isinstance(name, (str, bytes)):
        raise ValueError("a file without a name does not tell its format: give format= or as_one=True")
    suffix = os.path.splitext(os.fsdecode(name))[1].lower()
    if suffix in _PICKLES:
        raise ValueError(
            f"a {suffix} file is a pickle, which load() does not read: unpickle it and copy its arrays with "
            "Arena.array(), or give as_one=True for its bytes"
        )
    return READERS.get(suffix[1:], read_raw)
