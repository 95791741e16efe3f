# SPDX-License-Identifier: MIT
"""ksmctl demo: right bytes, honest figures, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Processes, is_alive, wait_until
from pace import SLOWER

import ksmalloc
from ksmalloc.ctl import main

MIB = 1 << 20
WORKERS = 3
OVERHEAD = 3 * MIB
"""What a worker may take beside the pages themselves: bookkeeping, scratch, and the allocator's whims."""

DEMO = [sys.executable, "-m", "ksmalloc", "demo"]


def environment(modules: str = "", **variables: str) -> dict[str, str]:
    """One in which Python finds the package that is being tested, whatever else there is."""
    places = filter(None, [str(Path(ksmalloc.__file__).parents[1]), modules])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), **variables}


def run(command: list[str], modules: str = "") -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"cwd": "/", "env": environment(modules=modules), "check": False}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def demo(path: str, *arguments: str, modules: str = "") -> subprocess.CompletedProcess[str]:
    return run([*DEMO, *arguments, "--path", path], modules)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["good"] is True
    return found


def check_bars(found: dict[str, Any], workers: int) -> None:
    """Both sums: N copies before, one after, one and the written pages at the end; and what verified says."""
    copy, page = found["bytes"], found["page_size"]
    slack = workers * OVERHEAD
    assert found["workers"] == workers
    assert found["verified_bytes"] == 3 * workers * copy
    for total in ("pss_total", "blocks_total"):
        before, after, written = (found["grown"][at][total] for at in ("before", "after", "after_write"))
        assert workers * copy - slack < before < workers * copy + slack
        assert copy - slack < after < copy + slack
        assert after < written < after + found["written_pages"] * page + slack
    assert copy - slack < found["pages_shared"] * page < copy + slack
    assert found["saved_bytes"] == found["pages_sharing"] * page
    assert found["saved_bytes"] > (workers - 1) * copy - slack


# ---- the whole ---------------------------------------------------------------------------------------------


def test_without_a_file(rendezvous: str) -> None:
    check_bars(figures(demo(rendezvous, "--json")), workers=4)
    assert os.listdir(rendezvous) == []


def test_every_kind_of_file(rendezvous: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    table = random.integers(0, 1 << 60, 500_000)
    np.save(tmp_path / "c.npy", table)
    np.save(tmp_path / "f.npy", np.asfortranarray(random.random((500, 700))))
    np.savez(tmp_path / "plain.npz", a=random.random(300_000), empty=np.zeros((0, 3)), scalar=np.float32(3))
    np.savez_compressed(
        tmp_path / "packed.npz", b=np.repeat(random.random(3_000), 100), when=np.zeros(9, "M8[s]")
    )
    half = random.integers(0, 1 << 16, (300, 1000), dtype=np.uint16).tobytes()
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "w": {"dtype": "BF16", "shape": [300, 1000], "data_offsets": [8, 8 + len(half)]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "none": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        }
    ).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8) + half
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "raw.bin").write_bytes(os.urandom(3 * MIB + 17))
    files = sorted(map(str, tmp_path.iterdir()))
    found = figures(demo(rendezvous, *files, "--workers", str(WORKERS), "--json"))
    assert found["files"] == files
    check_bars(found, WORKERS)


def test_the_table(rendezvous: str, tmp_path: Path) -> None:
    path = tmp_path / "raw.bin"
    path.write_bytes(os.urandom(4 * MIB))
    done = demo(rendezvous, str(path), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "2 workers, each with its own copy of raw.bin (4.00 MiB)" in done.stdout
    for word in ("pages_shared", "pages_sharing", "sum of PSS", "frames + private memory", "barrier move"):
        assert word in done.stdout
    assert ", settled." in done.stdout
    assert "24.0 MiB, all right." in done.stdout
    assert len(done.stderr.splitlines()) < 12
    assert "\r" not in done.stderr


def test_a_domain_of_a_name(rendezvous: str, tmp_path: Path) -> None:
    path = tmp_path / "raw.bin"
    path.write_bytes(os.urandom(MIB))
    found = figures(demo(rendezvous, str(path), "--workers", "2", "--domain", "mine", "--json"))
    assert found["domain"] == "mine"
    assert os.listdir(rendezvous) == []
    assert main(["start", "1", "1", "1", "--domain", "mine", "--path", rendezvous]) == 0
    done = demo(rendezvous, str(path), "--domain", "mine")
    assert (done.returncode, "there is a domain mine already" in done.stderr) == (1, True)
    assert os.listdir(rendezvous) == ["mine"]


def test_one_worker_and_zeros(rendezvous: str, tmp_path: Path) -> None:
    path = tmp_path / "zeros.bin"
    path.write_bytes(bytes(8 * MIB))
    found = figures(demo(rendezvous, str(path), "--workers", "1", "--json"))
    assert found["ksm_zero_pages"] > 0.9 * 8 * MIB / found["page_size"]
    assert found["pages_shared"] == 0
    assert found["grown"]["after"]["blocks_total"] < OVERHEAD


def test_without_numpy(rendezvous: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('not here')\n")
    check_bars(figures(demo(rendezvous, "--json", modules=str(tmp_path))), workers=4)


@pytest.mark.parametrize("content", [None, b""])
def test_files_that_cannot_be_loaded(rendezvous: str, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is not None:  # it is there, and empty
        path.write_bytes(content)
    done = demo(rendezvous, str(path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("python -m ksmalloc: ")
    assert "Traceback" not in done.stderr
    assert os.listdir(rendezvous) == []


# ---- how it ends -------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_and_await(
    processes: Processes, path: str, stage: str, variables: dict[str, str] | None = None, **options: Any
) -> tuple[Any, list[int]]:
    """A demonstration that has come to a stage, and the pids of its workers (and of their helper)."""
    process = processes.popen(*DEMO, "--path", path, cwd="/", env=environment(**variables or {}), **options)
    for line in process.stderr:
        if line.startswith(stage):
            break
    else:
        pytest.fail(f"never came to {stage!r}")
    return process, children(process.pid)


@pytest.mark.parametrize(
    "stage", ["making", "starting", "joining", "loading", "comparing", "merging", "writing"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(
    processes: Processes, rendezvous: str, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    variables = {"TMPDIR": str(tmp_path)}
    process, workers = start_and_await(processes, rendezvous, stage, variables, process_group=0)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=30 * SLOWER)
    assert process.returncode == 128 + number
    assert out == ""
    assert "Traceback" not in err
    assert wait_until(lambda: not any(map(is_alive, workers)))
    assert os.listdir(rendezvous) == []
    assert os.listdir(tmp_path) == []


def test_kill_9_of_the_parent_ends_the_workers(processes: Processes, rendezvous: str, tmp_path: Path) -> None:
    variables = {"TMPDIR": str(tmp_path)}
    process, workers = start_and_await(processes, rendezvous, "merging", variables)
    assert len(workers) >= 4
    process.kill()
    assert wait_until(lambda: not any(map(is_alive, workers)), timeout=40)


def test_a_worker_that_dies(processes: Processes, rendezvous: str) -> None:
    process, workers = start_and_await(processes, rendezvous, "comparing")
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=30 * SLOWER)
    assert process.returncode == 1
    assert f"worker {workers[-1]} was killed by SIGKILL" in err
    assert wait_until(lambda: not any(map(is_alive, workers)))
    assert os.listdir(rendezvous) == []
