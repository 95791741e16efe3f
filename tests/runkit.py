# SPDX-License-Identifier: MIT
"""Run a program of the tests that prints, last, one line of figures: `word=number word=number …`."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import Processes

PATIENCE = 10  # seconds that what was killed may take to end
NOT_HERE = 77  # the status of a program that says: what you want does not work on this machine


def said_so_far(process: subprocess.Popen[str]) -> str:
    """What a program that was killed has said. One that is left may still have the pipe open."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace") + f"\nand {PATIENCE} s later somebody is left"


class Run:
    """One run: its status, its figures, and whatever it said. Longer than `limit` seconds is a failure.

    The line of figures begins with `first`.
    """

    def __init__(
        self, processes: Processes, program: Path, *arguments: str | Path, limit: float, first: str
    ) -> None:
        process = processes.popen(program, *arguments, stderr=subprocess.STDOUT)
        try:
            self.output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()  # its processes go with it
            pytest.fail(f"no end within {limit} s\n{said_so_far(process)}", pytrace=False)
        asked = shlex.join(map(str, arguments))
        print(asked, self.output, sep="\n")
        self.status = process.returncode
        if self.status == NOT_HERE:
            pytest.skip(f"does not work here: {asked}")
        lines = [line for line in self.output.splitlines() if line.startswith(first)]
        words = dict(word.split("=", 1) for word in lines[-1].split()) if lines else {}
        self.figures = {name: int(word) for name, word in words.items() if word.isdigit()}
