"""Blocks: a buffer with exact exports, a life of its own, value semantics when pickled."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import pickle
import random
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

import ksmalloc

PAGE = 4096
arena_module = sys.modules["ksmalloc.arena"]


@pytest.fixture
def arena(rendezvous: str) -> Iterator[ksmalloc.Arena]:
    with ksmalloc.Domain(path=rendezvous) as domain, ksmalloc.Arena(domain=domain) as arena:
        yield arena


@pytest.fixture
def default(arena: ksmalloc.Arena, monkeypatch: pytest.MonkeyPatch) -> ksmalloc.Arena:
    """The process's default arena, for the time of a test in a domain of its own."""
    monkeypatch.setattr(arena_module, "_default", arena)
    return arena


def test_is_a_writable_buffer_of_bytes(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(10_000)
    view = memoryview(block)
    assert (view.format, view.itemsize, view.ndim) == ("B", 1, 1)
    assert (view.shape, view.strides, view.nbytes) == ((10_000,), (1,), 10_000)
    assert not view.readonly
    assert view.c_contiguous
    assert view.obj is block
    view[3:6] = b"abc"
    assert bytes(block)[:7] == b"\0\0\0abc\0"
    assert len(block) == block.nbytes == 10_000


@pytest.mark.parametrize("nbytes", [1, 2, 15, 16, 17, 100, 2048, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 1 << 22])
def test_sizes_and_alignment(arena: ksmalloc.Arena, nbytes: int) -> None:
    blocks = [arena.alloc(nbytes) for _ in range(5)]
    for block in blocks:
        assert block.address % (PAGE if nbytes >= PAGE else 16) == 0
        assert bytes(block) == bytes(nbytes)
        assert ctypes.addressof(ctypes.c_char.from_buffer(block)) == block.address
    ranges = sorted((block.address, block.address + nbytes) for block in blocks)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


def test_memory_handed_out_again_is_zero(arena: ksmalloc.Arena) -> None:
    for nbytes in (48, PAGE, 20 * PAGE):
        for _ in range(20):
            with arena.alloc(nbytes) as block, memoryview(block) as view:
                assert bytes(view) == bytes(nbytes)
                view[:] = b"\xff" * nbytes


def test_wrong_sizes(arena: ksmalloc.Arena) -> None:
    for nbytes in (0, -1, -(1 << 70)):
        with pytest.raises(ValueError):
            arena.alloc(nbytes)
    for nbytes in (1 << 62, sys.maxsize, sys.maxsize + 1, 1 << 64, 1 << 100):
        with pytest.raises(MemoryError):
            arena.alloc(nbytes)
    for wrong in (1.5, "4096", None, b"1", [1]):
        with pytest.raises(TypeError):
            arena.alloc(wrong)  # type: ignore[arg-type]
    assert arena.stats().blocks == 0


def test_free_counts_exports(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(PAGE)
    first, second = memoryview(block), memoryview(block)
    part = second[100:200]
    char = ctypes.c_char.from_buffer(block)
    for release in (first.release, part.release, second.release):
        with pytest.raises(BufferError):
            block.free()
        release()
    with pytest.raises(BufferError):
        block.free()
    del char
    gc.collect()
    block.free()
    assert arena.stats().blocks == 0


def test_use_after_free(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(PAGE)
    block.free()
    block.free()
    for use in (
        lambda: block.address,
        lambda: block.nbytes,
        lambda: len(block),
        lambda: memoryview(block),
        lambda: pickle.dumps(block),
        lambda: pickle.dumps(block, protocol=5),
        block.__enter__,
    ):
        with pytest.raises(ValueError):
            use()
    assert block.mergeable
    assert repr(block) == "<ksmalloc.Block, freed>"


def test_with_frees(arena: ksmalloc.Arena) -> None:
    with arena.alloc(PAGE) as block:
        assert arena.stats().blocks == 1
    assert arena.stats().blocks == 0
    with pytest.raises(ValueError):
        len(block)
    with pytest.raises(BufferError), arena.alloc(PAGE) as block:
        view = memoryview(block)
    assert bytes(view) == bytes(PAGE)


def test_goes_when_nobody_refers_to_it(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(3 * PAGE)
    gone = weakref.ref(block)
    view = memoryview(block)
    del block
    assert arena.stats().blocks == 1
    assert arena.stats().allocated_bytes == 3 * PAGE
    view[0] = 1
    view.release()
    del view
    assert gone() is None
    assert arena.stats().blocks == 0


def test_outlives_arena_and_domain(rendezvous: str) -> None:
    domain = ksmalloc.Domain(path=rendezvous)
    arena = ksmalloc.Arena(domain=domain)
    blocks = [arena.alloc(n) for n in (10, PAGE, 1 << 20)]
    for block in blocks:
        memoryview(block)[:3] = b"abc"
    arena.close()
    domain.close()
    del arena, domain
    gc.collect()
    for block in blocks:
        assert bytes(block)[:3] == b"abc"
        memoryview(block)[:3] = b"xyz"
        assert bytes(block)[:3] == b"xyz"
        block.free()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("mergeable", [True, False])
def test_pickles_by_value(default: ksmalloc.Arena, protocol: int, mergeable: bool) -> None:
    block = default.alloc(5000, mergeable)
    content = random.Random(1).randbytes(5000)
    memoryview(block)[:] = content
    other = pickle.loads(pickle.dumps(block, protocol=protocol))
    assert type(other) is ksmalloc.Block
    assert other.address != block.address
    assert other.mergeable is mergeable
    assert bytes(other) == content
    memoryview(other)[0] ^= 1
    assert bytes(block) == content
    other.free()
    block.free()


def test_pickles_out_of_band(default: ksmalloc.Arena) -> None:
    block = default.alloc(1 << 20)
    memoryview(block)[:4] = b"abcd"
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(block, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1000
    assert [buffer.raw().nbytes for buffer in buffers] == [1 << 20]
    with pytest.raises(BufferError):
        block.free()
    for received in (bytes(buffers[0]), bytearray(buffers[0]), buffers[0]):
        other = pickle.loads(data, buffers=[received])
        assert bytes(other) == bytes(block)
        memoryview(other)[0] = 0
        assert bytes(block)[:4] == b"abcd"
    buffers[0].release()
    block.free()


def test_copies_are_blocks_of_their_own(default: ksmalloc.Arena) -> None:
    block = default.alloc(100)
    for other in (copy.copy(block), copy.deepcopy(block)):
        memoryview(other)[0] = 1
        assert bytes(block) == bytes(100)


def test_repr(arena: ksmalloc.Arena) -> None:
    block = arena.alloc(123)
    assert repr(block) == f"<ksmalloc.Block of 123 bytes at {block.address:#x}>"
    assert repr(arena.alloc(1, mergeable=False)).endswith(", not mergeable>")


def test_threads(arena: ksmalloc.Arena) -> None:
    """Allocation, writing and freeing in many threads: no block ever shows another's bytes."""
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        mine: list[tuple[ksmalloc.Block, bytes]] = []
        try:
            for _ in range(300):
                if len(mine) < 20 and rng.random() < 0.6:
                    nbytes = rng.choice([24, 100, 3000, PAGE, 5 * PAGE])
                    block = arena.alloc(nbytes)
                    assert bytes(block) == bytes(nbytes)
                    content = rng.randbytes(8) * (nbytes // 8)
                    memoryview(block)[: len(content)] = content
                    mine.append((block, content))
                elif mine:
                    block, content = mine.pop(rng.randrange(len(mine)))
                    assert bytes(block)[: len(content)] == content
                    block.free()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert arena.stats().blocks == 0
