"""NF4 as plain tensors: 16 values fitted to a normal distribution, and a float32 scale per 64 weights, by bitsandbytes.

Source: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314; without its second quantization, of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Library

LIBRARY = Library("bitsandbytes", "0.46")
BLOCK = 64
# See torchao_modes: runs that stay in a CPU's cache; and bitsandbytes' CPU kernel needs 13 bytes for each weight. They
# end where a block does.
RUN_ELEMENTS = 2**18


def stored_shapes(numel: int) -> tuple[tuple[int, int], tuple[int]]:
    """The shapes of `packed` (uint8, two weights a byte) and `absmax` (float32) of that many weights."""
    return (-(-numel // 2), 1), (-(-numel // BLOCK),)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight, on its device.

    Args:
        weight: any shape; float32, float16 or bfloat16. Blocks follow one another row by row.

    Returns:
        `packed` and `absmax`, see `stored_shapes`.
    """
    import bitsandbytes  # noqa: F401 - registers torch.ops.bitsandbytes

    values = weight.flatten()
    runs = [
        torch.ops.bitsandbytes.quantize_4bit(run, BLOCK, "nf4", torch.uint8)
        for run in values.split(RUN_ELEMENTS if weight.device.type == "cpu" else max(1, values.numel()))
    ]
    return torch.cat([packed for packed, _ in runs]), torch.cat([absmax for _, absmax in runs])


def unpack(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that `pack` stored, a new tensor of `shape`; bitsandbytes must have been imported, as `pack` does."""
    # On a CPU, bitsandbytes 0.50.2 begins a block anew in every row, which `pack` does not.
    rows = list(shape) if shape[1] % BLOCK == 0 else [1, shape[0] * shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", rows, dtype).view(shape)
