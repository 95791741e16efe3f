# SPDX-License-Identifier: MIT
"""The storm of copies: a control group that holds one copy and not all of them, and everybody writes at once.

Memory that merging saved is memory that writes take back, all at once if need be. Then it is the kernel that
chooses who is killed. The rest must not notice. Needs root, for the group.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Processes, wait_until
from groupkit import Group
from limitkit import MIB, PAGE, SECONDS, Died, Worker, program
from teamkit import store_blocks

__all__ = ["program"]  # a fixture

WORKERS = 6
BYTES = 32 * MIB
PAGES = BYTES // PAGE
HELD = 3  # copies that the group holds beside the frames
OLD, NEW = 1, 2_000_000  # no two of these pages have digests that look alike to the index
KILLED = -9

pytestmark = pytest.mark.timeout(3 * SECONDS)


def join(processes: Processes, program: Path, rendezvous: str, group: Group | None) -> Worker:
    worker = Worker(processes, program)
    if group:
        worker.ask("enter", group.path)
    worker.ask("join", rendezvous, "storm")
    worker.ask("fill", PAGES, OLD)
    return worker


def settled(worker: Worker) -> int:
    """How many of its pages are merged then."""
    worker.settle()
    return worker.count("merged")


def all_write(workers: list[Worker]) -> list[Worker]:
    """At the same time; returns who lived through it. Who is done may be killed for somebody who is not."""
    for worker in workers:
        worker.tell("write", NEW)
    for worker in workers:
        with suppress(Died):
            worker.answer()
    statuses = [worker.process.poll() for worker in workers]
    assert set(statuses) <= {None, KILLED}
    return [worker for worker, status in zip(workers, statuses, strict=True) if status is None]


def test_survivors_keep_every_byte_and_the_domain_goes_on(
    processes: Processes, program: Path, rendezvous: str
) -> None:
    with Group("storm") as group:
        workers = [join(processes, program, rendezvous, group) for _ in range(WORKERS)]
        workers[0].settle()
        outside = join(processes, program, rendezvous, None)
        outside.settle()
        everybody = [*workers, outside]
        assert [worker.count("merged") for worker in everybody] == [PAGES] * (WORKERS + 1)
        assert abs(store_blocks([outside.pid]) - BYTES) <= MIB
        limit = group.limit_to(HELD * BYTES + BYTES // 2)
        before = group.used()

        left = all_write(workers)
        killed = WORKERS - len(left)
        print(f"\n{before >> 20} of {limit >> 20} MiB used by {WORKERS} workers that share {BYTES >> 20}:")
        print(f"all wrote at once: {killed} killed, {len(left)} left, {group.used() >> 20} MiB used")
        assert killed == group.kills() > 0
        assert left  # the kernel kills until the rest fits
        for worker in [*left, outside]:
            worker.ask("verify")

        # Who is left holds equal bytes again: they merge, with room for all.
        left[0].settle()
        for worker in left:
            worker.ask("verify")
            assert worker.count("breaks") >= PAGES
        assert wait_until(lambda: outside.count("peers") == len(left) + 1)
        if len(left) > 1:
            assert wait_until(lambda: all(settled(worker) == PAGES for worker in left), SECONDS)
        print(f"merged again: {group.used() >> 20} MiB used")
        late = join(processes, program, rendezvous, group)
        late.settle()
        for worker in (late, outside):
            worker.ask("verify")
            assert worker.count("merged") == PAGES

        # What the dead referred to is nobody's: with the last that hold it every frame goes.
        for worker in [*left, late]:
            worker.ask("free")
        outside.ask("free")
        assert wait_until(lambda: "freed" in outside.ask("sweep") and outside.count("shared") == 0)
        assert store_blocks([outside.pid]) == 0
        for worker in [*left, late, outside]:
            worker.process.stdin.close()
        for worker in [*left, late, outside]:
            assert worker.process.wait(SECONDS) == 0
