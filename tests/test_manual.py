# SPDX-License-Identifier: MIT
"""Pages of the manual whose code cannot run in a notebook, because of the threads that one has, run here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from forkkit import environment

import ksmalloc

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Pages are about the default domain; this makes one of the test's own of it.
START = """
import sys, ksmalloc
sys.modules["ksmalloc.domain"]._default = ksmalloc.Domain(path=sys.argv[1])
"""


@pytest.mark.parametrize("page", ["frozen.md"])
def test_a_page_says_what_happens(page: str, rendezvous: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    with ksmalloc.Domain(path=rendezvous) as domain:
        if domain.stats().barrier == "none":
            pytest.skip(str(domain.stats().why_not))
    command = [sys.executable, "-c", START + "\n".join(blocks), rendezvous]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_every_word_of_the_program_is_explained() -> None:
    text = (DOCS / "ksmctl.md").read_text(encoding="utf-8")
    from ksmalloc.ctl import COMMANDS

    assert [name for name in COMMANDS if f"`{name}`" not in text and f"ksmctl {name}" not in text] == []
