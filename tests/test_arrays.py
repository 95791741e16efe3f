"""NumPy arrays in an arena: shapes, dtypes, orders, and who keeps what."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import ksmalloc

PAGE = 4096


@pytest.fixture
def arena(rendezvous: str) -> Iterator[ksmalloc.Arena]:
    with ksmalloc.Domain(path=rendezvous) as domain, ksmalloc.Arena(domain=domain) as arena:
        yield arena


def block_of(array: Any) -> ksmalloc.Block:
    while not isinstance(array, ksmalloc.Block):
        array = array.obj if isinstance(array, memoryview) else array.base
        assert array is not None
    return array


@pytest.mark.parametrize("shape", [5, (5,), (3, 4), (2, 3, 4), [2, 2], (), np.int64(7), (np.int32(2), 3)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [float, "i2", np.uint8, "c16", "?", "S7", "U3", "M8[s]", "<f4", ">f4"])
def test_empty_is_as_numpy_says(arena: ksmalloc.Arena, shape: Any, order: Any, dtype: Any) -> None:
    expected = np.zeros(shape, dtype, order)
    array = arena.empty(shape, dtype, order)
    assert type(array) is np.ndarray
    assert array.shape == expected.shape
    assert array.dtype == expected.dtype
    assert array.strides == expected.strides
    assert array.flags.writeable
    assert array.flags.aligned
    block = block_of(array)
    assert block.address == array.ctypes.data
    assert block.nbytes == array.nbytes
    array[...] = np.ones((), dtype)
    assert (array == np.ones(expected.shape, dtype)).all()


def test_defaults(arena: ksmalloc.Arena) -> None:
    assert arena.empty(3).dtype == np.float64
    assert arena.zeros((2, 3)).flags.c_contiguous
    assert arena.full(3, 7).dtype == np.full(3, 7).dtype
    assert arena.full(3, 1.5).dtype == np.float64


def test_structured_and_subarray_dtypes(arena: ksmalloc.Arena) -> None:
    record = np.dtype([("a", "<i4"), ("b", "<f8", (2,))])
    array = arena.zeros(10, record)
    array["b"][3] = (1, 2)
    assert array[3]["b"].tolist() == [1, 2]
    pairs = arena.zeros(5, ("<f4", (3,)))
    assert pairs.shape == np.zeros(5, ("<f4", (3,))).shape
    assert pairs.dtype == np.float32
    assert arena.zeros(3, [("pad", "V4")]).nbytes == 12


def test_contents(arena: ksmalloc.Arena) -> None:
    assert (arena.zeros((100, 100), "i4") == 0).all()
    assert (arena.full((10, 10), 3.5) == 3.5).all()
    assert arena.full((2, 3), [1, 2, 3]).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert arena.full(2, 1.9, "i4").tolist() == [1, 1]
    assert arena.full(2, "abc").tolist() == ["abc", "abc"]
    assert arena.full((2, 2), 1, "i8", "F").flags.f_contiguous


def test_array_copies(arena: ksmalloc.Arena) -> None:
    source = np.arange(20_000, dtype="i4").reshape(100, 200)
    copy = arena.array(source)
    assert (copy == source).all()
    source[0, 0] = -1
    assert copy[0, 0] == 0
    assert arena.array([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert arena.array(5).shape == ()
    assert arena.array([1, 2], dtype="f4").dtype == np.float32
    assert arena.array(source.T).flags.f_contiguous
    assert arena.array(source[::2, ::3]).flags.c_contiguous
    assert (arena.array(source[::-2, ::3]) == source[::-2, ::3]).all()
    assert (arena.array(np.broadcast_to(np.arange(3), (4, 3))) == np.arange(3)).all()


@pytest.mark.parametrize("shape", [0, (0,), (3, 0), (0, 5, 2)])
def test_no_bytes_need_no_block(arena: ksmalloc.Arena, shape: Any) -> None:
    for array in (arena.empty(shape), arena.zeros(shape), arena.full(shape, 1), arena.array(np.empty(shape))):
        assert array.shape == np.empty(shape).shape
    assert arena.stats().blocks == 0


def test_objects_are_refused(arena: ksmalloc.Arena) -> None:
    for dtype in (object, [("a", "i4"), ("b", object)]):
        for make in (arena.empty, arena.zeros):
            with pytest.raises(TypeError, match="Python objects"):
                make(3, dtype)
    with pytest.raises(TypeError, match="Python objects"):
        arena.full(3, None)
    with pytest.raises(TypeError, match="Python objects"):
        arena.array([object()])
    if hasattr(np.dtypes, "StringDType"):
        with pytest.raises(TypeError, match="Python objects"):
            arena.empty(3, np.dtypes.StringDType())


def test_wrong_arguments(arena: ksmalloc.Arena) -> None:
    for shape in (-1, (2, -3)):
        with pytest.raises(ValueError):
            arena.empty(shape)
    for wrong in (1.5, "ab", None, (2, 1.0)):
        with pytest.raises(TypeError):
            arena.empty(wrong)  # type: ignore[arg-type]
    for order in ("A", "K", "", None):
        with pytest.raises(ValueError):
            arena.empty(3, order=order)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        arena.empty(3, "no such dtype")
    with pytest.raises(MemoryError):
        arena.empty((1 << 40, 1 << 40))
    assert arena.stats().blocks == 0


def test_arrays_keep_their_block(rendezvous: str) -> None:
    domain = ksmalloc.Domain(path=rendezvous)
    arena = ksmalloc.Arena(domain=domain)
    array = arena.full((1000, 100), 3.0)
    part = array[10:20, ::2]
    transposed = part.T.view()
    with pytest.raises(BufferError):
        block_of(array).free()
    stats = arena.stats
    arena.close()
    del array, part
    gc.collect()
    assert stats().blocks == 1
    assert (transposed == 3.0).all()
    transposed[:] = 4.0
    assert transposed.sum() == 4.0 * transposed.size
    del transposed
    gc.collect()
    assert stats().blocks == 0


def test_mergeable_reaches_the_block(arena: ksmalloc.Arena) -> None:
    arrays = [
        arena.empty(10, mergeable=False),
        arena.zeros(10, mergeable=False),
        arena.full(10, 1, mergeable=False),
        arena.array([1], mergeable=False),
    ]
    assert not any(block_of(array).mergeable for array in arrays)
    assert block_of(arena.empty(10)).mergeable


def test_equal_arrays_merge(arena: ksmalloc.Arena) -> None:
    data = np.random.default_rng(1).standard_normal(64 * PAGE // 8)
    arrays = [arena.array(data) for _ in range(4)]
    report = arena.scan()
    if report.why_not is not None:
        pytest.skip(report.why_not)
    assert arena.stats().arena_pages_merged == 4 * 64
    arrays[0][0] = 1e300
    for array in arrays[1:]:
        assert (array == data).all()
    assert (arrays[0][1:] == data[1:]).all()


def test_without_numpy(arena: ksmalloc.Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    for make in (lambda: arena.empty(3), lambda: arena.full(3, 1), lambda: arena.array([1])):
        with pytest.raises(ImportError, match=r"pip install 'ksmalloc\[numpy\]'"):
            make()
    assert len(arena.alloc(10)) == 10
