"""Domains: names, identity, settings, backing; errors of joining."""

from __future__ import annotations

import os
import pickle
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ksmalloc
from ksmalloc import shm

PAGE = 4096
bytes_of = sys.modules["ksmalloc.domain"].bytes_of


def test_attributes(rendezvous: str) -> None:
    with ksmalloc.Domain("images", path=rendezvous) as domain:
        assert domain.name == "images"
        assert domain.path == rendezvous
        assert domain.directory == f"{rendezvous}/images"
        assert re.fullmatch("[0-9a-f]{32}", domain.id)
        assert repr(domain) == f"<ksmalloc.Domain 'images' in {domain.directory!r}>"
        assert not domain.closed
        assert os.path.isdir(domain.directory)
    assert domain.closed
    assert repr(domain).endswith(", closed>")


def test_default_name_and_pathlike(rendezvous: str) -> None:
    with ksmalloc.Domain(path=Path(rendezvous)) as domain:
        assert domain.name == "default"
        assert domain.path == rendezvous


def test_one_membership_a_process(rendezvous: str) -> None:
    with ksmalloc.Domain("a", path=rendezvous) as first, ksmalloc.Domain("a", path=rendezvous) as second:
        assert first.id == second.id
        assert len(first.peers) == len(second.peers) == 1
        with ksmalloc.Domain("b", path=rendezvous) as other:
            assert other.id != first.id


def test_close(rendezvous: str) -> None:
    domain = ksmalloc.Domain(path=rendezvous)
    arena = ksmalloc.Arena(domain=domain)
    domain.close()
    domain.close()
    uses: list[Callable[[], Any]] = [
        domain.stats,
        domain.sweep,
        domain.__enter__,
        lambda: domain.peers,
        lambda: ksmalloc.Arena(domain=domain),
        lambda: ksmalloc.register(bytearray(PAGE * 4), domain=domain),
        lambda: ksmalloc.settle(domain=domain),
    ]
    for use in uses:
        with pytest.raises(ksmalloc.ClosedError, match="the domain 'default' is closed"):
            use()
    assert arena.stats().peers == 1
    assert bytes(arena.alloc(3)) == bytes(3)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a b", "ä", "a\0b", "x" * 64, "a\n"])
def test_wrong_names(rendezvous: str, name: str) -> None:
    with pytest.raises(ValueError):
        ksmalloc.Domain(name, path=rendezvous)
    assert os.listdir(rendezvous) == []


@pytest.mark.parametrize("name", ["a", "x" * 63, "A-b_c.9", "-", "a.", "a..b"])
def test_right_names(rendezvous: str, name: str) -> None:
    with ksmalloc.Domain(name, path=rendezvous) as domain:
        assert domain.stats().peers == 1


def test_wrong_places(rendezvous: str) -> None:
    file = Path(rendezvous, "file")
    file.touch()
    with pytest.raises(NotADirectoryError):
        ksmalloc.Domain(path=str(file))
    with pytest.raises(ValueError):
        ksmalloc.Domain(path="a\0b")
    Path(rendezvous, "elsewhere").mkdir(mode=0o700)
    Path(rendezvous, "link").symlink_to(Path(rendezvous, "elsewhere"))
    with pytest.raises(OSError):
        ksmalloc.Domain("link", path=rendezvous)
    Path(rendezvous, "open").mkdir()
    Path(rendezvous, "open").chmod(0o777)
    with pytest.raises(ksmalloc.OwnerError):
        ksmalloc.Domain("open", path=rendezvous)


def test_not_picklable(rendezvous: str) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain, pytest.raises(TypeError, match="join it again"):
        pickle.dumps(domain)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (1, 1),
        ("4096", 4096),
        ("64GiB", 64 << 30),
        (" 3 KiB ", 3072),
        ("1B", 1),
        ("2TiB", 2 << 40),
        ("5MiB", 5 << 20),
    ],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert bytes_of(size) == nbytes


@pytest.mark.parametrize("size", [0, -1, 1 << 64, "", "GiB", "-1", "1.5GiB", "1 GB", "64gib", "0", "1e3"])
def test_wrong_sizes(rendezvous: str, size: int | str) -> None:
    with pytest.raises(ValueError):
        ksmalloc.Domain(path=rendezvous, capacity=size)


def test_wrong_types(rendezvous: str) -> None:
    with pytest.raises(TypeError):
        ksmalloc.Domain(path=rendezvous, capacity=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'memfd', 'shm', not 'file'"):
        ksmalloc.Domain(path=rendezvous, backing="file")


# ---- settings


def test_settings(rendezvous: str) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain:
        settings = domain.settings
        names = ["run", "pages_to_scan", "max_pages_to_merge", "sleep_millisecs"]
        assert list(settings) == [*names, "advisor_mode", "advisor_max_cpu"]
        assert len(settings) == 6
        assert (settings["advisor_mode"], settings["advisor_max_cpu"]) == (1, 20)
        settings.update({"advisor_mode": 0, "pages_to_scan": 200})
        assert dict(domain.settings)["pages_to_scan"] == 200
        settings.update({"run": 0, "sleep_millisecs": 7})
        assert (settings["run"], settings["sleep_millisecs"], settings["pages_to_scan"]) == (0, 7, 200)
        assert repr(settings) == f"Settings({dict(settings)!r})"


def test_settings_refuse(rendezvous: str) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain:
        before = dict(domain.settings)
        with pytest.raises(KeyError):
            domain.settings["pages"]
        with pytest.raises(KeyError):
            domain.settings["pages"] = 1
        for name, values in {
            "run": (-1, 2),
            "pages_to_scan": (0, -1, 1_000_001, 1 << 32, (1 << 32) + 100),
            "max_pages_to_merge": (0, 1_000_001),
            "sleep_millisecs": (-1, 60_001),
            "advisor_mode": (-1, 2),
            "advisor_max_cpu": (0, 101),
        }.items():
            for value in values:
                with pytest.raises(ValueError):
                    domain.settings[name] = value
        for wrong in (1.5, "1", None):
            with pytest.raises(TypeError):
                domain.settings["run"] = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError):
            domain.settings.update({"pages_to_scan": 300, "run": 2})
        assert dict(domain.settings) == before


def test_what_the_advisor_chooses_nobody_sets(rendezvous: str) -> None:
    """As in kernel KSM."""
    with ksmalloc.Domain(path=rendezvous) as domain:
        for update in ({"pages_to_scan": 100}, {"pages_to_scan": 100, "advisor_mode": 1}):
            with pytest.raises(ValueError, match="advisor_mode 0"):
                domain.settings.update(update)
        domain.settings.update({"pages_to_scan": 100, "advisor_mode": 0})
        domain.settings["advisor_mode"] = 1
        assert domain.settings["pages_to_scan"] == 100
        other = ksmalloc.domain.rendezvous("default", rendezvous)
        with pytest.raises(ValueError):
            other.write_settings(dict(domain.settings) | {"pages_to_scan": 101})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("run", 0, 1),
        ("pages_to_scan", 1, 10**6),
        ("max_pages_to_merge", 1, 10**6),
        ("sleep_millisecs", 0, 60_000),
        ("advisor_mode", 0, 1),
        ("advisor_max_cpu", 1, 100),
    ],
)
def test_settings_at_their_limits(rendezvous: str, name: str, low: int, high: int) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain:
        domain.settings["advisor_mode"] = 0
        for value in (low, high):
            domain.settings[name] = value
            assert domain.settings[name] == value


def test_stopped_domain_says_why_it_does_not_merge(rendezvous: str) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain:
        if domain.stats().why_not is None:
            domain.settings["run"] = 0
            assert "KSM_ESTOPPED" in str(domain.stats().why_not)


# ---- sweep, backing


def test_sweep_frees_what_nobody_uses(rendezvous: str) -> None:
    with ksmalloc.Domain(path=rendezvous) as domain:
        if domain.stats().why_not is not None:
            pytest.skip(str(domain.stats().why_not))
        arena = ksmalloc.Arena(domain=domain, scan=False)
        content = os.urandom(16 * PAGE)
        blocks = [arena.alloc(16 * PAGE) for _ in range(2)]
        for block in blocks:
            memoryview(block)[:] = content
        assert arena.scan().frames_written == 16
        assert domain.stats().store_bytes >= 16 * PAGE
        assert domain.sweep() == 0
        assert all(bytes(block) == content for block in blocks)
        for block in blocks:
            block.free()
        domain.sweep()
        assert domain.stats().pages_shared == 0
        assert domain.stats().store_bytes == 0


def test_named_object(rendezvous: str) -> None:
    before = set(shm.objects())
    with ksmalloc.Domain(path=rendezvous, backing="shm", capacity="64MiB") as domain:
        name = f"/ksmalloc-{os.geteuid()}-{domain.id}"
        assert set(shm.objects()) - before == {name}
        status = os.stat("/dev/shm" + name)
        assert stat.S_IMODE(status.st_mode) == 0o600
        with ksmalloc.Domain(path=rendezvous, backing="shm") as again:
            assert again.id == domain.id
        assert set(shm.objects()) - before == {name}
        with pytest.raises(ksmalloc.BackingError):
            ksmalloc.Domain(path=rendezvous)
    assert set(shm.objects()) == before


def test_refused_domain_leaves_no_object(rendezvous: str) -> None:
    before = shm.objects()
    with pytest.raises(ValueError):
        ksmalloc.Domain("a/b", path=rendezvous, backing="shm")
    with ksmalloc.Domain(path=rendezvous), pytest.raises(ksmalloc.BackingError):
        ksmalloc.Domain(path=rendezvous, backing="shm")
    assert shm.objects() == before


def test_without_posix_ipc(rendezvous: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "posix_ipc", None)
    with pytest.raises(ImportError, match=r"pip install 'ksmalloc\[shm\]'"):
        ksmalloc.Domain(path=rendezvous, backing="shm")
    assert os.listdir(rendezvous) == []
