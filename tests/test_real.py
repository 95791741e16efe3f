# SPDX-License-Identifier: MIT
"""A real model in four spawned workers: one copy of it in memory, every byte right; different data: four."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from teamkit import MIB, both, by_mapping, commands, each, join, mappings, measured, own, table

from ksmalloc.ctl.measure import Memory
from ksmalloc.ctl.team import Team

WORKERS = 4
SECONDS = 5.0
"""How long the background may take after the last load, with default settings."""
ONE_BUFFER = pytest.mark.parametrize("as_one", [False, True], ids=["tensors", "one buffer"])


class Scene:
    """Four workers that have joined, and what they took before that."""

    def __init__(self, team: Team, model: Path, rendezvous: str) -> None:
        self.team, self.path, self.one = team, str(model), os.path.getsize(model)
        team.ask("warm", self.path)
        self.pids = team.pids
        self.before = measured(team)
        self.before_by_mapping = by_mapping(self.pids)
        self.before_mappings = [mappings(pid) for pid in self.pids]
        join(team, rendezvous)

    def grown(self) -> Memory:
        """By how much the workers grew, after each has read and checked every byte of its copy."""
        checked = self.team.ask("verify")
        assert min(checked) > 0.99 * self.one
        return measured(self.team) - self.before

    def copies(self, memory: Memory) -> str:
        blocks, pss = memory.blocks_total / self.one, own(memory) / self.one
        with_programs = memory.pss_total / self.one
        return f"{blocks:.3f} copies in blocks, {pss:.3f} in PSS, {with_programs:.3f} with program files"

    def where(self) -> str:
        growth = by_mapping(self.pids)
        growth.subtract(self.before_by_mapping)
        return table(growth)

    def more_mappings(self) -> list[int]:
        return [mappings(pid) - old for pid, old in zip(self.pids, self.before_mappings, strict=True)]

    def wait_for_background(self, copies: float) -> None:
        """Until the background has merged, or its time is over."""
        end = time.monotonic() + SECONDS
        while (measured(self.team) - self.before).blocks_total > copies * self.one and time.monotonic() < end:
            time.sleep(0.1)


@ONE_BUFFER
def test_four_workers_take_one_copy(minilm: Path, rendezvous: str, as_one: bool) -> None:
    with Team(WORKERS, commands) as team:
        scene = Scene(team, minilm, rendezvous)
        nbytes = team.ask("load", scene.path, as_one)
        loaded = time.monotonic()
        scene.wait_for_background(1.05)
        memory, seconds = scene.grown(), time.monotonic() - loaded
        print(f"\n{seconds:.1f} s after loading: {scene.copies(memory)}")
        assert both(memory)[1] <= 1.10 * scene.one, f"{scene.copies(memory)}: {scene.where()}"

        assert team.ask("settle", who=0)
        memory = scene.grown()
        print(f"settled: {scene.copies(memory)}; more mappings: {scene.more_mappings()}")
        assert both(memory)[1] <= 1.05 * scene.one, f"{scene.copies(memory)}: {scene.where()}"
        assert both(memory)[0] >= 0.99 * scene.one  # one copy is there
        assert max(scene.more_mappings()) <= 60

        stats = team.ask("stats", who=0)
        assert stats["pages_merged"] == stats["pages_shared"] + stats["pages_sharing"]
        assert stats["pages_sharing"] * stats["page_size"] >= 0.99 * (WORKERS - 1) * min(nbytes)
        assert stats["store_bytes"] == memory.store == stats["pages_shared"] * stats["page_size"]


@ONE_BUFFER
def test_different_data_takes_four_copies(minilm: Path, rendezvous: str, as_one: bool) -> None:
    with Team(WORKERS, commands) as team:
        scene = Scene(team, minilm, rendezvous)
        each(team, "load_different", [(scene.path, as_one, seed) for seed in range(1, WORKERS + 1)])
        time.sleep(0.5)
        assert team.ask("settle", who=0)
        memory = scene.grown()
        print(f"\n{scene.copies(memory)}")
        least, most = both(memory)
        assert 3.99 * scene.one <= least
        assert most <= 4.05 * scene.one, f"{scene.copies(memory)}: {scene.where()}"
        stats = team.ask("stats", who=0)
        names = ("pages_shared", "pages_sharing", "merges", "promotions", "ksm_zero_pages", "store_bytes")
        assert {name: stats[name] for name in names} == dict.fromkeys(names, 0)
        assert memory.store == 0
        assert stats["pages_unshared"] >= 0.99 * WORKERS * scene.one / stats["page_size"]


def test_loaded_in_different_orders(minilm: Path, rendezvous: str) -> None:
    """Every tensor lies in pages of its own, so the order costs mappings, and small tensors' pages."""
    with Team(WORKERS, commands) as team:
        scene = Scene(team, minilm, rendezvous)
        each(team, "load_shuffled", [(scene.path, seed) for seed in range(WORKERS)])
        assert team.ask("settle", who=0)
        memory = scene.grown()
        print(f"\n{scene.copies(memory)}; more mappings: {scene.more_mappings()}")
        assert both(memory)[1] <= 1.05 * scene.one + MIB, f"{scene.copies(memory)}: {scene.where()}"
        assert max(scene.more_mappings()) <= 400
