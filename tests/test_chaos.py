# SPDX-License-Identifier: MIT
"""Random death: tests/chaos/ is one program whose processes merge while others kill and stop them.

KSMALLOC_CHAOS_SECONDS makes the run longer (see `make chaos`), KSMALLOC_CHAOS_SEED repeats what it drew. The
same program with a bug planted into its core is the control: each must be noticed, or the run notices none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import buildkit
import pytest
from conftest import Processes
from runkit import Run

CHAOS = buildkit.ROOT / "tests" / "chaos"
SOAK = buildkit.ROOT / "tests" / "soak"
SHARED = (SOAK / "soak_slow.c", SOAK / "soak_none.c")  # pauses in the core; windows that keep nobody out
SECONDS = float(os.environ.get("KSMALLOC_CHAOS_SECONDS", "60"))
SEED = os.environ.get("KSMALLOC_CHAOS_SEED")
KILLS = 300
CONTROL_SECONDS = 300  # at most; most end after a few, and a bug that is met by chance takes its time
# Seconds without a sign of life that are called hanging: a longer run meets worse moments of the machine.
PATIENCE = "120" if SECONDS < 600 else "300"
IMPATIENCE = "15"  # longer than a newcomer waits for a lock
NO_ACTS = {"killed_in_REST", "killed_in_EXIT"}  # nothing of the core goes on in these
NEVER = ("wrong", "leaked", "missing", "invalid", "unsettled", "strays", "hung", "failed")
ACTS = (
    *("kills", "massacres", "stops", "forks", "execs", "leaves", "exits", "blocks", "writes", "registers"),
    *("merges", "promotions", "zero_pages", "breaks", "put_backs", "give_backs"),
    *("scans", "settles", "sweeps", "freezes", "unmerges", "audits", "saved_most"),
)
NOTICED = {  # what each planted bug shows itself as
    "peer": {"wrong", "missing"},  # a frame that is given back although it is in use: written anew, or gone
    "window": {"wrong", "failed"},  # or a system call finds its buffer gone for a moment: EFAULT
    "fork": {"wrong", "missing"},
    "dead": {"leaked"},
    "exec": {"failed"},
    "lock": {"hung"},
}
STANDS_STILL = re.compile(r"has stood still for \d+ s, doing (\w+)")


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, linked with the core as it is: planted bugs are functions that stand before the core's."""
    return buildkit.program(
        "chaos", [CHAOS], tmp_path_factory.mktemp("chaos"), *buildkit.CHECKED, extra=SHARED
    )


def run_chaos(processes: Processes, program: Path, rendezvous: str, *arguments: str, limit: float) -> Run:
    return Run(processes, program, "--rendezvous", rendezvous, *arguments, limit=limit, first="seed=")


@pytest.mark.timeout(3 * SECONDS + 600)
def test_survivors_keep_every_byte(chaos: Path, rendezvous: str, processes: Processes) -> None:
    arguments = ("--seconds", str(SECONDS), "--patience", PATIENCE, "--slow")
    seed = ("--seed", SEED) if SEED else ()
    run = run_chaos(processes, chaos, rendezvous, *arguments, *seed, limit=3 * SECONDS + 500)
    figures, output = run.figures, run.output
    assert run.status == 0, output
    assert {name: figures[name] for name in NEVER} == dict.fromkeys(NEVER, 0), output
    killed = {name: count for name, count in figures.items() if name.startswith("killed_in_")}
    assert [name for name in ACTS if not figures[name]] == [], output
    assert figures["kills"] >= KILLS, output
    assert figures["verified"] > 1 << 30, output
    assert [name for name in killed.keys() - NO_ACTS if not killed[name]] == [], output
    kills, pages = figures["kills"], figures["verified"] >> 12
    print(f"{kills} deaths, none harmed anybody: fewer than one in {kills / 3:.0f} does (95 %)")
    print(f"{pages} pages verified, none wrong: fewer than one in {pages / 3:.3g} is (95 %)")


@pytest.mark.timeout(CONTROL_SECONDS + 600)
@pytest.mark.parametrize("plant", NOTICED)
def test_control_is_noticed(plant: str, chaos: Path, rendezvous: str, processes: Processes) -> None:
    patience = IMPATIENCE if plant == "lock" else PATIENCE
    arguments = ("--seconds", str(CONTROL_SECONDS), "--every", "1", "--patience", patience)
    noticed = ("--plant", plant, "--until-noticed")
    run = run_chaos(processes, chaos, rendezvous, *arguments, *noticed, limit=CONTROL_SECONDS + 500)
    assert run.status == 1, run.output
    # or the core's own checks of its books notice it first, and end the process
    noticed_as = {name for name in NEVER if run.figures[name]}
    assert noticed_as & NOTICED[plant] or "broken invariant" in run.output, run.output
    if plant == "lock":  # not only newcomers wait
        assert set(STANDS_STILL.findall(run.output)) - {"ATTACH"}, run.output
