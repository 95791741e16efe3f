# SPDX-License-Identifier: MIT
"""The kernel's own KSM, switched on for a measurement and put back as it was found. Needs root."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/kernel/mm/ksm")
# In the order in which they are written; the last one starts it.
SETTINGS = ("advisor_mode", "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages", "run")
FULL_THROTTLE = {"advisor_mode": "none", "sleep_millisecs": "0", "pages_to_scan": "100000", "smart_scan": "0"}
"""As fast as it goes: it rests only to let others run."""


class Unavailable(Exception):
    """Kernel KSM cannot be switched on here, and why."""


def counter(name: str) -> int:
    return int((ROOT / name).read_text())


def _setting(name: str) -> str:
    text = (ROOT / name).read_text().strip()
    chosen = [word for word in text.split() if word.startswith("[")]  # [none] scan-time
    return chosen[0].strip("[]") if chosen else text


@contextmanager
def running(settings: dict[str, str]) -> Iterator[None]:
    """With these settings. Afterwards nothing of ours is merged any more, and all is set as it was."""
    if not os.access(ROOT / "run", os.W_OK):
        raise Unavailable(f"{ROOT}/run cannot be written: it needs root, and a kernel with KSM")
    found = {name: _setting(name) for name in SETTINGS if (ROOT / name).exists()}
    wanted = {name: value for name, value in settings.items() if name in found}
    try:
        for name in SETTINGS:
            if name in wanted:
                (ROOT / name).write_text(wanted[name])
        (ROOT / "run").write_text("1")
        yield
    finally:
        if found["run"] == "0":
            (ROOT / "run").write_text("2")
        for name in SETTINGS:
            if name in found:
                with suppress(OSError):
                    (ROOT / name).write_text(found[name])


def mergeable(nbytes: int) -> mmap.mmap:
    """Anonymous memory of ordinary pages. Kernel KSM does not know it yet: .madvise(mmap.MADV_MERGEABLE)."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def thread() -> int:
    """The pid of the kernel's thread."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if comm.read_text() == "ksmd\n":
                return int(comm.parent.name)
    raise Unavailable("there is no ksmd")


def cpu_ns(pid: int, tid: int | None = None) -> int:
    """What a thread has had of a processor, ever."""
    return int(Path(f"/proc/{pid}/task/{tid or pid}/schedstat").read_text().split()[0])


def wait_for(name: str, least: int, timeout: float = 120.0) -> float:
    """Until a counter has come so far; the seconds it took."""
    start = time.perf_counter()
    while counter(name) < least:
        if time.perf_counter() - start > timeout:
            raise TimeoutError(f"{name} is {counter(name)}, not {least}")
        time.sleep(0.001)
    return time.perf_counter() - start
