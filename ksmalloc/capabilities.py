# SPDX-License-Identifier: MIT
"""`capabilities()`: what works in this process, and what would have to change for more."""

from __future__ import annotations

from dataclasses import dataclass

from ksmalloc import _core, facts
from ksmalloc.domain import Domain, domain_of
from ksmalloc.handlers import name_of
from ksmalloc.remedies import Missing, missing


@dataclass(frozen=True, repr=False)
class Capabilities:
    """What this process may do in a domain. A snapshot: nothing in it changes later."""

    barrier: str
    """In force: ``"move"``, ``"stop"``, ``"segv"``, or ``"none"``, with which only frozen pages merge."""
    tracking: str
    """How written pages are found: ``"writes"``: the kernel tells; ``"pagemap"``: it tells of merged pages,
    others are read in every pass; ``"digest"``: by comparing, since /proc/self/pagemap cannot be read;
    ``"none"``."""
    cow: tuple[str, ...]
    """What ``Arena(cow=…)`` can have: ``"kernel"`` always, ``"sigsegv"`` if the handler would see a store."""
    handler: str
    """ksmalloc's handler for SIGSEGV: ``"absent"`` (nobody needs it yet), ``"installed"``, ``"displaced"`` by
    another one, or ``"masked"`` by a thread that blocks the signal."""
    suspensions: int
    """Times that it was found displaced or masked, ever."""
    stop_signal: int | None
    """The number of the signal that holds threads, once one was chosen."""
    stops: int
    """Times that all threads were held, ever."""
    stops_failed: int
    """Times that they could not be held, ever."""
    dumpable: bool
    """Whether the process is dumpable; if not, it shows none of its pages to peers."""
    why_not: str | None
    """What keeps this process from merging, or None."""
    better: tuple[Missing, ...]
    """What is not in force although it would be better: each with the reason, and the remedy here."""

    def __repr__(self) -> str:
        signal = "" if self.stop_signal is None else f" by signal {name_of(self.stop_signal)}"
        lines = [
            f"barrier {self.barrier}, tracking {self.tracking}, cow {' or '.join(self.cow)}",
            f"SIGSEGV handler {self.handler}, {self.suspensions} suspensions; "
            f"{self.stops} stops{signal}, {self.stops_failed} failed",
        ]
        if self.why_not is not None:
            lines.append(f"not merging: {self.why_not}")
        for one in self.better:
            lines.append(f"{one.name}: {one.reason}")
            lines += [f"    {line}" for line in one.remedy.splitlines()]
        return "\n".join(lines)


def capabilities(domain: Domain | str | None = None) -> Capabilities:
    """Which barrier, tracking and copy-on-write this process has, and why not better ones.

    domain: None the default one, a str the one of that name, or a `Domain`; joined if need be. Looks anew at
    what can be looked at without changing anything; of the barrier ``"stop"`` it reports the last attempt.
    Errors: those of `Domain`. Threads: any may call it. fork: the child has capabilities of its own.
    """
    membership = domain_of(domain)._membership()
    core = {**membership.capabilities(), "why_not": membership.stats()["why_not"]}  # which knows the settings
    found = facts.gather(core)
    handler = "installed" if core["handler"] else "absent"
    return Capabilities(
        barrier=found.barrier,
        tracking=found.tracking,
        cow=("kernel",) if found.segv else ("kernel", "sigsegv"),
        handler={"KSM_EDISPLACED": "displaced", "KSM_EMASKED": "masked"}.get(found.segv or "", handler),
        suspensions=core["suspensions"],
        stop_signal=core["stop_signal"] or None,
        stops=core["stops"],
        stops_failed=core["stops_failed"],
        dumpable=found.dumpable,
        why_not=_core.describe(core["why_not"]),
        better=missing(found),
    )
