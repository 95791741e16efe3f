# SPDX-License-Identifier: MIT
"""fuzz.py [SECONDS]: every target of this directory under libFuzzer, with the sanitizers, so long each.

Needs clang with its compiler-rt (CLANG=clang-14, say). New inputs are kept in build/fuzz/; from those that
reach anything new tests/fuzz/corpus/ was chosen (`--choose` chooses again).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "fuzz"
CLANG = os.environ.get("CLANG") or shutil.which("clang") or "clang-14"
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-pthread", "-DKSM_ASSERT_LEVEL=2", "-iquote", str(CSRC)]
SANITIZERS = ["-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=undefined"]
WRAPPED = re.compile(r"__wrap_(ksm_\w+)\(")
CHOSEN = 24  # inputs of a target that are kept in the repository
LARGEST = 512  # bytes of one


def compile_one(source: Path) -> Path:
    target = BUILD / f"{source.stem}.o"
    own = ["-iquote", str(HERE)] if source.parent == HERE else []
    subprocess.run([CLANG, *FLAGS, *SANITIZERS, *own, "-c", str(source), "-o", str(target)], check=True)
    return target


def core() -> list[Path]:
    return [source for source in sorted(CSRC.glob("*.c")) if source.name != "preload.c"]


def link(name: str, objects: list[Path]) -> Path:
    source = HERE / f"fuzz_{name}.c"
    wraps = {f"-Wl,--wrap={one}" for one in WRAPPED.findall(source.read_text("utf-8"))}
    program = BUILD / f"fuzz_{name}"
    flags = ["-fsanitize=fuzzer,address,undefined", "-pthread", *sorted(wraps)]
    subprocess.run(
        [CLANG, *flags, str(compile_one(source)), *map(str, objects), "-o", str(program)], check=True
    )
    return program


def run(name: str, program: Path, seconds: float) -> str:
    """Fuzz for a while. Returns a line of figures; ends this program if something was found."""
    corpus = BUILD / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    kept = BUILD / f"kept-{name}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for number, line in enumerate((HERE / "corpus" / f"{name}.txt").read_text("utf-8").split()):
        (kept / f"{number:02}").write_bytes(bytes.fromhex(line))
    options = [f"-max_total_time={int(seconds)}", "-print_final_stats=1", "-timeout=60", "-rss_limit_mb=2048"]
    artifacts = f"-artifact_prefix={BUILD}/found-{name}-"
    command = [str(program), str(corpus), str(kept), *options, artifacts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: something was found\n{done.stderr[-6000:]}")
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)[-1]
    return (
        f"{name}: executions={stats['number_of_executed_units']} seconds={int(seconds)} "
        f"edges={covered[0]} features={covered[1]} inputs={covered[2]}"
    )


def choose(name: str, program: Path) -> None:
    """Keep the few small inputs that reach most, of those found now and those that were kept before."""
    least = BUILD / f"least-{name}"
    shutil.rmtree(least, ignore_errors=True)
    least.mkdir()
    merge = [str(program), "-merge=1", f"-max_len={LARGEST}", str(least)]
    merge += [str(BUILD / "corpus" / name), str(BUILD / f"kept-{name}")]
    subprocess.run(merge, capture_output=True, check=True)
    inputs = sorted((one.read_bytes() for one in least.iterdir()), key=lambda one: (-len(one), one))
    lines = [one.hex() for one in inputs if one][:CHOSEN]
    (HERE / "corpus" / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")


def main(arguments: list[str]) -> None:
    seconds = float(next((one for one in arguments if not one.startswith("-")), 60))
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, core()))
    for source in sorted(HERE.glob("fuzz_*.c")):
        name = source.stem.removeprefix("fuzz_")
        if name == "main":
            continue
        program = link(name, objects)
        print(run(name, program, seconds), flush=True)
        if "--choose" in arguments:
            choose(name, program)


if __name__ == "__main__":
    main(sys.argv[1:])
