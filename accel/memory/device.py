"""The memory of a device, and copies to it that run beside the computation.

`CudaMemory` copies on a stream of its own. `HostMemory` is the CPU: either plainly, or as a pool with a limit that
stands in for another device, where a thread stands in for the copy stream, so that everything above runs, and can be
tested and measured, without a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hardware import Hardware
from .buffers import address_of, new_block, tensor_over
from .host import HostPages

# Runs of bytes and where they begin in a flat buffer.
Pieces = Sequence[tuple[int, Tensor]]
# A point in the order of copies or of computations; None has passed already.
Mark = Any
# Page-locked memory is taken from all other programs. Windows locks no more than half.
PINNED_SHARE = 0.4
# Kinds of `Hardware`: where pages of our own can be locked, and where torch has streams with events.
LOCKS_PAGES = ("cuda", "rocm")
HAS_STREAMS = ("cuda", "rocm", "xpu")


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

    def copy(self, target: Tensor, pieces: Pieces, after: Mark) -> Mark:
        """Begin to copy host bytes into a device buffer, behind all earlier copies.

        Args:
            target: of `empty`.
            pieces: uint8 tensors; they stay as they are until the copy is done.
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

    def copy(self, target: Tensor, pieces: Pieces, after: Mark) -> Mark:
        """See `DeviceMemory`."""
        if not self.beside:
            for start, piece in pieces:
                target[start : start + piece.numel()].copy_(piece)
            return None
        if self._copies is None:
            self._copies = self._streams.Stream(self.device)
        if after is not None:
            self._copies.wait_event(after)
        with self._streams.stream(self._copies):
            for start, piece in pieces:
                target[start : start + piece.numel()].copy_(piece, non_blocking=True)
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

    def copy(self, target: Tensor, pieces: Pieces, after: Mark) -> Mark:
        """See `DeviceMemory`. What was given to compute is computed, so there is nothing to wait for."""
        if not self._threaded:
            _move(target, pieces)
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "flux-hotswap-copy")
        self._last = self._thread.submit(_move, target, pieces)
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


def memory_of(device: torch.device, pin: bool = True) -> DeviceMemory:
    """The memory of a device as it is.

    Args:
        device: where an engine computes.
        pin: whether host memory may be page-locked.
    """
    return HostMemory() if device.type == "cpu" else CudaMemory(device, pin)


def copies_on(hardware: Hardware) -> str:
    """How `memory_of` copies on a device, in a few words."""
    if hardware.kind == "cpu":
        return "nothing: weights are where they are computed with"
    pinned = "from page-locked memory, " if hardware.kind in LOCKS_PAGES else ""
    return f"{pinned}{'beside the computation' if hardware.kind in HAS_STREAMS else 'in turn with the computation'}"


def _move(target: Tensor, pieces: Pieces) -> None:
    # Not `copy_`, which would start threads for one copy that compete with those that compute. Without the GIL, too.
    for start, piece in pieces:
        ctypes.memmove(target.data_ptr() + start, piece.data_ptr(), piece.numel())


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
