"""What must agree across files: versions, pins, README and CI, sizes; and nothing speaks of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ksmalloc

ROOT = Path(__file__).resolve().parent.parent
CODE = {".c", ".h", ".md", ".py", ".pyi", ".pyx", ".pxd", ".pxi", ".toml", ".yaml", ".pml", ".svg", ""}
OURS = ("csrc", "docs", "ksmalloc", "tests", ".ci")
NAMES = ("Makefile", "MANIFEST.in", "setup.py", "pyproject.toml", ".clang-format", ".pre-commit-config.yaml")
LIMITS = {".pyx": 400, ".pxi": 400, ".py": 250}
GENERATED = {"__pycache__", "_build", "jupyter_execute", ".ipynb_checkpoints"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def files() -> list[Path]:
    """The project's own text files."""
    below = [path for folder in OURS for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    above = [ROOT / name for name in NAMES] + sorted(ROOT.glob("*.md"))
    return sorted(path for path in below + above if path.is_file() and not GENERATED & set(path.parts))


def from_pyproject(pattern: str) -> str:
    [found] = re.findall(pattern, read("pyproject.toml"), re.MULTILINE)
    return str(found)


def test_version_is_one() -> None:
    assert ksmalloc.__version__ == from_pyproject(r'^version = "(.+)"$')


def test_formatters_are_pinned_alike() -> None:
    pins = dict(re.findall(r'"([\w-]+)==([\d.]+)"', read("pyproject.toml")))
    hooks = dict(re.findall(r'"([\w-]+)==([\d.]+)"', read(".pre-commit-config.yaml")))
    assert hooks == pins


def test_readme_has_two_commands_and_ci_runs_them() -> None:
    blocks = re.findall(r"^```sh\n(.+?)\n```$", read("README.md"), re.MULTILINE | re.DOTALL)
    marked = re.findall(r"<!-- command: (\w+) -->\n```sh\n(.+)\n```\n", read("README.md"))
    assert [name for name, _ in marked] == ["demo", "test"]
    assert [command for _, command in marked] == blocks
    for name, _ in marked:
        assert f'readme_command("{name}")' in read(".ci/stages.py")


def test_makefile_documents_every_target() -> None:
    phony = " ".join(re.findall(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE))
    documented = re.findall(r"^([a-z-]+):.*## ", read("Makefile"), re.MULTILINE)
    assert sorted(documented) == sorted(phony.split())


def test_c_files_name_their_license() -> None:
    first = "/* SPDX-License-Identifier: MIT */\n"
    sources = [path for path in files() if path.suffix in (".c", ".h")]
    assert [path.name for path in sources if not path.read_text("utf-8").startswith(first)] == []


def test_no_file_outgrows_its_noun() -> None:
    package = [path for path in files() if path.is_relative_to(ROOT / "ksmalloc") and path.suffix in LIMITS]
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in package}
    assert {name: n for name, n in lines.items() if n > LIMITS[Path(name).suffix]} == {}


def test_nothing_speaks_of_one_machine() -> None:
    machine = re.compile(r"/(root|work|opt|home)/[\w.]")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def test_what_the_test_extra_installs_is_not_skipped() -> None:
    skips = re.compile(r"pytest\.(importorskip|mark\.xfail)\b")
    tests = [path for path in files() if path.is_relative_to(ROOT / "tests") and path.suffix == ".py"]
    tests.remove(Path(__file__).resolve())
    assert [path.name for path in tests if skips.search(path.read_text("utf-8"))] == []


def test_c_tests_mirror_the_core() -> None:
    """tests/csrc/test_<module>.c tests a module of csrc/."""
    modules = {path.stem for path in (ROOT / "csrc").glob("*.[ch]")}
    programs = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "csrc").glob("test_*.c")}
    assert programs - modules == set()


def test_other_systems_are_refused_in_one_sentence() -> None:
    code = "import runpy, sys; sys.platform = 'darwin'; runpy.run_path('setup.py')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "ksmalloc works on Linux only: it is made of memfd, userfaultfd and pagemap.\n"
