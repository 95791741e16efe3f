# SPDX-License-Identifier: MIT
"""ksmctl start, stop and info: the words of the tool of 2008; and the program as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Processes
from ctlkit import Ctl, live

import ksmalloc
from ksmalloc.ctl import COMMANDS, main

START_USAGE = "usage: ksmctl start npages_to_scan npages_max_merge sleep"


@pytest.fixture
def ctl(rendezvous: str, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(rendezvous, capsys)


# ---- start, stop, info -------------------------------------------------------------------------------------


def test_the_words_of_2008(ctl: Ctl) -> None:
    assert ctl.said("start", "300", "200", "7") == "created scanner\n"
    assert ctl.said("info") == "running 0, pages_to_scan 300 pages_max_merge 200 sleep_time 7\n"
    assert ctl.said("stop") == "stopped scanner\n"
    assert ctl.said("info") == "running 0, pages_to_scan 300 pages_max_merge 200 sleep_time 7\n"


def test_info_before_anything_prints_the_defaults(ctl: Ctl) -> None:
    words = ctl.said("info").split()
    assert words[:2] == ["running", "0,"]
    assert words[2::2] == ["pages_to_scan", "pages_max_merge", "sleep_time"]
    assert all(int(word) >= 0 for word in words[3::2])
    assert os.listdir(ctl.path) == []  # looking makes nothing


def test_running_needs_the_setting_and_a_peer(ctl: Ctl, processes: Processes) -> None:
    ctl.said("start", "10", "20", "30")
    peer = live(processes, ctl.path)
    assert ctl.said("info") == "running 1, pages_to_scan 10 pages_max_merge 20 sleep_time 30\n"
    ctl.said("stop")
    assert ctl.said("info") == "running 0, pages_to_scan 10 pages_max_merge 20 sleep_time 30\n"
    ctl.said("start", "11", "21", "31")
    assert ctl.said("info") == "running 1, pages_to_scan 11 pages_max_merge 21 sleep_time 31\n"
    peer.kill()
    peer.wait()
    assert ctl.said("info") == "running 0, pages_to_scan 11 pages_max_merge 21 sleep_time 31\n"


def test_settings_hold_for_later_workers(ctl: Ctl, processes: Processes) -> None:
    ctl.said("start", "12", "22", "32")
    peer = live(processes, ctl.path)
    found = {
        "run": 1,
        "pages_to_scan": 12,
        "max_pages_to_merge": 22,
        "sleep_millisecs": 32,
        "advisor_mode": 0,
        "advisor_max_cpu": 20,
    }
    assert peer.args == f"{found}\n"


def test_each_domain_has_settings_of_its_own(ctl: Ctl) -> None:
    before = ctl.said("info")
    assert ctl.said("start", "13", "23", "33", "--domain", "other") == "created scanner\n"
    assert ctl.said("info") == before
    assert ctl.said("info", "--domain", "other").endswith(
        "pages_to_scan 13 pages_max_merge 23 sleep_time 33\n"
    )


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        ["1"],
        ["1", "2"],
        ["1", "2", "3", "4"],
        ["0", "1", "1"],
        ["1", "0", "1"],
        ["1000001", "1", "1"],
        ["1", "1000001", "1"],
        ["1", "1", "60001"],
        ["1", "1", "-1"],
        ["1", "1", "1.5"],
        ["one", "1", "1"],
        ["1", "", "1"],
        ["1", "1_0", "1"],
    ],
)
def test_bad_numbers(ctl: Ctl, numbers: list[str]) -> None:
    before = ctl.said("info")
    assert ctl("start", *numbers) == 2
    assert ctl.err.splitlines()[0] == START_USAGE
    assert ctl.out == ""
    assert ctl.said("info") == before


@pytest.mark.parametrize("numbers", [("1", "1", "0"), ("1000000", "1000000", "60000")])
def test_the_limits_are_the_core_s(ctl: Ctl, numbers: tuple[str, str, str]) -> None:
    assert ctl.said("start", *numbers) == "created scanner\n"
    words = ctl.said("info").split()
    assert tuple(words[3::2]) == numbers
    with ksmalloc.Domain(path=ctl.path) as domain:
        for name, low, high in (
            ("pages_to_scan", 1, 1_000_000),
            ("max_pages_to_merge", 1, 1_000_000),
            ("sleep_millisecs", 0, 60_000),
        ):
            for beyond in (low - 1, high + 1):
                with pytest.raises(ValueError):
                    domain.settings[name] = beyond


@pytest.mark.parametrize("command", [["start", "1", "1", "1"], ["stop"], ["info"]])
def test_a_name_that_cannot_be(ctl: Ctl, command: list[str]) -> None:
    assert ctl(*command, "--domain", "../elsewhere") == 1
    assert ctl.err.startswith("ksmctl: ")
    assert ctl.err.count("\n") == 1
    assert ctl.out == ""


# ---- the program -------------------------------------------------------------------------------------------


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "usage: ksmctl {start npages sleep | stop | info}"
    assert err.splitlines()[1].split() == START_USAGE.split()[1:]


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "unknown command begin"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ksmctl {ksmalloc.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 30
    for name, module in COMMANDS.items():
        assert module.HELP in text
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: ksmctl {name}")


def test_python_m_ksmalloc_is_the_same_program(rendezvous: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ksmalloc", *arguments]
        env = {**os.environ, "PYTHONPATH": str(Path(ksmalloc.__file__).parents[1])}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, cwd="/", env=env
        )

    assert run("start", "1", "2", "3", "--path", rendezvous).stdout == "created scanner\n"
    done = run("info", "--path", rendezvous)
    assert done.stdout == "running 0, pages_to_scan 1 pages_max_merge 2 sleep_time 3\n"
    done = run("start", "x", "2", "3")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == START_USAGE.replace("ksmctl", "python -m ksmalloc")
