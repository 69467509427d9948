"""NF4: bitsandbytes' 4-bit normal float, as a module of our own over its operators.

bitsandbytes' own `Linear4bit` keeps Python state beside the tensors, which a compiled region cannot be rebuilt from;
its operators (`torch.ops.bitsandbytes`) compile whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mode import Mode, runs_anywhere

BLOCK = 64
ABSMAX_BYTES = 4
# See torchao_modes: runs of rows that stay in a CPU's cache.
RUN_ELEMENTS = 2**18


class Nf4Linear(nn.Module):
    """A linear whose weight is stored in 4 bits: `packed`, two values a byte, and `absmax`, one per 64 of a row.

    Attributes:
        packed: (out · in / 2, 1) uint8, row by row.
        absmax: (out · in / 64,) float32.
        bias: (out,) in the compute dtype.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Make it without tensors."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name in ("packed", "absmax", "bias"):
            self.register_parameter(name, None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features). The weight is unpacked into the input's dtype, then multiplied."""
        return F.linear(hidden_states, self.unpack(hidden_states.dtype), self.bias)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight that it computes with, (out_features, in_features)."""
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.absmax, BLOCK, "nf4", [self.out_features, self.in_features], dtype
        )


def _to_nf4(weight: Tensor, bias: Tensor, per_picture: bool) -> Nf4Linear:
    import bitsandbytes  # noqa: F401 - registers torch.ops.bitsandbytes

    out_features, in_features = weight.shape
    rows = max(1, RUN_ELEMENTS // in_features) if weight.device.type == "cpu" else out_features
    runs = [
        torch.ops.bitsandbytes.quantize_4bit(run.contiguous(), BLOCK, "nf4", torch.uint8)
        for run in weight.split(rows)
    ]
    linear = Nf4Linear(in_features, out_features)
    linear.packed = nn.Parameter(torch.cat([packed for packed, _ in runs]), requires_grad=False)
    linear.absmax = nn.Parameter(torch.cat([absmax for _, absmax in runs]), requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _nf4_bytes(out_features: int, in_features: int) -> int:
    return out_features * in_features // 2 + out_features * in_features // BLOCK * ABSMAX_BYTES


NF4 = Mode(
    name="nf4",
    summary=f"weights in 4-bit normal floats, in blocks of {BLOCK} (bitsandbytes)",
    library=("bitsandbytes", "0.46"),
    lacks=runs_anywhere,
    multiple_of=(1, BLOCK),  # so that a block never spans two rows
    weight_bytes=_nf4_bytes,
    convert=_to_nf4,
    instead=("int4", "int8_weight_only", "fp8_weight_only"),
)
