# SPDX-License-Identifier: MIT
"""A control group at its memory limit. There the kernel refuses nothing, it kills: so no frames are written.

Needs root: the group is made for the test, and its limit is set to what it uses then and a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Processes, wait_until
from groupkit import Group
from limitkit import MIB, PAGE, SECONDS, Died, Worker, build, program
from teamkit import by_mapping, store_blocks

__all__ = ["program"]  # a fixture

WORKERS = 3
PAGES = 48 * MIB // PAGE
NO_ROOM = MIB // 4  # less than all peers take for a short stretch of pages each
LITTLE_ROOM = MIB  # enough for that, not for long ones
MORE_ROOM = 2 * MIB  # once there was too little there must be more: HEADROOM-2
KILLED = -9

pytestmark = pytest.mark.timeout(3 * SECONDS)
Start = Callable[..., Worker]


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("unchecked"), "unchecked")


@pytest.fixture
def group() -> Iterator[Group]:
    with Group() as made:
        yield made


def start(processes: Processes, program: Path, rendezvous: str, group: Group | None) -> Worker:
    worker = Worker(processes, program)
    if group:
        worker.ask("enter", group.path)
    worker.ask("join", rendezvous, "limits")
    return worker


def finish(workers: list[Worker]) -> None:
    for worker in workers:
        worker.process.stdin.close()
    for worker in workers:
        worker.process.wait(SECONDS)


def filled(processes: Processes, program: Path, rendezvous: str, group: Group) -> list[Worker]:
    """Workers in the group that hold the same bytes, none merged."""
    workers = [start(processes, program, rendezvous, group) for _ in range(WORKERS)]
    for worker in workers:
        worker.ask("fill", PAGES, 1)
    assert group.charged() > WORKERS * PAGES * PAGE
    return workers


def scan_or_die(workers: list[Worker]) -> dict[Worker, dict[str, str]]:
    """Let all scan at once; returns what those say who are still there."""
    for worker in workers:
        worker.tell("scan")
    left, ends = {}, []
    for worker in workers:
        try:
            left[worker] = worker.answer()
        except Died as death:
            ends.append(death.status)
    assert set(ends) <= {KILLED}
    return left


def check_merged(workers: list[Worker], pids: list[int]) -> None:
    """By the workers' counters, and from outside: all map the store's one copy."""
    for worker in workers:
        worker.ask("verify")
        assert worker.count("merged") == PAGES
    copies = by_mapping(pids, "Rss")
    stores = [nbytes for name, nbytes in copies.items() if name.startswith("/memfd:ksmalloc store")]
    assert sum(stores) >= len(workers) * PAGES * PAGE
    assert abs(store_blocks(pids) - PAGES * PAGE) <= MIB


def test_at_the_limit_nothing_is_written_and_nobody_killed(
    processes: Processes, program: Path, rendezvous: str, group: Group
) -> None:
    workers = filled(processes, program, rendezvous, group)
    pids = [worker.pid for worker in workers]
    limit = group.limit_to(NO_ROOM)
    print(f"\n{limit - group.used()} bytes left, {group.cache()} in files")
    said = scan_or_die(workers)
    assert [report["why_not"] for report in said.values()] == ["KSM_EHEADROOM"] * WORKERS
    for worker in workers:
        worker.ask("verify")
        stats = worker.stats()
        assert (stats["merged"], stats["promotions"]) == ("0", "0")
    assert min(worker.count("withheld") for worker in workers) > 0
    assert group.kills() == 0
    print(f"\n{limit >> 20} MiB allowed, {group.used() >> 20} used: nothing merged, nobody killed")

    # A few MiB more, and merging gives back what two of three copies took.
    before = group.used()
    group.set_limit(limit + MORE_ROOM)
    assert wait_until(
        lambda: workers[0].settle()["why_not"] == "OK", SECONDS
    )  # limits are looked up now and then
    after = group.used()
    check_merged(workers, pids)
    assert group.kills() == 0
    assert before - after > (WORKERS - 1.1) * PAGES * PAGE
    print(f"{MORE_ROOM >> 20} MiB more: {before >> 20} MiB used before, {after >> 20} after merging")
    assert {report["why_not"] for report in scan_or_die(workers).values()} == {"OK"}
    finish(workers)


def test_control_is_killed(processes: Processes, unchecked: Path, rendezvous: str, group: Group) -> None:
    """The same without the check."""
    workers = filled(processes, unchecked, rendezvous, group)
    group.limit_to(NO_ROOM)
    left = list(scan_or_die(workers))
    assert len(left) < WORKERS
    assert group.kills() > 0
    print(f"\nwithout the check {group.kills()} of {WORKERS} workers were killed")
    finish(left)


def test_at_the_limit_frames_that_exist_are_merged_with(
    processes: Processes, program: Path, rendezvous: str, group: Group
) -> None:
    """Somebody outside the group writes them; inside it merging only frees."""
    workers = filled(processes, program, rendezvous, group)
    group.limit_to(LITTLE_ROOM)
    before = group.used()
    outside = [start(processes, program, rendezvous, None) for _ in range(2)]
    for worker in outside:
        worker.ask("fill", PAGES, 1)
    for worker in outside * 2:  # the first one only says what it holds, the second writes it
        worker.ask("scan")
    assert sum(worker.count("promotions") for worker in outside) == PAGES
    assert list(scan_or_die(workers)) == workers
    outside[0].settle()
    everybody = [*workers, *outside]
    check_merged(everybody, [worker.pid for worker in everybody])
    after = group.used()
    print(f"\nat the limit {before >> 20} MiB, {after >> 20} after merging with frames from outside")
    assert sum(worker.count("promotions") for worker in workers) == 0
    assert group.kills() == 0
    assert before - after > (WORKERS - 0.1) * PAGES * PAGE
    finish(everybody)
