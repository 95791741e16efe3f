# SPDX-License-Identifier: MIT
"""Domains that a process must not enter: another layout while somebody lives there, another user's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from conftest import Processes

import ksmalloc

VERSION_AT = 8  # struct ksm_domain_file: magic, then the version
JOIN = """
import sys
import ksmalloc
try:
    ksmalloc.Domain(path=sys.argv[1])
except Exception as error:
    print(type(error).__name__, isinstance(error, OSError))
else:
    print("joined")
"""


def joined(processes: Processes, rendezvous: str) -> str:
    program = processes.python(JOIN, rendezvous, text=True)
    return str(program.communicate(timeout=60)[0]).strip()


def scribble_version(directory: str) -> None:
    with Path(directory, "domain").open("r+b") as file:
        file.seek(VERSION_AT)
        file.write((99).to_bytes(4, "little"))


def test_another_layout(processes: Processes, rendezvous: str) -> None:
    """Refused while a peer of it lives; when nobody does, the domain is made anew."""
    domain = ksmalloc.Domain(path=rendezvous)
    assert joined(processes, rendezvous) == "joined"
    scribble_version(domain.directory)
    assert joined(processes, rendezvous) == "LayoutError False"
    domain.close()
    assert joined(processes, rendezvous) == "joined"


def test_another_user(processes: Processes, rendezvous: str) -> None:
    directory = Path(rendezvous, "default")
    directory.mkdir(mode=0o700)
    shutil.chown(directory, user=65534)
    assert joined(processes, rendezvous) == "OwnerError True"
    shutil.chown(directory, user=os.getuid())
    directory.chmod(0o755)
    assert joined(processes, rendezvous) == "OwnerError True"
    directory.chmod(0o700)
    assert joined(processes, rendezvous) == "joined"


def test_a_symbolic_link(processes: Processes, rendezvous: str, tmp_path: Path) -> None:
    Path(rendezvous, "default").symlink_to(tmp_path)
    assert joined(processes, rendezvous) == "OSError True"
    assert list(tmp_path.iterdir()) == []
