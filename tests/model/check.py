#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Checks frames.pml with spin: every configuration must hold, every mutant must be caught.

    check.py                  everything, as a table; exit status 1 if something is not as it should be
    check.py NAME ...         only these
    check.py --list           the names
    check.py --trail NAME     the interleaving that breaks a mutant, step by step

Needs spin (Debian package: spin) and a C compiler; nothing else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).resolve().parent / "frames.pml"
MEMORY_MIB = 900  # for one run; two run at a time
SECONDS = 300  # for one run, on a machine that is busy with other things
DEPTH = 10_000  # longest path; pan says so if it does not suffice

HOLDS, CAUGHT = "holds", "caught"


@dataclass(frozen=True)
class Run:
    """One run of the verifier: a configuration, the macros that alter it, and what must come out."""

    name: str
    config: str
    macros: tuple[str, ...] = ()
    expect: str = HOLDS
    by: str = ""  # for a mutant: the invariant that breaks
    reaches: tuple[str, ...] = ()  # for a configuration: places that it must reach
    kind: str = "configuration"
    why: str = ""


@dataclass(frozen=True)
class Result:
    """What came out."""

    run: Run
    outcome: str  # "holds", "caught", or what went wrong
    by: str
    states: int
    mib: float
    seconds: float
    complaint: str  # empty: as expected

    @property
    def ok(self) -> bool:
        return not self.complaint


def _good(name: str, config: str, *macros: str, reaches: str, why: str) -> Run:
    places = tuple(f"W_{word}" for word in reaches.split())
    return Run(name, config, macros, reaches=(*places, "W_END"), why=why)


def _redundant(name: str, config: str, *macros: str, why: str) -> Run:
    return Run(name, config, macros, kind="redundant", why=why)


def _mutant(name: str, config: str, *macros: str, by: str = "REFS-1", why: str) -> Run:
    return Run(name, config, macros, expect=CAUGHT, by=by, kind="mutant", why=why)


CONFIGURATIONS: tuple[Run, ...] = (
    _good(
        "take-sweep",
        "TAKE_SWEEP",
        "STRICT",
        reaches="TWICE MISS BACK FREED",
        why="2 takers, 2 pages and a concurrent drop in one, a sweeper",
    ),
    _good(
        "alloc-reuse",
        "ALLOC_REUSE",
        "STRICT",
        "MORTALS=6",
        reaches="MISS BACK FREED TAKEOVER REUSED",
        why="allocation against takers and a sweeper; the merge lock is held while bytes are written",
    ),
    _good(
        "alloc-pinned",
        "ALLOC_REUSE",
        "STRICT",
        "MORTALS=6",
        "ALLOC_UNLOCKED",
        reaches="MISS BACK FREED TAKEOVER REUSED",
        why="the same; the lock is let go while bytes are written, a raised count pins the bit",
    ),
    _good(
        "two-sweepers",
        "TWO_SWEEPERS",
        "STRICT",
        reaches="MISS BACK FREED TAKEOVER RELEASED REUSED",
        why="2 sweepers, takeover from the dead, reuse, a stale taker",
    ),
    _good(
        "join",
        "JOIN",
        "STRICT",
        reaches="JOINED MISS BACK MOVED FREED TAKEOVER",
        why="a process joins and takes during a sweep",
    ),
    _good(
        "fork",
        "FORK",
        "STRICT",
        reaches="CHILD BACK MOVED FREED",
        why="bits copied, then the peer epoch raised; then the parent drops its page",
    ),
    _good(
        "fork-bump-first",
        "FORK",
        "STRICT",
        "MORTALS=1",
        "BUMP_FIRST",
        reaches="CHILD BACK MOVED FREED",
        why="the peer epoch raised, then bits copied: holds because the sweep looks at the bits twice",
    ),
    _good(
        "slot-reuse",
        "SLOT_REUSE",
        "STRICT",
        reaches="JOINED MISS BACK MOVED FREED TAKEOVER RELEASED REUSED",
        why="a dead allocator's or sweeper's slot is taken by a new process",
    ),
    _good(
        "scribble",
        "SCRIBBLE",
        "STRICT",
        reaches="REFUSED REUSED",
        why="FREE is written over the cell of a mapped frame",
    ),
    _good(
        "scribble-alloc",
        "SCRIBBLE_ALLOC",
        "STRICT",
        reaches="REFUSED LOST REUSED",
        why="FREE is written over an ALLOC cell; two allocators",
    ),
    _good(
        "scribble-join",
        "SCRIBBLE_JOIN",
        "STRICT",
        reaches="REFUSED REUSED JOINED",
        why="FREE is written over the cell of a frame mapped by a process that has just joined",
    ),
    _good(
        "scribble-dying",
        "SCRIBBLE_DYING",
        "SWEEP_CLAIM",
        "MORTALS=1",
        reaches="REFUSED FREED REUSED",
        why="FREE is written over a DYING cell; the sweeper's own bit is set until it has punched",
    ),
)

REDUNDANT: tuple[Run, ...] = (
    _redundant(
        "no-gen",
        "TWO_SWEEPERS",
        "M_NO_GEN",
        "MORTALS=2",
        why="take ignores the generation: the compare protects (a stale entry costs a compare)",
    ),
    _redundant(
        "no-compare",
        "TWO_SWEEPERS",
        "M_NO_COMPARE",
        "MORTALS=2",
        why="take does not compare: the generation protects, as long as digests never collide",
    ),
    _redundant(
        "no-prefilter",
        "FORK",
        "M_NO_PREFILTER",
        "MORTALS=1",
        why="bits are not looked at before DYING: one look suffices if fork copies before it raises",
    ),
    _redundant(
        "blind-publish",
        "SCRIBBLE_ALLOC",
        "M_BLIND_PUBLISH",
        why="publishing by a store: nobody else can own the frame while the allocator's bit is set",
    ),
    _redundant(
        "undo-publish-dying-compare",
        "TWO_SWEEPERS",
        "M_UNDO_PUBLISH_DYING",
        "ONLY_REFS_1",
        "MORTALS=1",
        why="publishing punched bytes again (REFS-3 not asked): take's compare protects",
    ),
)

MUTANTS: tuple[Run, ...] = (
    _mutant("take-no-fence", "TAKE_SWEEP", "M_TAKE_NO_FENCE", why="take: no fence between bit and cell"),
    _mutant(
        "sweep-no-fence",
        "TAKE_SWEEP",
        "M_SWEEP_NO_FENCE",
        "WEAK_CAS",
        why="sweep: no fence after DYING, on a machine where loads overtake a compare-and-swap",
    ),
    _mutant("no-recheck", "TAKE_SWEEP", "M_NO_RECHECK", why="sweep: bits not read again after DYING"),
    _mutant("no-state", "TAKE_SWEEP", "M_NO_STATE", why="take: state not checked"),
    _mutant(
        "no-gen-no-compare",
        "TWO_SWEEPERS",
        "M_NO_GEN",
        "M_NO_COMPARE",
        why="take: neither generation nor bytes checked",
    ),
    _mutant(
        "no-compare-collision", "ALLOC_REUSE", "M_NO_COMPARE", why="take: bytes not compared, digests collide"
    ),
    _mutant("drop-no-lock", "TAKE_SWEEP", "M_DROP_NO_LOCK", why="drop outside the merge lock"),
    _mutant("drop-clears", "TAKE_SWEEP", "M_DROP_CLEARS", why="drop clears the bit whatever the count"),
    _mutant(
        "miss-clears",
        "TAKE_SWEEP",
        "M_MISS_CLEARS",
        why="a take that misses clears the bit whatever the count",
    ),
    _mutant(
        "clear-before-unmap", "TAKE_SWEEP", "M_CLEAR_BEFORE_UNMAP", why="drop clears the bit, then unmaps"
    ),
    _mutant(
        "timeout",
        "TWO_SWEEPERS",
        "M_TIMEOUT",
        "ONLY_REFS_1",
        why="a live, stopped sweeper's cell is taken over",
    ),
    _mutant("punch-after-free", "TWO_SWEEPERS", "M_PUNCH_AFTER_FREE", "ONLY_REFS_1", why="punch after FREE"),
    _mutant("no-owner", "TWO_SWEEPERS", "M_NO_OWNER", by="REFS-9", why="ALLOC without an owner"),
    _mutant(
        "undo-publish-dying",
        "TWO_SWEEPERS",
        "M_UNDO_PUBLISH_DYING",
        by="REFS-3",
        why="a dead sweeper's DYING, perhaps punched, goes back to PUBLISHED",
    ),
    _mutant(
        "undo-publish-dying-no-compare",
        "TWO_SWEEPERS",
        "M_UNDO_PUBLISH_DYING",
        "M_NO_COMPARE",
        "ONLY_REFS_1",
        why="the same when only the generation protects a take",
    ),
    _mutant(
        "undo-publish-alloc",
        "TWO_SWEEPERS",
        "M_UNDO_PUBLISH_ALLOC",
        by="REFS-3",
        why="a dead allocator's ALLOC, half written, becomes PUBLISHED",
    ),
    _mutant(
        "undo-keeps",
        "TWO_SWEEPERS",
        "M_UNDO_KEEPS",
        by="REFS-9",
        why="what cannot be freed yet stays with the (live) sweeper that took it over",
    ),
    _mutant("join-no-bump", "JOIN", "M_NO_BUMP_JOIN", why="join does not raise the peer epoch"),
    _mutant("join-bump-late", "JOIN", "M_BUMP_LATE", why="join raises the peer epoch after its first bit"),
    _mutant(
        "join-bump-before-lock",
        "JOIN",
        "M_BUMP_BEFORE_LOCK",
        why="join raises the peer epoch before it has its lock",
    ),
    _mutant("join-no-epoch-check", "JOIN", "M_NO_EPOCH_CHECK", why="sweep ignores the peer epoch (join)"),
    _mutant("enumerate-first", "JOIN", "M_ENUM_FIRST", why="sweep enumerates, then reads the peer epoch"),
    _mutant("fork-no-bump", "FORK", "M_NO_BUMP_FORK", why="fork does not raise the peer epoch"),
    _mutant("fork-no-epoch-check", "FORK", "M_NO_EPOCH_CHECK", why="sweep ignores the peer epoch (fork)"),
    _mutant(
        "epoch-before-or",
        "FORK",
        "M_EPOCH_BEFORE_OR",
        why="sweep reads the peer epoch again before the bits, not after",
    ),
    _mutant("fork-lock-late", "FORK", "M_FORK_LOCK_LATE", why="the child takes its lock after fork"),
    _mutant("fork-no-merge-lock", "FORK", "M_FORK_NO_LOCK", "ONLY_REFS_1", why="fork without the merge lock"),
    _mutant(
        "fork-bump-first-no-prefilter",
        "FORK",
        "BUMP_FIRST",
        "M_NO_PREFILTER",
        why="epoch raised before the bits are copied, and the sweep looks at the bits only once",
    ),
    _mutant(
        "cell-no-slot-epoch",
        "SLOT_REUSE",
        "M_CELL_NO_SLOT_EPOCH",
        by="REFS-9",
        why="owner is a slot only: the new process in the slot seems to own the dead one's cell",
    ),
    _mutant(
        "bitmap-no-slot-epoch",
        "SLOT_REUSE",
        "M_BITMAP_NO_SLOT_EPOCH",
        "ONLY_REFS_1",
        why="a sweeper keeps the bitmap it once mapped for a slot",
    ),
    _mutant(
        "slot-epoch-late",
        "SLOT_REUSE",
        "M_SLOT_EPOCH_LATE",
        why="join raises the slot epoch after the peer epoch",
    ),
    _mutant("alloc-no-or", "SCRIBBLE", "M_ALLOC_NO_OR", why="allocation does not look at the bits"),
    _mutant(
        "alloc-bit-late",
        "SCRIBBLE_ALLOC",
        "M_ALLOC_BIT_LATE",
        "ONLY_REFS_1",
        why="allocation looks at the bits, then ALLOC, then sets its own",
    ),
    _mutant(
        "alloc-no-fence",
        "SCRIBBLE_ALLOC",
        "M_ALLOC_NO_FENCE",
        "ONLY_REFS_1",
        why="allocation: no fence between its own bit and the others'",
    ),
    _mutant(
        "alloc-no-epoch",
        "SCRIBBLE_JOIN",
        "M_ALLOC_NO_EPOCH",
        why="allocation with an old list of peers, peer epoch not checked",
    ),
    _mutant(
        "alloc-no-pin",
        "ALLOC_REUSE",
        "ALLOC_UNLOCKED",
        "M_NO_PIN",
        why="lock let go for the write, count not raised: another thread's miss clears the bit",
    ),
    _mutant(
        "sweep-no-claim",
        "SCRIBBLE_DYING",
        "ONLY_REFS_1",
        why="FREE written over DYING while the sweeper's own bit is not set: it punches a new frame",
    ),
)

RUNS: dict[str, Run] = {run.name: run for run in (*CONFIGURATIONS, *REDUNDANT, *MUTANTS)}


class Missing(RuntimeError):
    """A tool is not installed."""


def tools() -> tuple[str, str]:
    """The paths of spin and of a C compiler; Missing says what to install."""
    spin = shutil.which("spin")
    if spin is None:
        raise Missing("spin is not installed; on Debian: apt-get install spin")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise Missing("no C compiler; on Debian: apt-get install gcc")
    return spin, compiler


def _output(command: Sequence[str], cwd: Path) -> str:
    """What a command prints, whatever its exit status."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)
    return done.stdout + done.stderr


def _call(command: Sequence[str], cwd: Path) -> str:
    """The same for a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{output[-2000:]}")
    return output


def _defines(run: Run) -> list[str]:
    return [f"-DCFG={run.config}", *(f"-D{macro}" for macro in run.macros)]


def _build(run: Run, directory: Path, *, witness: bool) -> None:
    spin, compiler = tools()
    extra = ["-DWITNESS"] if witness else []
    output = _call([spin, *_defines(run), *extra, "-a", str(MODEL)], directory)
    if "Error" in output:
        raise RuntimeError(output)
    flags = ["-O0", "-w", "-DSAFETY", "-DNOREDUCE", f"-DMEMLIM={MEMORY_MIB}"]
    _call([compiler, *flags, "-o", "pan", "pan.c"], directory)


def _broken(output: str) -> str:
    """Which invariant pan found broken; empty if none."""
    found = re.search(r"pan:\d+: (.*)", output)
    if found is None:
        return ""
    what = found.group(1).replace(" ", "")
    if not what.startswith("assertionviolated"):
        return found.group(1)  # a deadlock, or pan gave up
    if "bm[" in what:
        return "REFS-2"
    if "want[" in what:
        return "REFS-1"
    if "published" in what:
        return "REFS-3"
    if "cnt[" in what:
        return "REFS-9"
    return f"REFS-4 or 5: {what}"


def _witnesses(names: Sequence[str], output: str) -> list[str]:
    """Those of the named places that were not reached."""
    numbers = {name: int(n) for name, n in re.findall(r"#define (W_\w+)\s+(\d+)", MODEL.read_text("utf-8"))}
    found = re.search(r"^witnesses (\d+)$", output, re.MULTILINE)
    reached = int(found.group(1)) if found else 0
    return [name for name in names if not reached >> numbers[name] & 1]


def _number(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    return float(found.group(1)) if found else 0.0


def check(run: Run) -> Result:
    """Runs one configuration or mutant and says whether what came out is what had to."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="frames-") as name:
        directory = Path(name)
        _build(run, directory, witness=True)
        output = _output(["./pan", f"-m{DEPTH}"], directory)
    errors = re.search(r"errors: (\d+)", output)
    by = _broken(output)
    complaint = ""
    if errors is None or ("Search not completed" in output and errors.group(1) == "0"):
        outcome, complaint = "gave up", f"the search was not completed:\n{output[-1500:]}"
    elif "search depth too small" in output:
        outcome, complaint = "gave up", f"paths longer than {DEPTH} steps were cut"
    elif errors.group(1) == "0":
        outcome = HOLDS
        missed = _witnesses(run.reaches, output)
        if run.expect != HOLDS:
            complaint = f"the mutant survived: nothing is broken ({run.by} had to be)"
        elif missed:
            complaint = f"never reached: {', '.join(missed)}"
    else:
        outcome = CAUGHT
        if run.expect != CAUGHT:
            complaint = f"broken: {by}; see check.py --trail {run.name}"
        elif by != run.by:
            complaint = f"caught by {by} instead of {run.by}"
    return Result(
        run,
        outcome,
        by,
        int(_number(r"(\d+) states, stored", output)),
        _number(r"([\d.]+)\s+total actual memory usage", output),
        time.monotonic() - start,
        complaint,
    )


def trail(run: Run) -> str:
    """The interleaving that breaks a mutant, as spin prints it."""
    spin, _ = tools()
    with tempfile.TemporaryDirectory(prefix="frames-") as name:
        directory = Path(name)
        shutil.copy(MODEL, directory)
        _build(run, directory, witness=False)
        _output(["./pan", f"-m{DEPTH}"], directory)
        left = [path.name for path in directory.glob("*.trail")]
        if not left:
            return "nothing is broken\n"
        output = _output([spin, *_defines(run), "-p", "-g", "-k", left[0], MODEL.name], directory)
    empty = re.compile(r"\[(else|goto|\.\(goto\))")
    return "".join(f"{line}\n" for line in output.splitlines() if not empty.search(line))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks the model of references to shared frames with spin.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="run only these (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--trail", metavar="NAME", help="print the interleaving that breaks this mutant")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    options = parser.parse_args(arguments)

    unknown = [name for name in (*options.names, *filter(None, [options.trail])) if name not in RUNS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (see --list)")
    if options.list:
        for run in RUNS.values():
            print(f"{run.kind:14}{run.name:32}{run.why}")
        return 0
    try:
        tools()
    except Missing as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 1
    if options.trail:
        print(trail(RUNS[options.trail]), end="")
        return 0

    start = time.monotonic()
    bad = 0
    print(f"{'kind':14}{'name':32}{'in':16}{'outcome':16}{'states':>10}{'MiB':>6}{'s':>7}")
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(check, [RUNS[name] for name in options.names or RUNS]):
            outcome = f"{result.outcome} {result.by}".strip()
            print(
                f"{result.run.kind:14}{result.run.name:32}{result.run.config:16}{outcome:16}"
                f"{result.states:>10,}{result.mib:>6.0f}{result.seconds:>7.1f}",
                flush=True,
            )
            if not result.ok:
                bad += 1
                print(f"    NOT AS EXPECTED: {result.complaint}", flush=True)
    print(f"{bad or 'none'} not as expected, {time.monotonic() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
