# SPDX-License-Identifier: MIT
"""What the barrier "stop" interrupts: the table in docs/stop.md is measured anew; Python notices nothing."""

from __future__ import annotations

import queue
import re
import select
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import ksmalloc

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CORE = ("park", "gate", "thread", "hazards", "error")
FLAGS = shlex.split(
    "-std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Werror -pthread -DKSM_FAULTS -DKSM_ASSERT_LEVEL=2"
)
MOST = 0.7  # seconds that the timed waits below take
STOPS = 50


def measured(folder: Path) -> dict[str, str]:
    """Call → "EINTR" or "goes on"."""
    sources = [*(CSRC / f"{name}.c" for name in CORE), *sorted(CSRC.glob("os*.c"))]
    quote = ("-iquote", CSRC, "-iquote", ROOT / "tests" / "csrc")
    command = ["cc", *FLAGS, *quote, ROOT / "tests" / "eintr" / "eintr.c", *sources]
    subprocess.run([*command, "-lutil", "-lrt", "-o", folder / "eintr"], check=True, timeout=120)
    done = subprocess.run(
        [folder / "eintr", "--run", "every_call"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert set(rows.values()) == {"EINTR", "goes on"}
    return rows


def documented(page: str) -> dict[str, str]:
    """The same from the table: `| call | what happens |`, details in brackets."""
    rows = re.findall(r"^\| (`.+) \| (EINTR|goes on) \|$", page, re.MULTILINE)
    return {call.replace("`", ""): what for call, what in rows}


def test_the_table_in_the_manual_is_what_happens(tmp_path: Path) -> None:
    assert documented((ROOT / "docs" / "stop.md").read_text("utf-8")) == measured(tmp_path)


def test_the_table_is_read_as_it_is_written() -> None:
    page = "| call | what |\n|---|---|\n| `read`: pipe | goes on |\n| `poll`, `x` | EINTR |\n| no | EINTR |\n"
    assert documented(page) == {"read: pipe": "goes on", "poll, x": "EINTR"}


# ---- Python ------------------------------------------------------------------------------------------------


def nap() -> None:
    time.sleep(MOST)


def receive() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Timer(MOST, theirs.send, [b"hello"]).start()
        assert ours.recv(16) == b"hello"


def receive_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(MOST)
        with pytest.raises(TimeoutError):
            ours.recv(16)


def accept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Timer(MOST, lambda: socket.create_connection(("127.0.0.1", port)).close()).start()
        connection, _ = server.accept()
        connection.close()


def wait_for_descriptors() -> None:
    assert select.select([], [], [], MOST) == ([], [], [])


def poll() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        poller = select.poll()
        poller.register(ours, select.POLLIN)
        assert poller.poll(MOST * 1000) == []


def epoll() -> None:
    with select.epoll() as poller:
        assert poller.poll(MOST) == []


def wait_for_child() -> None:
    code = f"import time; time.sleep({MOST})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def wait_for_child_in_time() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=MOST)
        child.communicate(b"\n")
    assert child.returncode == 0


def get_from_queue() -> None:
    with pytest.raises(queue.Empty):
        queue.Queue[int]().get(timeout=MOST)


def acquire() -> None:
    lock = threading.Lock()
    with lock:
        assert not lock.acquire(timeout=MOST)


def wait_for_event() -> None:
    assert not threading.Event().wait(MOST)


def pool() -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda n: time.sleep(MOST / 4) or n, range(8))) == list(range(8))


@contextmanager
def stops(path: str) -> Iterator[Callable[[], int]]:
    """Threads are held all the time: a thread writes equal pages and has them merged. Yields their number."""
    domain = ksmalloc.Domain("eintr", path=path)
    arena = ksmalloc.Arena(domain=domain, barrier="stop")
    pages = arena.empty((2, 32, 4096), np.uint8)
    over = threading.Event()

    def merge() -> None:
        number = 0
        while not over.is_set():
            number += 1
            pages[:, :, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
            pages[:, :, 8] = np.arange(32, dtype=np.uint8)
            arena.scan()
            assert (pages[0] == pages[1]).all()

    thread = threading.Thread(target=merge)
    thread.start()
    try:
        yield lambda: ksmalloc.capabilities(domain).stops
    finally:
        over.set()
        thread.join()


WAITS = (
    nap,
    receive,
    receive_in_time,
    accept,
    wait_for_descriptors,
    poll,
    epoll,
    wait_for_child,
    wait_for_child_in_time,
    get_from_queue,
    acquire,
    wait_for_event,
    pool,
)


def test_python_notices_nothing(rendezvous: str) -> None:
    """PEP 475: whatever is interrupted is called again, for the time that is left."""

    def timed(wait: Callable[[], None]) -> float:
        begin = time.monotonic()
        wait()
        return time.monotonic() - begin

    with stops(rendezvous) as count, ThreadPoolExecutor(len(WAITS)) as threads:
        before = count()
        rounds = 0
        while count() < before + STOPS or rounds == 0:
            rounds += 1
            took = list(threads.map(timed, WAITS))
            assert min(took) >= MOST * 0.99, "a wait ended early"
        print(f"{count() - before} stops in {rounds} rounds; the longest wait: {max(took):.2f} s")
