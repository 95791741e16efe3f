# SPDX-License-Identifier: MIT
"""Blocks seen as NumPy arrays. NumPy is imported when the first one is made."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from ksmalloc._core import Block

if TYPE_CHECKING:
    import numpy
    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer

    Shape = SupportsIndex | Sequence[SupportsIndex]
    Order = Literal["C", "F"]


def new_array(
    alloc: Callable[[int, bool], Block], shape: Shape, dtype: DTypeLike, order: Order, mergeable: bool
) -> NDArray[Any]:
    """What `Arena.empty()` makes; `alloc` is the arena's."""
    np = need_numpy()
    kind = np.dtype(dtype)
    if kind.itemsize == 0:
        kind = np.zeros((), kind).dtype  # strings without a length: NumPy decides it
    if kind.hasobject:
        raise TypeError(f"an array of {kind} holds pointers to Python objects, not their data")
    if order not in ("C", "F"):
        raise ValueError(f"order is 'C' or 'F', not {order!r}")
    lengths = lengths_of(shape)
    nbytes = math.prod(lengths) * kind.itemsize
    if nbytes == 0:
        nothing: NDArray[Any] = np.zeros(lengths, kind, order)
        return nothing
    return as_array(alloc(nbytes, mergeable), lengths, kind, order)


def as_array(block: Block, shape: Sequence[int], dtype: numpy.dtype[Any], order: Order) -> NDArray[Any]:
    """The block seen as an array; frombuffer holds an export of it, which numpy.ndarray alone would not."""
    np = need_numpy()
    array: NDArray[Any] = np.ndarray(shape, dtype, np.frombuffer(block, np.uint8), 0, None, order)
    return array


def read_only(buffer: Buffer) -> Any:
    """A read-only view of a buffer: of an array an array, of anything else a memoryview."""
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    if numpy is None or not isinstance(buffer, numpy.ndarray):
        return memoryview(buffer).toreadonly()
    view = buffer.view()
    view.flags.writeable = False
    return view


def _items(shape: Shape) -> Iterable[SupportsIndex]:
    return shape if isinstance(shape, Iterable) else (shape,)


def lengths_of(shape: Shape) -> tuple[int, ...]:
    """A shape as a tuple of lengths in items."""
    lengths = (shape,) if type(shape) is int else tuple(map(operator.index, _items(shape)))
    if min(lengths, default=0) < 0:
        raise ValueError(f"a shape has no negative lengths: {lengths}")
    return lengths


def need_numpy() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        return numpy
    try:
        import numpy
    except ImportError as error:
        raise ImportError("arrays need NumPy: pip install 'ksmalloc[numpy]'", name="numpy") from error
    return numpy
