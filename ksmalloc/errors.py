# SPDX-License-Identifier: MIT
"""The exceptions of ksmalloc, and the one table from the core's codes to them.

A code of the kernel becomes the matching `OSError` (`FileNotFoundError`, `PermissionError`, …), except
``ENOMEM``, which is `MemoryError`, and ``EINVAL``, which is `ValueError`: the caller's misuse. What only
ksmalloc can say is an `Error`.
"""

from __future__ import annotations

import errno


class Error(Exception):
    """What only ksmalloc can say; the base of its own exceptions."""


class Unsupported(Error, ImportError):
    """ksmalloc cannot work here: not Linux 5.10 or later, or another page size, which importing raises; or
    there is no /proc, which joining a domain raises."""


class LayoutError(Error):
    """The domain was made by a version of ksmalloc with another memory layout."""


class OwnerError(Error, PermissionError):
    """The rendezvous belongs to another user, or others may open it. ``errno`` is ``EACCES``."""


class PeerError(Error):
    """No peer could let this process in: none answered, no slot is free, or the descriptors are lost."""


class BarrierError(Error):
    """The barrier asked for by name cannot be had in this process, or its threads cannot be held."""


class HandlerError(Error):
    """A store into a read-only page would kill the process: another SIGSEGV handler stands in the place of
    ksmalloc's, or a thread blocks the signal."""


class HeadroomError(Error, MemoryError):
    """A control group of the process is so near its memory limit that the kernel might kill somebody."""


class BackingError(Error):
    """The domain exists with another backing than the one asked for."""


class ClosedError(Error, ValueError):
    """The arena or the domain is closed."""


class RegisterError(Error, ValueError):
    """The memory cannot be registered: not private anonymous memory, registered already, or too small."""


class CorruptError(Error):
    """The domain's shared memory holds impossible values, which were refused."""


class AlignmentWarning(UserWarning):
    """Registered data does not start on a page boundary, so equal data may not give equal pages."""


# The one table. What is not in it: OSError for a code of the kernel's, Error for one of ours.
_TYPES: dict[str, type[Exception]] = {
    "ENOMEM": MemoryError,
    "EINVAL": ValueError,
    "KSM_EUNSUPPORTED": Unsupported,
    "KSM_ELAYOUT": LayoutError,
    "KSM_EOWNER": OwnerError,
    "KSM_ENOPEER": PeerError,
    "KSM_EPEERS": PeerError,
    "KSM_ELOST": PeerError,
    "KSM_EBARRIER": BarrierError,
    "KSM_EUNSTOPPABLE": BarrierError,
    "KSM_EDEVICES": BarrierError,
    "KSM_EDISPLACED": HandlerError,
    "KSM_EMASKED": HandlerError,
    "KSM_EBACKING": BackingError,
    "KSM_ECLOSED": ClosedError,
    "KSM_EMEMORY": RegisterError,
    "KSM_EOVERLAP": RegisterError,
    "KSM_ESMALL": RegisterError,
    "KSM_ECORRUPT": CorruptError,
    "KSM_EHEADROOM": HeadroomError,
    "KSM_ENOPROC": Unsupported,
}
_FIRST_PRIVATE = -4096  # the kernel's codes lie between this and 0


def from_code(code: int, symbol: str, message: str, asked: str) -> Exception:
    """The exception for a failed call of the core: `code` and `symbol` say which, `asked` what for."""
    text = f"{message}: {asked}" if asked else message
    kind = _TYPES.get(symbol)
    if kind is not None:
        return kind(errno.EACCES, text) if issubclass(kind, OSError) else kind(text)
    return OSError(-code, text) if code > _FIRST_PRIVATE else Error(text)
