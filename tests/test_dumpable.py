# SPDX-License-Identifier: MIT
"""Processes that are not dumpable by their own choice: they take, show nothing, and say why.

Those that are so because they changed their user: test_change_of_user.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Processes, wait_until
from crewkit import public_folder, public_python
from forkkit import PEER, Peer
from handkit import NOBODY
from outside import merged
from surroundkit import BARRIERS, BLOCK, PAGE, PROGRAM, Program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start programs of somebody else")

# Before START (the start of its memory) or after it, as the test wants.
HIDE = r"""
import ctypes
assert ctypes.CDLL(None).prctl(4, *map(ctypes.c_ulong, (0, 0, 0, 0))) == 0  # PR_SET_DUMPABLE
"""
HIDDEN = r"""
import contextlib, io, json
import ksmalloc.ctl

def doctor():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        ksmalloc.ctl.main(["doctor", "--json", "--path", sys.argv[1], "--domain", "fork"])
    return json.loads(out.getvalue())

def report():
    here, found = own(), ksmalloc.capabilities(domain)
    assert all(right(made, seed) for made, seed in zip(mine, seeds))
    return json.dumps({
        "merged": here.pages_merged, "promotions": here.promotions, "why_not": arena.scan().why_not,
        "dumpable": found.dumpable, "tracking": found.tracking,
        "better": {one.name: one.reason for one in found.better},
    })

seeds = [1, 100, 60, 60]  # the peer's; what the peer will have; twice, and nobody else's
mine = [block(seed) for seed in seeds]
arena.scan()
ask(report())
assert ksmalloc.settle(60, domain=domain).settled  # although two of its pages are equal, and stay so
ask(report())
ended(forked(lambda: (arena.scan(), right(mine[2], 60) or os._exit(3),
                      json.loads(report())["dumpable"] is False or os._exit(4),
                      memoryview(mine[1]).__setitem__(slice(PAGE), bytes(PAGE)))))
assert all(right(made, seed) for made, seed in zip(mine, seeds))
memoryview(mine[1])[:PAGE] = noise(3, PAGE)
assert bytes(mine[1]) == noise(3, PAGE) + noise(100)[PAGE:] and right(mine[0], 1)
memoryview(mine[1])[:PAGE] = noise(100, PAGE)
assert ksmalloc.settle(60, domain=domain).settled
ask(report())
say(json.dumps(doctor()))
ask("rest")
"""


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """A Python that everybody may run: a process is dumpable or not by the user that it was started as."""
    with public_folder() as folder:
        yield public_python(folder)


class Hidden(Program):
    """A program that hides itself, before it joins or once it has memory; told when to go on."""

    def __init__(self, processes: Processes, rendezvous: str, barrier: str, when: str, **more: Any) -> None:
        body = HIDE + HIDDEN if when == "later" else HIDDEN
        start = HIDE + PROGRAM if when == "before" else PROGRAM
        super().__init__(processes, rendezvous, barrier, body, start=start, **more)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hear())
        return found


class Neighbour(Program):
    """A peer as forkkit has them, of another user."""

    def __init__(self, processes: Processes, rendezvous: str, **more: Any) -> None:
        super().__init__(processes, rendezvous, "50", "", start=PEER, **more)
        self.hear("ready")

    def __call__(self, command: str) -> str:
        self.tell(command)
        return self.hear()


def check(hidden: Hidden, peer: Peer | Neighbour) -> dict[str, Any]:
    """Its whole life beside a peer that is dumpable."""
    assert wait_until(lambda: int(peer("stats").split()[3]) == 2, 30)
    first = hidden.report()
    assert first["promotions"] == 0, "it shows nothing"
    assert first["dumpable"] is False
    assert "not dumpable" in first["why_not"], first
    assert peer("add 100") == "ok"
    assert peer("settle") == "True"
    hidden.tell()
    second = hidden.report()
    assert (second["merged"], second["promotions"]) == (2 * 512, 0), second
    assert merged(hidden.pid) == 2 * BLOCK
    hidden.tell()
    third = hidden.report()
    assert (third["merged"], third["promotions"]) == (2 * 512, 0), third
    again = merged(hidden.pid) - 2 * BLOCK + PAGE
    assert again == (PAGE if third["tracking"] == "writes" else 0), "broken, and what it was before"
    assert peer("check") == "True"
    hidden.tell()
    said = hidden.report()
    assert said["capabilities"]["dumpable"] is False
    hidden.hear("rest")
    hidden.tell()
    hidden.end()
    assert peer("check") == "True"
    assert wait_until(lambda: int(peer("stats").split()[3]) == 1, 30)
    return third


@pytest.mark.parametrize("when", ["before", "later"])
@BARRIERS
def test_root(processes: Processes, rendezvous: str, barrier: str, when: str) -> None:
    """The kernel shows it its pagemap all the same."""
    peer = Peer(processes, rendezvous, 50)
    assert check(Hidden(processes, rendezvous, barrier, when), peer)["tracking"] == "writes"


@pytest.mark.parametrize("when", ["before", "later"])
def test_nobody(processes: Processes, rendezvous: str, python: Path, when: str) -> None:
    """Who may not read its own pagemap compares: what was written, and is as before, is not found."""
    os.chown(rendezvous, NOBODY, NOBODY)
    more: dict[str, Any] = {"python": python, "user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}
    peer = Neighbour(processes, rendezvous, **more)
    found = check(Hidden(processes, rendezvous, "stop", when, **more), peer)
    assert found["tracking"] == "digest", "since its fork, if it could open it before"
    assert "not dumpable" in found["better"]["tracking pagemap"]
