# SPDX-License-Identifier: MIT
# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False
"""The bindings: classes that own what the core hands out. One call without the GIL and one check() a method.

`Block` is public as it is; the others have their public faces in `ksmalloc.domain`, `ksmalloc.arena` and
`ksmalloc.region`. Nothing here knows defaults or NumPy.
"""
cimport cython
from cpython cimport buffer as py
from cpython.ref cimport PyObject
from libc.errno cimport EINVAL
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport strcmp

from ksmalloc cimport _capi as c

import operator
import os
import pickle
import sys
from ksmalloc import errors

BARRIERS = {
    "auto": <int>c.KSM_BARRIER_AUTO,
    "move": <int>c.KSM_BARRIER_MOVE,
    "stop": <int>c.KSM_BARRIER_STOP,
    "segv": <int>c.KSM_BARRIER_SEGV,
}
TRACKINGS = {
    "none": <int>c.KSM_TRACKING_NONE,
    "pagemap": <int>c.KSM_TRACKING_PAGEMAP,
    "digest": <int>c.KSM_TRACKING_DIGEST,
    "writes": <int>c.KSM_TRACKING_WRITES,
}
BACKINGS = {"memfd": <int>c.KSM_BACKING_MEMFD, "shm": <int>c.KSM_BACKING_SHM}

cdef char *BYTES = b"B"  # a buffer's format: unsigned bytes


cdef int check(int rc, str asked="", tuple values=()) except -1:
    """The one way from a code to an exception. `asked` is formatted with `values` only then."""
    if rc < 0:
        message = c.ksm_error_message(rc).decode()
        raise errors.from_code(rc, c.ksm_error_name(rc).decode(), message, asked.format(*values))
    return rc


def symbol_of(int code):
    """The symbol of a code, as ``"EACCES"``; None for 0."""
    return c.ksm_error_name(code).decode() if code else None


def describe(int code):
    """A code as text: None for 0, else its sentence and its symbol."""
    return f"{c.ksm_error_message(code).decode()} ({c.ksm_error_name(code).decode()})" if code else None


# ---- domains -----------------------------------------------------------------------------------------

@cython.final
cdef class Rendezvous:
    """Where a domain is found, and how to make it: name, base directory, capacity in bytes, backing."""

    cdef bytes name, path
    cdef str asked
    cdef c.ksm_domain_options options

    def __cinit__(self, bytes name not None, bytes path, uint64_t capacity, int backing):
        self.name, self.path = name, path  # the options point into them
        self.asked = f"domain {os.fsdecode(name)!r}" + ("" if path is None else f" in {os.fsdecode(path)!r}")
        self.options.name = self.name
        if path is not None:
            self.options.path = self.path
        self.options.capacity_bytes = capacity
        self.options.backing = backing
        self.options.store_fd = -1

    def read_settings(self):
        cdef c.ksm_settings settings
        cdef uint32_t peers = 0
        with nogil:
            rc = c.ksm_settings_read(&self.options, &settings, &peers)
        check(rc, "settings of {}", (self.asked,))
        return settings, peers

    def write_settings(self, dict values not None):
        cdef c.ksm_settings settings = values
        with nogil:
            rc = c.ksm_settings_write(&self.options, &settings)
        check(rc, "settings {} of {}", (values, self.asked))

    def clean(self):
        with nogil:
            rc = c.ksm_domain_clean(&self.options)
        check(rc, "{}", (self.asked,))


@cython.final
cdef class Domain:
    """One reference on this process's membership in a domain."""

    cdef c.ksm_domain *domain

    def __cinit__(self, Rendezvous rendezvous not None, int barrier, int store_fd=-1, bytes store_id=None):
        cdef c.ksm_domain_options options = rendezvous.options
        options.barrier = barrier
        options.store_fd = store_fd
        for i, byte in enumerate(store_id or b""):
            options.store_id[i] = byte
        with nogil:
            rc = c.ksm_domain_attach(&options, &self.domain)
        check(rc, "{}", (rendezvous.asked,))

    def __dealloc__(self):
        if self.domain != NULL:
            with nogil:
                c.ksm_domain_detach(self.domain)

    @property
    def id(self):
        cdef char text[33]
        c.ksm_domain_id(self.domain, text)
        return text.decode()

    @property
    def directory(self):
        return os.fsdecode(c.ksm_domain_directory(self.domain))

    def stats(self):
        cdef c.ksm_stats stats
        with nogil:
            rc = c.ksm_domain_stats(self.domain, &stats)
        check(rc, "stats of a domain")
        return stats

    def capabilities(self):
        cdef c.ksm_capabilities found
        with nogil:
            rc = c.ksm_domain_capabilities(self.domain, &found)
        check(rc, "capabilities of a process")
        return found

    def peers(self):
        cdef bytearray room = bytearray(c.KSM_PEERS_MAX * sizeof(c.ksm_peer_info))
        cdef c.ksm_peer_info *found = <c.ksm_peer_info *><char *>room
        with nogil:
            rc = c.ksm_domain_peers(self.domain, found, c.KSM_PEERS_MAX)
        return [found[i] for i in range(min(check(rc, "peers of a domain"), c.KSM_PEERS_MAX))]

    def settle(self, uint32_t timeout_ms, bint again):
        cdef c.ksm_report report
        with nogil:
            rc = c.ksm_domain_settle(self.domain, timeout_ms, again, &report)
        check(rc, "settle a domain")
        return report

    def sweep(self):
        cdef uint64_t freed = 0
        with nogil:
            rc = c.ksm_domain_sweep(self.domain, &freed)
        check(rc, "sweep a domain")
        return freed


# ---- arenas and blocks -------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear
cdef class Span:
    """Where a contiguous buffer lies in memory; exports it while it exists."""

    cdef Py_buffer view

    def __cinit__(self, buffer):
        py.PyObject_GetBuffer(buffer, &self.view, py.PyBUF_STRIDES)
        if not py.PyBuffer_IsContiguous(&self.view, b"A"):
            raise BufferError("the buffer is not contiguous")

    def __dealloc__(self):
        py.PyBuffer_Release(&self.view)

    @property
    def nbytes(self):
        return self.view.len

    cdef int check(self, int rc, str verb) except -1:
        asked = (verb, self.view.len, <uintptr_t>self.view.buf)
        if rc == -EINVAL:
            raise ValueError("{} {} bytes at {:#x}: not in one live block of this arena".format(*asked))
        return check(rc, "{} {} bytes at {:#x}", asked)


@cython.final
@cython.no_gc
cdef class Arena:
    """The creator's reference on an arena."""

    cdef readonly Domain domain
    cdef readonly bint closed
    cdef c.ksm_arena *arena

    def __cinit__(self, Domain domain not None, bint scan, bint sigsegv):
        cdef unsigned flags = (0 if scan else c.KSM_ARENA_NO_SCAN) | (c.KSM_ARENA_SIGSEGV if sigsegv else 0)
        self.domain = domain
        with nogil:
            rc = c.ksm_arena_create(domain.domain, flags, &self.arena)
        check(rc, "an arena")

    def __dealloc__(self):
        if self.arena != NULL:
            with nogil:
                c.ksm_arena_release(self.arena)

    def close(self):
        self.closed = True
        with nogil:
            c.ksm_arena_close(self.arena)

    def scan(self):
        cdef c.ksm_report report
        with nogil:
            rc = c.ksm_arena_scan(self.arena, &report)
        check(rc, "scan an arena")
        return report

    def unmerge(self):
        cdef uint64_t unmerged = 0, broken = 0
        with nogil:
            rc = c.ksm_arena_unmerge(self.arena, &unmerged, &broken)
        check(rc, "unmerge an arena")
        return unmerged

    def freeze(self, Span span not None):
        cdef size_t pages = 0
        with nogil:
            rc = c.ksm_arena_freeze(self.arena, span.view.buf, span.view.len, &pages)
        span.check(rc, "freeze")
        return pages

    def thaw(self, Span span not None):
        with nogil:
            rc = c.ksm_arena_thaw(self.arena, span.view.buf, span.view.len)
        span.check(rc, "thaw")

    def writable_begin(self, Span span not None):
        with nogil:
            rc = c.ksm_arena_writable_begin(self.arena, span.view.buf, span.view.len)
        span.check(rc, "make writable")

    def writable_end(self, Span span not None):
        with nogil:
            rc = c.ksm_arena_writable_end(self.arena, span.view.buf, span.view.len)
        span.check(rc, "end writing to")

    def stats(self):
        cdef c.ksm_arena_numbers stats
        with nogil:
            rc = c.ksm_arena_stats(self.arena, &stats)
        check(rc, "stats of an arena")
        return stats


@cython.final
@cython.no_gc
cdef class Block:
    """Zeroed, writable memory from an arena; `Arena.alloc()` makes it.

    A buffer of one dimension, `nbytes` unsigned bytes. A block of a page or more starts on a page boundary, a
    smaller one on a multiple of 16. It lives until it is freed or nobody refers to it, also when its arena is
    closed; every export (a memoryview, an array) keeps it. After `free()` all but ``free()``, ``mergeable``
    and ``repr()`` raise ValueError.

    Pickling copies the contents (out of band with protocol 5 and a buffer callback); unpickling allocates
    from the default arena. Threads: any may use it; as with a bytearray, readers and writers take turns.
    fork: the child gets a block of its own with the same contents.
    """

    cdef object __weakref__
    cdef Arena arena
    cdef c.ksm_block block
    cdef Py_ssize_t exports
    cdef readonly bint mergeable

    def __cinit__(self, Arena arena not None, nbytes, mergeable=True):
        cdef unsigned flags = 0 if mergeable else c.KSM_ALLOC_UNMERGEABLE
        cdef size_t size
        nbytes = operator.index(nbytes)
        if nbytes <= 0:
            raise ValueError(f"a block has at least one byte, not {nbytes}")
        if nbytes > sys.maxsize:
            raise MemoryError(f"no address space has {nbytes} bytes")
        size = nbytes
        self.arena = arena
        self.mergeable = mergeable
        with nogil:
            rc = c.ksm_arena_alloc(arena.arena, size, flags, &self.block)
        check(rc, "a block of {} bytes", (nbytes,))

    def __dealloc__(self):
        if self.block.owner != NULL:
            with nogil:
                c.ksm_arena_free(self.arena.arena, &self.block)

    cdef int live(self) except -1:
        if self.block.owner == NULL:
            raise ValueError("the block is freed")
        return 0

    def free(self):
        """Give the memory back now. Idempotent. BufferError while something (a memoryview) exports it."""
        cdef c.ksm_block block
        if self.exports > 0:
            raise BufferError(f"the block is in use: {self.exports} exported buffers exist")
        if self.block.owner == NULL:
            return
        block = self.block
        self.block.owner = NULL
        with nogil:
            rc = c.ksm_arena_free(self.arena.arena, &block)
        check(rc, "free a block")

    @property
    def address(self):
        """The address of the first byte."""
        self.live()
        return <uintptr_t>self.block.address

    @property
    def nbytes(self):
        """The size in bytes, as asked for."""
        self.live()
        return self.block.nbytes

    def __len__(self):
        self.live()
        return self.block.nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.live()
        view.obj = self
        view.buf = self.block.address
        view.len = <Py_ssize_t>self.block.nbytes
        view.readonly, view.itemsize, view.ndim = 0, 1, 1
        view.format = BYTES if flags & py.PyBUF_FORMAT else NULL
        view.shape = &view.len if flags & py.PyBUF_ND else NULL
        view.strides = &view.itemsize if (flags & py.PyBUF_STRIDES) == py.PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def __enter__(self):
        self.live()
        return self

    def __exit__(self, *exc_info):
        self.free()

    def __reduce_ex__(self, protocol):
        from ksmalloc.arena import restore_block

        self.live()
        return restore_block, (pickle.PickleBuffer(self) if protocol >= 5 else bytes(self), self.mergeable)

    def __repr__(self):
        if self.block.owner == NULL:
            return "<ksmalloc.Block, freed>"
        label = "" if self.mergeable else ", not mergeable"
        return f"<ksmalloc.Block of {self.nbytes} bytes at {self.address:#x}{label}>"


include "_region.pxi"
include "_process.pxi"
