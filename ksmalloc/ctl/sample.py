# SPDX-License-Identifier: MIT
"""Something to load when no file was named."""

from __future__ import annotations

import os
import random

MIB = 1 << 20


def make_sample(directory: str, nbytes: int = 64 * MIB) -> list[str]:
    """Write files of `nbytes` pseudo-random bytes in all: raw bytes, and arrays where NumPy is installed."""
    source = random.Random(2008)
    try:
        import numpy as np
    except ImportError:
        return [_write_raw(os.path.join(directory, "sample.bin"), nbytes, source)]
    paths = [_write_raw(os.path.join(directory, "sample.bin"), nbytes // 4, source)]
    weights = np.frombuffer(source.randbytes(nbytes // 2), dtype=np.uint32).reshape(-1, 256)
    table = np.frombuffer(source.randbytes(nbytes // 4), dtype=np.uint8)
    for name, array in (("weights.npy", weights), ("table.npy", table)):
        paths.append(os.path.join(directory, name))
        np.save(paths[-1], array)
    return paths


def _write_raw(path: str, nbytes: int, source: random.Random) -> str:
    with open(path, "wb") as file:
        while nbytes > 0:
            file.write(source.randbytes(min(nbytes, MIB)))
            nbytes -= MIB
    return path
