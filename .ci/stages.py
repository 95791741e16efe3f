"""Everything that must hold, from a clean checkout: Debian packages, README's own commands, lint, the
manual, and a smoke test on every Python at hand. Prints how long each stage took; stops at the first that
fails, or that leaves a process behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 35 * 60  # seconds a stage may take
PR_SET_CHILD_SUBREAPER = 36

ENVIRONMENT = os.environ | {
    "DEBIAN_FRONTEND": "noninteractive",
    "KSMALLOC_WERROR": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_QUIET": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
    ENVIRONMENT.pop(name, None)


def children() -> list[int]:
    """Our living children; orphans of a stage become ours, because we are their subreaper."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state not in "ZX":
            found.append(int(entry.parent.name))
    return found


def describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = "ended"
    return f"process {pid} ({command[:80].strip()})"


def reap(until: int | None, seconds: float) -> int | None:
    """Collect ended children. Returns the wait status of `until`; None: the time is up, or nobody is left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid and pid == until:
            return status
        if not pid:
            time.sleep(0.05)
    return None


def stage(title: str, command: str, cwd: Path = ROOT) -> None:
    """Run one shell command in a session of its own, and print how long it took."""
    print(f"==> {title}\n    {command}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    status = reap(process.pid, LIMIT)
    process.returncode = 0  # collected by reap(), not by Popen
    if status is not None:
        reap(None, 10)  # what ends by itself within moments is not left behind
    left = children()
    names = [describe(pid) for pid in left]
    while left:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(None, 1)
        left = children()
    print(f"<== {title}: {time.monotonic() - start:.0f} s", flush=True)
    if status is None:
        sys.exit(f"{title}: no end within {LIMIT} s")
    if status != 0:
        sys.exit(f"{title}: failed with status {os.waitstatus_to_exitcode(status)}")
    if names:
        sys.exit(f"{title}: left behind {', '.join(names)}")


def readme_command(name: str) -> str:
    """The command in README.md's block that is marked with this name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(rf"<!-- command: {name} -->\n```sh\n(.+)\n```\n", text)
    return str(command)


def missing_packages() -> list[str]:
    """Debian packages that provide what is not there."""
    python_h = Path(sysconfig.get_path("include")) / "Python.h"
    wanted = {
        "gcc": shutil.which("gcc") and shutil.which("cc"),
        "libc6-dev": Path("/usr/include/stdio.h").exists(),
        "make": shutil.which("make"),
        "spin": shutil.which("spin"),
        "gcc-aarch64-linux-gnu": shutil.which("aarch64-linux-gnu-gcc"),
        "libc6-dev-arm64-cross": Path("/usr/aarch64-linux-gnu/include/stdio.h").exists(),
        "qemu-user-static": shutil.which("qemu-aarch64-static"),
        "python3-dev": python_h.exists(),
        "python3-venv": importlib.util.find_spec("ensurepip"),
    }
    return [package for package, there in wanted.items() if not there]


def pythons() -> list[Path]:
    """Pythons 3.10 and later that pyenv has, or else the one that runs this."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [path for path in versions.glob("3.*/bin/python") if int(path.parts[-3].split(".")[1]) >= 10]
    return sorted(found, key=lambda path: int(path.parts[-3].split(".")[1])) or [Path(sys.executable)]


def smoke(python: Path) -> None:
    """Install into a fresh environment of this Python, and use the installed package outside the checkout."""
    folder = Path(tempfile.mkdtemp(prefix="ksmalloc-smoke-"))
    try:
        title = f"smoke on {python.parts[-3] if python.parts[-2] == 'bin' else python}"
        stage(
            title,
            f"{python} -m venv {folder}/venv && {folder}/venv/bin/pip install {ROOT}"
            f" && {folder}/venv/bin/python {ROOT}/tests/smoke.py && {folder}/venv/bin/ksmctl --version",
            cwd=folder,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    start = time.monotonic()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if missing := missing_packages():
        if os.getuid() != 0:
            sys.exit(f"these Debian packages are missing: {' '.join(missing)}")
        stage(
            "packages",
            f"apt-get update -qq && apt-get install -qq --no-install-recommends {' '.join(missing)}",
        )
    stage("demo", readme_command("demo"))
    stage("tests", readme_command("test"))
    stage("build", "make build")
    stage("lint", "make lint")
    stage("docs", "make docs")
    for python in pythons():
        smoke(python)
    print(f"<== all: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
