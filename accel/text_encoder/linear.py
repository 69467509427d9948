"""A linear layer whose weight is stored in 8 or 4 bits, and computed with in the dtype of its input.

Text encoders run once per prompt and compute in float32 (T5's activations overflow float16), so the weight is expanded
when it is used, one layer at a time. All that is stored are plain tensors: they move between devices, and have sizes,
like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.dynamic import quantize_rows
from ..quantize import nf4

Parts = dict[str, Tensor]

# Weights that are scaled at a time: they are copied to float32.
CHUNK = 1 << 22


class WeightFormat(Protocol):
    """How a weight (out_features, in_features) is stored."""

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor; one of them is named `weight`."""

    def quantize(self, weight: Tensor) -> Parts:
        """Store a float32, float16 or bfloat16 weight; on its device."""

    def dequantize(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, a new tensor."""


@dataclass(frozen=True)
class RowScaled:
    """weight = q · scale with one float32 scale per row, or one in all.

    Attributes:
        dtype: of q: int8, float8_e4m3fn or float8_e5m2.
        per_tensor: one scale in all, as in ComfyUI's scaled fp8 files.
    """

    dtype: torch.dtype
    per_tensor: bool = False

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`."""
        return {"weight": (shape, self.dtype), "scale": ((1 if self.per_tensor else shape[0], 1), torch.float32)}

    def quantize(self, weight: Tensor) -> Parts:
        """See `WeightFormat`. The largest value of a row becomes the largest number of the dtype.

        Raises:
            ValueError: the format has one scale in all, which only files do.
        """
        if self.per_tensor:
            raise ValueError("a format with one scale is read from files, not made")
        values = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        rows = max(1, CHUNK // weight.shape[1])
        for source, target, factor in zip(weight.split(rows), values.split(rows), scale.split(rows), strict=True):
            for kept, made in zip((target, factor), quantize_rows(source, self.dtype), strict=True):
                kept.copy_(made)
        return {"weight": values, "scale": scale}

    def dequantize(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See `WeightFormat`."""
        return parts["weight"].to(dtype) * parts["scale"].to(dtype)


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes' 4-bit normal floats, see `quantize.nf4`."""

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`. Two weights share a byte."""
        packed, absmax = nf4.stored_shapes(shape[0] * shape[1])
        return {"weight": (packed, torch.uint8), "absmax": (absmax, torch.float32)}

    def quantize(self, weight: Tensor) -> Parts:
        """See `WeightFormat`."""
        packed, absmax = nf4.pack(weight)
        return {"weight": packed, "absmax": absmax}

    def dequantize(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See `WeightFormat`."""
        return nf4.unpack(parts["weight"], parts["absmax"], shape, dtype)


class WeightOnlyLinear(nn.Module):
    """`nn.Linear` without bias over a stored weight; made on the meta device, filled by `store`.

    `comfy_cast_weights` and `weight_function` are what ComfyUI's ModelPatcher sets on the layers that it leaves in host
    memory, and for LoRAs: functions from a weight to the changed weight. The stored weight itself is never written.
    """

    comfy_cast_weights = False
    weight_function: Sequence[Callable[[Tensor], Tensor]] = ()

    def __init__(self, in_features: int, out_features: int, weight_format: WeightFormat) -> None:
        """Have the sizes, without data."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.register_parameter("bias", None)  # ComfyUI asks every layer for one
        for name, (shape, dtype) in weight_format.shapes((out_features, in_features)).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def store(self, parts: Parts, device: torch.device) -> None:
        """Take what `WeightFormat.quantize` gave.

        Raises:
            ValueError: other names, shapes or dtypes than the format's.
        """
        for name, (shape, dtype) in self.weight_format.shapes((self.out_features, self.in_features)).items():
            part = parts[name]
            if part.shape != shape or part.dtype != dtype:
                raise ValueError(f"{name} is {tuple(part.shape)} {part.dtype}, expected {shape} {dtype}")
            setattr(self, name, nn.Parameter(part.to(device), requires_grad=False))

    def dequantize(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The stored weight (out_features, in_features), a new tensor on `device`."""
        parts = {name: parameter.to(device) for name, parameter in self.named_parameters(recurse=False)}
        return self.weight_format.dequantize(parts, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features) in the dtype and on the device of `x`, wherever the weight is."""
        weight = self.dequantize(x.dtype, x.device)
        for change in self.weight_function:
            weight = change(weight)
        return F.linear(x, weight)
