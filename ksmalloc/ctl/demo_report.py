# SPDX-License-Identifier: MIT
"""What the demonstration found, for people and as JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ksmalloc.ctl.measure import Memory
from ksmalloc.ctl.sizes import human
from ksmalloc.ctl.table import RULE, table

_NOTHING = Memory((), 0)


@dataclass
class Outcome:
    domain: str
    files: list[str]
    """Empty: sample data."""
    pids: list[int]
    can_merge: bool = False
    """Otherwise `stats` says why not, and nothing else was done."""
    nbytes: int = 0
    """Bytes of one copy."""
    verified: int = 0
    """Bytes compared with the files and found right, in all rounds."""
    written: int = 0
    """Bytes, each in a page of its own, that the last worker changed in its copy."""
    baseline: Memory = _NOTHING
    """Before anything was loaded."""
    before: Memory = _NOTHING
    """Loaded and read, not merged."""
    after: Memory = _NOTHING
    after_write: Memory = _NOTHING
    stats: dict[str, Any] = field(default_factory=dict)
    """The domain's: when merging had come to its end, or of a worker that cannot merge."""
    report: dict[str, Any] = field(default_factory=lambda: {"settled": False, "seconds": 0.0})

    @property
    def good(self) -> bool:
        everything = 3 * self.nbytes * len(self.pids)
        return self.verified == everything > 0 and bool(self.report["settled"])

    def as_dict(self) -> dict[str, Any]:
        stages = {"before": self.before, "after": self.after, "after_write": self.after_write}
        return {
            "good": self.good,
            "can_merge": self.can_merge,
            "domain": self.domain,
            "files": self.files,
            "workers": len(self.pids),
            "bytes": self.nbytes,
            "verified_bytes": self.verified,
            "written_pages": self.written,
            **self.report,
            **self.stats,
            "baseline": self.baseline.as_dict(),
            "absolute": {name: memory.as_dict() for name, memory in stages.items()},
            "grown": {name: (memory - self.baseline).as_dict() for name, memory in stages.items()},
        }


def render(outcome: Outcome) -> str:
    """The table people read."""
    stages = [stage - outcome.baseline for stage in (outcome.before, outcome.after, outcome.after_write)]
    last = outcome.pids[-1]
    rows: list[tuple[str, ...]] = [("memory", "loaded", "merged", "after a write"), RULE]
    for processes in zip(*(stage.processes for stage in stages), strict=True):
        rows.append((f"worker {processes[0].pid}", *(human(process.pss) for process in processes)))
    rows += [
        RULE,
        ("all workers, sum of PSS", *(human(stage.pss_total) for stage in stages)),
        ("frames + private memory", *(human(stage.blocks_total) for stage in stages)),
    ]
    stats, before, after = outcome.stats, stages[0].total, stages[1].total
    share = f", {100 * after / before:.0f} % of what it was" if before > 0 else ""
    settled = "settled" if outcome.report["settled"] else "NOT settled: the timeout came first"
    what = ", ".join(os.path.basename(path) for path in outcome.files) or "sample data"
    saved = human(stats["saved_bytes"])
    facts = [
        ("pages_shared", f"{stats['pages_shared']:,}", "frames in use"),
        ("pages_sharing", f"{stats['pages_sharing']:,}", f"further pages on them, {saved} saved"),
        ("ksm_zero_pages", f"{stats['ksm_zero_pages']:,}", "pages of zeros given back"),
    ]
    limits = [f"Not everything could merge: {stats['why_not']}."] if stats["why_not"] else []
    checked, own = human(outcome.verified), human(outcome.baseline.pss_total)
    return "\n".join(
        [
            f"{len(outcome.pids)} workers, each with its own copy of {what} ({human(outcome.nbytes)})",
            "",
            table(rows),
            "",
            *(f"  {name:<15}{figure:>12}   {meaning}" for name, figure, meaning in facts),
            "",
            f"Merged in {outcome.report['seconds']:.2f} s, barrier {stats['barrier']}, {settled}.",
            *limits,
            f"Takes {human(after)} instead of {human(before)}{share}.",
            f"Worker {last} wrote into {outcome.written:,} pages of its copy; the others did not see it.",
            f"Every byte of every copy was compared with the files, three times: {checked}, all right.",
            f"Not counted: what the workers took before they loaded anything, {own} in all.",
        ]
    )


def refusal(outcome: Outcome) -> str:
    """Why nothing merges here, and what would change that."""
    reason = f"Nothing can merge here: {outcome.stats['why_not'] or 'no barrier works in this process'}."
    hint = "`ksmctl doctor` says which lines would change that here."
    return f"{reason}\n{hint}" if outcome.stats["barrier"] == "none" else reason
