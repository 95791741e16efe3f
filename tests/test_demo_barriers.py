# SPDX-License-Identifier: MIT
"""ksmctl demo where the best barrier is not to be had, and where none is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_demo import DEMO, run

WITHOUT_USERFAULTFD = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000
PR_CAPBSET_DROP, CAP_SYS_PTRACE = 24, 19
def check(rc):
    if rc:
        print(os.strerror(ctypes.get_errno()))
        sys.exit(77)
if os.path.exists("/dev/userfaultfd"):
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"/dev/null", b"/dev/userfaultfd", None, MS_BIND, None))
check(libc.prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE))
if sys.argv[1] == "ignore":  # every signal that could hold a thread
    for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        signal.signal(number, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def without_userfaultfd(signals: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The demonstration in processes without CAP_SYS_PTRACE and /dev/userfaultfd."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("everybody may use userfaultfd here")
    done = run([sys.executable, "-c", WITHOUT_USERFAULTFD, signals, *DEMO[1:], "--workers", "2", *arguments])
    if done.returncode == 77:
        pytest.skip(f"the test cannot keep itself from userfaultfd: {done.stdout}")
    return done


def test_without_userfaultfd(rendezvous: str) -> None:
    done = without_userfaultfd("leave", "--path", rendezvous, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["can_merge"], found["good"], found["barrier"]) == (True, True, "stop")
    assert os.listdir(rendezvous) == []


@pytest.mark.parametrize("as_json", [False, True])
def test_where_nothing_can_merge(rendezvous: str, as_json: bool) -> None:
    done = without_userfaultfd("ignore", "--path", rendezvous, *(["--json"] if as_json else []))
    assert done.returncode == 1, done.stderr
    if as_json:
        found = json.loads(done.stdout)
        assert (found["can_merge"], found["good"], found["barrier"]) == (False, False, "none")
        assert found["why_not"]
    else:
        assert done.stdout.startswith("Nothing can merge here: ")
        assert "ksmctl doctor" in done.stdout
    assert os.listdir(rendezvous) == []
