# SPDX-License-Identifier: MIT
"""ksmctl demo"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ksmalloc import domain
from ksmalloc.ctl import demo_worker, signals
from ksmalloc.ctl.demo_report import Outcome, refusal, render
from ksmalloc.ctl.measure import measure
from ksmalloc.ctl.options import add_domain, seconds, whole_number
from ksmalloc.ctl.progress import Progress
from ksmalloc.ctl.sample import make_sample
from ksmalloc.ctl.sizes import human
from ksmalloc.ctl.team import Team

HELP = "load files in several workers and see what merging saves"
USAGE = "demo [FILE ...] [--workers N] [--timeout S] [--domain NAME] [--json]"
DESCRIPTION = """\
Several workers each load the same files into an arena of their own. Every byte is compared with the files,
the workers' pages are merged, every byte is compared again, and the memory they take is measured before and
after. Then one worker writes into its copy, and nobody else sees it.

Of npy, npz and safetensors files each array gets a place of its own; any other file is loaded as its bytes.
Without a FILE the demonstration makes 64 MiB of data itself.

Ends with 0 only if every byte was right and merging came to its end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="*", help="what each worker loads")
    parser.add_argument(
        "--workers", metavar="N", type=whole_number(1, 512), default=4, help="how many (default: 4)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=30.0, help="seconds for merging (default: 30)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_domain(parser, default=None, what="a name for the domain, not in use yet (default: a fresh one)")


def run(args: argparse.Namespace) -> int:
    for path in args.files:
        with open(path, "rb"):
            pass
    with ExitStack() as stack:
        stack.enter_context(signals.unwinding())
        progress = stack.enter_context(Progress(sys.stderr))
        outcome = _demonstrate(args, stack, progress)
    if args.json:
        print(json.dumps(outcome.as_dict(), indent=2))
    else:
        print(render(outcome) if outcome.can_merge else refusal(outcome))
    return 0 if outcome.good else 1


def _demonstrate(args: argparse.Namespace, stack: ExitStack, progress: Progress) -> Outcome:
    paths = [os.path.abspath(path) for path in args.files]
    if not paths:
        progress.stage("making 64 MiB of sample data")
        with signals.held():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ksmctl-demo-"))
        paths = make_sample(folder)
    name = stack.enter_context(_fresh_domain(args.domain, args.path))

    progress.stage(f"starting {args.workers} workers")
    with signals.held():
        team = stack.enter_context(Team(args.workers, demo_worker.commands))

    def everybody(stage: str, command: str, *arguments: Any) -> list[Any]:
        progress.stage(stage)
        answers: list[Any] = team.ask(
            command, *arguments, tick=lambda n: progress.detail(f"{n} of {len(team)} workers")
        )
        return answers

    outcome = Outcome(name, [] if not args.files else paths, team.pids)
    for outcome.stats in everybody("joining", "join", name, args.path):
        if outcome.stats["barrier"] == "none" or outcome.stats["why_not"]:
            return outcome
    outcome.can_merge = True
    outcome.baseline = measure(team.pids, _store_bytes(team))

    outcome.nbytes = everybody("loading", "load", paths)[0]
    verified = everybody("comparing every byte with the files", "verify")
    outcome.before = measure(team.pids, _store_bytes(team))

    outcome.report = _merge(team, args.timeout, progress)
    verified += everybody("comparing every byte again", "verify")
    outcome.stats = team.ask("stats", who=0)
    outcome.after = measure(team.pids, _store_bytes(team))

    progress.stage("writing into one copy")
    outcome.written = team.ask("write", who=len(team) - 1)
    verified += everybody("comparing every byte once more", "verify")
    outcome.after_write = measure(team.pids, _store_bytes(team))
    outcome.verified = sum(verified)
    return outcome


def _merge(team: Team, timeout: float, progress: Progress) -> dict[str, Any]:
    """One worker calls settle(), which asks all of them; meanwhile another one tells how far they are."""
    progress.stage("merging")
    team.tell("settle", timeout, numbers=[0])
    while not team.has_answered(0, timeout=0.2):
        if len(team) > 1:
            stats = team.ask("stats", who=1)
            progress.detail(f"{stats['pages_sharing']:,} pages, {human(stats['saved_bytes'])} saved")
    report: dict[str, Any] = team.answer(0)
    return report


def _store_bytes(team: Team) -> int:
    return int(team.ask("stats", who=0)["store_bytes"])


@contextmanager
def _fresh_domain(name: str | None, path: str | None) -> Iterator[str]:
    """The name of a domain that did not exist; removed again at the end, when all workers have ended."""
    chosen = name or f"ksmctl-demo-{os.getpid()}-{secrets.token_hex(4)}"
    root = path or f"/dev/shm/ksmalloc-{os.getuid()}"
    if os.path.lexists(os.path.join(root, chosen)):
        raise ValueError(f"there is a domain {chosen} already; the demonstration needs one of its own")
    try:
        yield chosen
    finally:
        with signals.held(), suppress(FileNotFoundError):
            domain.clean(chosen, path)
