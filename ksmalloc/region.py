# SPDX-License-Identifier: MIT
"""Registered memory: what somebody else allocated takes part in merging, too."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import TYPE_CHECKING

from ksmalloc import _core
from ksmalloc.domain import Domain, domain_of
from ksmalloc.errors import AlignmentWarning

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = os.sysconf("SC_PAGE_SIZE")
_warned = False


class Registration:
    """Memory that somebody else allocated, registered for merging; `register()` makes it.

    Holds an export of the buffer, so that the memory can neither move nor go, until `unregister()`, the end
    of the ``with`` block, or the object's own end.

    Threads: any may use it. fork: the child's copy of the memory is registered, too, by the child's object.
    """

    def __init__(self, region: _core.Region) -> None:
        self._region = region

    @property
    def nbytes(self) -> int:
        """The size of the buffer in bytes."""
        return self._region.nbytes

    @property
    def address(self) -> int:
        """The address of the buffer's first byte."""
        return self._region.address

    @property
    def pages(self) -> int:
        """How many whole pages lie inside the buffer: these may be merged."""
        return self._region.pages

    def unregister(self) -> None:
        """Give the memory back to its owner: private again, contents unchanged. Idempotent.

        No direct I/O (O_DIRECT, io_uring, RDMA) may be under way to it. OSError or MemoryError when the
        kernel refuses: then the memory stays registered, exported and valid.
        """
        self._region.unregister()

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unregister()

    def __repr__(self) -> str:
        state = "" if self._region.registered else ", unregistered"
        return f"<ksmalloc.Registration of {self.nbytes} bytes, {self.pages} pages{state}>"


def register(buffer: Buffer, *, domain: Domain | str | None = None) -> Registration:
    """Let memory that somebody else allocated be merged: the whole pages inside a writable buffer.

    The buffer (a bytearray, a NumPy array, a private anonymous mmap) has any shape and item size, is
    contiguous in C or Fortran order, and stays exported, so that it can neither move nor go, until
    `Registration.unregister()`. Memory that devices write (GPU, RDMA) must not be registered.
    domain: None the default one, a str the one of that name, or a `Domain`.

    Pages are compared whole: equal data at different offsets into its pages gives no equal pages. When the
    data does not start on a page boundary an `AlignmentWarning` says so, once a process.

    Errors: TypeError (no buffer), BufferError (read-only, or not contiguous), RegisterError, a ValueError
    (shared or file-backed memory, no whole page inside, pages registered already or in an arena).
    Threads: any may call it. fork: the child's copy of the memory is registered, too.
    """
    global _warned
    region = _core.Region(domain_of(domain)._membership(), buffer)
    offset = region.address % _PAGE
    if offset and not _warned:
        _warned = True
        warnings.warn(
            f"the data starts {offset} bytes into a page, so it merges only with equal data at the same "
            "offset; memory from an arena starts on a page boundary",
            AlignmentWarning,
            stacklevel=2,
        )
    return Registration(region)
