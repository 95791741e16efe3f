# SPDX-License-Identifier: MIT
"""For the tests of ksmctl: run it in this process, and have somebody live in a domain."""

from __future__ import annotations

import subprocess

import pytest
from conftest import Processes

from ksmalloc.ctl import main

PEER = """
import sys
import ksmalloc
domain = ksmalloc.Domain(sys.argv[1], path=sys.argv[2], backing=sys.argv[3])
print(dict(domain.settings), flush=True)
sys.stdin.read()
"""


class Ctl:
    """Runs ksmctl in this process, for the domains of one directory; remembers what it said."""

    def __init__(self, path: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        code = main([*arguments, "--path", self.path])
        self.out, self.err = self._capsys.readouterr()
        return code

    def said(self, *arguments: str) -> str:
        """What a command that succeeds prints, and nothing on stderr."""
        assert self(*arguments) == 0, self.err
        assert self.err == ""
        return self.out


def live(
    processes: Processes, path: str, name: str = "default", backing: str = "memfd"
) -> subprocess.Popen[str]:
    """A process that lives in a domain; its first line, the settings that it found, is in `.args`."""
    process = processes.python(PEER, name, path, backing)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    process.args = line
    return process
