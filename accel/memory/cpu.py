"""The memory of a CPU: plainly, or as a pool with a limit that stands in for another device.

In such a pool a thread stands in for the copy stream, so that everything above runs, and can be tested and measured,
without a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .base import Chunks, Mark
from .buffers import address_of, new_block, tensor_over
from .host import HostPages


class HostMemory:
    """The CPU; with a limit, a pool of its memory that stands for a device of that size.

    Attributes:
        bytes: what the pool's buffers take now.
        peak_bytes: what they took at most.
        allocations: how many there were.
    """

    device = torch.device("cpu")
    pin = False

    def __init__(self, limit_bytes: int | None = None, *, threaded: bool = True, flat: bool = False) -> None:
        """Allocate nothing yet.

        Args:
            limit_bytes: of the pool; None for the CPU itself, which computes with what it was loaded.
            threaded: whether copies run on a thread, beside the computation.
            flat: see `DeviceMemory`.
        """
        self.separate = limit_bytes is not None
        self.flat = flat
        self.bytes = self.peak_bytes = self.allocations = 0
        self._limit_bytes = limit_bytes
        self._pages = HostPages()
        self._threaded = threaded
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future | None = None
        self._buffers: set[int] = set()
        # Reentrant: a collection of garbage inside `empty` may give a buffer back.
        self._lock = threading.RLock()

    @property
    def host_bytes(self) -> int:
        """See `DeviceMemory`."""
        return self._pages.bytes

    @property
    def pinned_bytes(self) -> int:
        """See `DeviceMemory`."""
        return 0

    def empty(self, size: int) -> Tensor:
        """See `DeviceMemory`."""
        with self._lock:
            self.allocations += 1
            if self._limit_bytes is not None and self.bytes + size > self._limit_bytes:
                raise torch.OutOfMemoryError(
                    f"tried to allocate {size:,} bytes; {self.bytes:,} of {self._limit_bytes:,} are in use"
                )
            block = new_block(size)
            address = address_of(block)
            self._buffers.add(address)
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return tensor_over(block, size, self._give_back, address, size)

    def _give_back(self, address: int, size: int) -> None:
        with self._lock:
            self._buffers.discard(address)
            self.bytes -= size

    def host(self, size: int) -> Tensor:
        """See `DeviceMemory`."""
        return self._pages.take(size)

    def upload(self, tensor: Tensor) -> Tensor:
        """See `DeviceMemory`."""
        if not self.separate:
            return tensor
        return self.empty(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """See `DeviceMemory`."""
        return not self.separate or tensor.untyped_storage().data_ptr() in self._buffers

    def copy(self, target: Tensor, chunks: Chunks, after: Mark) -> Mark:
        """See `DeviceMemory`. What was given to compute is computed, so there is nothing to wait for."""
        if not self._threaded:
            _move(target, chunks)
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "flux-hotswap-copy")
        self._last = self._thread.submit(_move, target, chunks)
        return self._last

    def mark(self) -> Mark:
        """See `DeviceMemory`."""
        return None

    def wait(self, mark: Mark) -> None:
        """See `DeviceMemory`."""
        if mark is not None:
            mark.result()

    def finish(self) -> None:
        """See `DeviceMemory`."""
        if self._last is not None:
            self._last.exception()
            self._last = None


def _move(target: Tensor, chunks: Chunks) -> None:
    # Not `copy_`, which would start threads for one copy that compete with those that compute. Without the GIL, too.
    for start, chunk in chunks:
        ctypes.memmove(target.data_ptr() + start, chunk.data_ptr(), chunk.numel())
