# SPDX-License-Identifier: MIT
"""What somebody else has put into the rendezvous: refused with an error that says so, and left as it was.

The one who plants is this test; the one who meets it is another process. What is refused inside the core, and
with which code, is in tests/csrc/test_rendezvous.c; for sockets see test_impostor.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Processes
from plantkit import joined, living, picture, place

__all__ = ["place"]  # a fixture


# ---- the domain file


def plant_fifo(file: Path) -> None:
    os.mkfifo(file, 0o600)


def plant_directory(file: Path) -> None:
    file.mkdir(mode=0o700)


def plant_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(file))
    file.chmod(0o600)


def plant_link(file: Path) -> None:
    target = file.parent.parent / "target"
    target.write_bytes(b"mine")
    target.chmod(0o600)
    file.symlink_to(target)


def plant_dangling_link(file: Path) -> None:
    file.symlink_to(file.parent.parent / "nowhere")


def plant_open_file(file: Path) -> None:
    file.write_bytes(b"")
    file.chmod(0o666)


def plant_open_hard_link(file: Path) -> None:
    target = file.parent.parent / "target"
    target.write_bytes(b"mine")
    target.chmod(0o644)
    os.link(target, file)


def plant_private_hard_link(file: Path) -> None:
    target = file.parent.parent / "target"
    target.write_bytes(b"mine")
    target.chmod(0o600)
    os.link(target, file)


def plant_others_file(file: Path) -> None:
    file.write_bytes(b"theirs")
    file.chmod(0o600)
    os.chown(file, 12345, -1)


PLANTS: dict[Callable[[Path], None], tuple[str, ...]] = {
    plant_fifo: ("OwnerError True",),
    plant_directory: ("IsADirectoryError True",),
    plant_socket: ("OSError True",),
    plant_link: ("OSError True",),
    plant_dangling_link: ("OSError True",),
    plant_open_file: ("OwnerError True",),
    plant_open_hard_link: ("OwnerError True",),
    plant_private_hard_link: ("OwnerError True",),
    plant_others_file: ("OwnerError True",),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_in_place_of_the_file(plant: Callable[[Path], None], place: Path, processes: Processes) -> None:
    if plant is plant_others_file and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    file = place / "default" / "domain"
    file.unlink()
    plant(file)
    before = picture(place)
    assert joined(processes, place) in PLANTS[plant]
    assert picture(place) == before


# ---- the directories


@pytest.mark.parametrize("level", ["base", "domain"])
@pytest.mark.parametrize("kind", ["link", "open", "file", "fifo", "theirs"])
def test_in_place_of_a_directory(level: str, kind: str, place: Path, processes: Processes) -> None:
    real = place if level == "base" else place / "default"
    base = place
    aside = place / "aside"
    if level == "base":
        base = place / "base"
        base.mkdir(mode=0o700)
        real = base
    real.rename(aside)
    expected = "OSError True"
    if kind == "link":
        real.symlink_to(aside)
    elif kind == "file":
        real.write_bytes(b"mine")
        expected = "NotADirectoryError True"
    elif kind == "fifo":
        os.mkfifo(real, 0o600)
        expected = "NotADirectoryError True"
    else:
        real.mkdir(mode=0o700)
        expected = "OwnerError True"
        if kind == "open":
            real.chmod(0o777)
        elif os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        else:
            os.chown(real, 12345, -1)
    before = picture(place)
    assert joined(processes, base) == expected
    assert picture(place) == before


# ---- the bytes of the file, while somebody lives there


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "CorruptError False"),
    "short": (lambda old: old[:20], "CorruptError False"),
    "garbage": (lambda old: bytes(b ^ 0x5A for b in old), "CorruptError False"),
    "another magic": (lambda old: b"kzmalloc" + old[8:], "CorruptError False"),
    "another version": (lambda old: old[:8] + b"\x63\0\0\0" + old[12:], "LayoutError False"),
    "another layout": (lambda old: old[:12] + b"\1\2\3\4" + old[16:], "LayoutError False"),
}


@pytest.mark.parametrize("what", BYTES)
def test_wrong_bytes_in_the_file(what: str, place: Path, processes: Processes) -> None:
    """Refused while somebody lives there; when nobody does, the domain is made anew."""
    change, expected = BYTES[what]
    file = place / "default" / "domain"
    file.write_bytes(change(file.read_bytes()))
    with living(place / "default"):
        before = picture(place)
        assert joined(processes, place) == expected
        assert picture(place) == before
    assert joined(processes, place) == "joined"
