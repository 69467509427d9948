"""What torch has taken of a device's memory."""

from __future__ import annotations

import gc

import torch


def start_peak(device: torch.device) -> None:
    """Give back what nobody uses, and forget what was taken so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors took at a time since `start_peak`; None on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int | None:
    """What is free of a GPU; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
