# SPDX-License-Identifier: MIT
"""What is measured against what: contests, and how they are run.

Every side of a contest is a function that measures once and returns a figure. It runs in a process of its
own, so that nothing is left from the one before. The sides take turns, and the medians are compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Figures = dict[str, float]
"""The figure that counts is "figure"; others are reported beside it."""
Side = Callable[[], float | Figures]
RUN = Path(__file__).with_name("run.py")
CONTESTS: dict[str, Contest] = {}


@dataclass(frozen=True)
class Contest:
    """The first side is ours; the ratio is that of its median to the second's."""

    name: str
    what: str
    unit: str
    bar: float | None
    """What the ratio must reach (or, if less is better, must not exceed); None: it is reported."""
    less_is_better: bool = False
    absolute: bool = False
    """The bar is one for our figure itself."""
    sides: dict[str, Side] = field(default_factory=dict)

    def side(self, function: Side) -> Side:
        self.sides[function.__name__] = function
        return function


@dataclass
class Result:
    contest: Contest
    figures: dict[str, list[Figures]]
    missing: dict[str, str]

    def all_of(self, side: str, name: str = "figure") -> list[float]:
        return [figures[name] for figures in self.figures.get(side, [])]

    def median(self, side: str, name: str = "figure") -> float | None:
        return statistics.median(self.all_of(side, name)) if self.figures.get(side) else None

    @property
    def ratio(self) -> float | None:
        names = list(self.contest.sides)
        ours = self.median(names[0])
        if self.contest.absolute or ours is None:
            return ours
        other = self.median(names[1]) if len(names) > 1 else None
        return ours / other if other else None

    @property
    def verdict(self) -> str:
        contest, ratio = self.contest, self.ratio
        if contest.bar is None or ratio is None:
            return ""
        met = ratio <= contest.bar if contest.less_is_better else ratio >= contest.bar
        sign = "≤" if contest.less_is_better else "≥"
        return f"{'meets' if met else 'MISSES'} {sign} {contest.bar:g}"


def contest(name: str, what: str, unit: str, bar: float | None, **options: bool) -> Contest:
    made = CONTESTS[name] = Contest(name, what, unit, bar, **options)
    return made


def measure(name: str, side: str) -> Figures:
    """In a process of its own. RuntimeError: what it said instead of a figure."""
    run = subprocess.run([sys.executable, RUN, "--measure", name, side], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr or run.stdout).strip().splitlines()[-1])
    found: float | Figures = json.loads(run.stdout.splitlines()[-1])
    return found if isinstance(found, dict) else {"figure": found}


def _report(result: Result, say: Callable[[str], None]) -> None:
    chosen = result.contest
    say(f"{chosen.name}: {chosen.what}")
    for side, rounds in result.figures.items():
        if side in result.missing:
            say(f"    {side:<14} {result.missing[side]}")
            continue
        for name in rounds[0]:
            every = result.all_of(side, name)
            unit = chosen.unit if name == "figure" else name
            title = side if name == "figure" else ""
            spread = f"{min(every):.4g} to {max(every):.4g}"
            say(f"    {title:<14} {statistics.median(every):.4g} {unit}   ({spread})")
    if result.ratio is not None:
        say(f"    {'figure' if chosen.absolute else 'ratio':<14} {result.ratio:.3g}   {result.verdict}")


def run(chosen: Contest, rounds: int, say: Callable[[str], None]) -> Result:
    result = Result(chosen, {side: [] for side in chosen.sides}, {})
    for _ in range(rounds):
        for side in chosen.sides:
            if side in result.missing:
                continue
            try:
                result.figures[side].append(measure(chosen.name, side))
            except RuntimeError as error:
                result.missing[side] = str(error)
    _report(result, say)
    return result
