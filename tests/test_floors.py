"""The floors of csrc/: a file includes lower floors only. The table is in csrc/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
MAX_LINES = 450
SMALL = 30  # a .c file this short needs no DOC block
EVERYBODYS = "ksmalloc.h"  # types only, so every floor may include it
# os_uffd.c is a part of os.h
WHOLES = ("arena", "barrier", "domain", "member", "merge", "os", "peer", "scan", "worker")


def expand(pattern: str) -> list[str]:
    """`error.[ch]` names error.c and error.h."""
    return [pattern[:-4] + letter for letter in "ch"] if pattern.endswith("[ch]") else [pattern]


def read_floors(readme: str) -> dict[str, int]:
    """File name → floor, from the rows `| number | files in backticks | what |` of the table."""
    floors: dict[str, int] = {}
    for line in readme.splitlines():
        row = re.match(r"\|\s*(\d+)\s*\|([^|]*)\|", line)
        for pattern in re.findall(r"`([^`]+)`", row[2]) if row else []:
            for name in expand(pattern):
                if name in floors:
                    raise ValueError(f"{name} stands in the floor table twice")
                floors[name] = int(row[1]) if row else 0
    return floors


def stale_rows(readme: str, names: set[str]) -> list[str]:
    """Entries of the table that name no file."""
    rows = re.findall(r"^\|\s*\d+\s*\|([^|]*)\|", readme, re.MULTILINE)
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]
    return [f"README.md: the floor table names {p}" for p in patterns if not names & set(expand(p))]


def may_include(name: str, header: str, floors: dict[str, int]) -> bool:
    if header == EVERYBODYS or Path(header).stem == Path(name).stem:
        return True
    if any(name.startswith(f"{whole}_") and header == f"{whole}.h" for whole in WHOLES):
        return True
    return floors[header] < floors[name]


def check_includes(name: str, text: str, floors: dict[str, int]) -> list[str]:
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        include = re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line)
        if not include:
            continue
        quote, header = include.groups()
        if header == "Python.h":
            problems.append(f"{name}:{number}: the core knows no Python.h")
        elif quote == '"' and header not in floors:
            problems.append(f'{name}:{number}: "{header}" stands on no floor')
        elif quote == '"' and name in floors and not may_include(name, header, floors):
            floor, below = floors[name], floors[header]
            problems.append(f"{name}:{number}: floor {floor} includes {header} of floor {below}")
    return problems


def check_text(name: str, text: str) -> list[str]:
    problems = []
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        problems.append(f"{name}: {len(lines)} lines, more than {MAX_LINES}: a noun is missing")
    top = "\n".join(lines[:15])
    if name.endswith(".c") and len(lines) >= SMALL and not re.search(r"^ \* DOC: \S", top, re.MULTILINE):
        problems.append(f"{name}: no DOC: block at its top")
    return problems


def check(csrc: Path) -> list[str]:
    """Everything that is wrong with the files of a directory, one sentence each."""
    readme = (csrc / "README.md").read_text(encoding="utf-8")
    floors = read_floors(readme)
    files = sorted(path for path in csrc.iterdir() if path.suffix in (".c", ".h"))
    problems = stale_rows(readme, {path.name for path in files})
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.name not in floors:
            problems.append(f"{path.name}: stands on no floor")
        problems += check_includes(path.name, text, floors) + check_text(path.name, text)
    return problems


def test_the_core_keeps_its_floors() -> None:
    assert check(CSRC) == []


def test_the_table_reads_from_the_ground_up() -> None:
    rows = re.findall(r"^\|\s*(\d+)\s*\|", (CSRC / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(len(rows)))


# ---- the checker, on planted violations --------------------------------------------------------------------

TABLE = """\
| floor | files | what |
|---|---|---|
| 0 | `base.h` `ksmalloc.h` | ground |
| 1 | `os.[ch]`, `os_uffd.c`, `caps.h` | system calls |
| 2 | `page.[ch]` | pages |
"""
SOUND = {
    "README.md": TABLE,
    "base.h": "#include <stdint.h>\n",
    "ksmalloc.h": "",
    "os.h": '#include "base.h"\n',
    "os.c": '#include "os.h"\n#include "base.h"\n',
    "os_uffd.c": '#include "os.h"\n',
    "caps.h": "",
    "page.h": '#include "ksmalloc.h"\n',
    "page.c": '#include "page.h"\n#include "os.h"\n#include <unistd.h>\n',
}


def problems_of(folder: Path, **changes: str) -> list[str]:
    """What the checker says of the sound directory with some files changed; `page_c` stands for page.c."""
    files = SOUND | {re.sub(r"_(c|h|md)$", r".\1", name): text for name, text in changes.items()}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return check(folder)


def test_a_sound_directory_passes(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("os_c", '#include "page.h"', "os.c:1: floor 1 includes page.h of floor 2"),
        ("base_h", '\n#  include  "os.h"', "base.h:2: floor 0 includes os.h of floor 1"),
        ("os_c", '#include "caps.h"', "os.c:1: floor 1 includes caps.h of floor 1"),
        ("os_h", '#include "caps.h"', "os.h:1: floor 1 includes caps.h of floor 1"),
        ("os_uffd_c", '#include "caps.h"', "os_uffd.c:1: floor 1 includes caps.h of floor 1"),
        ("page_c", '#include "unheard.h"', 'page.c:1: "unheard.h" stands on no floor'),
        ("page_c", "#include <Python.h>", "page.c:1: the core knows no Python.h"),
        ("page_c", '#include "Python.h"', "page.c:1: the core knows no Python.h"),
        ("stray_c", "", "stray.c: stands on no floor"),
        ("stray_h", "", "stray.h: stands on no floor"),
        ("page_c", "int x;\n" * 100, "page.c: no DOC: block at its top"),
        ("page_c", "int x;\n" * 20 + "/*\n * DOC: Late\n */\n" * 5, "page.c: no DOC: block at its top"),
        ("page_h", "int x;\n" * 451, "page.h: 451 lines, more than 450: a noun is missing"),
        ("README_md", TABLE + "| 3 | `span.[ch]` | x |\n", "README.md: the floor table names span.[ch]"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, text: str, problem: str) -> None:
    assert problems_of(tmp_path, **{name: text}) == [problem]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    documented = "/* SPDX-License-Identifier: MIT */\n/*\n * DOC: Pages\n *\n * All about pages.\n */\n"
    includes = '#include "page.h"\n#include "base.h"\n#include "ksmalloc.h"\n#include <sys/mman.h>\n'
    assert problems_of(tmp_path, page_c=documented + includes + "int x;\n" * 400) == []


def test_a_file_on_two_floors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.h stands in the floor table twice"):
        problems_of(tmp_path, README_md=TABLE + "| 3 | `page.h` | x |\n")
