"""How much memory is free, and how much of it LoRAs may keep."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# Programs count memory in these; people, disks and the settings of the nodes in GB.
MIB = 2**20
GIB = 2**30
GB = 10**9
# cgroup v2: what a container may use, which the machine's own figures do not show.
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class PoolBudgets:
    """How much memory an engine's LoRA pools may keep. The newest entry of each stays even when it alone is larger.

    Attributes:
        files_bytes: contents of LoRA files, in host memory.
        host_bytes: prepared stacks, in host memory; page-locked where the engine runs on CUDA.
        device_bytes: stacks on the device, ready to bind. On a CPU they are the prepared stacks themselves, and take
            nothing more.
    """

    files_bytes: int
    host_bytes: int
    device_bytes: int

    @property
    def strengths_bytes(self) -> int:
        """What is kept on the device beside its stacks, so that their strengths change without another copy."""
        return strengths_bytes(self.device_bytes)

    @classmethod
    def of_free_memory(cls, device: torch.device, reserved_bytes: int = 0) -> PoolBudgets:
        """Shares of what is free now: enough for a few LoRAs on any machine, for dozens on a large one.

        - files: 1/16 of the free host memory, 256 MiB to 4 GiB;
        - host: 1/8 of it, 512 MiB to 16 GiB;
        - device: 1/8 of the free device memory, 256 MiB to 2 GiB; on a CPU the same as host.

        Args:
            device: where the model runs.
            reserved_bytes: what the model will still take of the device's memory.
        """
        free = available_host_bytes() - (reserved_bytes if device.type == "cpu" else 0)
        files = _between(256 * MIB, free // 16, 4 * GIB)
        host = _between(512 * MIB, free // 8, 16 * GIB)
        if device.type == "cpu":
            return cls(files, host, host)
        return cls(files, host, device_pool_bytes(free_device_bytes(device) - reserved_bytes))


def device_pool_bytes(free_bytes: int) -> int:
    """What stacks may keep of a device on which so much is free beside the model."""
    return _between(256 * MIB, free_bytes // 8, 2 * GIB)


def strengths_bytes(pool_bytes: int) -> int:
    """What changes of strength may keep beside a pool of stacks: the half of a stack that is its lora_B, unscaled."""
    return pool_bytes // 2


def with_strengths(pool_bytes: int) -> int:
    """A pool of stacks and what changes of strength may keep beside it."""
    return pool_bytes + strengths_bytes(pool_bytes)


def without_strengths(lora_bytes: int) -> int:
    """The pool of stacks of which `with_strengths` makes so much."""
    return lora_bytes * 2 // 3


def available_host_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or less where this process's container has less."""
    import psutil  # ComfyUI itself needs it; a script that gives its budgets does not

    available = psutil.virtual_memory().available
    limit, used = (_read_int(CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else max(0, min(available, limit - used))


def free_device_bytes(device: torch.device) -> int:
    """Memory of a GPU that nothing uses, with what torch keeps in reserve."""
    if device.type == "mps":  # shared with the host; what Metal recommends to take, less what it has taken
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    api = getattr(torch, device.type)
    free, _ = api.mem_get_info(device)
    return free + api.memory_reserved(device) - api.memory_allocated(device)


def give_back_freed() -> None:
    """Give the system the pages that were freed, but lie between others on the C library's heap. Takes milliseconds.

    glibc keeps them for itself otherwise, of tensors under 32 MB: what a load frees of those that it has converted adds
    up to a GB.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """malloc_trim(3); None where the C library is not glibc."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS; no such library; Windows
        return None


def pinned_bytes(size: int) -> int:
    """What torch's host allocator takes for a page-locked tensor of `size` bytes: it rounds up to a power of two."""
    return 1 << max(0, size - 1).bit_length()


def _between(low: int, value: int, high: int) -> int:
    return min(max(low, value), high)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None
