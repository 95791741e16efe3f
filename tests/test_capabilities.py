# SPDX-License-Identifier: MIT
"""capabilities(): the real thing, as users with more and with less; and its words."""

from __future__ import annotations

import os

import pytest
from conftest import Processes
from nobodykit import run

import ksmalloc

# ---- words -------------------------------------------------------------------------------------------------


def test_here(rendezvous: str) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain:
        found = ksmalloc.capabilities(domain)
        assert isinstance(found, ksmalloc.Capabilities)
        assert found.barrier == domain.stats().barrier
        assert found.why_not == domain.stats().why_not
        assert found.tracking == "writes"
        assert found.dumpable
        assert (found.cow, found.suspensions) == (("kernel", "sigsegv"), 0)
        assert repr(found).startswith(f"barrier {found.barrier}, tracking writes, cow kernel or sigsegv\n")
        for one in found.better:
            assert isinstance(one, ksmalloc.Missing)
            assert f"{one.name}: {one.reason}\n    {one.remedy.splitlines()[0]}" in repr(found)
    with pytest.raises(ksmalloc.ClosedError):
        ksmalloc.capabilities(domain)


def test_repr_is_for_people() -> None:
    found = ksmalloc.Capabilities(
        barrier="stop",
        tracking="digest",
        cow=("kernel",),
        handler="masked",
        suspensions=1,
        stop_signal=58,
        stops=7,
        stops_failed=2,
        dumpable=True,
        why_not="a reason (KSM_EDEVICES)",
        better=(ksmalloc.Missing("barrier move", "there is a reason", "first line\nsecond line"),),
    )
    assert repr(found).splitlines() == [
        "barrier stop, tracking digest, cow kernel",
        "SIGSEGV handler masked, 1 suspensions; 7 stops by signal SIGRTMAX-6, 2 failed",
        "not merging: a reason (KSM_EDEVICES)",
        "barrier move: there is a reason",
        "    first line",
        "    second line",
    ]


# ---- the real thing ----------------------------------------------------------------------------------------


def test_nobody_behind_a_filter(processes: Processes, rendezvous: str) -> None:
    """As in a container: no system call, no device. Everything merges, by "stop"."""
    out = run(
        processes,
        rendezvous,
        r"""
filter_userfaultfd()
become_nobody()
arena = join()
blocks, content = two(arena)
report = arena.scan()
found = ksmalloc.capabilities(arena.domain)
assert (found.barrier, found.tracking, found.why_not) == ("stop", "pagemap", None), found
assert report.pages_merged == 32 and arena.stats().arena_pages_merged == 32, report
assert found.stops > 0 and found.stop_signal is not None and found.dumpable
assert names(found) == ["barrier move", "tracking writes"], found
assert ("seccomp" if MOVES else "has no UFFDIO_MOVE") in found.better[0].reason, found
assert "sysctl" not in found.better[0].remedy, found
memoryview(blocks[0])[0] ^= 1
assert bytes(blocks[1]) == content
print(MOVES, found)
""",
    )
    assert "/dev/userfaultfd" in out or out.startswith("False")


def test_root_behind_a_filter(processes: Processes, rendezvous: str) -> None:
    """The filter of containers does not concern the device."""
    if not os.path.exists("/dev/userfaultfd"):
        pytest.skip("there is no /dev/userfaultfd")
    run(
        processes,
        rendezvous,
        r"""
filter_userfaultfd()
arena = join()
blocks, content = two(arena)
assert arena.scan().pages_merged == 32
found = ksmalloc.capabilities(arena.domain)
wanted = ("move", []) if MOVES else ("stop", ["barrier move"])
assert (found.barrier, names(found)) == wanted, found
""",
    )


def test_nobody_that_is_not_dumpable(processes: Processes, rendezvous: str) -> None:
    """As a server that starts as root and then changes its user."""
    out = run(
        processes,
        rendezvous,
        r"""
become_nobody(dumpable=False)
arena = join()
blocks, content = two(arena)
arena.scan()
found = ksmalloc.capabilities(arena.domain)
assert not found.dumpable and found.tracking == "digest", found
assert "tracking pagemap" in names(found), found
memoryview(blocks[0])[:3] = b"abc"
assert bytes(blocks[1]) == content and bytes(blocks[0]) == b"abc" + content[3:]
print(found)
""",
    )
    assert "prctl(4, 1" in out


def test_a_worker_that_changes_its_user(processes: Processes, rendezvous: str) -> None:
    """A master of root's loads, merges and forks; the worker becomes nobody and lives on."""
    run(
        processes,
        rendezvous,
        r"""
arena = join()
blocks, content = two(arena)
arena.scan()
pid = os.fork()
if pid == 0:
    status = 1
    try:
        become_nobody(dumpable=False)
        arena.scan()
        found = ksmalloc.capabilities(arena.domain)
        assert not found.dumpable and found.barrier in ("move", "stop", "none"), found
        memoryview(blocks[0])[:3] = b"abc"
        assert bytes(blocks[1]) == content and bytes(blocks[0]) == b"abc" + content[3:]
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
assert bytes(blocks[0]) == content
""",
    )


def test_a_ring_is_refused_and_named(processes: Processes, rendezvous: str) -> None:
    run(
        processes,
        rendezvous,
        r"""
ring = io_uring()
become_nobody()
arena = join()
blocks, content = two(arena)
assert arena.scan().pages_merged == 0
found = ksmalloc.capabilities(arena.domain)
assert names(found) == ["barrier move", "barrier stop"], found
assert "io_uring" in found.better[1].reason and "UV_USE_IO_URING" in found.better[1].remedy, found
assert "KSM_EDEVICES" in found.why_not, found
os.close(ring)
end = time.monotonic() + 20
while arena.stats().arena_pages_merged < 32 and time.monotonic() < end:
    arena.scan()
assert arena.stats().arena_pages_merged == 32
assert names(ksmalloc.capabilities(arena.domain)) == ["barrier move"]
""",
    )


def test_a_thread_that_cannot_be_held_is_named(processes: Processes, rendezvous: str) -> None:
    run(
        processes,
        rendezvous,
        r"""
become_nobody()
arena = join()
blocks, content = two(arena)
begin, go = threading.Event(), threading.Event()
def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    prctl(15, ctypes.cast(ctypes.c_char_p(b"deaf"), ctypes.c_void_p).value)  # PR_SET_NAME
    begin.set()
    go.wait()
thread = threading.Thread(target=deaf)
thread.start()
begin.wait()
assert arena.scan().pages_merged == 0
found = ksmalloc.capabilities(arena.domain)
assert names(found) == ["barrier move", "barrier stop"] and found.stops_failed > 0, found
assert "deaf" in found.better[1].reason and "SIG_UNBLOCK" in found.better[1].remedy, found
go.set()
thread.join()
end = time.monotonic() + 20
while arena.stats().arena_pages_merged < 32 and time.monotonic() < end:
    arena.scan()
assert arena.stats().arena_pages_merged == 32
""",
    )


@pytest.mark.parametrize("how", ["displaced", "masked"])
def test_a_handler_that_would_not_see_a_store(processes: Processes, rendezvous: str, how: str) -> None:
    run(
        processes,
        rendezvous,
        r"""
arena = join(cow="sigsegv")
blocks, content = two(arena)
assert arena.scan().pages_merged == 32
assert ksmalloc.capabilities(arena.domain).handler == "installed"
how = sys.argv[2]
if how == "displaced":
    libc.signal(signal.SIGSEGV, ctypes.c_void_p(0))  # past everybody
else:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
end = time.monotonic() + 10
while not ksmalloc.capabilities(arena.domain).suspensions and time.monotonic() < end:
    arena.scan()  # it finds out, and makes everything writable
found = ksmalloc.capabilities(arena.domain)
assert (found.handler, found.cow) == (how, ("kernel",)), found
assert "cow sigsegv" in names(found) and found.suspensions == 1, found
memoryview(blocks[0])[:3] = b"abc"
assert bytes(blocks[0]) == b"abc" + content[3:] and bytes(blocks[1]) == content
try:
    arena.freeze(blocks[1])
except ksmalloc.HandlerError:
    pass
else:
    raise AssertionError("a store would kill the process")
""",
        how,
    )
