# SPDX-License-Identifier: MIT
"""vm.overcommit_memory=2, nothing left to commit: an error, where touching shared memory would be SIGBUS.

The kernel takes a 32nd of a process's addresses off what it may commit, up to user_reserve_kbytes. With that
setting very high a process has nothing left as soon as it reserves enough addresses, and has it again when it
gives them back; while everybody else goes on with more than the machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import Processes
from limitkit import SECONDS, Died, Worker, build, meminfo, needs_root, program, run, settings

__all__ = ["program"]  # a fixture

pytestmark = [needs_root, pytest.mark.timeout(3 * SECONDS)]

GIB = 1 << 30
LEFT = 1024 * GIB  # that everybody may commit beyond what is committed
ADDRESSES = 33 * LEFT  # whoever reserves them may commit nothing
SIGBUS = 7
PAGES = 300
BITS = 16384  # frames whose bits lie on the first page of a bitmap

PYTHON = r"""
from contextlib import suppress

def exhaust():
    return mmap.mmap(-1, int(sys.argv[2]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)

def scan():
    report = arena.scan()
    check(blocks, content)
    check(kept, kept_content)
    return report

def fork():
    pid = os.fork()
    if pid == 0:
        check(blocks, content)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

all_of_it = exhaust()
refused(join, MemoryError, BlockingIOError)  # the latter: not even for a thread's stack
all_of_it.close()
arena = join()
kept, kept_content = two(arena, 256, seed=2)
blocks, content = two(arena, 256)

all_of_it = exhaust()
report = scan()
assert merged() == 0, report
assert "ENOMEM" in report.why_not, report
refused(lambda: arena.alloc(1 << 30), MemoryError)
refused(lambda: ksmalloc.Domain("other", path=PATH), MemoryError, BlockingIOError)
assert refused(fork, OSError).errno == errno.ENOMEM
# The fork has ended the scanner, which has no memory to start again.
refused(arena.scan, MemoryError, BlockingIOError)
check(blocks, content)
check(kept, kept_content)
all_of_it.close()
scan_until(arena, 1024)
fork()
scan()
assert merged() == 1024 * PAGE
print(f"nothing left: {report.why_not}, nothing merged; afterwards {merged() // PAGE} pages")

# What has merged stays, is written, is given back and is freed without a page more.
all_of_it = exhaust()
model = write_half(blocks[0], content)
check(blocks[:1], model)
check(blocks[1:], content)
while kept:
    kept.pop().free()
freed = arena.domain.sweep()
blocks.pop().free()
content = bytes(model)
report = scan()
print(f"written and freed: {freed} frames freed, then {report.why_not}")
assert freed == 256
with suppress(MemoryError, OSError, ksmalloc.Error):
    arena.unmerge()
check(blocks, content)
all_of_it.close()
blocks.append(arena.alloc(len(content)))
memoryview(blocks[1])[:] = content
scan_until(arena, 512 - arena.stats().arena_pages_merged)
scan()
assert merged() == 512 * PAGE
"""


@contextmanager
def never_more_than_there_is() -> Iterator[None]:
    ratio, kbytes = (Path("/proc/sys/vm", f"overcommit_{name}") for name in ("ratio", "kbytes"))
    with ExitStack() as stack:
        if int(kbytes.read_text()):  # either of the two is 0
            stack.callback(kbytes.write_text, kbytes.read_text())
        else:
            stack.callback(ratio.write_text, ratio.read_text())
        kbytes.write_text(str((meminfo("Committed_AS") + LEFT) // 1024))
        stack.enter_context(settings(user_reserve_kbytes=LEFT // 256, overcommit_memory=2))
        yield


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("unpopulated"), "unpopulated")


class Crew:
    """Workers of one domain, of which the first may have nothing left."""

    def __init__(self, processes: Processes, rendezvous: str, programs: list[Path], pages: int) -> None:
        self.workers = [Worker(processes, one) for one in programs]
        for worker in self.workers:
            worker.ask("join", rendezvous, "commit")
            worker.ask("fill", pages, 1)
        self.poor, *self.others = self.workers

    def exhaust(self) -> None:
        self.poor.ask("reserve", ADDRESSES // GIB)

    def verify(self) -> None:
        for worker in self.workers:
            worker.ask("verify")

    def merge(self, *workers: Worker) -> None:
        for _ in range(2):
            for worker in workers:
                worker.ask("scan")


def scan(crew: Crew) -> dict[str, str]:
    """One that ends in SIGBUS if any page is touched without having been asked for."""
    report = crew.poor.ask("scan")
    crew.verify()
    return report


def first(crew: Crew) -> None:
    """Nobody has merged yet, so there are no tables to speak of."""
    crew.exhaust()
    report = scan(crew)
    assert (report["merged"], report["written"], report["why_not"]) == ("0", "0", "ENOMEM")
    crew.merge(crew.others[0])  # it says what it has
    report = scan(crew)
    assert (report["merged"], report["written"], report["why_not"]) == ("0", "0", "ENOMEM")
    assert crew.poor.count("failures") > 0


def far(crew: Crew) -> None:
    """Others' frames can be merged with, but those that lie far away need another page of bits."""
    crew.merge(*crew.others)
    assert crew.others[0].count("merged") > BITS
    crew.exhaust()
    report = scan(crew)
    assert (report["merged"], report["written"], report["why_not"]) == (str(BITS), "0", "ENOMEM")


CASES = [(first, PAGES), (far, BITS + 2000)]


@pytest.mark.parametrize(("case", "pages"), CASES, ids=["first", "far"])
def test_nothing_left(
    case: Callable[[Crew], None], pages: int, program: Path, processes: Processes, rendezvous: str
) -> None:
    """Nothing is lost, the report says why nothing merges, and it goes on when there is memory again."""
    with never_more_than_there_is():
        crew = Crew(processes, rendezvous, [program] * 3, pages)
        case(crew)
        crew.poor.ask("release")
        for _ in range(3):
            crew.merge(*crew.workers)
        crew.verify()
        found = [worker.count("merged") for worker in crew.workers]
        stats = crew.poor.stats()
    assert found == [pages] * 3
    assert (int(stats["shared"]), stats["why_not"]) == (pages, "OK")


def test_others_frames_cost_nothing(program: Path, processes: Processes, rendezvous: str) -> None:
    """Merging with what is there, and sweeping after others have died, needs no memory near the beginning."""
    with never_more_than_there_is():
        crew = Crew(processes, rendezvous, [program] * 3, PAGES)
        crew.merge(*crew.others)
        crew.exhaust()
        assert scan(crew)["merged"] == str(PAGES)
        crew.poor.ask("free")
        for worker in crew.others:
            worker.process.kill()
            worker.process.wait(SECONDS)
        freed = int(crew.poor.ask("sweep")["freed"])
        stats = crew.poor.stats()
    assert freed == PAGES
    assert stats["store"] == "0"


@pytest.mark.parametrize(("case", "pages"), CASES, ids=["first", "far"])
def test_control(
    case: Callable[[Crew], None],
    pages: int,
    program: Path,
    control: Path,
    processes: Processes,
    rendezvous: str,
) -> None:
    """A core that does not ask first is killed."""
    with never_more_than_there_is():
        crew = Crew(processes, rendezvous, [control, program, program], pages)
        with pytest.raises(Died) as died:
            case(crew)
    assert died.value.status == -SIGBUS


def test_python(processes: Processes, rendezvous: str) -> None:
    """MemoryError where memory is asked for, and no byte lost."""
    with never_more_than_there_is():
        print(run(processes, rendezvous, PYTHON, ADDRESSES))
