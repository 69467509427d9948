"""The memory of a device as it is."""

from __future__ import annotations

import torch

from ..hardware import Hardware
from .base import DeviceMemory
from .cpu import HostMemory
from .gpu import HAS_STREAMS, LOCKS_PAGES, CudaMemory


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
