# SPDX-License-Identifier: MIT
"""Kernel Samepage Merging in user space: processes that hold the same pages keep one copy of them.

Allocate from an `Arena` (or `register()` memory you have), and a scanner thread merges equal pages across all
processes of a `Domain`, without root. Writing to a merged page makes it private again, unnoticed.
"""

from __future__ import annotations

import sys

from ksmalloc.errors import (
    AlignmentWarning,
    BackingError,
    BarrierError,
    ClosedError,
    CorruptError,
    Error,
    HandlerError,
    HeadroomError,
    LayoutError,
    OwnerError,
    PeerError,
    RegisterError,
    Unsupported,
)

if not sys.platform.startswith("linux"):
    raise Unsupported("ksmalloc works on Linux only")

from ksmalloc import handlers as _handlers
from ksmalloc._core import Block
from ksmalloc.arena import Arena, arena
from ksmalloc.capabilities import Capabilities, capabilities
from ksmalloc.domain import Domain, settle, stats
from ksmalloc.load import load
from ksmalloc.region import Registration, register
from ksmalloc.remedies import Missing
from ksmalloc.stats import ArenaStats, PeerInfo, Report, Stats

__version__ = "0.1.0"

__all__ = [
    "AlignmentWarning",
    "Arena",
    "ArenaStats",
    "BackingError",
    "BarrierError",
    "Block",
    "Capabilities",
    "ClosedError",
    "CorruptError",
    "Domain",
    "Error",
    "HandlerError",
    "HeadroomError",
    "LayoutError",
    "Missing",
    "OwnerError",
    "PeerError",
    "PeerInfo",
    "RegisterError",
    "Registration",
    "Report",
    "Stats",
    "Unsupported",
    "arena",
    "capabilities",
    "load",
    "register",
    "settle",
    "stats",
]

_handlers.choose_stop_signal()
