"""What the machine can do."""

from __future__ import annotations

import torch

from .errors import SettingsError
from .settings import DTYPES


def resolve_dtype(choice: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Decide the dtype that the transformer computes in.

    Args:
        choice: a key of `settings.DTYPES`.
        stored: the dtype of most of the checkpoint's bytes.
        device: where the transformer runs.

    Returns:
        The chosen dtype. "auto" keeps a checkpoint's own float16 or bfloat16, keeps float32 on a CPU (there it is as
        fast as anything and exact), and computes in bfloat16 otherwise.

    Raises:
        SettingsError: the device cannot compute in an explicitly chosen dtype.
    """
    explicit = DTYPES[choice]
    if explicit is None:
        if stored in (torch.bfloat16, torch.float16):
            explicit = stored
        else:
            explicit = torch.float32 if stored == torch.float32 and device.type == "cpu" else torch.bfloat16
        if explicit == torch.bfloat16 and not supports_bf16(device):
            return torch.float16
        return explicit
    if explicit == torch.bfloat16 and not supports_bf16(device):
        raise SettingsError(f"dtype is 'bf16', but {device} does not compute in bfloat16: choose 'fp16' or 'auto'.")
    return explicit


def supports_bf16(device: torch.device) -> bool:
    """Whether `device` has bfloat16 arithmetic (CUDA from compute capability 8.0; CPUs and MPS always)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
