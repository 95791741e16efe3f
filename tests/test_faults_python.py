# SPDX-License-Identifier: MIT
"""The Python package while one system call in so many fails by chance: tests/faults/python_scenarios.py.

Runs for KSMALLOC_FAULTS_PYTHON_SECONDS altogether, each part with another rate.
KSMALLOC_FAULTS_SEED repeats a seed that was printed. The control is an extension whose core takes a frame for
written that is not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import buildkit
import pytest
from conftest import Processes
from forkkit import environment

SCENARIOS = buildkit.ROOT / "tests" / "faults" / "python_scenarios.py"
SECONDS = float(os.environ.get("KSMALLOC_FAULTS_PYTHON_SECONDS", "30"))
SEED = int(
    os.environ.get("KSMALLOC_FAULTS_SEED", 5 if SECONDS <= 30 else random.SystemRandom().randrange(2**32))
)
RATES = (50, 200, 1000)  # one call in so many fails
PATIENCE = 300  # against hanging: a call may wait for a peer, and the machine may be slow


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package as it is here, whose extension lets system calls fail."""
    out = tmp_path_factory.mktemp("package")
    shutil.copytree(buildkit.ROOT / "ksmalloc", out / "ksmalloc", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(out), "--build-temp", str(out / "objects")]
    flags = {"KSMALLOC_CFLAGS": " ".join((*buildkit.SWITCHES, *buildkit.CHECKED, "-O1"))}
    done = subprocess.run(
        command,
        cwd=buildkit.ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def run(
    package: Path, processes: Processes, rendezvous: str, seconds: float, seed: int, faults: str
) -> tuple[int, str, Counter[str]]:
    """How it ended, what it said, and which calls have failed how often."""
    log = package / f"log-{faults.replace(':', '-')}"
    more = {"PYTHONPATH": str(package), "KSMALLOC_FAULTS": faults, "KSMALLOC_FAULTS_LOG": str(log)}
    process = processes.popen(
        sys.executable,
        SCENARIOS,
        rendezvous,
        str(seconds),
        str(seed),
        env=environment() | more,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=4 * seconds + PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # children hold the other end of its output, too
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"seed {seed}, {faults}: it hangs\n{output}", pytrace=False)
    failed: Counter[str] = Counter()
    for line in log.read_text().splitlines() if log.exists() else ():
        name, count = line.split()
        failed[name] += int(count)
    return process.returncode, output, failed


@pytest.fixture(scope="module")
def control(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package, linked again with one object of the core replaced."""
    out = tmp_path_factory.mktemp("control")
    shutil.copytree(package / "ksmalloc", out / "ksmalloc")
    text = (buildkit.CSRC / "frame.c").read_text("utf-8")
    written = "int r = ksm_os_pwrite(peer->fds.store, from,"
    assert written in text
    (out / "frame.c").write_text(text.replace(written, "int r = 0 & " + written.removeprefix("int r = ")))
    [extension] = (out / "ksmalloc").glob("_core*.so")
    objects = [one for one in (package / "objects").rglob("*.o") if one.name != "frame.o"]
    flags = ("-shared", "-fPIC", "-O1", *buildkit.SWITCHES, "-iquote", str(buildkit.CSRC))
    buildkit.cc(*flags, out / "frame.c", *objects, "-Wl,-z,now", "-o", extension)
    return out


@pytest.mark.timeout(5 * SECONDS + 4 * PATIENCE)
def test_nothing_is_lost(package: Path, processes: Processes, rendezvous: str) -> None:
    figures: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    seed = SEED
    for rate in RATES:
        end = time.monotonic() + SECONDS / len(RATES)
        while (left := end - time.monotonic()) > 0:  # one that has lost its domain ends before
            faults = f"{rate}:{seed}"
            status, output, failed = run(package, processes, rendezvous, left, seed, faults)
            assert status == 0, f"KSMALLOC_FAULTS={faults}, status {status}\n{output}"
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
            assert found["operations"] > found.get("failed", 0), output
            figures.update({name: n for name, n in found.items() if isinstance(n, int)} | {"runs": 1})
            kinds.update(failed)
            seed += 1
    print(f"seed {SEED}: {dict(figures)}; {kinds.total()} calls of {len(kinds)} kinds have failed")
    assert kinds.total() > 100
    assert len(kinds) > 20
    assert figures["failed"] > 0  # and the program was told
    assert figures["most_merged"] > 0  # it merges, else nothing is tested
    assert figures["most_mapped"] > 0  # as the kernel sees it
    assert figures["forks"] > 0


@pytest.mark.timeout(3 * PATIENCE)
def test_control_finds_a_planted_bug(control: Path, processes: Processes, rendezvous: str) -> None:
    status, output, failed = run(control, processes, rendezvous, 60, SEED, f"3:{SEED}:PWRITE")
    assert status == 1, output
    assert "wrong bytes: " in output, output
    assert set(failed) == {"PWRITE"}
