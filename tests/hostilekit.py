# SPDX-License-Identifier: MIT
"""Run tests/hostile: a program that does to its registered memory what it must not."""

from __future__ import annotations

from pathlib import Path

import buildkit
from conftest import Processes
from runkit import Run

ACTS = [
    "nothing",
    "write",
    "munmap",
    "mmap_anonymous",
    "mmap_file",
    "mmap_readonly_file",
    "mmap_shared",
    "mremap_merged_here",
    "mremap_away",
    "mremap_away_mmap",
    "mremap_and_back",
    "mremap_grow",
    "mremap_shrink",
    "mprotect_none",
    "mprotect_read",
    "mprotect_flicker",
    "madvise_dontneed",
    "madvise_free",
    "madvise_others",
    "mlock",
    "mlockall",
]


def build(folder: Path) -> Path:
    return buildkit.program("hostile", [buildkit.ROOT / "tests" / "hostile"], folder, *buildkit.CHECKED)


def run_hostile(
    processes: Processes, program: Path, rendezvous: str, *arguments: str, limit: float = 240
) -> Run:
    return Run(processes, program, "--rendezvous", rendezvous, *arguments, limit=limit, first="barrier=")
