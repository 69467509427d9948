"""The memory of a GPU, and copies to it that run beside the computation, on a stream of their own."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .base import Chunks, Mark
from .host import HostPages

# Page-locked memory is taken from all other programs. Windows locks no more than half.
PINNED_SHARE = 0.4
# Kinds of `Hardware`: where pages of our own can be locked, and where torch has streams with events.
LOCKS_PAGES = ("cuda", "rocm")
HAS_STREAMS = ("cuda", "rocm", "xpu")


class CudaMemory:
    """A GPU. Copies run on a stream of their own; marks are events.

    Attributes:
        beside: whether they do. Otherwise copies and computation take turns, and there is nothing to mark.
    """

    separate = True

    def __init__(
        self, device: torch.device, pin: bool = True, pin_limit_bytes: int | None = None, streams: Any = None
    ) -> None:
        """Allocate nothing yet.

        Args:
            device: a GPU of any kind.
            pin: whether host buffers are page-locked: copies are then twice as fast, and run beside the computation.
            pin_limit_bytes: how much may be; by default 40 % of the machine's memory.
            streams: what has `Stream`, `Event`, `stream` and `current_stream`; by default the device's torch module.
        """
        self.device = device
        self.pin = self.flat = pin
        self.beside = streams is not None or device.type in HAS_STREAMS
        self._streams = streams or getattr(torch, device.type)
        self._copies: Any = None
        if pin and device.type in LOCKS_PAGES:
            limit = int(_host_bytes() * PINNED_SHARE) if pin_limit_bytes is None else pin_limit_bytes
            self._pages = HostPages(_pin, _unpin, limit)
        else:
            self._pages = HostPages()

    def without_pinning(self) -> None:
        """Use ordinary host memory from now on."""
        self.pin = self.flat = False
        self._pages = HostPages()

    def without_stream(self) -> None:
        """Copy in turn with the computation from now on."""
        self.beside = False

    @property
    def host_bytes(self) -> int:
        """See `DeviceMemory`."""
        return self._pages.bytes

    @property
    def pinned_bytes(self) -> int:
        """See `DeviceMemory`."""
        return self._pages.pinned_bytes

    def empty(self, size: int) -> Tensor:
        """See `DeviceMemory`."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def host(self, size: int) -> Tensor:
        """See `DeviceMemory`."""
        return self._pages.take(size)

    def upload(self, tensor: Tensor) -> Tensor:
        """See `DeviceMemory`."""
        # Only page-locked memory is surely still the same when the copy runs: other buffers are used again at once.
        return tensor.to(self.device, non_blocking=tensor.is_pinned())

    def holds(self, tensor: Tensor) -> bool:
        """See `DeviceMemory`."""
        return tensor.device.type == self.device.type

    def copy(self, target: Tensor, chunks: Chunks, after: Mark) -> Mark:
        """See `DeviceMemory`."""
        if not self.beside:
            for start, chunk in chunks:
                target[start : start + chunk.numel()].copy_(chunk)
            return None
        if self._copies is None:
            self._copies = self._streams.Stream(self.device)
        if after is not None:
            self._copies.wait_event(after)
        with self._streams.stream(self._copies):
            for start, chunk in chunks:
                target[start : start + chunk.numel()].copy_(chunk, non_blocking=True)
        done = self._streams.Event()
        done.record(self._copies)
        return done

    def mark(self) -> Mark:
        """See `DeviceMemory`."""
        if not self.beside:
            return None
        event = self._streams.Event()
        event.record(self._streams.current_stream(self.device))
        return event

    def wait(self, mark: Mark) -> None:
        """See `DeviceMemory`."""
        if mark is not None:
            self._streams.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """See `DeviceMemory`."""
        if self._copies is not None:
            self._copies.synchronize()


def _host_bytes() -> int:
    import psutil  # ComfyUI itself needs it; a script that gives its limit does not

    return psutil.virtual_memory().total


def _pin(address: int, size: int) -> bool:
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:
        return True
    # CUDA keeps the failure, and would report it at the next kernel: let that be this one.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
