# SPDX-License-Identifier: MIT
"""Programs of another user, with less than this one: what a process may do here, and what it says of it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from conftest import Processes
from forkkit import environment
from pace import SLOWER

START = r"""
import ctypes, dataclasses, json, os, random, signal, struct, sys, threading, time, traceback
import ksmalloc, ksmalloc.ctl

PAGE = 4096
PATH = sys.argv[1]
MOVES = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 8)  # this kernel does
libc = ctypes.CDLL(None, use_errno=True)

def prctl(option, *values):
    done = libc.prctl(option, *map(ctypes.c_ulong, [*values, 0, 0, 0, 0][:4]))
    assert done == 0, os.strerror(ctypes.get_errno())

def filter_call(number):
    # From now on this process and its children get EPERM for one system call.
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    program = Program(len(steps), ctypes.addressof(code))
    prctl(22, 2, ctypes.addressof(program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

def filter_userfaultfd():
    filter_call({"x86_64": 323, "aarch64": 282}[os.uname().machine])

def become_nobody(dumpable=True):
    os.chown(PATH, 65534, 65534)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    if dumpable:
        prctl(4, 1)  # PR_SET_DUMPABLE: as if another user had started the program

def join(**options):
    return ksmalloc.Arena(domain=ksmalloc.Domain("nobody", path=PATH), scan=False, **options)

def two(arena, pages=16, seed=1):
    content = random.Random(seed).randbytes(pages * PAGE)
    blocks = [arena.alloc(len(content)) for _ in range(2)]
    for block in blocks:
        memoryview(block)[:] = content
    return blocks, content

def names(capabilities):
    return [one.name for one in capabilities.better]

def io_uring():
    # A ring, as any program may have one: the descriptor.
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, parameters)
    if ring < 0:
        print("skip: io_uring_setup:", os.strerror(ctypes.get_errno()))
        os._exit(0)
    return ring
"""


def run(processes: Processes, rendezvous: str, body: str, *arguments: Any, **more: str) -> str:
    """Run the start and a body to the end; returns what it printed. Nothing may come on stderr."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    command = [sys.executable, "-c", START + body, rendezvous, *arguments]
    process = processes.popen(*command, env=environment() | more)
    out, err = process.communicate(timeout=60 * SLOWER)
    assert (process.returncode, err) == (0, ""), f"{out}{err}"
    if out.startswith("skip:"):
        pytest.skip(out)
    return str(out)
