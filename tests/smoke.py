"""A first use of an installed ksmalloc, with the standard library alone: allocate, merge, fork, write."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings

import ksmalloc

NBYTES = 1 << 20


def main() -> None:
    folder = tempfile.mkdtemp(prefix="ksmalloc-smoke-", dir="/dev/shm")
    data = os.urandom(NBYTES)
    try:
        arena = ksmalloc.Arena(domain=ksmalloc.Domain("smoke", path=folder))
        first, second = arena.alloc(NBYTES), arena.alloc(NBYTES)
        for block in (first, second):
            memoryview(block)[:] = data
        report = arena.scan()
        stats = arena.stats()
        if stats.why_not is None:
            assert report.pages_merged == 2 * NBYTES // stats.page_size, report
            assert stats.pages_sharing == NBYTES // stats.page_size, stats

        with warnings.catch_warnings(record=True) as caught:  # Python warns of threads at a fork
            warnings.simplefilter("always")
            child = os.fork()
        assert caught == [], caught
        if child == 0:
            memoryview(second)[:5] = b"child"
            os._exit(bytes(first) != data or bytes(second) != b"child" + data[5:])
        assert os.waitpid(child, 0)[1] == 0, "the child saw something else"

        memoryview(first)[:6] = b"parent"
        assert bytes(first) == b"parent" + data[6:]
        assert bytes(second) == data, "a write has shown in another block"
        arena.unmerge()
        assert bytes(second) == data
        print(arena.stats())
        first.free()
        second.free()
        arena.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
