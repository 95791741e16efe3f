# SPDX-License-Identifier: MIT
"""The interpreter is over, the process is not, and somebody refers to an arena: it goes on as before."""

from __future__ import annotations

from pathlib import Path

import buildkit
from conftest import Processes, wait_until
from forkkit import Peer
from outside import merged
from surroundkit import BARRIERS, BLOCK, MERGED, PAGE, Program

AFTERWARDS = r"""
/* Loaded by a program: what is left of it when Python has been finalised, before the process ends. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
	char *at, *copy;
	size_t nbytes;
} kept[8];
static size_t count;

void keep(char *at, size_t nbytes)
{
	kept[count].at = at;
	kept[count].nbytes = nbytes;
	kept[count].copy = malloc(nbytes);
	memcpy(kept[count++].copy, at, nbytes);
}

/* Says it, waits until it is told to go on, and reads every byte. */
static void step(const char *text)
{
	char c;
	if (write(1, text, strlen(text)) < 0 || read(0, &c, 1) != 1)
		_exit(8);
	for (size_t i = 0; i < count; i++)
		if (memcmp(kept[i].at, kept[i].copy, kept[i].nbytes))
			_exit(9);
}

__attribute__((destructor)) static void afterwards(void)
{
	step("over\n");
	step("read\n");
	step("read\n");
	memset(kept[0].at, 7, 4096 * 3);
	memset(kept[0].copy, 7, 4096 * 3);
	step("written\n");
}
"""


@BARRIERS
def test_python_is_over_and_memory_is_merged(
    processes: Processes, rendezvous: str, tmp_path: Path, barrier: str
) -> None:
    """An arena that somebody still refers to when Py_Finalize() returns: it goes on as before."""
    (tmp_path / "afterwards.c").write_text(AFTERWARDS)
    buildkit.cc("-shared", "-fPIC", tmp_path / "afterwards.c", "-o", tmp_path / "afterwards.so")
    body = f"""
import ctypes
{MERGED}
library = ctypes.CDLL(sys.argv[3])
for made in (mine[0], mine[2]):
    library.keep(ctypes.c_void_p(made.address), ctypes.c_size_t(NBYTES))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
del made
ask("merged")
"""
    peer = Peer(processes, rendezvous, 50)
    program = Program(processes, rendezvous, barrier, body, tmp_path / "afterwards.so")
    program.hear("merged")
    assert merged(program.pid) >= 2 * BLOCK

    def step(next_word: str) -> int:
        program.tell()
        program.hear(next_word)
        return merged(program.pid)

    step("over")
    assert step("read") == BLOCK, "one block of the three is left"
    assert peer("stats").split()[3] == "2", "it is a peer"
    assert peer("add 100") == "ok"
    assert peer("settle") == "True"
    assert step("read") == 2 * BLOCK, "and merges what a peer has got meanwhile"
    assert step("written") == 2 * BLOCK - 3 * PAGE
    assert peer("sweep").isdigit()
    assert peer("check") == "True"
    program.tell()
    program.end()
    assert wait_until(lambda: peer("stats").split()[3] == "1", timeout=30)
