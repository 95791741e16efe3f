# SPDX-License-Identifier: MIT
"""What ksmalloc itself takes is small beside what it merges, and no frame counts twice."""

from __future__ import annotations

import pytest
from conftest import wait_until
from teamkit import MIB, both, by_mapping, commands, each, join, measured, store_blocks, table

from ksmalloc.ctl.team import Team

STORE = "/memfd:ksmalloc store (deleted)"
SHARED = ("/memfd:ksmalloc control (deleted)", "/memfd:ksmalloc bitmap (deleted)")
SIZES = pytest.mark.parametrize(("workers", "mib"), [(2, 32), (4, 16), (2, 256)])


@SIZES
def test_metadata(rendezvous: str, workers: int, mib: int) -> None:
    merged = workers * mib * MIB
    with Team(workers, commands) as team:
        team.ask("warm")
        before, before_by_mapping = measured(team), by_mapping(team.pids)
        join(team, rendezvous, False)
        team.ask("fill", 1, mib * MIB)
        assert team.ask("settle", who=0)
        team.ask("verify")

        def share() -> float:
            return float(team.ask("stats", who=0)["metadata_bytes"] / merged)

        at_once = share()
        # Scanners give their buffers back when they rest, each when nothing more is to be done.
        wait_until(lambda: share() <= 0.01, timeout=5)
        wait_until(lambda: both(measured(team) - before)[1] - mib * MIB <= 0.009 * merged, timeout=3)
        stats = team.ask("stats", who=0)
        memory, growth, rss = measured(team) - before, by_mapping(team.pids), by_mapping(team.pids, "Rss")
        growth.subtract(before_by_mapping)

        pages = stats["pages_shared"] + stats["pages_sharing"]
        assert pages * stats["page_size"] == merged
        # The workers' growth beside their data, and of it what is ksmalloc's by its name.
        outside = both(memory)[1] - mib * MIB
        named = sum(growth[name] for name in SHARED)
        print(
            f"\n{merged // MIB} MiB merged: metadata {stats['metadata_bytes'] >> 10} KiB "
            f"({100 * stats['metadata_bytes'] / merged:.2f} %, before resting {100 * at_once:.2f} %), "
            f"outside {outside >> 10} KiB ({100 * outside / merged:.2f} %): {table(growth)}"
        )
        assert stats["metadata_bytes"] <= 0.01 * merged
        assert outside <= 0.01 * merged, table(growth)
        assert named <= stats["metadata_bytes"] + 64 * 1024
        assert outside <= 1.25 * stats["metadata_bytes"] + workers * 128 * 1024, (
            "the figure leaves something out"
        )

        # No frame counts twice: each process has every frame once, and all of them together have one copy.
        assert stats["store_bytes"] == memory.store == mib * MIB
        assert rss[STORE] == merged
        assert abs(growth[STORE] - mib * MIB) <= merged // 1000


@pytest.mark.parametrize(("workers", "mib"), [(2, 32)])
def test_different_data_has_no_frames(rendezvous: str, workers: int, mib: int) -> None:
    with Team(workers, commands) as team:
        team.ask("warm")
        before = measured(team)
        join(team, rendezvous, False)
        each(team, "fill", [(seed, mib * MIB) for seed in range(1, workers + 1)])
        assert team.ask("settle", who=0)
        team.ask("verify")
        memory, stats = measured(team) - before, team.ask("stats", who=0)
        names = ("pages_shared", "pages_sharing", "merges", "promotions", "store_bytes")
        assert {name: stats[name] for name in names} == dict.fromkeys(names, 0)
        assert store_blocks(team.pids) == 0
        assert STORE not in by_mapping(team.pids)
        assert workers * mib * MIB <= both(memory)[0]
        assert both(memory)[1] <= 1.02 * workers * mib * MIB
