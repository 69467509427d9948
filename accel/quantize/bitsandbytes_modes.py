"""NF4: bitsandbytes' 4-bit normal float, as a module of our own over its operators.

bitsandbytes' own `Linear4bit` keeps Python state beside the tensors, which a compiled region cannot be rebuilt from;
its operators (`torch.ops.bitsandbytes`) compile whole.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.base import Workspace
from .mode import Mode, runs_anywhere
from .nf4 import BLOCK, LIBRARY, pack, stored_shapes, unpack


class Nf4Linear(nn.Module):
    """A linear whose weight is stored in 4 bits: `packed`, two values a byte, and `absmax`, one per 64 of a row.

    Attributes:
        packed: ``(out_features in_features / 2) 1`` uint8, row by row.
        absmax: ``(out_features in_features / 64)`` float32.
        bias: ``out_features`` in the compute dtype, or None.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Make it without tensors."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name in ("packed", "absmax", "bias"):
            self.register_parameter(name, None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``… in_features -> … out_features``. The weight is unpacked into the input's dtype, then multiplied."""
        return F.linear(hidden_states, self.unpack(hidden_states.dtype), self.bias)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight that it computes with, ``out_features in_features``."""
        return unpack(self.packed, self.absmax, (self.out_features, self.in_features), dtype)


def _to_nf4(weight: Tensor, bias: Tensor | None, per_picture: bool) -> Nf4Linear:
    out_features, in_features = weight.shape
    packed, absmax = pack(weight)
    linear = Nf4Linear(in_features, out_features)
    linear.packed = nn.Parameter(packed, requires_grad=False)
    linear.absmax = nn.Parameter(absmax, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _nf4_bytes(out_features: int, in_features: int) -> int:
    packed, absmax = stored_shapes(out_features * in_features)
    return prod(packed) + prod(absmax) * torch.float32.itemsize


NF4 = Mode(
    name="nf4",
    summary=f"weights in 4-bit normal floats, in blocks of {BLOCK} (bitsandbytes)",
    library=LIBRARY,
    lacks=runs_anywhere,
    multiple_of=(1, BLOCK),  # so that a block never spans two rows
    weight_bytes=_nf4_bytes,
    convert=_to_nf4,
    workspace=Workspace(unpacks_weight=True),
    error=0.14,
    instead=("int4", "int8_weight_only", "fp8_weight_only"),
)
