# SPDX-License-Identifier: MIT
"""Sanitizers and valgrind over the tests: what each is told, what it reports, what it cannot run and why.

KSMALLOC_SANITIZER=asan, ubsan, tsan or valgrind makes tests/test_csrc.py run under it (`make asan`, …).
tests/sanitizers/suite.py runs the Python tests under the first.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

FILES = Path(__file__).resolve().parent / "sanitizers"


class Tool(NamedTuple):
    """`{log}` stands for where reports go: one file a process that has something to say."""

    cflags: tuple[str, ...]
    programs: tuple[str, ...]  # more flags, for what is a program and no library
    environment: Mapping[str, str]
    command: tuple[str, ...]  # stands before the program's name
    slower: int  # how many times as long everything may take
    without: str  # what does not work under it, as kit.h knows it
    left_out: Mapping[str, str]  # pattern of program-case: why it cannot run


UNDEFINED = "print_stacktrace=1:log_path={log}"

# A case ends with its process, and frees nothing it need not. SIGSEGV is what many cases are about.
ASAN = Tool(
    cflags=("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    # As libraries each of the two has an idea of its own where reports go, and only one can be told.
    programs=("-static-libasan", "-static-libubsan"),
    environment={
        # The handler's stack: it would unmap ours when a thread ends.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:use_sigaltstack=0:detect_stack_use_after_return=1"
        ":log_path={log}",
        "UBSAN_OPTIONS": UNDEFINED,
    },
    command=(),
    slower=2,
    without="",
    left_out={},
)

UBSAN = Tool(
    cflags=("-fsanitize=undefined", "-fno-sanitize-recover=undefined"),
    programs=(),
    environment={"UBSAN_OPTIONS": UNDEFINED},
    command=(),
    slower=1,
    without="",
    left_out={},
)

STOPS = (
    "a signal is kept back until its thread calls the C library: who computes is not held, and a handler that"
    " has returned to the sanitizer proves nothing"
)
HANDLERS = "handlers of others are installed through the sanitizer, which puts one of its own in front"
WALKS = "thousands of processes, each with its shadow to map: hours; the steps are in the cases beside, too"
PROCESSES = "several processes in step, each seen by itself; slowed down they miss each other's time"
NEIGHBOURS = "the sanitizer maps memory beside ours, and the kernel makes one mapping of both"
HOLES = "memory is moved away and back: the sanitizer maps its own where there was none in between"
MAPPINGS = "it counts the process's mappings, and the sanitizer makes some meanwhile"

# It does not know what fences order. All that ours order is atomic, so nothing is reported wrongly. A case
# ends with its process, and joins no thread it need not.
TSAN = Tool(
    cflags=("-fsanitize=thread", "-Wno-tsan"),
    programs=(),
    environment={
        "TSAN_OPTIONS": "handle_segv=0:die_after_fork=0:report_thread_leaks=0:history_size=7:log_path={log}"
        f":suppressions={FILES / 'tsan.supp'}",
    },
    command=(),
    slower=2,
    without="stop",
    left_out={
        **dict.fromkeys(
            ("test_gate-*", "test_park-*", "test_barrier_stop-*", "test_caps-a_*_is_named"), STOPS
        ),
        **dict.fromkeys(("test_hazards-a_read_that_*", "test_hazards-a_process_that_*"), STOPS),
        **dict.fromkeys(("test_member_fork-a_child_keeps_*", "test_member-a_barrier_that_was_lost_*"), STOPS),
        **dict.fromkeys(
            ("test_restore-*_held", "test_restore-*_parking", "test_restore-*_ring_exists"), STOPS
        ),
        "test_scan_rest-who_writes_*": STOPS,
        "test_os_map-*_from_the_list": NEIGHBOURS,
        "test_barrier_follow-moved_all_the_time": HOLES,
        "test_arena-breaks_keep_*": MAPPINGS,
        **dict.fromkeys(("test_handler-*reporter*", "test_handler-one_who_*"), HANDLERS),
        **dict.fromkeys(("test_handler-there_is_an_end_*", "test_arena-a_displaced_*"), HANDLERS),
        **dict.fromkeys(("test_os-*", "test_barrier_move-*_surviv*"), WALKS),
        **dict.fromkeys(("test_domain-*stopped*", "test_domain-killed_*", "test_member_user-*"), PROCESSES),
    },
)

ONE_AT_A_TIME = (
    "one thread runs at a time: one that sleeps at a page taken out keeps the scanner from putting it back,"
    " and one that computes is not held"
)
FAULTS = (
    "stores into pages that are closed on purpose: it reports them as wrong, and not all reach our handler"
)
SELDOM = "something is to be done so many times a second, and everything takes longer"
PLACES = "it decides itself where memory is mapped, and keeps descriptors of its own"
GROWS = "the address space is measured, and it takes more of its own with each thread"

VALGRIND = Tool(
    cflags=(),
    programs=(),
    environment={},
    command=(
        "valgrind",
        "--quiet",
        "--vgdb=no",
        "--trace-children=yes",
        "--trace-children-skip=/bin/*,/usr/bin/*",
        "--sim-hints=lax-ioctls",
        "--run-libc-freeres=no",  # it frees what other threads still use
        "--log-file={log}.%p",
        "--error-exitcode=86",
    ),
    slower=5,
    without="stop",
    left_out={
        **dict.fromkeys(("test_gate-*", "test_park-*", "test_barrier_stop-*"), ONE_AT_A_TIME),
        **dict.fromkeys(
            ("test_barrier_follow-*", "test_barrier-stores_*", "test_barrier-writers_*"), ONE_AT_A_TIME
        ),
        **dict.fromkeys(
            (
                "test_barrier-held_*",
                "test_merge-nothing_is_*",
                "test_merge-what_fl*",
                "test_restore-writers_*",
            ),
            ONE_AT_A_TIME,
        ),
        **dict.fromkeys(("test_domain-killed_*", "test_domain-a_stopped_*", "test_member_user-*"), PROCESSES),
        **dict.fromkeys(("test_scan_rest-*write*", "test_scan_rest-without_*"), ONE_AT_A_TIME),
        "test_headroom-with_plenty_*": SELDOM,
        **dict.fromkeys(("test_os-*", "test_barrier_move-*_surviv*"), WALKS),
        **dict.fromkeys(("test_handler-*", "test_cow-*", "test_barrier_segv-*"), FAULTS),
        **dict.fromkeys(("test_arena-threads_*", "test_freeze-a_fork_*"), FAULTS),
        **dict.fromkeys(
            ("test_arena-areas_*", "test_member-*costs_no_*", "test_member-a_fork_while_*"), PLACES
        ),
        **dict.fromkeys(("test_member_fork-*keeps_no_mem*", "test_member_fork-*inherit_no_mem*"), GROWS),
    },
)

TOOLS = {"asan": ASAN, "ubsan": UBSAN, "tsan": TSAN, "valgrind": VALGRIND}


def name_here() -> str | None:
    """The name of the tool that the environment asks for."""
    return os.environ.get("KSMALLOC_SANITIZER") or None


def tool() -> Tool | None:
    name = name_here()
    return TOOLS[name] if name else None


def why_left_out(used: Tool | None, program: str, case: str) -> str | None:
    found = (
        [why for pattern, why in used.left_out.items() if fnmatch(f"{program}-{case}", pattern)]
        if used
        else []
    )
    return found[0] if found else None


class Reports:
    """A directory for the reports of one run. Programs that have become somebody else write there, too."""

    def __init__(self, used: Tool | None) -> None:
        self.tool = used
        self.folder = Path(tempfile.mkdtemp(prefix="ksmalloc-reports-"))
        self.folder.chmod(0o1777)
        self.log = str(self.folder / "log")

    def environment(self) -> dict[str, str]:
        if not self.tool:
            return dict(os.environ)
        told = {name: value.format(log=self.log) for name, value in self.tool.environment.items()}
        slower = max(self.tool.slower, float(os.environ.get("KSMALLOC_TEST_SLOWER", "1")))
        harness = {
            "KSMALLOC_TEST_SLOWER": str(slower),
            "KSMALLOC_TEST_WITHOUT": self.tool.without,
        }
        return os.environ | told | harness

    def command(self, *words: str | Path) -> list[str]:
        prefix = self.tool.command if self.tool else ()
        return [*(word.format(log=self.log) for word in prefix), *map(str, words)]

    def collect(self) -> str:
        """What was reported, and the directory goes."""
        texts = [path.read_text("utf-8", "replace") for path in sorted(self.folder.iterdir())]
        shutil.rmtree(self.folder)
        return "".join(errors(text) if self.tool and self.tool.command else text for text in texts)


def errors(text: str) -> str:
    """What valgrind has to say, but for the ends of processes by a signal: many are to end so."""
    found, is_end = "", False
    for line in text.splitlines():
        words = re.sub(r"^==\d+== ?", "", line)
        is_end = words.startswith("Process terminating") or (is_end and words.startswith(" "))
        if words.strip() and not is_end and not line.startswith("--"):
            found += f"{words}\n"
    return found
