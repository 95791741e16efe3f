# SPDX-License-Identifier: MIT
"""ksmctl doctor"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ksmalloc
from ksmalloc import Capabilities, Domain, PeerInfo, domain, facts
from ksmalloc.ctl.options import add_domain
from ksmalloc.handlers import name_of

HELP = "what works here, and what would allow more"
USAGE = "doctor [--domain NAME] [--path DIR] [--json]"
DESCRIPTION = """\
Join the domain as a worker of this user would, merge two pages, and print what the process may do: which
barrier, tracking and copy-on-write are in force, why not better ones, and the exact lines that would enable
those here. Then what the workers say that live in the domain. Nothing is left behind.

Ends with 0 if the two pages merged."""

MEANING = {
    "barrier": {
        "move": "pages are moved away while they are compared: nothing is interrupted",
        "stop": "all threads are held by a signal while pages are compared",
        "segv": "pages are read-only while they are compared: system calls that write fail",
        "none": "nothing but frozen pages merges",
    },
    "tracking": {
        "writes": "the kernel says which pages were written",
        "pagemap": "the kernel says which merged pages were written; others are read in every pass",
        "digest": "merged pages are read to find out which were written",
        "none": "written pages are not found",
    },
    "handler": {
        "absent": "nobody needs it yet",
        "installed": "stores into read-only pages reach it",
        "displaced": "another one stands in its place",
        "masked": "a thread blocks SIGSEGV",
    },
}
VERDICTS = {
    "all": "Memory merges here: two equal pages did.",
    "frozen": "Only frozen memory merges here: two equal pages did once arena.freeze() was called.",
    "nothing": "Nothing merges here: two equal pages did not.",
}
PAGE = os.sysconf("SC_PAGE_SIZE")
_ERRORS = (ksmalloc.Error, OSError, ValueError, MemoryError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_domain(parser, what="the domain to join (default: default)")


def run(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        found = examine(args.domain, args.path, stack)
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0 if found["merges"] == "all" and found["refusal"] is None else 1


def examine(name: str, path: str | None, stack: ExitStack) -> dict[str, Any]:
    """Everything there is to say, as plain values. What was joined is left with the stack's end."""
    capabilities: Capabilities | None = None
    peers: list[PeerInfo] = []
    refusal: str | None = None
    merges = "nothing"
    try:
        joined = stack.enter_context(visit(name, path))
        merges, peers = try_out(joined), joined.peers
        capabilities = ksmalloc.capabilities(joined)
    except _ERRORS as error:
        refusal = f"{error}" or type(error).__name__
        with suppress(*_ERRORS):  # the process may do well elsewhere
            joined = stack.enter_context(elsewhere())
            merges = try_out(joined)
            capabilities = ksmalloc.capabilities(joined)
    return {
        "user": facts.user(),
        "uid": os.geteuid(),
        "kernel": platform.release(),
        "container": facts.container(),
        "domain": name,
        "refusal": refusal,
        "merges": merges,
        "capabilities": None if capabilities is None else dataclasses.asdict(capabilities),
        "workers": [
            {"pid": peer.pid, "barrier": peer.stats.barrier, "why_not": peer.stats.why_not}
            for peer in peers
            if not peer.is_self
        ],
    }


def try_out(joined: Domain) -> str:
    """Merge two pages: ``"all"`` memory merges, what is ``"frozen"``, or ``"nothing"``."""
    content = os.urandom(PAGE)
    with ksmalloc.Arena(domain=joined, scan=False) as arena:
        blocks = [arena.alloc(PAGE) for _ in range(2)]
        for block in blocks:
            memoryview(block)[:] = content
        for answer in ("all", "frozen"):
            if answer == "frozen":
                for block in blocks:
                    arena.freeze(block)
            arena.scan()
            merged = arena.stats().arena_pages_merged
            if any(bytes(block) != content for block in blocks):
                raise ksmalloc.Error("a page has changed by being merged: please report this")
            if merged == len(blocks):
                return answer
    return "nothing"


@contextmanager
def visit(name: str, path: str | None) -> Iterator[Domain]:
    """The domain; what joining made is removed again if nobody else has come to live there."""
    _, before = domain.read_settings(name, path)
    base = path or f"/dev/shm/ksmalloc-{os.geteuid()}"
    new_base, new = not os.path.exists(base), not os.path.exists(os.path.join(base, name))
    joined = Domain(name, path=path)
    try:
        yield joined
    finally:
        joined.close()
        if new and not before:
            with suppress(OSError):
                domain.clean(name, path)
                if new_base:
                    os.rmdir(base)


@contextmanager
def elsewhere() -> Iterator[Domain]:
    """A domain of our own, in a directory of our own."""
    folder = tempfile.mkdtemp(prefix="ksmalloc-doctor-")
    try:
        with Domain("doctor", path=folder) as joined:
            yield joined
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def render(found: dict[str, Any]) -> str:
    """For people."""
    place = {None: "", "kubernetes": ", in Kubernetes"}.get(
        found["container"], f", in a {found['container']} container"
    )
    lines = [f"user {found['user']} ({found['uid']}), Linux {found['kernel']}{place}"]
    if found["refusal"] is not None:
        lines.append(f"domain {found['domain']}: cannot be joined: {found['refusal']}")
    capabilities = found["capabilities"]
    if capabilities is None:
        return "\n".join([*lines, "and no domain could be made to look further"])
    lines += ["", *aligned(rows(capabilities)), "", VERDICTS[found["merges"]]]
    if capabilities["why_not"] is not None:
        lines.append(f"Not merging: {capabilities['why_not']}.")
    for one in capabilities["better"]:
        lines += ["", f"{one['name']}: not in force, because {one['reason']}. What would help:", ""]
        lines += [f"    {line}" for line in one["remedy"].splitlines()]
    if found["workers"]:
        lines += ["", "Workers in the domain:"]
        lines += aligned(
            (
                f"{w['pid']}",
                f"barrier {w['barrier']}" + (f", not merging: {w['why_not']}" if w["why_not"] else ""),
            )
            for w in found["workers"]
        )
    return "\n".join(lines)


def aligned(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<13}{text}" for name, text in pairs]


def rows(capabilities: dict[str, Any]) -> list[tuple[str, str]]:
    """What is in force, one thing a line."""
    made = [(name, f"{capabilities[name]}: {words[capabilities[name]]}") for name, words in MEANING.items()]
    made.insert(2, ("cow", " or ".join(capabilities["cow"])))
    signal = capabilities["stop_signal"]
    made.append(("stop signal", "none chosen yet" if signal is None else f"{signal} ({name_of(signal)})"))
    stops = f"{capabilities['stops']}, and {capabilities['stops_failed']} that failed"
    return [*made, ("stops", stops), ("suspensions", str(capabilities["suspensions"]))]
