# SPDX-License-Identifier: MIT
"""The ways in which Python starts processes, from one that merges; and that nothing warns of our thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Processes
from forkkit import QUIET, START, environment, run


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(processes: Processes, rendezvous: str, tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        START
        + """
import multiprocessing
kept = []

def work(number):
    same, different = block(1), block(10 + number)
    kept.extend([same, different])
    merge()
    assert right(same, 1) and right(different, 10 + number)
    time.sleep(0.05)
    return os.getpid()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    with context.Pool(2) as pool:
        a = block(1)
        pids = pool.map(work, range(6), chunksize=1)
        assert ksmalloc.settle(30, domain=domain).settled
        stats = domain.stats()
        assert own().pages_merged == 512 and own().merges == 512, own()
        assert stats.peers >= 1 + len(set(pids))
        assert (stats.pages_shared, stats.pages_merged) == (512, 7 * 512), (stats, stats.pages_shared)
        pool.close()
        pool.join()
    if sys.argv[2] == "forkserver":
        from multiprocessing import forkserver
        forkserver._forkserver._stop()
    assert right(a, 1)
    wait_until(lambda: len(domain.peers) == 1)
    domain.sweep()
    assert domain.stats().pages_shared == 512
    print(*sorted(set(pids)))
"""
    )
    process = processes.popen(sys.executable, *QUIET, program, rendezvous, method, env=environment())
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out + err
    assert out


def test_exec_in_the_child(processes: Processes, rendezvous: str) -> None:
    body = """
a, b = block(1), block(1)
merge()
r, w = os.pipe()
os.set_inheritable(r, True)
pid = os.fork()
if pid == 0:
    c = block(1)
    merge()
    assert own().pages_merged == 1536, own()
    os.execv("/bin/cat", ["cat", f"/dev/fd/{r}"])
os.close(r)
wait_until(lambda: os.readlink(f"/proc/{pid}/exe") != os.readlink("/proc/self/exe"))
wait_until(lambda: len(domain.peers) == 1)  # it lives, and is no peer any more
assert os.waitpid(pid, os.WNOHANG) == (0, 0)
os.close(w)
ended(pid)
assert right(a, 1) and right(b, 1)
del a, b
domain.sweep()
assert domain.stats().store_bytes == 0, domain.stats()
"""
    run(processes, rendezvous, body)


def test_subprocess(processes: Processes, rendezvous: str) -> None:
    body = """
import subprocess
a, b = block(1), block(1)
merge()
for number in range(10):
    done = subprocess.run([sys.executable, "-S", "-c", "print(7)"], capture_output=True, text=True,
                          preexec_fn=os.getpid if number == 5 else None, close_fds=bool(number % 2))
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\\n", "")
    os.posix_spawn("/bin/true", ["true"], {})
    os.wait()
assert len(domain.peers) == 1 and own().pages_merged == 1024
assert right(a, 1) and right(b, 1)
assert os.system("true") == 0
"""
    run(processes, rendezvous, body, *QUIET)


NO_WARNING = """
a, b = arena.alloc(1 << 20), arena.alloc(1 << 20)
memoryview(a)[:] = memoryview(b)[:] = os.urandom(1 << 20)
for number in range(8):
    arena.scan()
    pid = os.fork()
    if pid == 0:
        c = arena.alloc(1 << 20)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    c = arena.alloc(1 << 20)
    if number % 2:
        pid2 = os.fork()
        if pid2 == 0:
            os._exit(0)
        assert os.waitpid(pid2, 0)[1] == 0
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize(
    "imports",
    ["", "import logging", "import threading", "import logging, threading, multiprocessing, random, asyncio"],
    ids=["nothing", "logging", "threading", "many"],
)
@pytest.mark.parametrize("warnings", ["always", "error"])
def test_fork_warns_of_nothing(processes: Processes, rendezvous: str, imports: str, warnings: str) -> None:
    """Python 3.12 and later count the threads of a process that forks; ours must not be one of them."""
    start = f"""
import os, sys
{imports}
import ksmalloc
arena = ksmalloc.Arena(domain=ksmalloc.Domain(path=sys.argv[1]))
"""
    run(processes, rendezvous, NO_WARNING, "-W", warnings, start=start)
