# SPDX-License-Identifier: MIT
"""What can be found out about this process, its user and its machine; remedies follow from it alone."""

from __future__ import annotations

import os
import platform
import pwd
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksmalloc import _core

_BARRIERS = {number: word for word, number in _core.BARRIERS.items() if word != "auto"}  # all others: "none"
_TRACKINGS = {number: word for word, number in _core.TRACKINGS.items()}
_CAP_SYS_PTRACE = 19


@dataclass(frozen=True)
class Facts:
    """What remedies depend on. Answers are None where a thing works, else the symbol of its error."""

    barrier: str
    """In force: ``"move"``, ``"stop"``, ``"segv"`` or ``"none"``."""
    tracking: str
    """In force: ``"writes"``, ``"pagemap"``, ``"digest"`` or ``"none"``."""
    move: str | None
    uffd_device: str | None
    uffd_call: str | None
    uffd_user: str | None
    """userfaultfd(2) for faults of user code only, which the kernel itself refuses to nobody."""
    stop: str | None
    segv: str | None
    pagemap: str | None
    writes: str | None
    why_not: str | None
    stop_reason: str
    """The last failure of "stop" in words, or ``""``."""
    stop_signal: int
    """0: none chosen yet."""
    dumpable: bool
    kernel: tuple[int, int]
    user: str
    """Its name, else its number."""
    can_ptrace: bool
    """Whether CAP_SYS_PTRACE is in force."""
    unprivileged_uffd: bool | None
    """vm.unprivileged_userfaultfd; None: it cannot be read."""
    container: str | None
    """``"docker"``, ``"podman"``, ``"kubernetes"``, another kind, or None."""
    max_map_count: int | None


def gather(core: Mapping[str, Any]) -> Facts:
    """The facts, from the core's answers and from a look around."""
    return Facts(
        barrier=_BARRIERS.get(core["barrier"], "none"),
        tracking=_TRACKINGS.get(core["tracking"], "none"),
        move=_core.symbol_of(core["move"]),
        uffd_device=_core.symbol_of(core["uffd_device"]),
        uffd_call=_core.symbol_of(core["uffd_call"]),
        uffd_user=_core.symbol_of(core["uffd_user"]),
        stop=_core.symbol_of(core["stop"]),
        segv=_core.symbol_of(core["segv"]),
        pagemap=_core.symbol_of(core["pagemap"]),
        writes=_core.symbol_of(core["writes"]),
        why_not=_core.symbol_of(core["why_not"]),
        stop_reason=os.fsdecode(core["stop_reason"]),
        stop_signal=core["stop_signal"],
        dumpable=core["dumpable"] == 1,
        kernel=kernel_of(platform.release()),
        user=user(),
        can_ptrace=has_capability(_read("/proc/self/status"), _CAP_SYS_PTRACE),
        unprivileged_uffd=_switch("/proc/sys/vm/unprivileged_userfaultfd"),
        container=container(),
        max_map_count=_number("/proc/sys/vm/max_map_count"),
    )


def kernel_of(release: str) -> tuple[int, int]:
    """Version and patch level of a release such as ``"6.8.0-45-generic"``; zeros if it has none."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def user() -> str:
    """Who we are, for people: the name, else the number."""
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return f"{os.geteuid()}"


def has_capability(status: str, number: int) -> bool:
    """Whether a capability is in force, by the text of /proc/self/status."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> number & 1)


def container() -> str | None:
    """The kind of container that we are in, as `Facts.container` has it."""
    return container_of(os.environ, os.path.exists, _read("/proc/1/cgroup") + _read("/proc/self/cgroup"))


def container_of(environ: Mapping[str, str], exists: Callable[[str], bool], cgroups: str) -> str | None:
    """The kind of container that its traces speak of: variables, marker files, names of control groups."""
    if "KUBERNETES_SERVICE_HOST" in environ or "kubepods" in cgroups:
        return "kubernetes"
    if exists("/run/.containerenv") or environ.get("container") == "podman" or "/libpod-" in cgroups:
        return "podman"
    if exists("/.dockerenv") or "/docker/" in cgroups or "/docker-" in cgroups:
        return "docker"
    return environ.get("container") or None  # systemd-nspawn, lxc and others say it there


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _switch(path: str) -> bool | None:
    number = _number(path)
    return None if number is None else number != 0
