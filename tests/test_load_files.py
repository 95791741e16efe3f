"""load(): which format, which arena, what counts as a file."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ksmalloc

arena_module = sys.modules["ksmalloc.arena"]


@pytest.fixture
def arena(rendezvous: str) -> Iterator[ksmalloc.Arena]:
    with ksmalloc.Domain(path=rendezvous) as domain, ksmalloc.Arena(domain=domain) as arena:
        yield arena


@pytest.mark.parametrize("name", ["data.bin", "data", "data.npy.gz", "archive.tar"])
def test_other_files_are_one_block(arena: ksmalloc.Arena, tmp_path: Path, name: str) -> None:
    content = os.urandom(100_001)
    path = tmp_path / name
    path.write_bytes(content)
    block = ksmalloc.load(path, arena=arena)
    assert type(block) is ksmalloc.Block
    assert bytes(block) == content
    assert block.address % 4096 == 0


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.pkl"])
def test_as_one(arena: ksmalloc.Arena, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"any bytes")
    block = ksmalloc.load(path, arena=arena, as_one=True)
    assert bytes(block) == b"any bytes"
    with pytest.raises(ValueError):
        ksmalloc.load(path, arena=arena)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".pth", ".joblib", ".PT"])
def test_pickles_are_not_loaded(arena: ksmalloc.Arena, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"data")
    with pytest.raises(ValueError, match="is a pickle"):
        ksmalloc.load(path, arena=arena)


def test_format_names(arena: ksmalloc.Arena, tmp_path: Path) -> None:
    path = tmp_path / "array.dat"
    with path.open("wb") as file:
        np.save(file, np.arange(5))
    assert type(ksmalloc.load(path, arena=arena)) is ksmalloc.Block
    assert ksmalloc.load(path, arena=arena, format="npy").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="'safetensors', 'npy', 'npz', not 'hdf5'"):
        ksmalloc.load(path, arena=arena, format="hdf5")
    with pytest.raises(ValueError, match="contradict"):
        ksmalloc.load(path, arena=arena, format="npy", as_one=True)


@pytest.mark.parametrize("buffering", [0, -1])
def test_open_files_are_read_from_where_they_stand(
    arena: ksmalloc.Arena, tmp_path: Path, buffering: int
) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"0123456789")
    with path.open("rb", buffering=buffering) as file:
        file.seek(4)
        assert bytes(ksmalloc.load(file, arena=arena)) == b"456789"
        assert not file.closed
        with pytest.raises(ValueError, match="empty"):
            ksmalloc.load(file, arena=arena)


def test_nameless_files(arena: ksmalloc.Arena) -> None:
    with pytest.raises(ValueError, match="without a name"):
        ksmalloc.load(io.BytesIO(b"123"), arena=arena)
    assert bytes(ksmalloc.load(io.BytesIO(b"123"), arena=arena, as_one=True)) == b"123"
    with os.fdopen(os.memfd_create("nameless"), "w+b", buffering=0) as file:
        file.write(b"abc")
        file.seek(0)
        with pytest.raises(ValueError):
            ksmalloc.load(file, arena=arena)


def test_what_is_no_file(arena: ksmalloc.Arena, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"text")
    for wrong in (None, 3, b"data.bin", [1]):
        with pytest.raises(TypeError):
            ksmalloc.load(wrong, arena=arena)  # type: ignore[arg-type]
    with path.open(encoding="ascii") as file, pytest.raises(TypeError):
        ksmalloc.load(file, arena=arena)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        ksmalloc.load(tmp_path / "missing.npy", arena=arena)
    with pytest.raises(IsADirectoryError):
        ksmalloc.load(tmp_path, arena=arena)
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe, pytest.raises(OSError):
        ksmalloc.load(pipe, arena=arena, as_one=True)


class Short(io.BytesIO):
    """Gives a few bytes at a time, and stops before its end."""

    def __init__(self, data: bytes, stop: int) -> None:
        super().__init__(data)
        self.stop = stop

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return super().readinto(buffer[: min(3, max(0, self.stop - self.tell()))])


def test_short_reads(arena: ksmalloc.Arena) -> None:
    data = os.urandom(1000)
    assert bytes(ksmalloc.load(Short(data, 1000), arena=arena, as_one=True)) == data
    with pytest.raises(ValueError, match="ends 10 bytes early"):
        ksmalloc.load(Short(data, 990), arena=arena, as_one=True)
    assert arena.stats().blocks == 0


def test_which_arena(arena: ksmalloc.Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"text")
    monkeypatch.setattr(arena_module, "_default", arena)
    block = ksmalloc.load(path)
    assert arena.stats().blocks == 1
    assert block.mergeable
    assert not ksmalloc.load(path, mergeable=False).mergeable
    arena.close()
    with pytest.raises(ksmalloc.ClosedError):
        ksmalloc.load(path, arena=arena)


def test_equal_files_merge(arena: ksmalloc.Arena, tmp_path: Path) -> None:
    if arena.stats().why_not is not None:
        pytest.skip(str(arena.stats().why_not))
    path = tmp_path / "array.npy"
    source = np.random.default_rng(1).standard_normal((100, 4096))
    np.save(path, source)
    first, second = (ksmalloc.load(path, arena=arena) for _ in range(2))
    arena.scan()
    assert arena.stats().arena_pages_merged == 2 * 800
    first[3, 3] = 7
    assert np.array_equal(second, source)


def test_without_numpy(arena: ksmalloc.Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    path = tmp_path / "x.npy"
    path.write_bytes(b"data")
    with pytest.raises(ImportError, match=r"pip install 'ksmalloc\[numpy\]'"):
        ksmalloc.load(path, arena=arena)
    assert bytes(ksmalloc.load(path, arena=arena, as_one=True)) == b"data"
