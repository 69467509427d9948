"""One row of `python -m benchmarks gpu`: what it is given, and how it runs in a process of its own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .child import describe

# What a process sends: (kind, content).
VALUES, DONE, FAILED, NO_DEVICE = "values", "done", "failed", "no device"


class Job:
    """What a row's function works with.

    Attributes:
        device: what is measured.
        quick: whether sizes are only to show that the code runs.
        folder: for what rows share: LoRA files, and what each made of the same noise.
        ends: when the row is ended (`time.monotonic`).
    """

    def __init__(self, connection: Connection, device: torch.device, quick: bool, folder: Path, limit_s: float) -> None:
        """Its time begins now."""
        self._connection = connection
        self.device = device
        self.quick = quick
        self.folder = folder
        self.ends = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Until it is ended."""
        return self.ends - time.monotonic()

    def add(self, **values: Any) -> None:
        """Report figures; they count even if what follows fails."""
        self._connection.send((VALUES, {name: _plain(value) for name, value in values.items()}))


@dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
        stage: what it is part of.
        name: within its stage.
        function: (job, *arguments) -> None; reports through `Job.add`.
        limit_s: it is ended after so long.
        arguments: of the function.
        least_s: it is not begun when less is left.
        cold: whether it compiles as on a machine that never did.
    """

    stage: str
    name: str
    function: Callable[..., None]
    limit_s: float
    arguments: tuple[Any, ...] = ()
    least_s: float = 10.0
    cold: bool = False


def serve(
    connection: Connection, row: Row, device: str, quick: bool, folder: str, limit_s: float, forked: bool
) -> None:
    """The process: run a row, and say how it ended."""
    job = Job(connection, torch.device(device), quick, Path(folder), limit_s)
    if forked and not _usable(job.device):
        connection.send((NO_DEVICE, None))
        return
    try:
        row.function(job, *row.arguments)
    except Exception as error:  # whatever a library raises: the table says it
        traceback.print_exc()
        connection.send((FAILED, describe(error)))
    else:
        connection.send((DONE, None))


def _usable(device: torch.device) -> bool:
    """Whether this process can use the device: not if it was forked from one that had."""
    try:
        return torch.zeros(1, device=device).add(1).item() == 1
    except Exception:  # what a process says that has no GPU differs
        traceback.print_exc()
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value
