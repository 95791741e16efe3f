# SPDX-License-Identifier: MIT
"""Arenas: memory to allocate from, as blocks and as NumPy arrays."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from ksmalloc import _core, handlers
from ksmalloc._core import Block, Span
from ksmalloc.arrays import need_numpy, new_array, read_only
from ksmalloc.domain import Domain, domain_of, word_of
from ksmalloc.stats import ArenaStats, Report, make_arena_stats, make_report

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray
    from typing_extensions import Buffer

    from ksmalloc.arrays import Order, Shape

_COWS = {"auto": 0, "kernel": 0, "sigsegv": 1}


class Arena:
    """Memory to allocate from, whose equal pages merge with those of all processes in its domain.

    name: a label for people. domain: None the default one, a str the one of that name, or a `Domain`.
    barrier: what keeps stores away while pages are compared. ``"auto"``: the better of ``"move"`` and
    ``"stop"`` that works in this process; if none does, only frozen pages merge, and ``stats().why_not`` says
    why. ``"move"``, ``"stop"``, ``"segv"``: that one, from now on for all of the process in this domain, or
    BarrierError.
    cow: who copies a merged page when it is written. ``"auto"`` and ``"kernel"``: the kernel. ``"sigsegv"``:
    merged pages are read-only, and ksmalloc's handler for SIGSEGV copies them; a system call that would write
    into one fails with EFAULT, unless inside `writable()`. The manual says when to choose what.
    scan: whether the pages merge in the background; if not, they merge in `scan()` and `ksmalloc.settle()`.

    Closing ends allocation only: blocks and arrays live as long as somebody uses them.

    Errors: ValueError (an unknown word), BarrierError, HandlerError, and those of `Domain`.
    Threads: any may use it. fork: it works in parent and child, whose blocks are theirs alone.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        domain: Domain | str | None = None,
        barrier: str = "auto",
        cow: str = "auto",
        scan: bool = True,
    ) -> None:
        number = word_of(_core.BARRIERS, "barrier", barrier)
        sigsegv = bool(word_of(_COWS, "cow", cow))
        self._domain = domain_of(domain)
        with handlers.installing(sigsegv or barrier == "segv"):
            self._core = _core.Arena(self._domain._membership(number), scan, sigsegv)
        self._name = name

    @property
    def name(self) -> str | None:
        """The label given at creation."""
        return self._name

    @property
    def domain(self) -> Domain:
        """The domain in which the pages merge."""
        return self._domain

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._core.closed

    def alloc(self, nbytes: SupportsIndex, mergeable: bool = True) -> Block:
        """A `Block` of `nbytes` bytes, zeroed and writable.

        mergeable=False: never looked at, never merged; required for memory that devices write by themselves.

        Errors: TypeError (no integer), ValueError (0 or negative), MemoryError, ClosedError.
        """
        return Block(self._core, nbytes, mergeable)

    def empty(
        self, shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, mergeable: bool = True
    ) -> NDArray[Any]:
        """A NumPy array in a block of its own; contents unspecified. Needs NumPy.

        shape: an int or a sequence of ints, in items. dtype: anything but one with Python objects. order:
        ``"C"`` rows first, ``"F"`` columns first. The array keeps its block; one without bytes has none.

        Errors: TypeError (objects in dtype), ValueError (negative shape, unknown order), MemoryError,
        ClosedError, ImportError (no NumPy).
        """
        return new_array(self.alloc, shape, dtype, order, mergeable)

    def zeros(
        self, shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, mergeable: bool = True
    ) -> NDArray[Any]:
        """As `empty()`, filled with zeros."""
        return self.empty(shape, dtype, order, mergeable=mergeable)  # an arena's memory is zeroed

    def full(
        self,
        shape: Shape,
        fill_value: ArrayLike,
        dtype: DTypeLike | None = None,
        order: Order = "C",
        *,
        mergeable: bool = True,
    ) -> NDArray[Any]:
        """As `empty()`, filled with `fill_value`, whose dtype is the array's unless one is given."""
        np = need_numpy()
        kind = np.asarray(fill_value).dtype if dtype is None else np.dtype(dtype)
        array = self.empty(shape, kind, order, mergeable=mergeable)
        np.copyto(array, fill_value, casting="unsafe")
        return array

    def array(
        self, obj: ArrayLike, dtype: DTypeLike | None = None, *, mergeable: bool = True
    ) -> NDArray[Any]:
        """A copy of `obj`, an array or what makes one (nested sequences, a scalar), in a block of its own.

        Shape and, unless one is given, dtype are `obj`'s; Fortran order is kept, any other becomes C order.
        """
        np = need_numpy()
        source = np.asarray(obj, dtype)
        fortran = source.flags.f_contiguous and not source.flags.c_contiguous
        copy = self.empty(source.shape, source.dtype, "F" if fortran else "C", mergeable=mergeable)
        np.copyto(copy, source)
        return copy

    def scan(self) -> Report:
        """Merge now, in the scanner's thread, while the caller waits with the GIL released.

        On return every duplicate within the arena, and of frames or candidates that peers had at the time
        of the call, is merged on this side. An arena that was unmerged merges again from here on.
        """
        return make_report(self._core.scan(), settle=False)

    def unmerge(self) -> int:
        """Make every page private again, contents unchanged, and keep it so until the next `scan()`.

        Returns how many pages were merged.
        """
        return self._core.unmerge()

    def freeze(self, a: Buffer) -> Any:
        """Make the whole pages inside `a` read-only, so that they can be merged under every barrier.

        a: a block, an array, or any buffer contiguous in C or Fortran order, that lies in one block of this
        arena. Returns a read-only view of it: of an array an array of the same shape and dtype, of anything
        else a memoryview; it keeps the memory alive. A store through an older, writable view still works: it
        thaws its page, unnoticed. **A system call that writes there** (``readinto``, ``recv_into``) fails
        with EFAULT, so nothing of the kind may be under way; see `writable()`.

        Errors: TypeError (no buffer), BufferError (not contiguous), ValueError (not this arena's memory),
        HandlerError (a store would kill the process), MemoryError.
        Threads: any may call it. fork: pages that are frozen are so in the child, too.
        """
        view, span = read_only(a), Span(a)
        if span.nbytes:
            with handlers.installing():
                self._core.freeze(span)
        return view

    def thaw(self, a: Buffer) -> None:
        """Make frozen pages writable again; what is merged stays so until it is written.

        a: what was given to `freeze()`, the view that it returned (it stays read-only), or a part of either.
        Idempotent. Errors: TypeError, BufferError and ValueError as in `freeze()`; MemoryError.
        """
        span = Span(a)
        if span.nbytes:
            self._core.thaw(span)

    @contextmanager
    def writable(self, *buffers: Buffer) -> Iterator[None]:
        """Meanwhile every page that `buffers` touch is private and writable, and stays so.

        For system calls that write into memory whose merged or frozen pages are read-only:
        ``with arena.writable(a): sock.recv_into(a)``. Frozen pages are thawed for good. Such blocks nest, and
        may overlap in any thread; the buffers stay exported meanwhile. Errors: as in `thaw()`, with nothing
        changed. fork: the child is inside, too.
        """
        with ExitStack() as stack:
            for span in [Span(buffer) for buffer in buffers]:
                if span.nbytes:
                    self._core.writable_begin(span)
                    stack.callback(self._core.writable_end, span)
            yield

    def stats(self) -> ArenaStats:
        """Counters of this arena and of its domain."""
        return make_arena_stats(self._name, self._core.domain.stats(), self._core.stats())

    def close(self) -> None:
        """Allow no further allocation (ClosedError); live blocks and arrays stay valid. Idempotent."""
        self._core.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Arena belongs to its process and cannot be pickled; its blocks and arrays can")

    def __repr__(self) -> str:
        label = "" if self._name is None else f" {self._name!r}"
        return f"<ksmalloc.Arena{label} in domain {self._domain.name!r}{', closed' if self.closed else ''}>"


_lock = threading.Lock()
_default: Arena | None = None


def _after_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_in_child)


def arena() -> Arena:
    """This process's default arena, in the default domain; made at the first call, by any thread.

    After fork the child has the same object. If somebody closed it, the next call makes a new one.
    """
    global _default
    with _lock:
        if _default is None or _default.closed:
            _default = Arena(name="default")
        return _default


def restore_block(data: Buffer, mergeable: bool) -> Block:
    """A block of the default arena with the bytes of `data`: what a pickled Block becomes."""
    with memoryview(data) as view:
        block = arena().alloc(view.nbytes, mergeable)
        with memoryview(block) as target:
            target[:] = view
    return block
