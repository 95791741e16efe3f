# SPDX-License-Identifier: MIT
"""Workers that do what they are told: answers, deaths, and that none is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import is_alive

from ksmalloc.ctl.team import Team, WorkerError


def talk() -> dict[str, Callable[..., Any]]:
    def fail() -> None:
        raise ValueError("no")

    return {"pid": os.getpid, "echo": lambda *args: args, "fail": fail, "exit": os._exit, "sleep": time.sleep}


def test_a_team() -> None:
    answered: list[int] = []
    with Team(3, talk) as team:
        pids = team.pids
        assert len(team) == 3
        assert team.ask("pid", tick=answered.append) == pids
        assert answered == [1, 2, 3]
        assert team.ask("echo", 1, "two", who=1) == (1, "two")
        with pytest.raises(WorkerError, match=f"worker {pids[0]}: ValueError: no"):
            team.ask("fail", who=0)
        assert team.ask("pid") == pids
        with pytest.raises(WorkerError, match=f"worker {pids[2]} ended with 7"):
            team.ask("exit", 7, who=2)
        with pytest.raises(WorkerError, match=f"worker {pids[2]} ended with 7"):
            team.ask("pid")
        assert team.ask("echo", "again", who=0) == ("again",)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(WorkerError, match=f"worker {pids[1]} was killed by SIGKILL"):
            team.ask("pid", who=1)
    assert not any(map(is_alive, pids))
    team.close()


def test_a_team_that_does_not_listen_is_killed() -> None:
    team = Team(2, talk)
    pids = team.pids
    assert team.ask("pid") == pids
    team.tell("sleep", 1000, numbers=[0, 1])
    team.close(patience=0.1)
    assert not any(map(is_alive, pids))
