"""Registered memory: what is accepted, what is refused, who holds what."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import ksmalloc

PAGE = 4096
region_module = sys.modules["ksmalloc.region"]


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning about alignment has a test of its own."""
    monkeypatch.setattr(region_module, "_warned", True)


@pytest.fixture
def domain(rendezvous: str) -> Iterator[ksmalloc.Domain]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        yield domain


def anonymous(pages: int) -> mmap.mmap:
    return mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_page_aligned_memory(domain: ksmalloc.Domain) -> None:
    memory = anonymous(10)
    registration = ksmalloc.register(memory, domain=domain)
    assert (registration.nbytes, registration.pages) == (10 * PAGE, 10)
    assert registration.address % PAGE == 0
    assert repr(registration) == f"<ksmalloc.Registration of {10 * PAGE} bytes, 10 pages>"
    with pytest.raises(BufferError):
        memory.close()
    registration.unregister()
    registration.unregister()
    assert repr(registration).endswith(", unregistered>")
    memory.close()


def test_with_unregisters(domain: ksmalloc.Domain) -> None:
    data = bytearray(100 * PAGE)
    with ksmalloc.register(data, domain=domain) as registration:
        assert registration.pages in (99, 100)
        with pytest.raises(BufferError):
            data.append(0)
    data.append(0)


def test_only_whole_pages_inside(domain: ksmalloc.Domain) -> None:
    memory = anonymous(10)
    view = memoryview(memory)[100 : 5 * PAGE + 7]
    with ksmalloc.register(view, domain=domain) as registration:
        assert registration.pages == 4
        assert registration.nbytes == 5 * PAGE + 7 - 100


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(domain: ksmalloc.Domain, order: str) -> None:
    array = np.zeros((512, 512), "M8[s]", order=order)  # type: ignore[call-overload]
    with ksmalloc.register(array, domain=domain) as registration:
        assert registration.nbytes == array.nbytes
        assert registration.address == array.ctypes.data
    with pytest.raises(BufferError):
        ksmalloc.register(array[:, ::2], domain=domain)


def test_refused_buffers(domain: ksmalloc.Domain) -> None:
    readonly = np.zeros(10 * PAGE)
    readonly.flags.writeable = False
    for buffer in (bytes(10 * PAGE), memoryview(bytearray(10 * PAGE)).toreadonly(), readonly):
        with pytest.raises(BufferError, match="read-only"):
            ksmalloc.register(buffer, domain=domain)
    with pytest.raises(BufferError, match="contiguous"):
        ksmalloc.register(memoryview(bytearray(10 * PAGE))[::2], domain=domain)
    for wrong in (1, "text", None, [1, 2]):
        with pytest.raises(TypeError):
            ksmalloc.register(wrong, domain=domain)  # type: ignore[arg-type]


def test_too_small(domain: ksmalloc.Domain) -> None:
    for nbytes in (0, 1, PAGE - 1):
        with pytest.raises(ksmalloc.RegisterError):
            ksmalloc.register(bytearray(nbytes), domain=domain)
    memory = anonymous(2)
    with memoryview(memory) as view, view[1 : 2 * PAGE - 1] as part, pytest.raises(ValueError):
        ksmalloc.register(part, domain=domain)


def test_shared_and_file_backed_memory_is_refused(domain: ksmalloc.Domain) -> None:
    shared = mmap.mmap(-1, 4 * PAGE)
    with pytest.raises(ksmalloc.RegisterError, match="private"):
        ksmalloc.register(shared, domain=domain)
    file = os.memfd_create("a file")
    os.truncate(file, 4 * PAGE)
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        mapped = mmap.mmap(file, 4 * PAGE, flags=flags)
        with pytest.raises(ksmalloc.RegisterError, match="private"):
            ksmalloc.register(mapped, domain=domain)
    os.close(file)


def test_twice(domain: ksmalloc.Domain) -> None:
    memory = anonymous(10)
    with ksmalloc.register(memory, domain=domain):
        with pytest.raises(ksmalloc.RegisterError, match="registered already"):
            ksmalloc.register(memory, domain=domain)
        with memoryview(memory) as view, view[3 * PAGE : 4 * PAGE] as part, pytest.raises(ValueError):
            ksmalloc.register(part, domain=domain)
    with ksmalloc.register(memory, domain=domain):
        pass
    block = ksmalloc.Arena(domain=domain).alloc(10 * PAGE)
    with pytest.raises(ksmalloc.RegisterError):
        ksmalloc.register(block, domain=domain)
    block.free()


def test_refusal_keeps_no_export(domain: ksmalloc.Domain) -> None:
    data = bytearray(PAGE // 2)
    with pytest.raises(ValueError):
        ksmalloc.register(data, domain=domain)
    data.append(1)


def test_end_of_the_object_unregisters(domain: ksmalloc.Domain) -> None:
    array = np.zeros(100 * PAGE, "u1")
    gone = weakref.ref(array)
    registration = ksmalloc.register(array, domain=domain)
    del array
    gc.collect()
    assert gone() is not None
    del registration
    gc.collect()
    assert gone() is None


def test_a_cycle_is_collected(domain: ksmalloc.Domain) -> None:
    class Holder(np.ndarray[tuple[int], np.dtype[np.uint8]]):
        registration: ksmalloc.Registration

    array = np.zeros(100 * PAGE, "u1").view(Holder)
    gone = weakref.ref(array)
    array.registration = ksmalloc.register(array, domain=domain)
    del array
    gc.collect()
    assert gone() is None


def test_warns_once(domain: ksmalloc.Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "_warned", False)
    memory, other = anonymous(4), anonymous(4)
    with ksmalloc.register(memory, domain=domain):
        pass
    with memoryview(memory)[64:] as part, memoryview(other)[64:] as second:
        with pytest.warns(ksmalloc.AlignmentWarning, match="64 bytes into a page") as caught:
            ksmalloc.register(part, domain=domain).unregister()
        assert caught[0].filename == __file__
        ksmalloc.register(second, domain=domain).unregister()


def test_merges_with_an_arena(domain: ksmalloc.Domain) -> None:
    if domain.stats().why_not is not None:
        pytest.skip(str(domain.stats().why_not))
    content = os.urandom(30 * PAGE)
    memory = anonymous(30)
    memory[:] = content
    block = ksmalloc.Arena(domain=domain, scan=False).alloc(30 * PAGE)
    memoryview(block)[:] = content
    with ksmalloc.register(memory, domain=domain):
        assert ksmalloc.settle(domain=domain).settled
        assert domain.stats().pages_sharing == 30
        memory[0] ^= 1
        assert bytes(block) == content
        memory[0] ^= 1
    assert memory[:] == content
    assert "/memfd:ksmalloc" not in mapping_of(memory)


def mapping_of(memory: mmap.mmap) -> str:
    address = np.frombuffer(memory, np.uint8).ctypes.data
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            begin, end = (int(word, 16) for word in line.split()[0].split("-"))
            if begin <= address < end:
                return line
    raise AssertionError("not mapped")
