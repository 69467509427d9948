"""A process with a pipe to it, a log, and a time limit: what fails, hangs or dies in it ends alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from accel.errors import first_line

from .report import BenchmarkError

STOP_S = 30
LOG_LINES = 15
# What takes seconds to import, and touches no device.
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "peft",
    "torchao.quantization",
    "diffusers.models.transformers.transformer_flux",
    "benchmarks.subject_process",
)


class ChildError(BenchmarkError):
    """A process ended before it had answered; the message has the end of its log."""


def process_context(fork: bool) -> BaseContext:
    """How processes are started.

    Args:
        fork: from a process that has the libraries imported, where the system can; else from nothing. A forked process
            cannot use a GPU that was touched before the fork.
    """
    if fork and "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(LIBRARIES))
        return context
    return multiprocessing.get_context("spawn")


class OutOfTimeError(ChildError):
    """A process was ended because its time was over."""


class Child:
    """Runs a function of a module in a process of its own. Close it in the end."""

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        log: Path,
        fork: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process.

        Args:
            name: for messages.
            function: what it runs: (its end of the pipe, *arguments).
            arguments: what can be pickled.
            log: gets what it prints.
            fork: see `process_context`.
            environment: variables that it sets before it runs the function.
        """
        self.name = name
        self._log = log
        context = process_context(fork)
        self._connection, theirs = context.Pipe()
        everything = (theirs, function, arguments, str(log), dict(environment or {}))
        self._process = context.Process(target=_run, args=everything, name=name, daemon=False)
        self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Give it a message."""
        self._connection.send(message)

    def receive(self, limit_s: float | None = None) -> Any:
        """Wait for its next message.

        Args:
            limit_s: it is ended when it has not sent one by then.

        Raises:
            OutOfTimeError: it was ended.
            ChildError: it has ended by itself.
        """
        try:
            if not self._connection.poll(limit_s):
                self.kill()
                raise OutOfTimeError(f"{self.name}: no answer for {limit_s:.0f} s. {self._tail()}")
            return self._connection.recv()
        except (EOFError, ConnectionError) as exc:
            self._process.join(STOP_S)
            code = self._process.exitcode
            raise ChildError(f"{self.name}: its process ended with exit code {code}. {self._tail()}") from exc

    def kill(self) -> None:
        """End it and what it has started, now."""
        if self._process.pid is not None and hasattr(os, "killpg"):
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._process.kill()  # it has no group of its own yet
        else:
            self._process.kill()
        self._process.join(STOP_S)

    def close(self, wait_s: float = STOP_S) -> None:
        """Let it end, and see to it that it does after so many seconds."""
        self._connection.close()
        self._process.join(wait_s)
        if self._process.is_alive():
            self.kill()

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines() if self._log.is_file() else []
        return "\n".join(lines[-LOG_LINES:])


def _run(
    connection: Connection,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    log: str,
    environment: Mapping[str, str],
) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    os.environ.update(environment)  # torch reads it when it first compiles
    with open(log, "w", encoding="utf-8") as stream:
        # Libraries write there, not between the lines of the table.
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        function(connection, *arguments)
        sys.stdout.flush()
        sys.stderr.flush()


def describe(error: BaseException) -> str:
    """What went wrong, in a line; its kind too where that is not the benchmark's own."""
    text = first_line(error)
    return text if isinstance(error, BenchmarkError) else f"{type(error).__name__}: {text}"
