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

Parts = dict[str, Tensor]

NF4_BLOCK = 64
# Weights that are quantized at a time: bitsandbytes' CPU kernel needs 13 bytes for each.
CHUNK = 1 << 22


class WeightFormat(Protocol):
    """How a weight (out_features, in_features) is stored."""

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor; one of them is named `weight`."""

    def quantize(self, weight: Tensor) -> Parts:
        """Store a float weight; on its device."""

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
        integer = self.dtype == torch.int8
        limit = 127.0 if integer else torch.finfo(self.dtype).max
        values = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        rows = max(1, CHUNK // weight.shape[1])
        for source, target, factor in zip(weight.split(rows), values.split(rows), scale.split(rows), strict=True):
            run = source.float()
            factor.copy_(run.abs().amax(dim=1, keepdim=True) / limit).clamp_min_(torch.finfo(torch.float32).tiny)
            run = run / factor
            target.copy_((run.round_() if integer else run).clamp_(-limit, limit))
        return {"weight": values, "scale": scale}

    def dequantize(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See `WeightFormat`."""
        return parts["weight"].to(dtype) * parts["scale"].to(dtype)


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes' 4-bit normal floats: 16 values fitted to a normal distribution, a float32 scale per 64 weights.

    Source: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314; without its second quantization, of scales.
    """

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`. Two weights share a byte."""
        numel = shape[0] * shape[1]
        blocks = -(-numel // NF4_BLOCK)
        return {"weight": ((-(-numel // 2), 1), torch.uint8), "absmax": ((blocks,), torch.float32)}

    def quantize(self, weight: Tensor) -> Parts:
        """See `WeightFormat`."""
        from bitsandbytes.functional import quantize_4bit

        packed, absmax = [], []
        for chunk in weight.flatten().split(CHUNK):
            values, state = quantize_4bit(chunk.float(), blocksize=NF4_BLOCK, quant_type="nf4")
            packed.append(values)
            absmax.append(state.absmax)
        return {"weight": torch.cat(packed), "absmax": torch.cat(absmax)}

    def dequantize(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See `WeightFormat`."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(parts["absmax"], shape=shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(parts["weight"], state)


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
