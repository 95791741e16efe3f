# SPDX-License-Identifier: MIT
"""Where processes meet, and the settings that are kept there."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping

from ksmalloc import _core

_UINT32_MAX = (1 << 32) - 1


def rendezvous(
    name: str,
    path: str | os.PathLike[str] | None = None,
    backing: int = 0,
    capacity: int = 0,
) -> _core.Rendezvous:
    """Where the domain `name` is found, and how it is made."""
    base = None if path is None else os.fsencode(path)
    label = name.encode()
    if b"\0" in label or (base is not None and b"\0" in base):
        raise ValueError("names and paths hold no zero bytes")
    return _core.Rendezvous(label, base, capacity, backing)


class Settings(Mapping[str, int]):
    """A domain's settings: a mapping of six names to ints, kept in the rendezvous.

    They hold for all peers at once and for peers that join later. Reading and writing need no living peer.

    run: 1 merge, 0 stop (what is merged stays merged). pages_to_scan: pages a batch, 1 to 1,000,000.
    max_pages_to_merge: pages merged in a batch at most, 1 to 1,000,000. sleep_millisecs: pause between
    batches, 0 to 60,000 ms. advisor_mode: 1, those three are chosen, so that new data is found at once and no
    process uses more than advisor_max_cpu per cent of one processor for long (1 to 100); 0, they are not.

    Unknown names are KeyError, values out of range ValueError, values that are no ints TypeError. As in
    kernel KSM pages_to_scan cannot be set while the advisor chooses it: that is a ValueError, too. All six
    are written together: two processes that write at the same moment may undo each other's change.
    """

    def __init__(self, rendezvous: _core.Rendezvous) -> None:
        self._rendezvous = rendezvous

    def _read(self) -> dict[str, int]:
        return self._rendezvous.read_settings()[0]

    def __getitem__(self, name: str) -> int:
        return self._read()[name]

    def __setitem__(self, name: str, value: int) -> None:
        self.update({name: value})

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def update(self, values: Mapping[str, int]) -> None:
        """Change several settings in one step: all of them, or, on an error, none."""
        settings = self._read()
        for name, value in values.items():
            if name not in settings:
                raise KeyError(name)
            settings[name] = operator.index(value)
            if not 0 <= settings[name] <= _UINT32_MAX:
                raise ValueError(f"{name} = {value} is out of range")
        if settings["advisor_mode"] == 1 and "pages_to_scan" in values:
            raise ValueError("the advisor chooses pages_to_scan; with advisor_mode 0 it can be set")
        self._rendezvous.write_settings(settings)

    def __repr__(self) -> str:
        return f"Settings({self._read()!r})"
