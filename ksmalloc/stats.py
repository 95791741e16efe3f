# SPDX-License-Identifier: MIT
"""Figures: counters in KSM's words (`Stats`), of one arena (`ArenaStats`), and what a scan did (`Report`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ksmalloc import _core

_BARRIERS = {number: word for word, number in _core.BARRIERS.items() if word != "auto"}  # all others: "none"


@dataclass(frozen=True, repr=False)
class Stats:
    """Counters of a domain, or of one peer in it. Pages are of `page_size` bytes.

    A snapshot: nothing in it changes later, and the peers do not stop while it is taken.
    """

    pages_shared: int
    """Frames in use (of one peer: distinct frames that it refers to)."""
    pages_sharing: int
    """Further pages that use them: the pages saved."""
    pages_unshared: int
    """Pages looked at, found unique, and checked again and again."""
    pages_volatile: int
    """Pages that changed since they were last looked at."""
    pages_scanned: int
    """Pages looked at, ever."""
    pages_skipped: int
    """Pages that could not be merged: pinned, shared by fork, swapped."""
    full_scans: int
    """Complete passes (of a domain: the least of any peer's)."""
    ksm_zero_pages: int
    """Pages of zeros given back; not part of `pages_sharing`."""
    pages_merged: int
    """Pages that are mapped to frames now, and unbroken: `pages_shared` + `pages_sharing`."""
    merges: int
    """Pages merged, ever."""
    promotions: int
    """Frames written, ever."""
    cow_breaks: int
    """Merged pages broken by a write, ever; exact where ksmalloc's handler copies them."""
    put_backs: int
    """Pages whose window closed without a merge, ever."""
    failures: int
    """System calls that failed inside a merge and were recovered, ever."""
    give_backs: int
    """Broken pages that were given anonymous memory again, so that they let go of their frame, ever."""
    stops: int
    """Times that all threads were held, ever (`barrier` ``"stop"``, and giving back)."""
    suspensions: int
    """Times that ksmalloc's SIGSEGV handler was found displaced, or the signal blocked by a thread, ever."""
    withheld: int
    """Stretches of pages not looked at because a control group was at its memory limit, ever."""
    vmas_used: int
    """Memory mappings that merging costs now (of a domain: the sum)."""
    vma_budget: int
    """Memory mappings that merging may cost (of a domain: the sum)."""
    saved_bytes: int
    """`pages_sharing` in bytes."""
    metadata_bytes: int
    """All of ksmalloc's memory that is not frames."""
    store_bytes: int
    """Bytes that the store occupies (of one peer: 0)."""
    peers: int
    """Living processes in the domain."""
    page_size: int
    """Bytes in a page."""
    barrier: str
    """That of this process: ``"move"``, ``"stop"``, ``"segv"``; with ``"none"`` only frozen pages merge."""
    why_not: str | None
    """What keeps this process from merging, or None."""
    cow: str = "kernel"
    """Who copies a merged page when it is written: ``"kernel"``, or (of an arena) ``"sigsegv"``."""

    def __repr__(self) -> str:
        line = (
            f"{gib(self.pages_merged * self.page_size)} merged in {self.peers} "
            f"{'peer' if self.peers == 1 else 'peers'}, {gib(self.pages_shared * self.page_size)} real, "
            f"barrier {self.barrier}"
        )
        return line if self.why_not is None else f"{line}, not merging: {self.why_not}"


@dataclass(frozen=True, repr=False)
class ArenaStats(Stats):
    """The counters of the arena's domain, and those of the arena alone. Pages are of `page_size` bytes.

    Every name of `Stats` means here what it means there: the whole domain.
    """

    name: str | None = None
    """The arena's label."""
    blocks: int = 0
    """Live blocks."""
    allocated_bytes: int = 0
    """Bytes asked for, of live blocks."""
    arena_pages: int = 0
    """Pages behind the live blocks."""
    arena_pages_merged: int = 0
    """Those of them that are merged and unbroken."""
    arena_pages_broken: int = 0
    """Those of them that were merged and then written."""
    arena_pages_zero: int = 0
    """Those of them that were given back because they were all zero."""
    arena_pages_frozen: int = 0
    """Those of them that are frozen (`Arena.freeze()`)."""
    arena_cow_breaks: int = 0
    """Merged pages of the arena that ksmalloc's SIGSEGV handler has copied, ever."""
    scan: bool = True
    """Whether the arena is merged in the background."""

    def __repr__(self) -> str:
        label = "" if self.name is None else f" {self.name!r}"
        merged = f"{self.arena_pages_merged} of {self.arena_pages} pages merged"
        return (
            f"arena{label}: {gib(self.allocated_bytes)} in {self.blocks} blocks, {merged}; "
            f"domain: {Stats.__repr__(self)}"
        )


@dataclass(frozen=True)
class PeerInfo:
    """One living process of a domain."""

    pid: int
    """As the peer's own pid namespace numbers it: for people."""
    slot: int
    """Its slot in the domain, unique among the living."""
    is_self: bool
    """Whether it is the process that asks."""
    stats: Stats
    """Its own counters."""


@dataclass(frozen=True)
class Report:
    """What a scan or `ksmalloc.settle()` did in this process."""

    pages_scanned: int
    """Pages looked at."""
    pages_merged: int
    """Pages merged."""
    zero_pages: int
    """Pages of zeros given back."""
    frames_written: int
    """Frames written for pages whose twin had none yet."""
    passes: int
    """Passes made."""
    seconds: float
    """How long it took."""
    settled: bool | None
    """True: nothing more can merge; False: the timeout of `ksmalloc.settle()` came first. Of a scan: None."""
    why_not: str | None
    """What kept pages from merging, or None."""


def gib(nbytes: int) -> str:
    """A size for people, in GiB to two places, in MiB or KiB when small."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if nbytes >= unit / 10:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes / 1024:.4g} KiB" if nbytes else "0 KiB"


def _words(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        **raw,
        "barrier": _BARRIERS.get(raw["barrier"], "none"),
        "why_not": _core.describe(raw["why_not"]),
    }


def make_stats(raw: dict[str, Any]) -> Stats:
    """Stats from the core's numbers."""
    return Stats(**_words(raw))


def make_arena_stats(name: str | None, domain: dict[str, Any], arena: dict[str, Any]) -> ArenaStats:
    """ArenaStats from the core's numbers."""
    return ArenaStats(
        **_words(domain),
        name=name,
        blocks=arena["blocks"],
        allocated_bytes=arena["allocated_bytes"],
        arena_pages=arena["pages"],
        arena_pages_merged=arena["pages_merged"],
        arena_pages_broken=arena["pages_broken"],
        arena_pages_zero=arena["pages_zero"],
        arena_pages_frozen=arena["pages_frozen"],
        arena_cow_breaks=arena["cow_breaks"],
        cow="sigsegv" if arena["sigsegv"] else "kernel",
        scan=bool(arena["scan"]),
    )


def make_peer(raw: dict[str, Any]) -> PeerInfo:
    """PeerInfo from the core's numbers."""
    return PeerInfo(raw["pid"], raw["slot"], bool(raw["self"]), make_stats(raw["stats"]))


def make_report(raw: dict[str, Any], settle: bool) -> Report:
    """Report from the core's numbers; `settle`: whether settling was asked for."""
    return Report(
        **{
            **raw,
            "settled": bool(raw["settled"]) if settle else None,
            "why_not": _core.describe(raw["why_not"]),
        }
    )
