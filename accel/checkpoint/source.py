"""What every kind of checkpoint file looks like to the rest of `accel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ..files import FileIdentity, TensorInfo


class Rows(Protocol):
    """A stored tensor whose rows can be taken out, dequantized where the file has blocks. A Tensor is one."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows, on the checkpoint's device, as a view of the file or a copy; copy before you keep them."""


class Checkpoint(Protocol):
    """A model's files, of which only headers were read."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def identity(self) -> FileIdentity:
        """The state of all its files."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name in the files."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the files say about themselves."""

    @property
    def device(self) -> torch.device:
        """Where its rows are: the CPU, for files."""

    def open(self) -> AbstractContextManager[Callable[[str], Rows]]:
        """Open the data, and make sure that the files are still the same.

        Yields:
            A function from a tensor's name to its rows.

        Raises:
            FileError: the files are gone, damaged, or were changed since their headers were read.
        """
