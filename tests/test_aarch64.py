# SPDX-License-Identifier: MIT
"""The core on aarch64: compiled by a cross compiler, and run under qemu-user as far as that can.

An emulated program shares this processor's memory ordering, which is stronger than that of ARM hardware; and
qemu-user knows no userfaultfd, so nothing is merged here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import buildkit
import pytest

HERE = buildkit.ROOT / "tests" / "aarch64"
NATIVE = platform.machine() == "aarch64"
COMPILER = "cc" if NATIVE else "aarch64-linux-gnu-gcc"
RUN = [] if NATIVE else ["qemu-aarch64-static"]
PACKAGES = {  # of Debian, by what they bring
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "/usr/aarch64-linux-gnu/include/stdio.h": "libc6-dev-arm64-cross",
}
PROGRAMS = ("cow", "error", "frame", "guard", "layout", "page", "region", "slab", "span", "table")
LIMIT = 900  # seconds for one of them, a minute if nothing else runs
CONTROLS = 40  # runs in which a missing fence is to be seen at least once


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = [
        package for what, package in PACKAGES.items() if not shutil.which(what) and not Path(what).exists()
    ]
    if missing and not NATIVE:
        message = f"these Debian packages are missing: {' '.join(missing)}"
        if os.geteuid() == 0:
            pytest.fail(message, pytrace=False)  # whoever is root can install them
        pytest.skip(message)


def cc(compiler: str, *arguments: str | Path) -> None:
    command = [compiler, *buildkit.FLAGS, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=buildkit.ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stderr}", pytrace=False)


def compile_all(sources: Iterable[Path], out: Path, *flags: str) -> list[Path]:
    jobs = [(source, out / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda job: cc(COMPILER, *flags, "-iquote", buildkit.CSRC, "-c", job[0], "-o", job[1]), jobs
            )
        )
    return [target for _, target in jobs]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The whole core: a warning fails it, as everywhere."""
    out = tmp_path_factory.mktemp("aarch64")
    return compile_all(buildkit.core_sources(), out, "-O1", *buildkit.SWITCHES, *buildkit.CHECKED)


def test_the_core_compiles_as_it_is_released(tmp_path: Path) -> None:
    objects = compile_all(buildkit.core_sources(), tmp_path, "-O2", "-fvisibility=hidden", "-fPIC")
    assert len(objects) == len(buildkit.core_sources()) > 50


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, core: list[Path], tmp_path: Path) -> None:
    """The core's own tests, of what needs nothing that qemu-user lacks."""
    source = buildkit.ROOT / "tests" / "csrc" / f"test_{name}.c"
    flags = ("-O1", "-static", *buildkit.SWITCHES, *buildkit.CHECKED, "-iquote", str(buildkit.CSRC))
    cc(COMPILER, *flags, "-iquote", source.parent, source, *core, "-o", tmp_path / name)
    done = subprocess.run(
        [*RUN, tmp_path / name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert ", 0 failed" in done.stdout


def build(source: str, out: Path, compiler: str, *more: str | Path) -> Path:
    cc(compiler, "-O2", "-static", "-iquote", buildkit.CSRC, HERE / source, *more, "-o", out)
    return out


def said_by(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def test_digests_and_layout_are_the_same_everywhere(tmp_path: Path) -> None:
    """Processes of one domain may be of different builds, and what is stored is compared by digest."""
    page = buildkit.CSRC / "page.c"
    here = said_by([build("digests.c", tmp_path / "here", "cc", page)])
    there = said_by([*RUN, build("digests.c", tmp_path / "there", COMPILER, page)])
    assert len(here.splitlines()) > 6900
    assert here == there


@pytest.mark.parametrize("where", ["here", "aarch64"])
def test_atomics_under_threads(where: str, tmp_path: Path) -> None:
    compiler, run = ("cc", []) if where == "here" else (COMPILER, RUN)
    program = build("atomics.c", tmp_path / "atomics", compiler)
    assert said_by([*run, program]).startswith("400000 operations of each kind")
    control = build("atomics.c", tmp_path / "control", compiler, "-DWITHOUT_FENCE")
    for _ in range(CONTROLS):
        done = subprocess.run([*run, control], capture_output=True, text=True, timeout=240, check=False)
        if "wrong: neither saw the other\n" in done.stdout:
            break
    else:
        pytest.fail(f"in {CONTROLS} runs without the fence nothing was seen", pytrace=False)
