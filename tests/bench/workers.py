# SPDX-License-Identifier: MIT
"""Workers that load the same model, with the settings that everybody gets."""

from __future__ import annotations

import mmap
import os
import tempfile
import time

import ksmd
import numpy as np
from contest import Figures, contest
from merging import MIB, PAGE, fill, together
from numpy.typing import NDArray

import ksmalloc

WORKERS, MODEL = 8, 256 * MIB
ENOUGH = 95 * WORKERS * MODEL // PAGE // 100

load_model = contest(
    "workers",
    "256 MiB of equal data in each of 8 workers, default settings: from the last write until 95 % are merged",
    "s",
    bar=3,
    less_is_better=True,
    absolute=True,
)


def _model() -> NDArray[np.uint64]:
    """What all load, at hand for everybody, so that loading takes no time to speak of."""
    fd = os.memfd_create("model")
    os.ftruncate(fd, MODEL)
    model = np.frombuffer(mmap.mmap(fd, MODEL), np.uint64)
    os.close(fd)
    fill(model, 1)
    return model


def _own_cpu() -> float:
    usage = os.times()
    return usage.user + usage.system


@load_model.side
def ksmalloc_default() -> Figures:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ksmalloc-bench-") as path:
        spent, told = os.pipe()
        model = _model()

        def load(_: int) -> tuple[ksmalloc.Arena, object]:
            arena = ksmalloc.Arena(domain=ksmalloc.Domain("bench", path=path))
            data = arena.empty(MODEL // 8, np.uint64)
            data[:] = model
            return arena, data

        def work(loaded: tuple[ksmalloc.Arena, object]) -> None:
            before = _own_cpu()
            while loaded[0].domain.stats().pages_merged < ENOUGH:
                time.sleep(0.02)
            os.write(told, f"{_own_cpu() - before}\n".encode())

        seconds = together(WORKERS, load, work)
        os.close(told)
        with os.fdopen(spent) as lines:
            return {"figure": seconds, "CPU seconds, all workers": sum(map(float, lines))}


@load_model.side
def kernel_ksm() -> Figures:
    """With 3,000 pages every 20 ms, of which more than that is seldom set."""
    settings = {"advisor_mode": "none", "sleep_millisecs": "20", "pages_to_scan": "3000"}
    daemon, before, model = ksmd.thread(), ksmd.counter("pages_sharing"), _model()

    def load(_: int) -> mmap.mmap:
        copy = ksmd.mergeable(MODEL)
        copy.madvise(mmap.MADV_MERGEABLE)
        np.frombuffer(copy, np.uint64)[:] = model
        return copy

    def work(_: mmap.mmap) -> None:
        ksmd.wait_for("pages_sharing", before + ENOUGH - MODEL // PAGE)

    with ksmd.running(settings):
        cpu = ksmd.cpu_ns(daemon)
        seconds = together(WORKERS, load, work)
        return {"figure": seconds, "CPU seconds of ksmd": (ksmd.cpu_ns(daemon) - cpu) / 1e9}
