# SPDX-License-Identifier: MIT
"""A debugger at a process that merges: attached, in the way, stepping, reading and writing memory, gone.

Under `stop` a debugger writes behind everybody's back (docs/unseen.md), so there only while nothing merges.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Processes
from debuggerkit import Scene, frames
from surroundkit import BARRIERS, PAGE, SECONDS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may trace everywhere")


@BARRIERS
def test_a_rude_debugger(processes: Processes, rendezvous: str, tmp_path: Path, barrier: str) -> None:
    scene = Scene(processes, rendezvous, barrier, tmp_path)
    before = scene.ask()
    scene.debugger("seize")
    figures = scene.debugger(f"stress 300 {int(barrier == 'move')} 1")
    while scene.ask()[0] < before[0] + 256:
        figures = scene.debugger(f"stress 50 {int(barrier == 'move')} 1")
    after = scene.ask()
    print(f"\n{barrier}: {figures}, {after[0] - before[0]} merges meanwhile, {after[2] - before[2]} stops")
    assert figures["steps"] >= 200
    assert figures["peeks"] >= 200
    assert (figures["pokes"] > 0) == (barrier == "move")
    scene.debugger("detach")
    scene.end(figures["pokes"])


@BARRIERS
def test_a_poke_is_private(processes: Processes, rendezvous: str, tmp_path: Path, barrier: str) -> None:
    """A debugger that writes into a merged page breaks it, as a store does: of nobody else a byte changes."""
    scene = Scene(processes, rendezvous, barrier, tmp_path)
    pid, at = scene.program.pid, scene.written
    assert frames(pid, at) == 512
    scene.debugger("seize")
    scene.ask("still 0")
    right = [int.from_bytes(scene.content[page * PAGE :][:8], "little") for page in range(3)]
    for page in range(3):
        scene.debugger(f"poke {at + page * PAGE} 7")
    assert [scene.ask(f"word {page * PAGE}")[0] for page in range(3)] == [7] * 3
    assert frames(pid, at) == 509
    assert frames(pid, scene.known) == 512
    assert scene.peer("check") == "True"
    for page in range(3):
        scene.debugger(f"poke {at + page * PAGE} {right[page]}")
    scene.ask("still 1")
    scene.goes_on()
    scene.debugger("detach")
    scene.end(0)
    assert scene.peer("check") == "True"


def test_the_check_notices_a_poke(processes: Processes, rendezvous: str, tmp_path: Path) -> None:
    """The control: what a debugger writes, and nobody is told of, fails the program."""
    scene = Scene(processes, rendezvous, "move", tmp_path)
    scene.debugger("seize")
    scene.debugger(f"poke {scene.written + 5 * PAGE} 7")
    scene.debugger("detach")
    scene.program.tell("end 0")
    _, err = scene.program.process.communicate(timeout=SECONDS)
    assert "what the debugger wrote" in err


@pytest.mark.parametrize("name", ["held", "ksmalloc", "python"])
@BARRIERS
def test_threads_that_may_not_run(
    processes: Processes, rendezvous: str, tmp_path: Path, barrier: str, name: str
) -> None:
    """One after the other is kept from running for a while: ours in the middle of what it does, too.

    Under `stop` nothing merges meanwhile.
    """
    scene = Scene(processes, rendezvous, barrier, tmp_path)
    scene.debugger("seize")
    for count in range(3):
        assert scene.debugger(f"hold {name} 200")["held"] > count
        scene.ask("beat")
    scene.goes_on()
    scene.debugger("detach")
    scene.end(0)


def test_it_is_said_why_nothing_merges(processes: Processes, rendezvous: str, tmp_path: Path) -> None:
    """Once enough attempts have failed; the next ones come later and later. Then it goes on."""
    scene = Scene(processes, rendezvous, "stop", tmp_path)
    failed = scene.ask()[3]
    scene.debugger("seize")
    scene.debugger("hold held 2500")
    scene.program.tell("reasons")
    reasons = scene.program.hear()
    tries = scene.ask()[3] - failed
    print(f"\n{tries} attempts: {reasons}")
    assert 1 <= tries <= 60
    # Or it was caught inside our handler, which blocks all signals.
    assert "is stopped by a debugger" in reasons or "(held) blocks the signal" in reasons
    scene.goes_on()
    scene.debugger("detach")
    scene.end(0)


@BARRIERS
def test_debuggers_come_and_go(processes: Processes, rendezvous: str, tmp_path: Path, barrier: str) -> None:
    """Attached in both ways, and detached, while it merges."""
    scene = Scene(processes, rendezvous, barrier, tmp_path)
    before = scene.ask()
    for round in range(12):
        scene.debugger("attach" if round % 3 == 2 else "seize")
        if round % 3 == 1:
            scene.debugger("stress 20 0 1")
        scene.debugger("detach")
        scene.ask("beat")
    assert scene.ask()[0] > before[0]
    scene.end(0)


@pytest.mark.parametrize("act", ["nothing", "killed"])
def test_a_debugger_that_dies(processes: Processes, rendezvous: str, tmp_path: Path, act: str) -> None:
    """The kernel lets go of all threads. (Not amid a step: then the SIGTRAP kills.)"""
    scene = Scene(processes, rendezvous, "stop", tmp_path)
    scene.debugger("seize")
    scene.debugger("stress 100 0 1")
    if act == "killed":
        assert scene.tracer.stdin is not None
        scene.tracer.stdin.write("stress 1000000 0 0\n")
        scene.tracer.stdin.flush()
        scene.ask("beat")
    scene.tracer.kill()
    scene.tracer.wait()
    scene.end(0)
