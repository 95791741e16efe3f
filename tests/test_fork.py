# SPDX-License-Identifier: MIT
"""Processes that fork with merged memory: parent and child keep their data, and both go on merging."""

from __future__ import annotations

from conftest import Processes
from forkkit import QUIET, run


def test_the_child_keeps_its_data_and_merges_further(processes: Processes, rendezvous: str) -> None:
    body = """
a, b = block(1), block(1)
merge()
assert domain.stats().pages_shared == 512 and domain.stats().pages_sharing == 512, domain.stats()

def child():
    assert right(a, 1) and right(b, 1)
    merge()
    assert len(domain.peers) == 2 and own().pages_merged == 1024, own()
    before = own().merges
    c, d, e = block(2), block(2), block(3)
    merge()
    assert own().merges - before == 1024, own()
    memoryview(a)[0] ^= 1  # nobody else sees it
    assert right(b, 1) and right(c, 2) and right(d, 2) and right(e, 3)

pid = forked(child)
ended(pid)
assert right(a, 1) and right(b, 1)
merge()
assert len(domain.peers) == 1
domain.sweep()
stats = domain.stats()
assert (stats.pages_shared, stats.pages_merged, stats.store_bytes) == (512, 1024, NBYTES), stats
c = block(1)
merge()
assert own().pages_merged == 1536
"""
    run(processes, rendezvous, body)


def test_parent_and_child_merge_with_each_other(processes: Processes, rendezvous: str) -> None:
    body = """
a = arena.alloc(NBYTES, mergeable=False)  # both have the same of it: "stop" would merge that too
memoryview(a)[:] = noise(1)
r, w = os.pipe()
r2, w2 = os.pipe()

def child():
    b, different = block(2), block(3)
    os.write(w, b"x")
    os.read(r2, 1)
    assert ksmalloc.settle(30 * SLOWER, domain=domain).settled
    assert right(b, 2) and right(different, 3)
    assert own().pages_merged == 512, own()
    os.write(w, b"x")
    os.read(r2, 1)
    assert right(b, 2) and right(different, 3)

pid = forked(child)
os.read(r, 1)
b, different = block(2), block(4)
os.write(w2, b"x")
os.read(r, 1)
assert ksmalloc.settle(30 * SLOWER, domain=domain).settled
stats = domain.stats()
assert (stats.pages_shared, stats.pages_sharing, stats.peers) == (512, 512, 2), stats
os.write(w2, b"x")
ended(pid)
assert right(a, 1) and right(b, 2) and right(different, 4)
del b
domain.sweep()
assert domain.stats().store_bytes == 0
"""
    run(processes, rendezvous, body)


def test_fork_from_a_thread_while_scanning(processes: Processes, rendezvous: str) -> None:
    body = """
a, b = block(1), block(1)
over = False

def scan():
    while not over:
        arena.scan()

def rewrite():
    c = arena.alloc(NBYTES)
    while not over:
        memoryview(c)[:] = noise(1)

threads = [threading.Thread(target=scan), threading.Thread(target=rewrite)]
for thread in threads:
    thread.start()
done = []

def fork():
    for _ in range(10):
        def child():
            assert right(a, 1) and right(b, 1)
            merge()
            assert right(a, 1) and right(b, 1)
        ended(forked(child))
        done.append(1)

forker = threading.Thread(target=fork)
forker.start()
forker.join()
over = True
for thread in threads:
    thread.join()
assert len(done) == 10
assert right(a, 1) and right(b, 1)
merge()
assert own().pages_merged >= 1024
"""
    run(processes, rendezvous, body, *QUIET)


def test_the_parent_frees_while_the_child_reads(processes: Processes, rendezvous: str) -> None:
    body = """
a, b = block(1), block(1)
merge()
r, w = os.pipe()
r2, w2 = os.pipe()

def child():
    os.close(w)
    checks = 0
    os.set_blocking(r, False)
    while True:
        assert right(a, 1) and right(b, 1)
        checks += 1
        if checks == 2:
            os.write(w2, b"x")
        try:
            if not os.read(r, 1):
                break
        except BlockingIOError:
            pass
    assert checks > 3 and len(domain.peers) == 2

pid = forked(child)
os.read(r2, 1)
a.free()
b.free()
domain.sweep()
assert domain.stats().pages_shared == 512, domain.stats()
others = [block(seed) for seed in (2, 2, 3, 3)]  # would land in frames that were freed wrongly
merge()
domain.sweep()
time.sleep(0.2)
os.close(w)
ended(pid)
domain.sweep()
assert domain.stats().pages_shared == 1024, domain.stats()
assert [right(other, seed) for other, seed in zip(others, (2, 2, 3, 3))] == [True] * 4
"""
    run(processes, rendezvous, body)


def test_a_chain_of_forks(processes: Processes, rendezvous: str) -> None:
    body = """
kept = [(block(1), 1), (block(1), 1)]
merge()

def generation(depth):
    assert all(right(*pair) for pair in kept)
    if depth % 2:
        merge()  # else the child forks again before its scanner has ever run
    kept.append((block(10 + depth), 10 + depth))
    kept.append((block(10 + depth), 10 + depth))
    if depth % 2:
        merge()
    if depth < 6:
        ended(forked(lambda: generation(depth + 1)))
    assert all(right(*pair) for pair in kept)
    merge()
    assert own().pages_merged >= 1024 + 512 * depth // 2, (depth, own())

ended(forked(lambda: generation(1)))
assert all(right(*pair) for pair in kept)
assert len(domain.peers) == 1
domain.sweep()
assert domain.stats().pages_shared == 512, domain.stats()
"""
    run(processes, rendezvous, body)


def test_many_forks(processes: Processes, rendezvous: str) -> None:
    body = """
a, b = block(1), block(1)
merge()
threads = len(os.listdir("/proc/self/task"))
for number in range(20):
    def child():
        assert right(a, 1)
        if number % 2:
            c = block(1)
            merge()
            assert own().pages_merged == 1536, own()
    ended(forked(child))
r, w = os.pipe()
pids = [forked(lambda: os.read(r, 1)) for _ in range(10)]
assert len(domain.peers) == 11
os.write(w, bytes(10))
for pid in pids:
    ended(pid)
os.close(r)
os.close(w)
merge()
domain.sweep()
stats = domain.stats()
assert (stats.peers, stats.pages_shared, stats.pages_sharing) == (1, 512, 512), stats
assert stats.store_bytes == NBYTES
assert right(a, 1) and right(b, 1)
wait_until(lambda: len(os.listdir("/proc/self/task")) == threads)
assert len(os.listdir("/proc/self/fd")) < 20
"""
    run(processes, rendezvous, body)


def test_different_data_in_children_is_not_merged(processes: Processes, rendezvous: str) -> None:
    body = """
arena = ksmalloc.Arena(domain=domain, scan=False)  # nothing merges before the children have written
a = block(1)
r, w = os.pipe()
r2, w2 = os.pipe()

def child(seed):
    memoryview(a)[:] = noise(seed)
    os.write(w, b"x")
    os.read(r2, 1)
    assert right(a, seed)

pids = [forked(lambda: child(seed)) for seed in (2, 3, 4)]
for _ in pids:
    os.read(r, 1)
assert ksmalloc.settle(30 * SLOWER, domain=domain).settled
stats = domain.stats()
assert (stats.peers, stats.pages_shared, stats.merges, stats.store_bytes) == (4, 0, 0, 0), stats
private = sum(int(line.split()[1]) for pid in [os.getpid(), *pids]
              for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss_Anon:"))
assert private * 1024 >= 4 * NBYTES
os.write(w2, b"xxx")
for pid in pids:
    ended(pid)
assert right(a, 1)
"""
    run(processes, rendezvous, body)
