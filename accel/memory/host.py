"""Host memory for weights: pages of their own, given back to the system with the last tensor over them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from .buffers import address_of, new_block, tensor_over

Pin = Callable[[int, int], bool]
Unpin = Callable[[int], None]


class HostPages:
    """Hands out page-aligned buffers and counts them; page-locks them up to a limit. Thread-safe.

    Page-locked by `cudaHostRegister` and not by torch's own allocator, which rounds sizes up to a power of two (a block
    of 340 MB would take 512) and keeps what is freed.
    """

    def __init__(self, pin: Pin | None = None, unpin: Unpin | None = None, pin_limit_bytes: int = 0) -> None:
        """Lock nothing without `pin`.

        Args:
            pin: (address, bytes) -> whether the pages are locked now.
            unpin: undoes it.
            pin_limit_bytes: what may be locked at a time; further buffers are ordinary memory.
        """
        self._pin = pin
        self._unpin = unpin
        self._pin_limit_bytes = pin_limit_bytes
        self._bytes = 0
        self._pinned_bytes = 0
        # Reentrant: a collection of garbage inside `take` may give a buffer back.
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """What all buffers take now."""
        return self._bytes

    @property
    def pinned_bytes(self) -> int:
        """What of it is page-locked."""
        return self._pinned_bytes

    def take(self, size: int) -> Tensor:
        """A buffer of so many bytes, uint8, of any content.

        Raises:
            MemoryError: the system has none.
        """
        try:
            block = new_block(size)
        except OSError as exc:
            raise MemoryError(f"{size:,} bytes of host memory: {exc}") from exc
        address = address_of(block)
        with self._lock:
            pinned = self._pin is not None and self._pinned_bytes + len(block) <= self._pin_limit_bytes
            pinned = pinned and self._pin(address, len(block))
            self._bytes += len(block)
            self._pinned_bytes += len(block) if pinned else 0
        # The block goes with it, so that its pages stay until they are unlocked.
        return tensor_over(block, size, self._give_back, block, address, pinned)

    def _give_back(self, block: object, address: int, pinned: bool) -> None:
        with self._lock:
            self._bytes -= len(block)
            if pinned:
                self._pinned_bytes -= len(block)
                self._unpin(address)
