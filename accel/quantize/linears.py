"""What is asked of a linear, whatever its weight is stored as."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.packed import is_packed, unpacked
from .bitsandbytes_modes import Nf4Linear

UNIT_VECTORS = 1024


def dequantize(base: nn.Module) -> Tensor:
    """The weight that a linear computes with.

    Args:
        base: what `Mode.convert` gave, or a plain `nn.Linear`.

    Returns:
        (out_features, in_features) float32, on the linear's device; a plain float32 weight itself, else a new tensor.
    """
    if isinstance(base, Nf4Linear):
        return base.unpack(torch.float32)
    weight = base.weight
    if is_packed(weight):
        return unpacked(weight).float()
    if not is_quantized(weight):
        return weight.detach().float()
    if type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize(torch.float32)
    return _by_products(weight)


def _by_products(weight: Tensor) -> Tensor:
    """Read a weight that cannot be unpacked (tinygemm's int4) by multiplying it with unit vectors."""
    in_features = weight.shape[1]
    columns = []
    for start in range(0, in_features, UNIT_VECTORS):
        ones = torch.arange(start, min(start + UNIT_VECTORS, in_features), device=weight.device)
        columns.append(F.linear(F.one_hot(ones, in_features).to(weight.dtype), weight).T.float())
    return torch.cat(columns, dim=1)


def is_quantized(weight: Tensor) -> bool:
    """Whether a parameter is a tensor subclass that is stored as several plain tensors."""
    return hasattr(weight, "__tensor_flatten__")


def stored_tensors(parameter: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that a parameter is stored as: itself, or those of its quantized form."""
    if not is_quantized(parameter):
        return (parameter,)
    names, _ = parameter.__tensor_flatten__()
    return tuple(tensor for name in names for tensor in stored_tensors(getattr(parameter, name)))


def parameter_bytes(model: nn.Module) -> int:
    """What a model's parameters take, quantized ones as they are stored."""
    return sum(
        tensor.numel() * tensor.element_size()
        for parameter in model.parameters()
        for tensor in stored_tensors(parameter)
    )
