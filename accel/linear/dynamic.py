"""Linears that quantize what they read: torchao's float8 and int8 weights, with activations quantized by rows.

torchao's own path quantizes the activations once for every linear, and compares their sizes while it is traced, which
a batch of any size does not allow. So the activations are quantized here, once for all linears that read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Rows of zeros have no scale of their own.
SMALLEST_SCALE = 1e-12


def quantized_dtype(base: nn.Module) -> torch.dtype | None:
    """What a linear wants its input quantized to, row by row: float8_e4m3fn, int8, or None for not at all."""
    weight = getattr(base, "weight", None)
    if getattr(weight, "act_quant_kwargs", None) is None or weight.scale.shape != (weight.shape[0], 1):
        return None
    return weight.qdata.dtype


def quantize_rows(x: Tensor, dtype: torch.dtype, again: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale each row to the range of a dtype.

    Args:
        x: ``… k``, k in_features; any float dtype.
        dtype: float8_e4m3fn or int8.
        again: x, computed once more by the same code. A kernel that takes the largest of each row and then scales it
            reads what x is computed from twice; given one tensor for both, inductor has it write x out in between.

    Returns:
        The values, ``(…) k`` of `dtype`, and their scales, ``(…) 1`` float32.
    """
    rows = x.flatten(0, -2)
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scale = (rows.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=SMALLEST_SCALE)
    rows = rows if again is None else again.flatten(0, -2)
    values = (rows.float() / scale).clamp(-largest, largest)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scale


def int8_linears(x: Tensor, bases: Sequence[nn.Module]) -> list[Tensor]:
    """Run linears with int8 weights over one input; inductor fuses what follows the integer products.

    Args:
        x: ``… k``, k in_features.
        bases: whose `quantized_dtype` is int8, with a bias or without.

    Returns:
        ``… o`` of each linear, o its out_features, x's dtype.
    """
    values, scale = quantize_rows(x, torch.int8)
    outputs = []
    for base in bases:
        weight = base.weight
        product = torch._int_mm(values, weight.qdata.t()).float() * (scale * weight.scale.flatten())
        output = product if base.bias is None else product + base.bias
        outputs.append(output.to(x.dtype).unflatten(0, x.shape[:-1]))
    return outputs
