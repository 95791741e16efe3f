# SPDX-License-Identifier: MIT
"""A real model in four workers of a user who may do little: one copy of it in memory, every byte right."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until
from crewkit import Growth, public_copy, public_folder
from handkit import NOBODY, hands
from teamkit import NAME, each, join

from ksmalloc.ctl.team import Team

WORKERS = 4

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture(scope="module")
def model(minilm: Path) -> Iterator[Path]:
    """The model where everybody may read it."""
    with public_folder() as folder:
        yield public_copy(folder, minilm)


class Nobodies:
    """Four ordinary processes of nobody's, to whom userfaultfd is refused, in a domain."""

    def __init__(self, team: Team, model: Path, rendezvous: str) -> None:
        self.team, self.path = team, str(model)
        team.ask("warm", self.path)
        team.ask("become_nobody", True, True)
        assert team.ask("user") == [(NOBODY,) * 6] * WORKERS
        for refused in team.ask("refusals"):
            assert refused["userfaultfd"] == refused["userfaultfd, user mode"] == errno.EPERM
            assert refused["/dev/userfaultfd"] in (errno.EACCES, errno.ENOENT, errno.EPERM)
            assert refused["/proc/self/pagemap"] == 0
        self.growth = Growth(team.pids, os.path.getsize(model))
        os.chown(rendezvous, NOBODY, NOBODY)
        join(team, rendezvous)

    def verify(self) -> None:
        assert min(self.team.ask("verify")) > 0.99 * self.growth.one


@pytest.mark.parametrize("as_one", [False, True], ids=["tensors", "one buffer"])
def test_four_workers_take_one_copy(model: Path, rendezvous: str, as_one: bool) -> None:
    with Team(WORKERS, hands) as team:
        scene = Nobodies(team, model, rendezvous)
        team.ask("load", scene.path, as_one)
        seconds = scene.growth.wait_for_background(1.05)
        scene.verify()
        scene.growth.check(0.99, 1.10, f"\n{seconds:.1f} s after loading")
        for found in team.ask("capabilities"):
            assert (found.barrier, found.tracking, found.dumpable) == ("stop", "pagemap", True)
            assert found.stops > 0
            print(f"{found.stops} stops, {found.stops_failed} failed")
        for said in team.ask("doctor", "--domain", NAME, "--path", rendezvous):
            assert (said["uid"], said["refusal"], len(said["workers"])) == (NOBODY, None, WORKERS - 1)
            assert said["capabilities"]["barrier"] == "stop"
            [missing] = [one for one in said["capabilities"]["better"] if one["name"] == "barrier move"]
            assert "/dev/userfaultfd" in missing["reason"]
            assert missing["remedy"]
        assert wait_until(lambda: team.ask("why_not") == [None] * WORKERS)


def test_different_data_takes_four_copies(model: Path, rendezvous: str) -> None:
    with Team(WORKERS, hands) as team:
        scene = Nobodies(team, model, rendezvous)
        each(team, "load_different", [(scene.path, False, seed) for seed in range(1, WORKERS + 1)])
        assert team.ask("settle", who=0)
        scene.verify()
        scene.growth.check(3.99, 4.05, "\ndifferent data")
