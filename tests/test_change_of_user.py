# SPDX-License-Identifier: MIT
"""A server that starts as root and becomes nobody, as gunicorn's `user=` does it: its workers take one copy.

Whoever has changed its user is not dumpable: /proc/self/pagemap is closed to it, and so is much of /proc.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until
from crewkit import SECONDS, Crew, Growth, meeting, public_copy, public_folder, public_python
from handkit import NOBODY
from teamkit import MIB, PAGE

WORKERS = 4
PRELOADED = 24 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    with public_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def model(public: Path, minilm: Path) -> Path:
    """The model where everybody may read it."""
    return public_copy(public, minilm)


@pytest.fixture(scope="module")
def python(public: Path) -> Path:
    """A Python that everybody may run."""
    return public_python(public)


@pytest.fixture
def name() -> Iterator[str]:
    with meeting() as name:
        yield name


def check_one_copy(crew: Crew, growth: Growth, what: str) -> None:
    """With nothing but default settings; and every byte is right."""
    seconds = growth.wait_for_background(1.05)
    assert min(crew.ask("verify")) > 0.99 * growth.one
    print(f"\n{what}:")
    for found in crew.ask("capabilities"):
        reasons = [one.reason for one in found.better if one.name == "barrier stop"]
        print(f"barrier {found.barrier}, {found.stops} stops, {found.stops_failed} failed", *reasons)
    growth.check(0.99, 1.10, f"{seconds:.1f} s after loading")


def check_digest(crew: Crew, name: str) -> None:
    """The kernel does not say which pages are broken; they are found all the same, and it is told why."""
    for refused in crew.ask("refusals"):
        assert refused["/proc/self/pagemap"] == errno.EACCES
    for found in crew.ask("doctor", "--domain", name):
        assert (found["uid"], found["domain"], found["refusal"]) == (NOBODY, name, None)
        assert found["capabilities"]["tracking"] == "digest"
        assert found["capabilities"]["dumpable"] is False
        [missing] = [one for one in found["capabilities"]["better"] if one["name"] == "tracking pagemap"]
        assert "not dumpable" in missing["reason"]
        assert "PR_SET_DUMPABLE" in missing["remedy"]


def preload(crew: Crew) -> None:
    """The master loads what a fork hands on: something twice, which is merged, and something once."""
    for seed in (1, 1, 2):
        crew.master("fill", seed, PRELOADED // 3)
    assert crew.master("settle")
    assert crew.master("own_stats")["pages_merged"] == 2 * PRELOADED // 3 // PAGE


def wait_for_preloaded(crew: Crew, processes: int) -> None:
    """Until it is merged in the workers' domain; what is there once is shared by fork, and may stay so."""
    pages = processes * 2 * PRELOADED // 3 // PAGE
    assert wait_until(lambda: crew.stats("pages_merged") >= pages, SECONDS), crew.ask("stats")
    assert all(crew.ask("settle"))  # it is measured before the workers load something
    assert crew.ask("verify") == [PRELOADED] * WORKERS
    assert crew.master("verify") == PRELOADED


AT_ONCE = pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])


@AT_ONCE
def test_workers_that_drop_by_themselves(model: Path, name: str, at_once: bool) -> None:
    """The master is root and has nothing to do with it."""
    with Crew() as crew:
        crew.master("warm", str(model))
        crew.fork(WORKERS, at_once)
        if not at_once:
            crew.ask("drop_root")
        crew.ask("warm", str(model))
        growth = Growth(crew.everybody, model.stat().st_size)
        crew.ask("meet", name)
        crew.ask("load", str(model), False)
        check_one_copy(crew, growth, "workers that drop")
        check_digest(crew, name)


def test_different_data_takes_four_copies(model: Path, name: str) -> None:
    with Crew() as crew:
        crew.master("warm", str(model))
        crew.fork(WORKERS, True)
        crew.ask("warm", str(model))
        growth = Growth(crew.everybody, model.stat().st_size)
        crew.ask("meet", name)
        crew.ask_each("load_different", [(str(model), False, seed) for seed in range(1, WORKERS + 1)])
        assert all(crew.ask("settle"))
        assert min(crew.ask("verify")) > 0.99 * growth.one
        growth.check(3.99, 4.10, "\ndifferent data")


@AT_ONCE
def test_preloaded_by_root(model: Path, name: str, at_once: bool) -> None:
    """Master and workers have joined before: the workers' memberships follow their user."""
    with Crew() as crew:
        crew.master("warm", str(model))
        crew.master("meet", name)
        preload(crew)
        crew.fork(WORKERS, at_once)
        if not at_once:
            crew.ask("drop_root")
        assert wait_until(lambda: all(sorted(peers) == sorted(crew.pids) for peers in crew.ask("peers")))
        assert crew.master("peers") == crew.everybody[:1]
        wait_for_preloaded(crew, WORKERS)
        crew.ask("warm", str(model))
        growth = Growth(crew.everybody, model.stat().st_size)
        crew.ask("load", str(model), False)
        check_one_copy(crew, growth, "preloaded by root")
        assert crew.master("verify") == PRELOADED


@pytest.mark.parametrize("when", ["before it joins", "after it has loaded"])
def test_a_master_that_drops(model: Path, name: str, when: str) -> None:
    """It loads a part, and forks workers that load the rest."""
    with Crew() as crew:
        crew.master("warm", str(model))
        if when == "before it joins":
            crew.master("drop_root")
        crew.master("meet", name)
        preload(crew)
        if when == "after it has loaded":
            crew.master("drop_root")
        crew.fork(WORKERS, False)
        crew.ask("warm", str(model))
        wait_for_preloaded(crew, WORKERS + 1)
        growth = Growth(crew.everybody, model.stat().st_size)
        crew.ask("load", str(model), True)
        check_one_copy(crew, growth, "a master that drops")
        check_digest(crew, name)
        assert crew.master("verify") == PRELOADED


def test_started_by_a_master_that_has_dropped(model: Path, name: str, python: Path) -> None:
    """A program that nobody starts is an ordinary one; it merges with the others, and with its master."""
    with Crew() as crew:
        crew.master("warm", str(model))
        crew.master("drop_root")
        crew.master("meet", name)
        crew.start(WORKERS, python)
        crew.ask("warm", str(model))
        growth = Growth(crew.everybody, model.stat().st_size)
        crew.ask("meet", name)
        crew.master("load", str(model), True)
        crew.ask("load", str(model), True)
        check_one_copy(crew, growth, "started by a master that has dropped")
        assert crew.master("verify") > 0.99 * growth.one
        for found in crew.ask("capabilities"):
            assert (found.tracking, found.dumpable) == ("writes", True)
        assert crew.stats("peers") == WORKERS + 1


def test_nothing_is_lost_where_the_new_user_cannot_follow(rendezvous: str) -> None:
    """A domain at a place that is root's alone: it is told why, and no byte changes."""
    with Crew() as crew:
        crew.master("warm")
        crew.master("join", rendezvous)
        preload(crew)
        crew.fork(2, True)
        assert wait_until(lambda: all("KSM_EUSER" in str(reason) for reason in crew.ask("why_not")))
        crew.ask("fill", 3, MIB)
        assert crew.ask("verify") == [PRELOADED + MIB] * 2
        assert crew.master("verify") == PRELOADED
