# SPDX-License-Identifier: MIT
"""The whole file system of a machine that is started for a test: an archive that the kernel unpacks."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"}


def libraries(program: Path) -> list[Path]:
    """What the dynamic linker would load for a program or a library, and the linker itself."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    found = re.findall(r"(?:=> )?(/\S+) \(0x", done.stdout)
    return [Path(one) for one in found]


class Initramfs:
    """An archive in cpio's "newc" format. What is added twice is kept once."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def directory(self, path: str, mode: int = 0o755) -> None:
        parent = os.path.dirname(path)
        if parent != path and parent not in self._entries and parent != "/":
            self.directory(parent)
        self._entries[path] = (stat.S_IFDIR | mode, b"")

    def text(self, path: str, content: str, mode: int = 0o644) -> None:
        self.directory(os.path.dirname(path))
        self._entries[path] = (stat.S_IFREG | mode, content.encode())

    def link(self, path: str, target: str) -> None:
        self.directory(os.path.dirname(path))
        self._entries[path] = (stat.S_IFLNK | 0o777, target.encode())

    def file(self, source: Path, path: str | None = None) -> None:
        """A file of this machine, links followed, under its own path unless another is given."""
        target = path or str(source)
        if target not in self._entries:
            self.directory(os.path.dirname(target))
            mode = stat.S_IMODE(source.stat().st_mode)
            self._entries[target] = (stat.S_IFREG | mode, source.read_bytes())

    def program(self, source: Path, path: str | None = None) -> None:
        """With all that it loads."""
        self.file(source, path)
        for library in libraries(source):
            self.file(library)

    def tree(self, source: Path, path: str | None = None) -> None:
        """A directory, with all that its libraries load."""
        for folder, names, files in os.walk(source):
            names[:] = sorted(name for name in set(names) - SKIPPED if not name.startswith("config-"))
            place = Path(path or source) / Path(folder).relative_to(source)
            self.directory(str(place))
            for name in files:
                one = Path(folder) / name
                if not one.exists():
                    continue
                self.file(one, str(place / name))
                if ".so" in name:
                    for library in libraries(one):
                        self.file(library)

    def write(self, target: Path) -> int:
        """Returns its size."""
        with target.open("wb") as out:
            for chunk in self._chunks():
                out.write(chunk)
            return out.tell()

    def _chunks(self) -> Iterator[bytes]:
        for number, (path, (mode, content)) in enumerate(sorted(self._entries.items()), 1):
            yield _entry(path.lstrip("/"), number, mode, content)
        yield _entry("TRAILER!!!", 0, 0, b"")


def _entry(name: str, inode: int, mode: int, content: bytes) -> bytes:
    raw = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
