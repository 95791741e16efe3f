# SPDX-License-Identifier: MIT
"""What a pass costs that merges nothing: over new memory, and over memory that nobody writes."""

from __future__ import annotations

import mmap
import os
import threading
import time

import ksmd
import numpy as np
from contest import Figures, contest
from merging import MIB, PAGE, arena, fill

import ksmalloc

NEW = 2048 * MIB
first_pass = contest(
    "first_pass", "the first pass over 2 GiB without duplicates, of one core", "GiB/s", bar=4, absolute=True
)


def scanners() -> list[int]:
    """The threads that are not ours."""
    mine = {thread.native_id for thread in threading.enumerate()}
    return [int(task) for task in os.listdir("/proc/self/task") if int(task) not in mine]


def cpu_ns() -> int:
    return sum(ksmd.cpu_ns(os.getpid(), tid) for tid in scanners())


@first_pass.side
def ksmalloc_pass() -> float:
    with arena(scan=True) as ours:
        ours.domain.settings["run"] = 0
        data = ours.empty(NEW // 8, np.uint64)
        fill(data, 1)
        passes = ours.domain.stats().full_scans
        ours.domain.settings.update({"advisor_mode": 0, "pages_to_scan": 1_000_000})
        before = cpu_ns()
        ours.domain.settings["run"] = 1
        while ours.domain.stats().full_scans < passes + 1:
            time.sleep(0.005)
        return NEW / (1 << 30) / ((cpu_ns() - before) / 1e9)


@first_pass.side
def kernel_ksm_pass() -> float:
    data = ksmd.mergeable(NEW)
    fill(np.frombuffer(data, np.uint64), 1)
    data.madvise(mmap.MADV_MERGEABLE)
    daemon = ksmd.thread()
    before, scans = ksmd.cpu_ns(daemon), ksmd.counter("full_scans")
    with ksmd.running(ksmd.FULL_THROTTLE):
        ksmd.wait_for("full_scans", scans + 1)
        return NEW / (1 << 30) / ((ksmd.cpu_ns(daemon) - before) / 1e9)


IDLE = 1024 * MIB
idle = contest(
    "idle",
    "a pass over 1 GiB that nobody writes, half of it merged",
    "ms of CPU",
    bar=15,
    less_is_better=True,
    absolute=True,
)


@idle.side
def ksmalloc_idle() -> Figures:
    with arena(scan=True) as ours:
        data = ours.empty(IDLE // 8, np.uint64)
        quarter = len(data) // 4
        fill(data[:quarter], 1)
        data[quarter : 2 * quarter] = data[:quarter]
        fill(data[2 * quarter :], 2)
        assert ksmalloc.settle(60, domain=ours.domain).settled
        assert ours.domain.stats().pages_merged == IDLE // 2 // PAGE
        time.sleep(5)
        passes, before, start = ours.domain.stats().full_scans, cpu_ns(), time.monotonic()
        while ours.domain.stats().full_scans < passes + 5 and time.monotonic() < start + 30:
            time.sleep(0.2)
        spent, made = cpu_ns() - before, ours.domain.stats().full_scans - passes
        seconds = time.monotonic() - start
        return {"figure": spent / made / 1e6, "% of a core": spent / seconds / 1e7}


@idle.side
def kernel_ksm_idle() -> float:
    data = ksmd.mergeable(IDLE)
    words = np.frombuffer(data, np.uint64)
    quarter = len(words) // 4
    fill(words[:quarter], 1)
    words[quarter : 2 * quarter] = words[:quarter]
    fill(words[2 * quarter :], 2)
    data.madvise(mmap.MADV_MERGEABLE)
    daemon = ksmd.thread()
    with ksmd.running(ksmd.FULL_THROTTLE):
        ksmd.wait_for("full_scans", ksmd.counter("full_scans") + 4)
        before, scans = ksmd.cpu_ns(daemon), ksmd.counter("full_scans")
        ksmd.wait_for("full_scans", scans + 3)
        return (ksmd.cpu_ns(daemon) - before) / 3 / 1e6
