# SPDX-License-Identifier: MIT
"""The fuzz targets of tests/fuzz/ with inputs from a seed: no fuzzer is needed for that (see `make fuzz`).

Each plays the kept inputs, then made ones for KSMALLOC_FUZZ_SECONDS, against a simple model. The controls are
the same targets with a mistake in the core: they must find it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import buildkit
import pytest

FUZZ = buildkit.ROOT / "tests" / "fuzz"
TARGETS = ("span", "slab", "table", "index")
SECONDS = float(os.environ.get("KSMALLOC_FUZZ_SECONDS", "3"))  # of each target
SEED = os.environ.get("KSMALLOC_FUZZ_SEED", "1")
CONTROL_SECONDS = 60  # at most
COMPILING = 600  # seconds, on a very busy machine
FLAGS = ("-O1", *buildkit.CHECKED)
MISTAKES = {
    "span: a run that ends where another begins is not joined to it": (
        "span",
        "span.c",
        "node(spans, after)->page == to;",
        "node(spans, after)->page == to + 1;",
    ),
    "slab: the next slab is not told of the one before": (
        "slab",
        "slab.c",
        "slab->next->previous = slab->previous;",
        ";",
    ),
    "table: a count of levels is believed": (
        "table",
        "table.c",
        "KSM_MIN(levels, table->levels_max)",
        "levels",
    ),
    "table: a word is put where one is needed": (
        "table",
        "table.c",
        "old == 0 || (is_stale",
        "true || (is_stale",
    ),
    "index: frames that others refer to are handed out": (
        "index",
        "frame.c",
        "ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1",
        "0",
    ),
    "index: a frame that is being freed can be taken": (
        "index",
        "frame.c",
        "&& !ksm_busy_with_others(peer, frame)",
        "",
    ),
    "index: frames that others refer to are freed": (
        "index",
        "sweep.c",
        "back &= ksm_bits_of_others(peer, (ksm_frameno)(doomed->first + i))",
        "back = 0",
    ),
    "index: claims are given to everybody": (
        "index",
        "index.c",
        "if (word & CLAIMED && !owner_is_self(search->peer, word)",
        "if (false && !owner_is_self(search->peer, word)",
    ),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return buildkit.compile_all(buildkit.core_sources(), tmp_path_factory.mktemp("core"), *FLAGS)


def link(target: str, objects: list[Path], out: Path) -> Path:
    source = FUZZ / f"fuzz_{target}.c"
    own = buildkit.compile_all([source, FUZZ / "fuzz_main.c"], out, *FLAGS, "-iquote", str(FUZZ))
    buildkit.cc(*own, *objects, *buildkit.wraps([source]), "-o", out / target)
    return out / target


def play(program: Path, keep: Path, seconds: float, *inputs: Path) -> subprocess.CompletedProcess[str]:
    command = [
        str(program),
        "--seed",
        SEED,
        "--seconds",
        str(seconds),
        "--keep",
        str(keep),
        *map(str, inputs),
    ]
    limit = 60 + 4 * seconds
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.timeout(COMPILING + 4 * SECONDS)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(target: str, objects: list[Path], tmp_path: Path) -> None:
    kept = FUZZ / "corpus" / f"{target}.txt"
    done = play(link(target, objects, tmp_path), tmp_path / "input", SECONDS, kept)
    left = tmp_path / "input"
    found = f"\nthe input: {left.read_bytes().hex()}" if left.exists() else ""
    assert done.returncode == 0, done.stderr + found
    words = dict(word.split("=") for word in done.stdout.split())
    assert int(words["executions"]) > len(kept.read_text("utf-8").split()) > 0, done.stdout


@pytest.mark.timeout(COMPILING + 4 * CONTROL_SECONDS)
@pytest.mark.parametrize("what", MISTAKES)
def test_control(what: str, objects: list[Path], tmp_path: Path) -> None:
    target, name, line, instead = MISTAKES[what]
    text = (buildkit.CSRC / name).read_text("utf-8")
    assert line in text, f"{name} has no such line any more"
    (tmp_path / name).write_text(text.replace(line, instead), "utf-8")
    [mistaken] = buildkit.compile_all([tmp_path / name], tmp_path, *FLAGS, "-Wno-error")
    rest = [one for one in objects if one.name != mistaken.name]
    program = link(target, [*rest, mistaken], tmp_path)
    assert play(program, tmp_path / "input", CONTROL_SECONDS).returncode != 0
