# SPDX-License-Identifier: MIT
"""ksmctl doctor: what works here, why not more, and that looking leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Processes
from ctlkit import Ctl, live
from nobodykit import run

import ksmalloc
from ksmalloc.ctl import doctor

NAMES = ["barrier", "tracking", "cow", "handler", "stop signal", "stops", "suspensions"]


@pytest.fixture
def ctl(rendezvous: str, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(rendezvous, capsys)


def test_for_people(ctl: Ctl) -> None:
    code = ctl("doctor")
    assert ctl.err == ""
    lines = ctl.out.splitlines()
    assert lines[0].startswith("user ")
    assert f"Linux {os.uname().release}" in lines[0]
    assert [line[2:15].strip() for line in lines[2:9]] == NAMES
    assert (code == 0) == ("Memory merges here: two equal pages did." in lines)
    assert os.listdir(ctl.path) == []  # looking makes nothing


def test_for_programs(ctl: Ctl) -> None:
    code = ctl("doctor", "--json", "--domain", "other")
    found = json.loads(ctl.out)
    assert (found["domain"], found["refusal"], found["workers"]) == ("other", None, [])
    assert found["uid"] == os.geteuid()
    assert (code == 0) == (found["merges"] == "all")
    assert found["capabilities"]["barrier"] in ("move", "stop", "none")
    assert {tuple(one) for one in found["capabilities"]["better"]} <= {("name", "reason", "remedy")}
    assert os.listdir(ctl.path) == []


def test_settings_and_the_living_are_left_alone(ctl: Ctl, processes: Processes) -> None:
    ctl.said("start", "10", "20", "30")
    ctl("doctor")
    assert ctl.said("info") == "running 0, pages_to_scan 10 pages_max_merge 20 sleep_time 30\n"
    peer = live(processes, ctl.path)
    ctl("doctor")
    assert f"  {peer.pid:<13}barrier " in ctl.out
    assert ctl.said("info") == "running 1, pages_to_scan 10 pages_max_merge 20 sleep_time 30\n"
    ctl("doctor", "--json")
    [worker] = json.loads(ctl.out)["workers"]
    assert (worker["pid"], worker["why_not"]) == (peer.pid, None)


def test_a_domain_that_is_switched_off(ctl: Ctl) -> None:
    ctl.said("start", "10", "20", "30")
    ctl.said("stop")
    ctl("doctor")
    assert "KSM_ESTOPPED" in ctl.out
    assert 'domain.settings["run"] = 1' in ctl.out


def test_a_domain_that_cannot_be_joined(ctl: Ctl, tmp_path: Path) -> None:
    """It says why, and what the process could do elsewhere."""
    before = set(os.listdir("/tmp"))
    Path(ctl.path, "default").symlink_to(tmp_path)
    assert ctl("doctor") == 1
    assert "domain default: cannot be joined: " in ctl.out
    assert "barrier " in ctl.out
    assert os.listdir(tmp_path) == []
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("ksmalloc-doctor-")]
    assert ctl("doctor", "--domain", "a/b") == 1
    assert "cannot be joined" in ctl.out


def test_where_nothing_can_be_joined(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/null")
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert ctl("doctor", "--domain", "a/b") == 1
    assert "no domain could be made" in ctl.out
    assert ctl("doctor", "--json", "--domain", "a/b") == 1
    assert json.loads(ctl.out)["capabilities"] is None


def refuse(*_: object, **__: object) -> str:
    raise PermissionError("nowhere")


def test_nobody(processes: Processes, rendezvous: str) -> None:
    """The lines that would help are there; meanwhile "stop" does."""
    out = run(
        processes,
        rendezvous,
        r"""
filter_userfaultfd()
become_nobody()
assert ksmalloc.ctl.main(["doctor", "--path", PATH]) == 0
assert ksmalloc.ctl.main(["doctor", "--path", PATH, "--json"]) == 0
assert os.listdir(PATH) == []
""",
    )
    people, _, programs = out.partition("\n{")
    assert "barrier      stop: " in people
    assert "barrier move: not in force, because" in people
    assert "/dev/userfaultfd" in people
    assert "Memory merges here" in people
    found = json.loads("{" + programs)
    assert found["user"] in ("nobody", "65534")
    assert found["capabilities"]["stops"] > 0
    assert "\n    " + found["capabilities"]["better"][0]["remedy"].splitlines()[0] + "\n" in people


def test_only_what_is_frozen(processes: Processes, rendezvous: str) -> None:
    out = run(
        processes,
        rendezvous,
        r"""
ring = io_uring()
become_nobody()
assert ksmalloc.ctl.main(["doctor", "--path", PATH]) == 1
""",
    )
    assert "Only frozen memory merges here" in out
    assert "barrier stop: not in force" in out
    assert "KSM_EDEVICES" in out


def test_every_word_has_a_meaning() -> None:
    assert set(doctor.MEANING["barrier"]) == {"move", "stop", "segv", "none"}
    assert set(doctor.MEANING["tracking"]) == {"writes", "pagemap", "digest", "none"}
    assert set(doctor.VERDICTS) == {"all", "frozen", "nothing"}
    assert ksmalloc.ctl.COMMANDS["doctor"] is doctor
