"""What an engine asks of the memory of a device, whatever the device is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Runs of bytes and where they begin in a flat buffer.
Chunks = Sequence[tuple[int, Tensor]]
# A point in the order of copies or of computations; None has passed already.
Mark = Any


class DeviceMemory(Protocol):
    """Where an engine computes.

    Attributes:
        device: as torch knows it.
        separate: whether weights on the host have to be copied before it can compute with them.
        pin: whether host buffers are page-locked.
        flat: whether host weights are kept in one buffer per block, or as they were loaded.
    """

    device: torch.device
    separate: bool
    pin: bool
    flat: bool

    @property
    def host_bytes(self) -> int:
        """What the buffers of `host` take now."""

    @property
    def pinned_bytes(self) -> int:
        """What of them is page-locked."""

    def empty(self, size: int) -> Tensor:
        """A buffer on the device: (size,) uint8 of any content, aligned to 256 bytes.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """

    def host(self, size: int) -> Tensor:
        """A buffer on the host: (size,) uint8 of any content.

        Raises:
            MemoryError: it does not fit.
        """

    def upload(self, tensor: Tensor) -> Tensor:
        """A plain tensor of the host as one on the device; it has arrived for what is computed afterwards."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a plain tensor lies on the device."""

    def copy(self, target: Tensor, chunks: Chunks, after: Mark) -> Mark:
        """Begin to copy host bytes into a device buffer, behind all earlier copies.

        Args:
            target: of `empty`.
            chunks: uint8 tensors; they stay as they are until the copy is done.
            after: what has to pass first, of `mark`.

        Returns:
            The end of this copy.
        """

    def mark(self) -> Mark:
        """The end of what the device has been given to compute so far."""

    def wait(self, mark: Mark) -> None:
        """Compute further only behind a mark of `copy`.

        Raises:
            Exception: what the copy failed with.
        """

    def finish(self) -> None:
        """Wait until all copies are done, or have failed."""
