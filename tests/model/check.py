#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Checks the models with spin: every configuration must hold, every mutant must be caught.

    check.py                  everything, as a table; exit status 1 if something is not as it should be
    check.py NAME ...         only these
    check.py --list           the names
    check.py --trail NAME     the interleaving that breaks a mutant, step by step

frames.pml is built for every run anew; gate.pml and guard.pml are built once, and read from their environment
what to do. Needs spin (Debian package: spin) and a C compiler; nothing else.
"""

from __future__ import annotations

import argparse
import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock

DIRECTORY = Path(__file__).resolve().parent
FRAMES, GATE, GUARD = "frames", "gate", "guard"
MODELS = {name: DIRECTORY / f"{name}.pml" for name in (FRAMES, GATE, GUARD)}
MEMORY_MIB = 900  # for one run; two run at a time
SECONDS = 300  # for one run, on a machine that is busy with other things
DEPTH = 10_000  # longest path; pan says so if it does not suffice
SMALL_TABLE = "-w20"  # of states, as a power of two: for the two smaller models

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
    model: str = FRAMES
    cycles: bool = False  # look for paths that go on for ever, and for nothing but these and assertions


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


def _of(model: str, *runs: Run) -> tuple[Run, ...]:
    return tuple(replace(run, model=model) for run in runs)


def _ends(run: Run) -> Run:
    """The same run, of which is asked that no path is endless."""
    return replace(run, name=f"{run.name}-ends", reaches=(), cycles=True, why="the same: no path is endless")


def _breaks(name: str, config: str, rule: str, by: str, why: str) -> Run:
    """A mutant of gate.pml or guard.pml: its rule may be several."""
    return _mutant(name, config, *(f"M_{word}" for word in rule.split()), by=by, why=why)


def _spares(name: str, config: str, rule: str, why: str) -> Run:
    return _redundant(name, config, *(f"M_{word}" for word in rule.split()), why=why)


CONFIGURATIONS += _of(
    GATE,
    _good(
        "gate-late",
        "LATE",
        reaches="HELD GIVEN LATE BEHIND MOVED",
        why="two threads, three stops: signals and threads of earlier stops",
    ),
    _good(
        "gate-life",
        "LIFE",
        reaches="HELD GIVEN LATE BEHIND ESRCH GONE LEFT THREE SLOT MOVED",
        why="threads are created and end while they are listed and sent to; the main thread becomes a zombie",
    ),
    _good(
        "gate-reuse",
        "REUSE",
        reaches="HELD GIVEN LATE BEHIND ESRCH GONE AGAIN MOVED",
        why="a new thread has the number of one that has ended",
    ),
    _good(
        "gate-exempt",
        "EXEMPT",
        reaches="HELD GIVEN LATE BEHIND LEFT MOVED",
        why="a scanner of another domain begins, ends, and goes on as an ordinary thread",
    ),
)

_GUARD_REACHES = "MERGED FROZEN UNEQUAL COPIED OPENED THAWED QUICKER RESTORED"

CONFIGURATIONS += _of(
    GUARD,
    _good("guard-move", "MOVE", reaches=f"{_GUARD_REACHES} KERNEL", why="two stores; windows by `move`"),
    _good("guard-stop", "STOP", reaches=f"{_GUARD_REACHES} KERNEL", why="the same; windows by `stop`"),
    _good("guard-segv", "SEGV", reaches=f"{_GUARD_REACHES} KERNEL", why="the same; windows by `segv`"),
    _good(
        "guard-kernel",
        "MOVE_KERNEL",
        reaches=f"{_GUARD_REACHES} KERNEL",
        why="`move`; merged pages are writable and the kernel copies, unless they are frozen",
    ),
    _good(
        "guard-opener",
        "OPENER",
        reaches=f"{_GUARD_REACHES} KERNEL ALL",
        why="everything is opened without the merge lock, the page is freed, a call fails",
    ),
    _good(
        "guard-fork",
        "FORK",
        reaches=f"{_GUARD_REACHES} KERNEL ORPHAN",
        why="a child is born, perhaps with the page BUSY",
    ),
    _good(
        "guard-failures",
        "FAILURES",
        reaches=f"{_GUARD_REACHES} KERNEL BACK",
        why="`segv`; two calls fail, those of the way back too",
    ),
)

CONFIGURATIONS += tuple(
    _ends(run)
    for run in CONFIGURATIONS
    if run.name in ("gate-late", "gate-exempt", "guard-move", "guard-kernel")
)

REDUNDANT += _of(
    GATE,
    _spares(
        "gate-count-late",
        "REUSE",
        "COUNT_LATE",
        "a thread counts as missing after it was sent to: one more is missing all the while",
    ),
    _spares(
        "gate-sending-uncounted",
        "REUSE",
        "SENDING_UNCOUNTED",
        "nothing keeps `missing` above zero while signals are sent: it saves wakes (but see gate-underflow)",
    ),
    _spares(
        "gate-withdraw-blindly",
        "REUSE",
        "WITHDRAW_BLINDLY",
        "a slot is withdrawn by a store: who has ended does not exchange it any more",
    ),
    _spares(
        "gate-withdraw-exempt-blindly",
        "EXEMPT",
        "WITHDRAW_BLINDLY",
        "the same of a scanner: every signal is blocked in it",
    ),
    _spares(
        "gate-no-exchange",
        "LATE",
        "NO_EXCHANGE",
        "handlers do not ask their slots: `missing` carries the stop as well (but see gate-exempt-parks)",
    ),
)

REDUNDANT += _of(
    GUARD,
    _spares(
        "guard-stop-map-while-open",
        "STOP",
        "MAP_WHILE_OPEN",
        "`stop`: no BUSY before a read-only mapping, for nobody runs until MERGED is said",
    ),
)

MUTANTS += _of(
    GATE,
    _breaks("gate-one-listing", "REUSE", "ONE_LISTING", "PARK", "threads are listed once"),
    _breaks(
        "gate-list-at-once",
        "REUSE",
        "LIST_AGAIN_AT_ONCE",
        "PARK",
        "listed again before those known are parked, waited for then",
    ),
    _breaks(
        "gate-list-by-number",
        "REUSE",
        "LIST_BY_NUMBER",
        "PARK",
        "if the kernel listed by number, not in order of creation",
    ),
    _breaks(
        "gate-esrch",
        "REUSE",
        "ESRCH_IS_NOBODY",
        "PARK",
        "one that ends while it is listed is not somebody new",
    ),
    _breaks(
        "gate-gone-stays",
        "REUSE",
        "GONE_STAYS",
        "PARK",
        "GONE holds for the number: the next thread that has it is not sent to",
    ),
    _breaks("gate-close-late", "LATE", "CLOSE_LATE", "PARK", "the gate closes after the signals are sent"),
    _breaks(
        "gate-unexempt",
        "EXEMPT",
        "UNEXEMPT_NO_LOCK",
        "PARK",
        "a scanner becomes an ordinary thread during a stop",
    ),
    _breaks(
        "gate-slot-no-stop", "LATE", "SLOT_NO_STOP", "SLEEP", "slots do not carry the number of the stop"
    ),
    _breaks(
        "gate-value-no-stop",
        "LIFE",
        "VALUE_NO_STOP",
        "SLEEP",
        "signals do not: a late one takes another thread's slot",
    ),
    _breaks(
        "gate-missing-no-stop",
        "LATE",
        "MISSING_NO_STOP",
        "COUNT",
        "`missing` does not: lowered for an earlier stop",
    ),
    _breaks(
        "gate-two-steps",
        "LATE",
        "ARRIVE_TWO_STEPS",
        "COUNT",
        "the stop is compared, and then `missing` is lowered",
    ),
    _breaks(
        "gate-underflow",
        "LATE",
        "COUNT_LATE SENDING_UNCOUNTED",
        "COUNT",
        "a thread counts as missing after it was sent to, and nothing else is missing",
    ),
    _breaks(
        "gate-exempt-parks",
        "EXEMPT",
        "NO_EXCHANGE",
        "COUNT",
        "handlers do not ask their slots: one that was withdrawn lowers `missing` again",
    ),
    _breaks(
        "gate-arrive-late",
        "LATE",
        "ARRIVE_AFTER_WAITING",
        "SLEEP",
        "one less is missing after the gate has opened",
    ),
    _breaks(
        "gate-any",
        "LATE",
        "WAIT_ANY_GATE",
        "SLEEP",
        "a handler waits while any stop is under way, and is missing in that one",
    ),
    _breaks(
        "gate-sleep-blindly",
        "LATE",
        "SLEEP_BLINDLY",
        "SLEEP",
        "the gate is not compared when the thread falls asleep",
    ),
    _breaks("gate-no-wake", "LATE", "NO_WAKE", "SLEEP", "opened, nobody is woken"),
    _breaks("gate-wake-one", "LATE", "WAKE_ONE", "SLEEP", "one is woken"),
    _breaks("gate-wake-first", "LATE", "WAKE_FIRST", "SLEEP", "woken, then opened"),
    _breaks(
        "gate-send-twice",
        "LATE",
        "SEND_TWICE",
        "SLEEP",
        "who has a slot is sent to again at the next listing",
    ),
    _breaks("gate-gone-awaited", "LIFE", "GONE_IS_AWAITED", "SLEEP", "who has ended is waited for"),
    _breaks(
        "gate-zombie-awaited",
        "LIFE",
        "ZOMBIE_IS_AWAITED",
        "SLEEP",
        "a main thread that has ended is waited for",
    ),
    _breaks(
        "gate-exempt-awaited",
        "EXEMPT",
        "EXEMPT_IS_AWAITED",
        "SLEEP",
        "a thread that has become a scanner is waited for",
    ),
)

MUTANTS += _of(
    GATE,
    replace(
        _breaks(
            "gate-always-new", "LATE", "ALWAYS_NEW", "ENDS", "who has a slot is somebody new at every listing"
        ),
        cycles=True,
    ),
)

MUTANTS += _of(
    GUARD,
    _breaks(
        "guard-map-while-open",
        "MOVE",
        "MAP_WHILE_OPEN",
        "GUARD-1",
        "`move`: no BUSY before a read-only mapping",
    ),
    _breaks(
        "guard-merged-late", "STOP", "SAY_MERGED_LATE", "GUARD-1", "`stop`: MERGED is said when all run again"
    ),
    _breaks("guard-no-claim", "MOVE", "NO_CLAIM", "LOST", "a handler copies without a claim"),
    _breaks(
        "guard-claim-anything",
        "MOVE",
        "CLAIM_ANYTHING",
        "GUARD-1",
        "a handler claims whatever the byte has become, and puts it back",
    ),
    _breaks(
        "guard-claim-two-steps",
        "MOVE",
        "CLAIM_IN_TWO_STEPS",
        "LOST",
        "the byte is compared, and then it says BUSY",
    ),
    _breaks("guard-copy-first", "MOVE", "COPY_BEFORE_CLAIM", "LOST", "copied, then claimed"),
    _breaks("guard-open-first", "MOVE", "OPEN_BEFORE_COPY", "GUARD-1", "OPEN, then copied"),
    _breaks("guard-stays-busy", "FAILURES", "STAYS_BUSY", "ENDS", "a handler that failed leaves BUSY"),
    _breaks("guard-busy-late", "MOVE", "COUNT_BUSY_LATE", "GUARD-2", "`busy` grows after the byte says BUSY"),
    _breaks("guard-no-compare", "SEGV", "NO_COMPARE", "LOST", "no comparison in the window"),
    _breaks("guard-segv-no-claim", "SEGV", "SEGV_NO_CLAIM", "GUARD-1", "`segv`: read-only without a claim"),
    _breaks("guard-segv-no-protect", "SEGV", "SEGV_NO_PROTECT", "LOST", "`segv`: claimed, and not read-only"),
    _breaks(
        "guard-segv-set-first",
        "SEGV",
        "SEGV_SET_FIRST",
        "GUARD-1",
        "`segv`: the byte first, then the protection",
    ),
    _breaks("guard-freeze-open", "MOVE", "FREEZE_OPEN", "GUARD-1", "frozen without BUSY in between"),
    _breaks(
        "guard-freeze-broken",
        "MOVE_KERNEL",
        "FREEZE_BROKEN",
        "CERTAIN",
        "MERGED is said of what the kernel has copied",
    ),
    _breaks(
        "guard-restore-busy",
        "MOVE",
        "RESTORE_BUSY",
        "LOST",
        "a page that a handler holds is restored by the barrier",
    ),
    _breaks(
        "guard-restore-no-claim",
        "MOVE",
        "RESTORE_NO_CLAIM",
        "LOST",
        "a merged page is restored without a claim",
    ),
    _breaks(
        "guard-restore-counts",
        "MOVE",
        "RESTORE_COUNTS",
        "BREAKS",
        "restore takes what the handler has copied for a break of the kernel's",
    ),
    _breaks(
        "guard-put-first", "MOVE", "PUT_FIRST", "REFS", "the reference is put, then the page is replaced"
    ),
    _breaks(
        "guard-forget-early", "MOVE", "FORGET_EARLY", "REFS", "the same of a page that the barrier holds"
    ),
    _breaks(
        "guard-free-no-claim", "OPENER", "FREE_NO_CLAIM", "CERTAIN", "freed while somebody else holds it"
    ),
    _breaks(
        "guard-opener-no-claim",
        "OPENER",
        "OPEN_ALL_NO_CLAIM",
        "CERTAIN",
        "everything is opened without claims",
    ),
    _breaks(
        "guard-opener-says-open",
        "OPENER",
        "OPEN_ALL_SAYS_OPEN",
        "REFS",
        "what is opened and refers to a frame says OPEN",
    ),
    _breaks("guard-orphan-stays", "FORK", "ORPHAN_STAYS", "ENDS", "in the child BUSY stays BUSY"),
    _breaks("guard-orphan-open", "FORK", "ORPHAN_SAYS_OPEN", "REFS", "in the child BUSY becomes OPEN"),
    _breaks(
        "guard-fork-busy",
        "FORK",
        "FORK_KEEPS_BUSY",
        "GUARD-2",
        "in the child `busy` counts the parent's threads",
    ),
    _breaks("guard-fork-unlocked", "FORK", "FORK_UNLOCKED", "REFS", "fork without the merge lock"),
    _breaks(
        "guard-way-back",
        "FAILURES",
        "WAY_BACK_IGNORED",
        "GUARD-1",
        "what could not be made writable again says OPEN",
    ),
    _breaks(
        "guard-thaw-half-way",
        "FAILURES",
        "THAW_HALF_WAY",
        "CERTAIN",
        "a run that is half writable after a failure says READONLY",
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


def _output(command: Sequence[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command prints, whatever its exit status."""
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return done.stdout + done.stderr


def _call(command: Sequence[str], cwd: Path) -> str:
    """The same for a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{output[-2000:]}")
    return output


@cache
def _text(model: str) -> str:
    return MODELS[model].read_text("utf-8")


def _number_of(pattern: str, model: str) -> int:
    found = re.search(rf"^#define {pattern}", _text(model), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{model}.pml does not define {pattern}")
    return int(found.group(1))


def _settings(run: Run) -> dict[str, str]:
    """What gate.pml and guard.pml are told: by the environment; by macros if the simulator runs as well."""
    mutants = sum(1 << _number_of(rf"{macro}\s+MUTANT\((\d+)\)", run.model) for macro in run.macros)
    config = _number_of(rf"{run.config}\s+(\d+)", run.model)
    return {"CONFIG": str(config), "MUTANTS": str(mutants)}


def _defines(run: Run) -> list[str]:
    if run.model == FRAMES:
        return [f"-DCFG={run.config}", *(f"-D{macro}" for macro in run.macros)]
    return [f"-D{name}={value}" for name, value in _settings(run).items()]


def _build(run: Run, defines: Sequence[str], directory: Path) -> None:
    spin, compiler = tools()
    output = _call([spin, *defines, "-a", str(MODELS[run.model])], directory)
    if "Error" in output:
        raise RuntimeError(output)
    kind = "-DNP" if run.cycles else "-DSAFETY"
    flags = ["-O0", "-w", kind, "-DNOREDUCE", f"-DMEMLIM={MEMORY_MIB}"]
    _call([compiler, *flags, "-o", "pan", "pan.c"], directory)


_built: dict[tuple[str, bool], tempfile.TemporaryDirectory[str]] = {}
_building = Lock()


def _verifier(run: Run, directory: Path) -> tuple[list[str], dict[str, str]]:
    """A verifier for this run, and its environment."""
    if run.model == FRAMES:
        _build(run, [*_defines(run), "-DWITNESS"], directory)
        return ["./pan"], dict(os.environ)
    kind = (run.model, run.cycles)
    with _building:
        if kind not in _built:
            place = tempfile.TemporaryDirectory(prefix=f"{run.model}-")
            atexit.register(place.cleanup)
            _build(run, ["-DWITNESS"], Path(place.name))
            _built[kind] = place
    command = [str(Path(_built[kind].name) / "pan"), SMALL_TABLE, *(["-l"] if run.cycles else [])]
    return command, {**os.environ, **_settings(run)}


GUARD_RULES = ("", "LOST", "GUARD-1", "CERTAIN", "GUARD-2", "REFS", "BREAKS")  # as Monitor() numbers them


def _broken_gate(what: str) -> str:
    if what.startswith("invalid end state"):
        return "SLEEP"
    if what.startswith("non-progress cycle"):
        return "ENDS"
    return "COUNT" if "missing" in what else "PARK" if "life[" in what or "held" in what else what


def _broken_guard(what: str) -> str:
    if what.startswith(("invalid end state", "non-progress cycle")):
        return "ENDS"
    number = re.search(r"which!=(\d+)", what)
    return GUARD_RULES[int(number.group(1))] if number else "GUARD-2" if "busy" in what else what


def _broken(model: str, output: str) -> str:
    """Which invariant pan found broken; empty if none."""
    found = re.search(r"pan:\d+: (.*)", output)
    if found is None:
        return ""
    if model != FRAMES:
        return (_broken_gate if model == GATE else _broken_guard)(found.group(1))
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


def _witnesses(run: Run, output: str) -> list[str]:
    """Those places of the run's that were not reached."""
    numbers = {name: int(n) for name, n in re.findall(r"#define (W_\w+)\s+(\d+)", _text(run.model))}
    found = re.search(r"^witnesses (\d+)$", output, re.MULTILINE)
    reached = int(found.group(1)) if found else 0
    return [name for name in run.reaches if not reached >> numbers[name] & 1]


def _number(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    return float(found.group(1)) if found else 0.0


def check(run: Run) -> Result:
    """Runs one configuration or mutant and says whether what came out is what had to."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        directory = Path(name)
        command, environment = _verifier(run, directory)
        output = _output([*command, f"-m{DEPTH}"], directory, environment)
    errors = re.search(r"errors: (\d+)", output)
    by = _broken(run.model, output)
    complaint = ""
    if errors is None or ("Search not completed" in output and errors.group(1) == "0"):
        outcome, complaint = "gave up", f"the search was not completed:\n{output[-1500:]}"
    elif "search depth too small" in output:
        outcome, complaint = "gave up", f"paths longer than {DEPTH} steps were cut"
    elif errors.group(1) == "0":
        outcome = HOLDS
        missed = _witnesses(run, output)
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
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        directory = Path(name)
        path = MODELS[run.model]
        shutil.copy(path, directory)
        _build(run, _defines(run), directory)
        _output(["./pan", f"-m{DEPTH}", *(["-l"] if run.cycles else [])], directory)
        left = [path.name for path in directory.glob("*.trail")]
        if not left:
            return "nothing is broken\n"
        output = _output([spin, *_defines(run), "-p", "-g", "-k", left[0], path.name], directory)
    empty = re.compile(r"\[(else|goto|\.\(goto\))")
    return "".join(f"{line}\n" for line in output.splitlines() if not empty.search(line))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks the models with spin.")
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
