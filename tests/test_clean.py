# SPDX-License-Identifier: MIT
"""ksmctl clean: what the dead left goes, and nothing else does."""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Processes
from ctlkit import Ctl, live

from ksmalloc import shm
from ksmalloc.ctl import main


@pytest.fixture
def ctl(rendezvous: str, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(rendezvous, capsys)


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The memory objects that `clean` sees: those of this test only. What is left of them goes at the end."""
    names: list[str] = []
    monkeypatch.setattr(
        shm, "objects", lambda: sorted(name for name in names if os.path.lexists("/dev/shm" + name))
    )
    yield names
    for name in names:
        Path("/dev/shm" + name).unlink(missing_ok=True)


def make_object(names: list[str], nbytes: int = 1 << 20) -> Path:
    names.append(f"/ksmalloc-{os.getuid()}-{secrets.token_hex(16)}")
    path = Path("/dev/shm" + names[-1])
    path.write_bytes(os.urandom(nbytes))
    return path


def test_clean_removes_the_dead_and_spares_the_living(
    ctl: Ctl, processes: Processes, objects: list[str]
) -> None:
    ctl.said("start", "1", "2", "3", "--domain", "dead")
    live(processes, ctl.path, "alive")
    assert sorted(os.listdir(ctl.path)) == ["alive", "dead"]
    said = ctl.said("clean").splitlines()
    assert said[0] == "domain alive: in use, left alone"
    assert said[1].startswith("removed domain dead (")
    assert said[2].startswith("removed 1 in all, ")
    assert os.listdir(ctl.path) == ["alive"]
    assert ctl.said("info", "--domain", "alive").startswith("running 1, ")


def test_clean_after_kill_9(ctl: Ctl, processes: Processes, objects: list[str]) -> None:
    peer = live(processes, ctl.path, "killed")
    peer.kill()
    peer.wait()
    assert ctl.said("clean").startswith("removed domain killed (")
    assert os.listdir(ctl.path) == []
    assert ctl.said("clean") == "nothing to remove\n"


def test_a_dry_run_removes_nothing(ctl: Ctl, processes: Processes, objects: list[str]) -> None:
    ctl.said("stop", "--domain", "dead")
    live(processes, ctl.path, "alive")
    path = make_object(objects)
    said = ctl.said("clean", "--dry-run").splitlines()
    assert said[0] == "domain alive: in use, left alone"
    assert said[1].startswith("would remove domain dead (")
    assert said[2] == f"would remove {path} (1.00 MiB)"
    assert said[3].startswith("would remove 2 in all, 1.0")
    assert sorted(os.listdir(ctl.path)) == ["alive", "dead"]
    assert path.exists()


def test_clean_one_domain(ctl: Ctl, processes: Processes, objects: list[str]) -> None:
    for name in ("one", "two"):
        ctl.said("stop", "--domain", name)
    live(processes, ctl.path, "alive")
    assert ctl.said("clean", "--domain", "one").startswith("removed domain one (")
    assert sorted(os.listdir(ctl.path)) == ["alive", "two"]
    assert ctl.said("clean", "--domain", "alive").startswith("domain alive: in use, left alone\n")
    assert sorted(os.listdir(ctl.path)) == ["alive", "two"]


def test_clean_leaves_what_is_no_rendezvous(ctl: Ctl, objects: list[str]) -> None:
    (Path(ctl.path) / "photos").mkdir()
    (Path(ctl.path) / "photos" / "cat.jpg").write_bytes(b"meow")
    (Path(ctl.path) / "empty").mkdir()
    (Path(ctl.path) / "names").mkdir()
    (Path(ctl.path) / "names" / "domain").write_bytes(b"example.org")
    ctl.said("stop", "--domain", "more")
    (Path(ctl.path) / "more" / "notes").write_bytes(b"")
    (Path(ctl.path) / "link").symlink_to("photos")
    (Path(ctl.path) / "ksmalloc").write_bytes(b"ksmalloc")
    assert ctl.said("clean") == "nothing to remove\n"
    assert sorted(os.listdir(ctl.path)) == ["empty", "ksmalloc", "link", "more", "names", "photos"]
    assert sorted(os.listdir(os.path.join(ctl.path, "more"))) == ["domain", "notes"]


def test_clean_without_any_rendezvous(ctl: Ctl, objects: list[str]) -> None:
    assert main(["clean", "--path", os.path.join(ctl.path, "missing")]) == 0


def test_clean_spares_objects_that_somebody_has_open_or_mapped(ctl: Ctl, objects: list[str]) -> None:
    dead, opened, mapped = sorted(make_object(objects) for _ in range(3))
    with opened.open("rb"), mapped.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        file.close()
        assert ctl.said("clean") == (
            f"removed {dead} (1.00 MiB)\n"
            f"{opened}: in use, left alone\n"
            f"{mapped}: in use, left alone\n"
            "removed 1 in all, 1.00 MiB\n"
        )
        memory.close()
    assert not dead.exists()
    assert ctl.said("clean").endswith("removed 2 in all, 2.00 MiB\n")


def test_clean_follows_no_links(ctl: Ctl, objects: list[str], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    objects.append(f"/ksmalloc-{os.getuid()}-{secrets.token_hex(16)}")
    os.symlink(precious, "/dev/shm" + objects[-1])
    assert ctl("clean") == 1
    assert objects[-1] in ctl.out
    assert precious.exists()
    assert os.path.islink("/dev/shm" + objects[-1])


def test_clean_takes_the_object_that_kill_9_left(ctl: Ctl, processes: Processes) -> None:
    """backing="shm" from end to end: the object stays while a peer lives, and goes after its death."""
    before = set(shm.objects())
    peer = live(processes, ctl.path, "named", "shm")
    (name,) = set(shm.objects()) - before
    ctl.said("clean", "--dry-run")
    assert f"/dev/shm{name}: in use, left alone\n" in ctl.out
    peer.kill()
    peer.wait()
    assert name in shm.objects()
    ctl.said("clean", "--dry-run")
    assert f"would remove /dev/shm{name} (" in ctl.out
    Path("/dev/shm" + name).unlink()
