"""Figures: names, meanings, and the one line for people."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Processes

import ksmalloc

PAGE = 4096
gib = sys.modules["ksmalloc.stats"].gib
KSM = {
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "pages_scanned",
    "pages_skipped",
    "full_scans",
    "ksm_zero_pages",
}


@pytest.fixture
def domain(rendezvous: str) -> Iterator[ksmalloc.Domain]:
    with ksmalloc.Domain(path=rendezvous) as domain:
        yield domain


def example(**changes: Any) -> ksmalloc.Stats:
    numbers: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(ksmalloc.Stats)}
    numbers |= {"page_size": PAGE, "peers": 8, "barrier": "move", "why_not": None, "cow": "kernel"}
    return ksmalloc.Stats(**(numbers | changes))


def test_ksm_words(domain: ksmalloc.Domain) -> None:
    stats = domain.stats()
    assert type(stats) is ksmalloc.Stats
    assert {field.name for field in dataclasses.fields(stats)} >= KSM
    assert (stats.peers, stats.page_size, stats.cow) == (1, os.sysconf("SC_PAGE_SIZE"), "kernel")
    assert stats.barrier in ("move", "stop", "none")
    assert (stats.give_backs, stats.stops) == (0, 0)
    assert (stats.barrier == "none") <= (stats.why_not is not None)
    # Bookkeeping may have grown by a page meanwhile; suspensions are the process's, see below.
    again = ksmalloc.stats(domain)
    same = {"metadata_bytes": stats.metadata_bytes, "suspensions": stats.suspensions}
    assert dataclasses.replace(again, **same) == stats
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.peers = 2  # type: ignore[misc]


def test_a_process_begins_with_no_suspensions(processes: Processes, rendezvous: str) -> None:
    """They are the handler's, which the whole process has in common: only a new one knows there were none."""
    program = "import ksmalloc, sys; print(ksmalloc.Domain('new', path=sys.argv[1]).stats().suspensions)"
    output, errors = processes.python(program, rendezvous).communicate(timeout=60)
    assert (output, errors) == ("0\n", "")


def test_repr_is_one_line() -> None:
    line = repr(example(pages_merged=486400, pages_shared=68157))
    assert line == "1.86 GiB merged in 8 peers, 0.26 GiB real, barrier move"
    assert repr(example(peers=1)) == "0 KiB merged in 1 peer, 0 KiB real, barrier move"
    assert repr(example(barrier="none", why_not="a reason (KSM_EBARRIER)")).endswith(
        "barrier none, not merging: a reason (KSM_EBARRIER)"
    )


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 KiB"),
        (4096, "4 KiB"),
        (1 << 20, "1.00 MiB"),
        (200 << 20, "0.20 GiB"),
        (3 << 30, "3.00 GiB"),
        (5 << 40, "5120.00 GiB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert gib(nbytes) == text


def test_arena_stats_add_to_the_domains(domain: ksmalloc.Domain) -> None:
    arena = ksmalloc.Arena(name="tables", domain=domain, scan=False)
    blocks = [arena.alloc(3 * PAGE), arena.alloc(10)]
    stats = arena.stats()
    assert isinstance(stats, ksmalloc.ArenaStats)
    assert isinstance(stats, ksmalloc.Stats)
    assert (stats.name, stats.blocks, stats.allocated_bytes, stats.scan) == (
        "tables",
        2,
        3 * PAGE + 10,
        False,
    )
    assert stats.arena_pages >= 4
    assert (stats.arena_pages_merged, stats.arena_pages_broken, stats.arena_pages_zero) == (0, 0, 0)
    assert (stats.arena_pages_frozen, stats.arena_cow_breaks, stats.cow) == (0, 0, "kernel")
    assert ksmalloc.Arena(domain=domain, cow="sigsegv").stats().cow == "sigsegv"
    assert stats.peers == 1
    assert repr(stats).startswith("arena 'tables': 12.01 KiB in 2 blocks, 0 of ")
    assert "\n" not in repr(stats)
    assert ksmalloc.Arena(domain=domain).stats().scan is True
    del blocks
    assert arena.stats().blocks == 0


def test_peers(domain: ksmalloc.Domain) -> None:
    [peer] = domain.peers
    assert isinstance(peer, ksmalloc.PeerInfo)
    assert peer.pid == os.getpid()
    assert peer.is_self is True
    assert isinstance(peer.stats, ksmalloc.Stats)


def test_settle_reports(domain: ksmalloc.Domain) -> None:
    report = ksmalloc.settle(5, domain=domain)
    assert isinstance(report, ksmalloc.Report)
    assert report.settled is True or report.why_not is not None
    assert 0 <= report.seconds < 5
    assert isinstance(ksmalloc.settle(0, domain=domain).settled, bool)
    for wrong in (-1, -0.001, float("nan")):
        with pytest.raises(ValueError):
            ksmalloc.settle(wrong, domain=domain)
    with pytest.raises(TypeError):
        ksmalloc.settle("soon", domain=domain)  # type: ignore[arg-type]
