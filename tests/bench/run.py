# SPDX-License-Identifier: MIT
"""Runs contests side by side, prints medians and ratios, and notes them.

python tests/bench/run.py                  all of them, five rounds
python tests/bench/run.py merge_one idle   these
python tests/bench/run.py --list
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import allocation  # noqa: F401 (each of these enters its contests)
import merging  # noqa: F401
import passes  # noqa: F401
import workers  # noqa: F401
from contest import CONTESTS, run

HISTORY = Path(__file__).resolve().parents[2] / "build" / "bench"


def main() -> int:
    parser = argparse.ArgumentParser(description="Contests of ksmalloc with others.")
    parser.add_argument("names", nargs="*", metavar="CONTEST", help="which ones; all if none is given")
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken (5)")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument(
        "--measure", nargs=2, metavar=("CONTEST", "SIDE"), help="one side once, in this process"
    )
    arguments = parser.parse_args()
    if arguments.list:
        for chosen in CONTESTS.values():
            print(f"{chosen.name:<14} {chosen.what}")
        return 0
    if arguments.measure:
        name, side = arguments.measure
        print(json.dumps(CONTESTS[name].sides[side]()))
        return 0
    unknown = set(arguments.names) - set(CONTESTS)
    if unknown:
        parser.error(f"there is no contest {', '.join(sorted(unknown))}; --list says what there is")
    names = arguments.names or list(CONTESTS)
    results = [run(CONTESTS[name], arguments.rounds, lambda line: print(line, flush=True)) for name in names]
    HISTORY.mkdir(parents=True, exist_ok=True)
    note = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "contests": {r.contest.name: {"figures": r.figures, "ratio": r.ratio} for r in results},
    }
    path = HISTORY / f"{note['at'].replace(':', '')}.json"
    path.write_text(json.dumps(note, indent=1))
    print(f"noted in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return int(any(result.verdict.startswith("MISSES") for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
