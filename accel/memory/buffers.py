"""Large host buffers that are used again.

Memory that the system has not handed out yet is slow: on a virtual machine (AMD EPYC, 2026-11) writing 172 MB took
62 ms into new pages and 8 ms into used ones; reading as much from the disk took 55 ms. Huge pages, where Linux has
them, are new in an eighth of the time.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

# Compiled kernels assume the alignment of the pointers that they saw first.
BYTES_ALIGNMENT = 64
# Smaller buffers come from the C library, which keeps their pages itself.
LARGE_BYTES = 2**22


class HostBuffers:
    """Hands out buffers, and takes their memory back when the last tensor over one is gone. Thread-safe."""

    def __init__(self, keep_bytes: int) -> None:
        """Keep up to `keep_bytes` that nobody uses."""
        self._keep_bytes = keep_bytes
        self._free: list[mmap.mmap] = []
        self._epoch = 0
        # Reentrant: a collection of garbage inside `take` may give a buffer back.
        self._lock = threading.RLock()

    @property
    def free_bytes(self) -> int:
        """What is kept for the next buffers."""
        with self._lock:
            return sum(map(len, self._free))

    def take(self, size: int) -> Tensor:
        """A buffer of so many bytes, uint8, page-aligned, of any content."""
        if size < LARGE_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        with self._lock:
            fitting = [block for block in self._free if size <= len(block) <= 2 * size]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._free.remove(block)
        if block is None:
            block = new_block(size)
        return tensor_over(block, size, self._give_back, block, self._epoch)

    def clear(self) -> None:
        """Give all unused memory back to the system; what is in use now is not kept either, when it comes back."""
        with self._lock:
            self._epoch += 1
            self._free.clear()

    def _give_back(self, block: mmap.mmap, epoch: int) -> None:
        with self._lock:
            if epoch == self._epoch and self.free_bytes + len(block) <= self._keep_bytes:
                self._free.append(block)


def new_block(size: int) -> mmap.mmap:
    """Pages from the system, `size` bytes rounded up to whole ones, zero."""
    size = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return mmap.mmap(-1, size)
    # Private: Python's default is shared with forked processes, and has no huge pages.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def address_of(block: mmap.mmap) -> int:
    """Where a block's first byte is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def tensor_over(block: mmap.mmap, size: int, gone: Callable[..., None], *arguments: object) -> Tensor:
    """The first `size` bytes of a block as a uint8 tensor.

    Args:
        block: of pages.
        size: of the tensor.
        gone: called with `arguments` when the last tensor over the block is gone: by any thread, in the middle of
            anything that may collect garbage; and not at the end of the process.
    """
    view = memoryview(block)
    tensor = torch.frombuffer(view, dtype=torch.uint8, count=size)
    # The storage holds the view, and so do all tensors over it; the arguments hold the block, if it is among them.
    weakref.finalize(view, gone, *arguments).atexit = False
    return tensor
