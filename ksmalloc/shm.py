# SPDX-License-Identifier: MIT
"""``backing="shm"``: the store in a named POSIX shared memory object, through posix_ipc.

A memfd needs no name and goes with its last process, so it is the default. A named object can be seen and
measured from outside (``/dev/shm``), and outlives a last process that is killed, until somebody joins the
domain again or it is removed here.
"""

from __future__ import annotations

import errno
import os
from importlib import import_module
from typing import Any

from ksmalloc import _core

_DIRECTORY = "/dev/shm"
_PREFIX = f"ksmalloc-{os.geteuid()}-"


def posix_ipc() -> Any:
    """The module posix_ipc, or an ImportError that says how to get it."""
    try:
        return import_module("posix_ipc")
    except ImportError as error:
        raise ImportError(
            "backing='shm' needs posix_ipc: pip install 'ksmalloc[shm]'", name="posix_ipc"
        ) from error


def join(rendezvous: _core.Rendezvous) -> _core.Domain:
    """Join a domain whose store is a named object, which is made here in case there is no such domain yet.

    Errors: ImportError (no posix_ipc), OSError, and those of joining.
    """
    ipc = posix_ipc()
    store_id = os.urandom(16)
    name = f"/{_PREFIX}{store_id.hex()}"
    try:
        memory = ipc.SharedMemory(name, flags=ipc.O_CREX, mode=0o600)
    except ipc.PermissionsError as error:
        raise OSError(errno.EACCES, str(error), name) from error
    domain = None
    try:
        domain = _core.Domain(rendezvous, _core.BARRIERS["auto"], memory.fd, store_id)
    finally:
        memory.close_fd()
        if (
            domain is None or domain.id != store_id.hex()
        ):  # the domain has another store: this one is nobody's
            ipc.unlink_shared_memory(name)
    return domain


def objects() -> list[str]:
    """The names of this user's shared memory objects of ksmalloc's, of living domains and of dead ones."""
    with os.scandir(_DIRECTORY) as entries:
        return sorted(
            "/" + entry.name
            for entry in entries
            if entry.name.startswith(_PREFIX) and entry.is_file(follow_symlinks=False)
        )
