# SPDX-License-Identifier: MIT
"""Older kernels, and kernels or containers that lack one thing: what works there, and that nothing is lost.

tests/kernels/as_on runs a program as there (by a seccomp filter and LD_PRELOAD), tests/lifekit.py is that
program. `make old-kernel` boots a kernel itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import buildkit
import lifekit
import pytest
from forkkit import environment
from machinekit import in_child

import ksmalloc

KERNELS = buildkit.ROOT / "tests" / "kernels"
MOVE = (6, 8)
FEATURES = (
    *("PROCMAP_QUERY", "UFFDIO_MOVE", "UFFD_FEATURE_MOVE", "PAGEMAP_SCAN", "MFD_NOEXEC_SEAL", "device"),
    *("MADV_COLLAPSE", "PR_SET_VMA_ANON_NAME", "MADV_POPULATE_READ", "MADV_POPULATE_WRITE"),
    *("UFFD_USER_MODE_ONLY", "userfaultfd", "filtered-userfaultfd", "memfd", "seals", "close_range"),
    *("filtered-close_range", "unshare", "kcmp", "filtered-kcmp", "process_vm_readv"),
    *(
        "filtered-process_vm_readv",
        "statx",
        "rt_tgsigqueueinfo",
        "signalfd",
        "fallocate",
        "mincore",
        "mremap",
    ),
    *("getrandom", "pagemap", "proc"),
)
OPTIONAL = {  # a kernel may be built without them
    "device": "CONFIG_USERFAULTFD",
    "MADV_COLLAPSE": "CONFIG_TRANSPARENT_HUGEPAGE",
    "PR_SET_VMA_ANON_NAME": "CONFIG_ANON_VMA_NAME",
}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("-")[0].split(".")[:2])


HERE = version(platform.release())


@pytest.fixture(scope="module")
def as_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, its library and the probe, in one directory."""
    out = tmp_path_factory.mktemp("kernels")
    buildkit.cc("-O1", KERNELS / "as_on.c", "-o", out / "as_on")
    buildkit.cc("-O1", KERNELS / "probe.c", "-o", out / "probe")
    buildkit.cc("-O1", "-shared", "-fPIC", KERNELS / "absent.c", "-o", out / "libabsent.so")
    return out / "as_on"


def said_by(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def live(as_on: Path, lacking: str, rendezvous: str, merges: bool = True) -> dict[str, Any]:
    if os.geteuid() != 0:
        pytest.skip("only root has the barrier move, and may hide /proc")
    releases = [version(word) for word in lacking.split(",") if word[:1].isdigit()]
    if HERE < MOVE and not [release for release in releases if release < MOVE]:
        pytest.skip("the barrier move needs Linux 6.8")
    under = [str(as_on), lacking] if lacking else []
    return lifekit.live(under, rendezvous, merges)


# ---- the switches themselves -------------------------------------------------------------------------------


def test_all_that_can_be_taken_away_is_tested(as_on: Path) -> None:
    listed = [line.split()[0] for line in said_by(as_on, "--list").splitlines()]
    assert listed == list(FEATURES) == said_by(as_on.with_name("probe"), "--list").split()


@pytest.mark.parametrize("name", FEATURES)
def test_what_is_taken_away_is_gone(as_on: Path, name: str) -> None:
    """A direct call works without the switch, and gets the error that it should with it."""
    if os.geteuid() != 0 and name in ("proc", "userfaultfd", "device", "UFFDIO_MOVE", "UFFD_FEATURE_MOVE"):
        pytest.skip("only root may hide /proc, or use userfaultfd")
    [line] = [line for line in said_by(as_on, "--list").splitlines() if line.split()[0] == name]
    _, since, error = line.split()
    probe = as_on.with_name("probe")
    assert said_by(as_on, name, probe, name) == error
    here = said_by(probe, name)
    first = version(since)
    if name not in OPTIONAL:
        assert (here == "OK") == (first <= HERE), here
    if first > (0, 0):  # a kernel before it lacks it, the first one with it has it
        before = f"{first[0]}.{first[1] - 1}" if first[1] else "5.19"
        assert said_by(as_on, before, probe, name) in (error, "EBADF")  # no userfaultfd to ask for a move
        assert said_by(as_on, since, probe, name) == here


def test_a_filter_holds_for_children_too(as_on: Path) -> None:
    assert said_by(as_on, "kcmp", "sh", "-c", f"{as_on.with_name('probe')} kcmp; true") == "ENOSYS"


# ---- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["5.10", "5.15", "6.1", "6.6", "6.7"])
def test_before_moves_threads_are_held(as_on: Path, release: str, rendezvous: str) -> None:
    found = live(as_on, release, rendezvous)
    assert (found["barrier"], found["tracking"], found["why_not"]) == ("stop", "pagemap", None), found
    assert f"barrier move: Linux {release} has no UFFDIO_MOVE" in found["said"]
    assert (found["frozen"], found["left"]) == (True, [0, 0, 0]), found


@pytest.mark.parametrize(("release", "tracking"), [("", "writes"), ("6.9", "writes"), ("6.8", "pagemap")])
def test_with_moves_nobody_is_held(as_on: Path, release: str, tracking: str, rendezvous: str) -> None:
    found = live(as_on, release, rendezvous)
    assert (found["barrier"], found["tracking"], found["why_not"]) == ("move", tracking, None), found
    assert "0 stops" in found["said"]


@pytest.mark.parametrize("release", ["4.19", "5.4", "5.9"])
def test_older_kernels_are_refused_when_importing(as_on: Path, release: str) -> None:
    lines = (
        "try:",
        "    import ksmalloc",
        "except ImportError as error:",
        "    print(type(error).__name__, error)",
    )
    code = "\n".join(lines)
    done = subprocess.run(
        [as_on, release, sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "Unsupported this kernel, page size or platform is not supported: ksmalloc\n"


# ---- one thing is missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacking", "barrier", "tracking"),
    [
        ("userfaultfd", "stop", "pagemap"),
        ("filtered-userfaultfd", "stop", "pagemap"),
        ("UFFD_FEATURE_MOVE", "stop", "pagemap"),
        ("device", "move", "writes"),
        ("pagemap", "move", "digest"),
        ("6.7,pagemap", "stop", "digest"),
        ("PROCMAP_QUERY,PAGEMAP_SCAN", "move", "pagemap"),
        ("process_vm_readv,mincore", "move", "writes"),
        ("6.7,process_vm_readv", "stop", "pagemap"),
        ("6.7,filtered-process_vm_readv", "stop", "pagemap"),
        ("unshare", "move", "writes"),
        ("6.7,unshare", "stop", "pagemap"),
        ("close_range", "move", "writes"),
        ("6.7,filtered-close_range", "stop", "pagemap"),
        ("6.7,kcmp", "stop", "pagemap"),
        ("6.7,filtered-kcmp", "stop", "pagemap"),
    ],
)
def test_without(as_on: Path, lacking: str, barrier: str, tracking: str, rendezvous: str) -> None:
    """Everything merges; what is worse for it is what capabilities() says."""
    found = live(as_on, lacking, rendezvous)
    assert (found["barrier"], found["tracking"], found["why_not"]) == (barrier, tracking, None), found
    assert ("tracking pagemap: there is no /proc/self/pagemap" in found["said"]) == (tracking == "digest")
    assert ("\nbarrier move: " in found["said"]) == (barrier == "stop")
    assert (found["frozen"], found["left"]) == (True, [0, 0, 0]), found


@pytest.mark.parametrize("lacking", ["statx", "rt_tgsigqueueinfo"])
def test_without_holding_threads_broken_pages_stay_where_they_are(
    as_on: Path, lacking: str, rendezvous: str
) -> None:
    found = live(as_on, lacking, rendezvous)
    assert (found["barrier"], found["why_not"]) == ("move", None), found
    assert found["left"] == [5, 1, 0]  # what was written, in a private mapping of the frame's place


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("6.7,statx", "the process's descriptors and mappings cannot be read"),
        ("6.7,rt_tgsigqueueinfo", "a signal cannot be sent"),
    ],
)
def test_without_any_barrier_nothing_merges(as_on: Path, lacking: str, reason: str, rendezvous: str) -> None:
    found = live(as_on, lacking, rendezvous, merges=False)
    assert found["why_not"] is not None
    assert reason in found["said"]


def test_memory_that_cannot_be_given_back(as_on: Path, rendezvous: str) -> None:
    found = live(as_on, "fallocate", rendezvous)
    assert "Operation not supported: sweep a domain" in found["freed"]


@pytest.mark.parametrize(
    ("lacking", "error"),
    [
        ("proc", "Unsupported: there is no /proc, through which peers reach each other"),
        ("6.7,proc", "Unsupported: there is no /proc, through which peers reach each other"),
        ("memfd", "OSError: [Errno 38] Function not implemented"),
        ("seals", "ValueError: Invalid argument"),
        ("signalfd", "OSError: [Errno 38] Function not implemented"),
        ("getrandom", "OSError: [Errno 5] Input/output error"),
        ("unshare,close_range", "PermissionError: [Errno 1] Operation not permitted"),
    ],
)
def test_what_cannot_be_done_without(as_on: Path, lacking: str, error: str, rendezvous: str) -> None:
    found = live(as_on, lacking, rendezvous)
    assert found["refused"] == f"{error}: domain 'life' in '{rendezvous}'"
    left = [path.name for path in Path(rendezvous).rglob("*")]
    assert set(left) <= {"life", "domain"}, left


def test_proc_that_vanishes(rendezvous: str) -> None:
    """Who has joined and then enters a place without /proc keeps every byte."""
    if os.geteuid() != 0:
        pytest.skip("only root may hide /proc")
    libc = ctypes.CDLL(None, use_errno=True)

    def body() -> None:
        assert libc.unshare(0x20000) == 0  # CLONE_NEWNS; the scanner's thread will be in the same one
        assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
        arena = ksmalloc.Arena(domain=ksmalloc.Domain(path=rendezvous), scan=False)
        content = random.Random(1).randbytes(64 * lifekit.PAGE)
        blocks = [arena.alloc(len(content)) for _ in range(3)]
        for block in blocks[:2]:
            memoryview(block)[:] = content
        arena.scan()
        assert arena.stats().arena_pages_merged == 128
        assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
        memoryview(blocks[0])[:3] = b"abc"
        memoryview(blocks[2])[:] = content
        for _ in range(3):
            arena.scan()
        assert bytes(blocks[0]) == b"abc" + content[3:]
        assert bytes(blocks[1]) == bytes(blocks[2]) == content
        arena.unmerge()
        assert bytes(blocks[1]) == bytes(blocks[2]) == content

    assert in_child(body) == 0
