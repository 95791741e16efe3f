# SPDX-License-Identifier: MIT
"""The wrappers of Python's own ways to install a SIGSEGV handler; those that go past them; Python's end."""

from __future__ import annotations

import signal

from crashkit import MAKE, STORE, looks, run


def test_the_wrappers_are_what_they_wrap(rendezvous: str) -> None:
    body = (
        MAKE
        + MAKE
        + (
            "import inspect\n"
            "for wrapper in (faulthandler.enable, faulthandler.disable, signal.signal):\n"
            "    assert wrapper.__doc__ == wrapper.__wrapped__.__doc__\n"
            "    assert not hasattr(wrapper.__wrapped__, '__wrapped__') or wrapper is signal.signal\n"
            "assert list(inspect.signature(signal.signal).parameters) == ['signalnum', 'handler']\n"
            "assert signal.signal(signal.SIGUSR1, hear) == signal.SIG_DFL == signal.Handlers.SIG_DFL\n"
            "for wrong in (('x', hear), (signal.SIGSEGV, 'x'), (signal.SIGKILL, hear), (-1, hear)):\n"
            "    try:\n"
            "        signal.signal(*wrong)\n"
            "    except (TypeError, ValueError, OSError):\n"
            "        continue\n"
            "    raise AssertionError(wrong)\n"
            "assert faulthandler.disable() is False\n"
            "faulthandler.enable(sys.stderr, all_threads=False)\n"
            "assert faulthandler.is_enabled()\n"
            "try:\n"
            "    faulthandler.enable(file=object())\n"
            "except AttributeError:\n"
            "    pass\n"
        )
    )
    assert looks(run(rendezvous, body + STORE, "with")) == (0, "")


def test_nothing_is_wrapped_before_it_is_needed(rendezvous: str) -> None:
    body = (
        "before = faulthandler.enable, faulthandler.disable, signal.signal\n"
        "arena = ksmalloc.Arena(domain=ksmalloc.Domain('x', path=sys.argv[1]))\n"
        "blocks = [arena.alloc(4096) for _ in range(2)]\n"
        "arena.scan()\n"
        "assert (faulthandler.enable, faulthandler.disable, signal.signal) == before\n"
        "arena.freeze(blocks[0])\n"
        "assert faulthandler.enable is not before[0] and signal.signal is not before[2]\n"
    )
    assert looks(run(rendezvous, body, "with")) == (0, "")


PAST = r"""
from faulthandler import enable

def two(arena, byte):
    blocks = [arena.alloc(4096) for _ in range(2)]
    for block in blocks:
        memoryview(block)[:] = byte * 4096
    arena.scan()
    memoryview(blocks[0])[0] = 1
    assert bytes(blocks[0]) == b"\1" + byte * 4095 and bytes(blocks[1]) == byte * 4096
    return arena.stats().arena_cow_breaks

mine.make()
domain = mine.arena.domain
enable()
while not ksmalloc.capabilities(domain).suspensions:
    mine.arena.scan()
found = ksmalloc.capabilities(domain)
assert (found.handler, found.cow) == ("displaced", ("kernel",)), found
assert two(mine.arena, b"x") == 16
[one] = [one for one in found.better if one.name == "cow sigsegv"]
exec(one.remedy)
assert ksmalloc.capabilities(domain).handler == "installed"
assert two(mine.arena, b"y") == 17
"""


def test_one_that_goes_past_the_wrappers_is_found(rendezvous: str) -> None:
    """Nothing is read-only until ours stands again, which the remedy brings about."""
    assert looks(run(rendezvous, PAST, "with")) == (0, "")


LATE = r"""
mine.make()
content = bytes(range(256)) * 16
blocks = [mine.arena.alloc(4096) for _ in range(2)]
for block in blocks:
    memoryview(block)[:] = content
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(block))
mine.arena.scan()
libc = ctypes.CDLL(None)
# A store by the C library, when Python has ended: the time of day, which needs no system call.
libc.on_exit(libc.clock_gettime, ctypes.c_void_p(blocks[0].address))
"""


def test_stores_after_python_has_ended(rendezvous: str) -> None:
    """Python's end takes faulthandler's handler away, and ours with it, unless we stand again."""

    def ends(body: str) -> int:
        return run(rendezvous, body, "with", "-X", "faulthandler").returncode

    assert {ends(LATE) for _ in range(5)} == {0}
    unprotected = "ksmalloc._core.handler_outlives_python = lambda: None\n" + LATE
    # Not always: the scanner may find out first that ours is gone, and make everything writable.
    assert any(ends(unprotected) == -signal.SIGSEGV for _ in range(20))
