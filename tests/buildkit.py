# SPDX-License-Identifier: MIT
"""Compile C for the tests: the core as it is or with switches on, and programs that are linked with it.

KSMALLOC_SANITIZER adds flags (see sankit.py).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sankit

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = shlex.split("-std=gnu11 -D_GNU_SOURCE -g -Wall -Wextra -Werror -pthread")
USED = sankit.tool()
MORE = (*USED.cflags, *USED.programs) if USED else ()
SWITCHES = ("-DKSM_FAULTS",)  # system calls that fail when told to
CHECKED = ("-DKSM_ASSERT_LEVEL=2",)
AUDITED = ("-DKSM_ASSERT_LEVEL=3",)  # and all books are recounted after every pass
WRAPPED = re.compile(r"__wrap_(ksm_\w+)\(|^SLOW\(\w+, (\w+)", re.MULTILINE)  # functions that a program wraps


def cc(*arguments: str | Path, fail: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the compiler in the checkout. A failure fails the test unless the caller wants to see it."""
    command = [os.environ.get("CC", "cc"), *FLAGS, *map(str, arguments), *MORE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    if fail and done.returncode != 0:
        pytest.fail(f"{shlex.join(command)}\n{done.stderr}", pytrace=False)
    return done


def is_core(source: Path) -> bool:
    """Whether a C file is part of the core: not the preload library, not a program of its own."""
    has_main = re.search(r"^int\s+main\s*\(", source.read_text(encoding="utf-8"), re.MULTILINE)
    return source.name != "preload.c" and not has_main


def core_sources() -> list[Path]:
    return [source for source in sorted(CSRC.glob("*.c")) if is_core(source)]


def compile_all(sources: Iterable[Path], out: Path, *flags: str) -> list[Path]:
    """One object a source, in `out`, several at a time."""
    jobs = [(source, out / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: cc(*flags, "-iquote", CSRC, "-c", job[0], "-o", job[1]), jobs))
    return [target for _, target in jobs]


def wraps(sources: Iterable[Path]) -> set[str]:
    """Linker flags for every function of the core that these sources stand before."""
    found = [match for source in sources for match in WRAPPED.findall(source.read_text("utf-8"))]
    return {f"-Wl,--wrap={first or second}" for first, second in found}


def program(name: str, folders: Iterable[Path], out: Path, *flags: str, extra: Iterable[Path] = ()) -> Path:
    """Link everything in some folders, and `extra` sources, with the core; all compiled alike."""
    sources = [source for folder in folders for source in sorted(folder.glob("*.c"))] + list(extra)
    seen = [flag for source in sources for flag in ("-iquote", str(source.parent))]
    objects = compile_all(core_sources(), out, "-O2", *flags)
    objects += compile_all(sources, out, "-O2", *flags, *dict.fromkeys(seen))
    cc(*objects, *sorted(wraps(sources)), "-o", out / name)
    return out / name
