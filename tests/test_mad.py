# SPDX-License-Identifier: MIT
"""A peer gone mad: tests/mad/ is one program. Honest processes know every byte of their memory; a mad one
among them scribbles over all that it can reach: shared memory, sockets, the rendezvous.

Others may stop merging. They may not crash, hang, or see a wrong byte; and when the mad one is gone, a new
domain works. KSMALLOC_MAD_SECONDS makes each round longer, KSMALLOC_MAD_ROUNDS makes more of them, and
KSMALLOC_MAD_SEED other ones (see `make mad`): first each way of madness alone, then all, then random sets.

The controls are the same program with one protection of the core taken out: it must fail.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import buildkit
import pytest
from conftest import Processes
from runkit import Run

MAD = buildkit.ROOT / "tests" / "mad"
WAYS = (
    "words",
    "pages",
    "header",
    "slots",
    "cells",
    "index",
    "races",
    "files",
    "rendezvous",
    "calls",
    "answers",
)
ACTS = (
    "pages",
    "writes",
    "merges",
    "merged_outside",
    "scans",
    "sweeps",
    "freed",
    "blocks",
    "settles",
    "unmerges",
    "forks",
    "joins",
)
SECONDS = float(os.environ.get("KSMALLOC_MAD_SECONDS", "0.6"))  # of a round
ROUNDS = int(os.environ.get("KSMALLOC_MAD_ROUNDS", str(len(WAYS) + 3)))
SEED = int(os.environ.get("KSMALLOC_MAD_SEED", "1"))
SLOWEST = 30  # times as long as its rounds may a run take on a busy machine: calls wait for locks and answers
CONTROL_ROUNDS = 40
COMPILING = 600  # seconds, on a very busy machine
NOTHING_HAPPENED, WRONG_BYTE, DIED, HANGS, ALLOWED = range(5)  # the program's status


class Mad(Run):
    """One run: also how often each way was gone."""

    def __init__(
        self, processes: Processes, program: Path, rendezvous: str, *arguments: str, limit: float
    ) -> None:
        super().__init__(
            processes, program, "--rendezvous", rendezvous, *arguments, limit=limit, first="status="
        )
        self.ways = {name: self.figures.get(f"way_{name}", 0) for name in WAYS}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as users run the core."""
    return buildkit.program("mad", [MAD], tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every assertion: one about what peers have written would be a way to end others."""
    return buildkit.program("mad", [MAD], tmp_path_factory.mktemp("checked"), *buildkit.CHECKED)


@pytest.mark.timeout(SLOWEST * (SECONDS + 2) * (ROUNDS + 1) + COMPILING)
@pytest.mark.parametrize(("build", "barrier"), [("release", "move"), ("checked", "stop")])
def test_nobody_is_hurt(
    build: str, barrier: str, rendezvous: str, processes: Processes, request: pytest.FixtureRequest
) -> None:
    program = request.getfixturevalue(build)
    arguments = (
        "--barrier",
        barrier,
        "--seconds",
        str(SECONDS),
        "--rounds",
        str(ROUNDS),
        "--seed",
        str(SEED),
    )
    limit = SLOWEST * (SECONDS + 2) * (ROUNDS + 1)
    run = Mad(processes, program, rendezvous, *arguments, limit=limit)
    assert run.status == NOTHING_HAPPENED, run.output
    assert (run.figures["wrong"], run.figures["allowed"]) == (0, 0), run.output
    assert [way for way in WAYS if not run.ways[way]] == [], run.output
    assert [act for act in ACTS if not run.figures[act]] == [], run.output
    assert run.figures["rounds"] == ROUNDS + 1, run.output  # in the last one nobody was mad
    assert run.figures["calm_merges"] > 0, run.output


# ---- controls: without a protection somebody is hurt


class Weakness(NamedTuple):
    """What is taken out of the core: source, line, what stands there instead. How the program must end:
    which harm may be the first that is seen.
    """

    edits: tuple[tuple[str, str, str], ...]
    ways: str
    harm: set[int]


WEAKNESSES = {
    "a frame is handed out although somebody refers to it": Weakness(
        (("frame.c", "ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1", "0"),),
        "cells,races",
        {WRONG_BYTE},
    ),
    "a frame's number is not compared with the size of the store": Weakness(
        (
            (
                "frame.c",
                "if (frame >= peer->layout.frames)\n\t\treturn false;\n\tif (ksm_sparse_reach",
                "if (ksm_sparse_reach",
            ),
        ),
        "index",
        {DIED, WRONG_BYTE},
    ),
    "a count of levels is believed": Weakness(
        (("table.c", "KSM_MIN(levels, table->levels_max)", "levels"),),
        "header",
        {DIED},
    ),
    "bitmaps are not sealed": Weakness(
        (
            ("peer_seat.c", "ksm_os_seal(fd, SEALS_SIZE | F_SEAL_FUTURE_WRITE)", "0"),
            ("peer.c", "(ksm_os_seals(fd) & required) != required", "required == 0"),
        ),
        "files",
        {ALLOWED, DIED},  # whose bitmap is truncated, that one dies of it
    ),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The core's objects and the program's, to be linked again with one of them replaced."""
    out = tmp_path_factory.mktemp("objects")
    core = buildkit.compile_all(buildkit.core_sources(), out, "-O2")
    return core + buildkit.compile_all(sorted(MAD.glob("*.c")), out, "-O2", "-iquote", str(MAD))


@pytest.mark.timeout(SLOWEST * 2 * CONTROL_ROUNDS + COMPILING)
@pytest.mark.parametrize("what", WEAKNESSES)
def test_control(
    what: str, objects: list[Path], tmp_path: Path, rendezvous: str, processes: Processes
) -> None:
    weak = WEAKNESSES[what]
    linked = {one.name: one for one in objects}
    for name, line, instead in weak.edits:
        text = (buildkit.CSRC / name).read_text("utf-8")
        assert line in text, f"{name} has no such line any more"
        (tmp_path / name).write_text(text.replace(line, instead), "utf-8")
        [weakened] = buildkit.compile_all([tmp_path / name], tmp_path, "-O2", "-Wno-error")
        linked[weakened.name] = weakened
    buildkit.cc(*linked.values(), *buildkit.wraps(MAD.glob("*.c")), "-o", tmp_path / "mad")
    arguments = ("--barrier", "stop", "--seconds", "1", "--rounds", str(CONTROL_ROUNDS), "--ways", weak.ways)
    run = Mad(processes, tmp_path / "mad", rendezvous, *arguments, limit=SLOWEST * 2 * CONTROL_ROUNDS)
    assert run.status in weak.harm, run.output
