# SPDX-License-Identifier: MIT
"""Worker processes that do what they are told through a pipe, and end with their parent however it ends."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import ksmalloc
from ksmalloc.ctl import signals

Commands = Callable[[], dict[str, Callable[..., Any]]]
"""Called in the worker; returns what it can be told to do."""

Tick = Callable[[int], None]
"""Called with the number of answers that have come, each time there is another one."""


class WorkerError(ksmalloc.Error):
    """A worker died, or could not do what it was told."""


class Team:
    """`count` spawned processes. Leaving the context ends them: by closing their pipes, then by SIGKILL."""

    def __init__(self, count: int, commands: Commands) -> None:
        resource_tracker.ensure_running()  # it would start with the first worker, and let interrupts through
        self._context = multiprocessing.get_context("spawn")
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._told = [0] * count
        try:
            with signals.held():
                for number in range(count):
                    self._start(number, commands)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, commands: Commands) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, commands), name=f"worker-{number}", daemon=True
        )
        process.start()
        self._members.append((process, ours))
        theirs.close()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process, _ in self._members]

    def ask(self, command: str, *args: Any, who: int | None = None, tick: Tick | None = None) -> Any:
        """Tell all workers, or worker `who` alone, to do something; returns all answers, or the one."""
        numbers = range(len(self._members)) if who is None else [who]
        self.tell(command, *args, numbers=numbers)
        answers: dict[int, Any] = {}
        while len(answers) < len(numbers):
            for number in numbers:
                if number not in answers and self.has_answered(number, 0.05 / len(numbers)):
                    answers[number] = self.answer(number)
                    if tick is not None:
                        tick(len(answers))
        return [answers[number] for number in numbers] if who is None else answers[who]

    def tell(self, command: str, *args: Any, numbers: Sequence[int]) -> None:
        """Send a command; each of `numbers` then owes an answer(). What they still owed is forgotten."""
        for number in numbers:
            self._told[number] += 1
            try:
                self._members[number][1].send((self._told[number], command, args))
            except OSError:
                raise self._died(number) from None

    def has_answered(self, number: int, timeout: float) -> bool:
        """Whether there is something for answer() to read, or to raise."""
        process, connection = self._members[number]
        return bool(wait([connection, process.sentinel], timeout))

    def answer(self, number: int) -> Any:
        process, connection = self._members[number]
        told = 0
        while told != self._told[number]:
            wait([connection, process.sentinel])
            try:
                if not connection.poll():
                    raise self._died(number)
                told, ok, value = connection.recv()
            except (EOFError, ConnectionError):
                raise self._died(number) from None
        if not ok:
            raise WorkerError(f"worker {process.pid}: {value}")
        return value

    def _died(self, number: int) -> WorkerError:
        process = self._members[number][0]
        process.join(1)
        code = process.exitcode
        how = (
            f"ended with {code}"
            if code is None or code >= 0
            else f"was killed by {signal.Signals(-code).name}"
        )
        return WorkerError(f"worker {process.pid} {how}")

    def close(self, patience: float = 5) -> None:
        """End all workers, those by SIGKILL that have not ended after `patience` seconds. Idempotent."""
        deadline = time.monotonic() + patience
        with signals.held():
            members, self._members = self._members, []
            for _, connection in members:
                connection.close()
            for process, _ in members:
                process.join(max(0, deadline - time.monotonic()))
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(patience=5 if error is None else 0.2)


def _serve(connection: Connection, commands: Commands) -> None:
    signals.hold_interrupts_only()
    table: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            told, name, args = connection.recv()
        except (EOFError, ConnectionError):
            return  # the parent is done with us, or gone
        try:
            table = table or commands()
            answer = told, True, table[name](*args)
        except Exception as error:
            answer = told, False, "".join(traceback.format_exception_only(type(error), error)).strip()
        try:
            connection.send(answer)
        except ConnectionError:
            return
