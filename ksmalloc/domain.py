# SPDX-License-Identifier: MIT
"""Domains: the processes that share one store of frames."""

from __future__ import annotations

import math
import operator
import os
import re
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn

from ksmalloc import _core, facts, remedies
from ksmalloc.errors import BarrierError, ClosedError
from ksmalloc.rendezvous import Settings, rendezvous
from ksmalloc.stats import PeerInfo, Report, Stats, make_peer, make_report, make_stats

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SUMMED = ("pages_scanned", "pages_merged", "zero_pages", "frames_written", "passes", "seconds")
_AUTO = _core.BARRIERS["auto"]


def word_of(known: Mapping[str, int], what: str, word: str) -> int:
    """The core's number for a word, or a ValueError that lists the known words."""
    try:
        return known[word]
    except (KeyError, TypeError):
        raise ValueError(f"{what} is one of {', '.join(map(repr, known))}, not {word!r}") from None


def bytes_of(size: int | str) -> int:
    """A size in bytes: an int, or a string such as ``"64GiB"``, ``"512 MiB"``, ``"4096"``."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+)\s*(\w*)\s*", size)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"a size is a whole number and one of B, KiB, MiB, GiB, TiB, not {size!r}")
        nbytes = int(match[1]) * _UNITS[match[2]]
    else:
        nbytes = operator.index(size)
    if not 0 < nbytes < 1 << 64:
        raise ValueError(f"a capacity is at least 1 byte and less than 2**64, not {size!r}")
    return nbytes


class Domain:
    """This process's membership in a domain: the processes that share one store, and so trust each other.

    name: letters, digits, ``.``, ``_`` and ``-``, at most 63 bytes, not starting with ``.``.
    path: the directory in which domains meet; None: this user's, ``/dev/shm/ksmalloc-UID``.
    backing: ``"memfd"``: frames vanish with the last process, whatever kills it; ``"shm"``: frames lie in a
    named shared memory object, which outlives a last process that is killed (needs posix_ipc).
    capacity: the most the store may hold, in bytes, or a string such as ``"64GiB"``; None: this machine's
    memory. Backing and capacity are decided by the first peer.

    The first process makes the domain, later ones join it; the last one to leave takes it away. A process
    is one peer however many Domain objects it has for it. Arenas, blocks and registrations keep their domain.

    Errors: ValueError (name, capacity, backing), OwnerError, LayoutError, PeerError, BackingError, OSError.
    Threads: any may use it. fork: the child is a peer of its own, and the object works in it.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        path: str | os.PathLike[str] | None = None,
        backing: str = "memfd",
        capacity: int | str | None = None,
    ) -> None:
        kind = word_of(_core.BACKINGS, "backing", backing)
        self._rendezvous = rendezvous(name, path, kind, 0 if capacity is None else bytes_of(capacity))
        if backing == "shm":
            from ksmalloc import shm

            core = shm.join(self._rendezvous)
        else:
            core = _core.Domain(self._rendezvous, _AUTO)
        self._core: _core.Domain | None = core
        self.name = name
        self._id, self._directory = core.id, core.directory
        self.path = os.path.dirname(self._directory) if path is None else os.fsdecode(path)

    def _membership(self, barrier: int = _AUTO) -> _core.Domain:
        """The core's membership; BarrierError if the barrier, asked for by name, cannot be had."""
        core = self._core
        if core is None:
            raise ClosedError(f"the domain {self.name!r} is closed")
        if barrier == _AUTO:
            return core
        try:
            return _core.Domain(self._rendezvous, barrier)
        except BarrierError as error:
            word = next(word for word, number in _core.BARRIERS.items() if number == barrier)
            reason = remedies.against(facts.gather(core.capabilities()), word)
            raise BarrierError(f"{error}: {reason}") from None

    @property
    def id(self) -> str:
        """The domain's random identity, 32 hex digits; another one after a change of user."""
        return self._id if self._core is None else self._core.id

    @property
    def directory(self) -> str:
        """The rendezvous directory."""
        return self._directory if self._core is None else self._core.directory

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._core is None

    @property
    def peers(self) -> list[PeerInfo]:
        """The living processes of the domain, this one among them."""
        return [make_peer(raw) for raw in self._membership().peers()]

    @property
    def settings(self) -> Settings:
        """The settings of the domain: ``domain.settings["pages_to_scan"] = 200``."""
        return Settings(self._rendezvous)

    def stats(self) -> Stats:
        """Counters of the whole domain. ClosedError after `close()`."""
        return make_stats(self._membership().stats())

    def sweep(self) -> int:
        """Look at every frame now and free those that nobody refers to; returns how many were freed.

        Scanners do this by themselves from time to time. The GIL is released meanwhile. Errors:
        BlockingIOError (processes came and went all the while; the next call may succeed).
        """
        return self._membership().sweep()

    def close(self) -> None:
        """Give up this object's membership. Idempotent.

        The process stays in the domain while an arena, a block, a registration or another object needs it.
        """
        self._id, self._directory = self.id, self.directory
        self._core = None

    def __enter__(self) -> Domain:
        self._membership()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Domain belongs to its process and cannot be pickled; join it again by its name")

    def __repr__(self) -> str:
        return f"<ksmalloc.Domain {self.name!r} in {self.directory!r}{', closed' if self.closed else ''}>"


_lock = threading.Lock()
_default: Domain | None = None
_warned = False


def _after_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_in_child)


def read_settings(name: str, path: str | os.PathLike[str] | None = None) -> tuple[dict[str, int], int]:
    """A domain's settings, and how many peers live in it, without joining; of nobody: the defaults."""
    return rendezvous(name, path).read_settings()


def write_settings(values: Mapping[str, int], name: str, path: str | os.PathLike[str] | None = None) -> None:
    """Write settings without joining; they wait for the first peer. Errors: those of `Settings`."""
    Settings(rendezvous(name, path)).update(values)


def clean(name: str, path: str | os.PathLike[str] | None = None) -> None:
    """Remove the rendezvous of a domain in which nobody lives; OSError with ``EBUSY`` if somebody does."""
    rendezvous(name, path).clean()


def domain_of(domain: Domain | str | None) -> Domain:
    """The domain that an argument means: None the default one, a str the one of that name."""
    global _default
    if isinstance(domain, Domain):
        return domain
    if isinstance(domain, str):
        return Domain(domain)
    if domain is not None:
        raise TypeError(f"domain is None, a str or a ksmalloc.Domain, not {type(domain).__name__}")
    with _lock:
        if _default is None or _default.closed:
            _default = Domain()
        return _default


def settle(timeout: float = 30, *, domain: Domain | str | None = None) -> Report:
    """Ask all peers of a domain to finish: return when nothing more can merge, or after `timeout` seconds.

    `Report.settled` says which; its figures are the domain's. domain: None the default one, a str the one
    of that name, or a `Domain`. The GIL is released meanwhile. ValueError if timeout is negative.
    """
    if math.isnan(timeout) or timeout < 0:
        raise ValueError(f"a timeout is at least 0 seconds, not {timeout!r}")
    core = domain_of(domain)._membership()
    end = time.monotonic() + timeout
    total = core.settle(_slice(timeout), False)
    while not total["settled"] and (left := end - time.monotonic()) > 0:  # signals are handled here
        more = core.settle(_slice(left), True)
        total = {**more, **{name: total[name] + more[name] for name in _SUMMED}}
    return make_report(total, settle=True)


def _slice(seconds: float) -> int:
    """How many milliseconds to spend in one call: not so long that Ctrl-C would seem to be ignored."""
    return math.ceil(min(seconds, 0.2) * 1000)


def stats(domain: Domain | str | None = None) -> Stats:
    """Counters of a domain: None the default one, a str the one of that name, or a `Domain`."""
    return domain_of(domain).stats()
