# SPDX-License-Identifier: MIT
"""The file formats of `ksmalloc.load()`: raw, npy, npz and safetensors, each read and checked here.

Nothing in a file is believed: every length is held against the bytes that are there before memory is asked
for. What is wrong is a ValueError that says what.
"""

from __future__ import annotations

import ast
import json
import math
import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ksmalloc._core import Block
from ksmalloc.arena import Arena
from ksmalloc.arrays import as_array, need_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 1 << 20  # bytes taken at a time from a member of an archive
_NPY_HEADER_MAX = 1 << 16
_SAFETENSORS_HEADER_MAX = 100_000_000  # the format's own limit

# NumPy has no bfloat16 and no 8-bit floats: those arrive as the unsigned integers that hold their bits.
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1",
    "F8_E5M2FNUZ": "u1",
}


def malformed(why: str, cause: BaseException | None = None) -> NoReturn:
    raise ValueError(f"malformed file: {why}") from cause


class Target(NamedTuple):
    """Where what is read goes."""

    arena: Arena
    mergeable: bool


class Source:
    """A file of which `rest` bytes are left; reads exactly as many as asked for."""

    def __init__(self, file: Any, rest: int | None = None, chunk: int | None = None) -> None:
        self.file = file
        self.chunk = chunk
        if rest is None:
            start = file.tell()
            rest = file.seek(0, os.SEEK_END) - start
            file.seek(start)
        self.rest = rest

    def into(self, target: memoryview) -> None:
        """Fill `target`."""
        done = 0
        while done < len(target):
            stop = len(target) if self.chunk is None else done + self.chunk
            n = self.file.readinto(target[done:stop])
            if not n:
                malformed(f"it ends {len(target) - done} bytes early")
            done += n
        self.rest -= done

    def bytes(self, n: int) -> bytes:
        """The next `n` bytes."""
        data = bytearray(n)
        self.into(memoryview(data))
        return bytes(data)

    def block(self, target: Target, nbytes: int) -> Block:
        """The next `nbytes` bytes, as a block."""
        block = target.arena.alloc(nbytes, target.mergeable)
        with memoryview(block) as view:
            self.into(view)
        return block

    def array(self, target: Target, shape: Any, dtype: Any, fortran: bool = False) -> NDArray[Any]:
        """The next bytes, as an array."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return target.arena.empty(shape, dtype, "F" if fortran else "C")
        return as_array(self.block(target, nbytes), shape, dtype, "F" if fortran else "C")


def read_raw(source: Source, target: Target) -> Block:
    """All of the file."""
    if source.rest <= 0:
        raise ValueError("the file is empty, and a block has at least one byte")
    return source.block(target, source.rest)


def read_npy(source: Source, target: Target) -> NDArray[Any]:
    """One array; the file then stands behind it."""
    np = need_numpy()
    if source.rest < 12 or source.bytes(6) != b"\x93NUMPY":
        malformed("it does not begin like an .npy file")
    major, minor = source.bytes(2)
    if (major, minor) not in ((1, 0), (2, 0), (3, 0)):
        malformed(f"version {major}.{minor} of the .npy format is unknown")
    length = int.from_bytes(source.bytes(2 if major == 1 else 4), "little")
    if length > min(source.rest, _NPY_HEADER_MAX):
        malformed(f"an .npy header of {length} bytes, with {source.rest} bytes left")
    text = source.bytes(length)
    try:
        header = ast.literal_eval(text.decode("utf-8" if major == 3 else "latin-1"))
        descr, fortran, shape = (header[key] for key in ("descr", "fortran_order", "shape"))
        dtype = np.lib.format.descr_to_dtype(descr)
    except (ValueError, SyntaxError, LookupError, TypeError, RecursionError, MemoryError) as error:
        malformed(f"the .npy header cannot be read: {error}", error)
    if len(header) != 3 or not isinstance(fortran, bool) or not _are_lengths(shape, tuple):
        malformed(f"the .npy header says {header}")
    if dtype.hasobject:
        raise ValueError("the .npy file holds Python objects, as a pickle, which load() does not read")
    if math.prod(shape) * dtype.itemsize > source.rest:
        malformed(f"an array of shape {shape} and dtype {dtype} in {source.rest} bytes")
    return source.array(target, shape, dtype, fortran)


def read_npz(source: Source, target: Target) -> dict[str, NDArray[Any]]:
    """All arrays of an archive, by name."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(source.file) as archive:
            for info in archive.infolist():
                name, suffix = os.path.splitext(info.filename)
                if suffix != ".npy" or name in arrays:
                    malformed(f"the .npz archive holds {info.filename!r}, which is no array or occurs twice")
                with archive.open(info) as member:
                    inner = Source(member, info.file_size, _CHUNK)
                    arrays[name] = read_npy(inner, target)
                    if inner.rest:
                        malformed(f"{inner.rest} bytes follow the array in {info.filename!r}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        malformed(f"the .npz archive cannot be read: {error}", error)
    return arrays


class _Tensor(NamedTuple):
    begin: int
    end: int
    name: str
    shape: list[int]
    dtype: Any


def read_safetensors(source: Source, target: Target) -> dict[str, NDArray[Any]]:
    """All tensors by name, in the header's order: a length, a JSON header, then the tensors without gaps."""
    tensors = [_tensor(*item) for item in _safetensors_header(source).items() if item[0] != "__metadata__"]
    ordered = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
    position = 0
    for tensor in ordered:
        if tensor.begin != position:
            fault = "overlaps another" if tensor.begin < position else "leaves a gap before it"
            malformed(f"tensor {tensor.name!r} {fault}: it begins at {tensor.begin}, not {position}")
        position = tensor.end
    if position != source.rest:
        malformed(f"tensors of {position} bytes in {source.rest} bytes")
    arrays = {tensor.name: source.array(target, tensor.shape, tensor.dtype) for tensor in ordered}
    return {tensor.name: arrays[tensor.name] for tensor in tensors}


def _safetensors_header(source: Source) -> dict[str, Any]:
    if source.rest < 8:
        malformed("it is too short for safetensors")
    length = int.from_bytes(source.bytes(8), "little")
    if length > min(source.rest, _SAFETENSORS_HEADER_MAX):
        malformed(f"a safetensors header of {length} bytes, with {source.rest} bytes left")
    text = source.bytes(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        malformed(f"the safetensors header cannot be read: {error}", error)
    if not isinstance(header, dict):
        malformed("the safetensors header is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        malformed("__metadata__ is no map of strings")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(name: str, entry: Any) -> _Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        malformed(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {word!r}; known are {', '.join(_DTYPES)}")
    if not _are_lengths(shape, list) or not _are_lengths(offsets, list) or len(offsets) != 2:
        malformed(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    dtype = need_numpy().dtype(_DTYPES[word])
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        malformed(f"tensor {name!r} needs {nbytes} bytes and has {end - begin}")
    return _Tensor(begin, end, name, shape, dtype)


def _are_lengths(values: Any, kind: type[Any]) -> bool:
    return isinstance(values, kind) and all(type(value) is int and value >= 0 for value in values)


READERS = {"safetensors": read_safetensors, "npy": read_npy, "npz": read_npz}
