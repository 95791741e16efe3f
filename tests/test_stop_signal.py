# SPDX-License-Identifier: MIT
"""The signal that holds threads, as the environment chooses it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from forkkit import environment

from ksmalloc import handlers


@pytest.mark.parametrize(
    ("text", "number"),
    [("40", 40), ("SIGRTMIN", 34), ("SIGRTMIN+6", 40), ("SIGRTMAX", 64), (" SIGRTMAX-2 ", 62)],
)
def test_signals_by_name(text: str, number: int) -> None:
    assert handlers.number_of(text) == number


@pytest.mark.parametrize(
    "text", ["", "x", "9", "33", "65", "SIGRTMIN-1", "SIGRTMAX+1", "SIGUSR1", "4O", "-1", "٤٠"]
)
def test_no_such_signals(text: str) -> None:
    with pytest.raises(ValueError):
        handlers.number_of(text)


WITH_STOP = """
import sys, ksmalloc
arena = ksmalloc.Arena(domain=ksmalloc.Domain(path=sys.argv[1]), barrier="stop")
print(ksmalloc.capabilities(arena.domain).stop_signal)
"""


def with_stop(rendezvous: str, text: str | None) -> subprocess.CompletedProcess[str]:
    env = environment()
    env.pop(handlers.STOP_SIGNAL, None)
    if text is not None:
        env[handlers.STOP_SIGNAL] = text
    command = [sys.executable, "-c", WITH_STOP, rendezvous]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_environment_chooses_the_signal(rendezvous: str) -> None:
    done = with_stop(rendezvous, "SIGRTMIN+3")
    assert (done.stdout, done.stderr) == ("37\n", "")
    assert with_stop(rendezvous, None).stdout == f"{64 - 6}\n"


def test_a_bad_signal_is_named_and_ignored(rendezvous: str) -> None:
    done = with_stop(rendezvous, "SIGUSR1")
    assert done.stdout == f"{64 - 6}\n"
    assert "RuntimeWarning: KSMALLOC_STOP_SIGNAL is ignored: a signal is a number, SIGRTMIN+n" in done.stderr
