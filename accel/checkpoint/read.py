"""A recognised checkpoint, tensor by tensor, as the model's modules want it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.layout import FusedLinear
from ..spec import ModelSpec
from .stored import StoredReader


@dataclass(frozen=True)
class LinearWeights:
    """One linear of the model.

    Attributes:
        module: its diffusers name.
        weight: (out_features, in_features).
        bias: (out_features,), or None for a linear without.
    """

    module: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class VectorWeights:
    """A parameter that is no linear's, such as the scale of an RMS norm: its full diffusers name and value (size,)."""

    parameter: str
    value: Tensor


def read_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Iterator[LinearWeights | VectorWeights]:
    """Read a checkpoint tensor by tensor, as the model's modules want it.

    Args:
        spec: what `inspect_checkpoint` gave.
        dtype: what the tensors are converted to. Scaled and block-quantized ones are computed in float32, then rounded
            once.
        device: where they go.

    Yields:
        Every linear and every vector of the model once; nothing of the file stays in memory behind them.

    Raises:
        FileError: a file is gone or was changed since it was inspected.
        CheckpointError: a tensor or a scale holds NaN or infinity, or a scale is not positive.
    """
    layout = spec.stored_layout
    with spec.file.open() as rows:
        reader = StoredReader(spec.file.name, rows, torch.device(device))
        # The few small ones first: a block is whole, and can be moved, as soon as its last linear is read.
        for vector in layout.vectors:
            yield VectorWeights(vector.parameter, reader.read(spec.stored[vector.name], dtype))
        for linear in layout.linears:
            yield from _linear(linear, spec, reader, dtype)


def _linear(
    linear: FusedLinear, spec: ModelSpec, reader: StoredReader, dtype: torch.dtype
) -> Iterator[LinearWeights]:
    stored_weight = spec.stored[f"{linear.name}.weight"]
    stored_bias = spec.stored[f"{linear.name}.bias"] if linear.bias else None
    for part in linear.parts:
        end = part.start + part.rows
        runs: tuple[tuple[int, int], ...] = ((part.start, end),)
        if linear.swap_halves:
            middle = part.start + part.rows // 2
            runs = ((middle, end), (part.start, middle))
        weight = reader.read(stored_weight, dtype, runs)
        bias = None if stored_bias is None else reader.read(stored_bias, dtype, runs)
        yield LinearWeights(part.module, weight, bias)
