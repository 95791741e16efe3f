# SPDX-License-Identifier: MIT
"""ksmalloc's SIGSEGV handler beside Python's: stores land, and a real crash looks as it does without."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from conftest import Processes
from crashkit import DEFAULT, DISABLE, ENABLE, HEAR, IGNORE, MAKE, START, STORE, looks, run
from forkkit import environment

OVER_AND_OVER = "for _ in range(100):\n"
IN_A_THREAD = "import threading\nt = threading.Thread(target=faulthandler.enable)\nt.start()\nt.join()\n"
ORDERS = {
    "alone": MAKE,
    "enabled before": ENABLE + MAKE,
    "enabled after": MAKE + ENABLE,
    "before, and once more": ENABLE + MAKE + ENABLE,
    "after, and disabled": MAKE + ENABLE + DISABLE,
    "before, and disabled": ENABLE + MAKE + DISABLE,
    "before, disabled, enabled": ENABLE + MAKE + STORE + DISABLE + STORE + ENABLE,
    "over and over": ENABLE + MAKE + f"{OVER_AND_OVER}    {DISABLE}    {ENABLE}",
    "replaced before": HEAR + DEFAULT + MAKE,
    "replaced after": MAKE + HEAR + STORE + DEFAULT,
    "ignored after": MAKE + IGNORE,
    "replaced over and over": MAKE + f"{OVER_AND_OVER}    {HEAR}    {IGNORE}    {DEFAULT}" + STORE + ENABLE,
    "enabled, replaced, disabled": MAKE + ENABLE + STORE + HEAR + STORE + DISABLE,
    "replaced, enabled": MAKE + DEFAULT + ENABLE,
    "in another thread": MAKE + IN_A_THREAD,
    "in a child": MAKE + ENABLE + "if os.fork():\n    os._exit(os.wait()[1] & 0x7F)\n",
}
CRASHES = {
    "a fault": "ctypes.string_at(0)\n",
    "a signal": "os.kill(os.getpid(), signal.SIGSEGV)\n",
    "an abort": "os.abort()\n",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_stores_land_and_a_crash_looks_the_same(rendezvous: str, order: str) -> None:
    body = order + STORE + "print('so far', flush=True)\n" + CRASHES["a fault"]
    done, control = run(rendezvous, body, "with"), run(rendezvous, body, "without")
    assert control.stdout == "so far\n"
    assert done.stdout == "so far\n", done.stderr
    assert looks(done) == looks(control)
    if "fork" in order:
        assert done.returncode == signal.SIGSEGV  # what the parent says of its child
    else:
        assert done.returncode == -signal.SIGSEGV
    assert ("Fatal Python error: Segmentation fault" in done.stderr) == order_dumps(order)


def order_dumps(order: str) -> bool:
    """Whether faulthandler is what a crash meets in the end."""
    last = max(order.rfind(step) for step in (ENABLE, "faulthandler.enable"))
    return last > max(order.rfind(step) for step in (DISABLE, HEAR, DEFAULT, IGNORE))


@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES)
def test_the_command_line_option(rendezvous: str, crash: str) -> None:
    body = MAKE + STORE + crash
    done, control = (run(rendezvous, body, how, "-X", "faulthandler") for how in ("with", "without"))
    assert looks(done) == looks(control)
    assert done.returncode < 0
    assert "Fatal Python error: " in done.stderr


def test_handlers_in_python_are_called(rendezvous: str) -> None:
    """Before and after ours, for signals that are sent; and signal.signal() returns what it always did."""
    for order in (HEAR + MAKE, MAKE + HEAR, MAKE + ENABLE + HEAR):
        body = (
            order
            + STORE
            + (
                "os.kill(os.getpid(), signal.SIGSEGV)\n"
                "assert heard == [signal.SIGSEGV]\n"
                "assert signal.signal(signal.SIGSEGV, signal.SIG_IGN) is hear\n"
                "assert signal.getsignal(signal.SIGSEGV) is signal.SIG_IGN\n"
                "os.kill(os.getpid(), signal.SIGSEGV)\n"
                "assert heard == [signal.SIGSEGV]\n"
            )
        )
        for how in ("with", "without"):
            assert looks(run(rendezvous, body + STORE, how)) == (0, "")


def test_under_pytest(processes: Processes, rendezvous: str, tmp_path: Path) -> None:
    """pytest enables faulthandler when it is configured: after a conftest.py, before the tests."""
    start = START.replace("sys.argv[2]", "'with'").replace("sys.argv[1]", repr(rendezvous))
    (tmp_path / "conftest.py").write_text(start + MAKE)
    (tmp_path / "test_it.py").write_text(
        "import ctypes\nfrom conftest import mine\n"
        "def test_stores():\n    mine.store()\n"
        "def test_more_stores():\n    mine.make()\n    mine.store()\n"
        "def test_crash():\n    ctypes.string_at(0)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(tmp_path)]
    env = environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    fine = processes.popen(*command, "-k", "stores", env=env, cwd=tmp_path)
    out, err = fine.communicate(timeout=60)
    assert (fine.returncode, err) == (0, ""), out
    crashed = processes.popen(*command, env=env, cwd=tmp_path)
    out, err = crashed.communicate(timeout=60)
    assert crashed.returncode == -signal.SIGSEGV
    assert out.count("PASSED") == 2
    assert err.startswith("Fatal Python error: Segmentation fault\n")
    assert 'test_it.py", line 9 in test_crash' in err
