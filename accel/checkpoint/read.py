"""A recognised checkpoint, tensor by tensor, as the model's modules want it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layout import FusedLinear
from ..spec import ModelSpec
from ..tensors import all_finite
from .decode import decode
from .source import Rows

# Values that are converted, scaled and checked at a time: few enough for a CPU's caches and for little memory, enough
# that starting threads costs nothing.
CPU_CHUNK = 2**22
DEVICE_CHUNK = 2**24


@dataclass(frozen=True)
class LinearWeights:
    """One linear of the model: its diffusers name, weight (out_features, in_features) and bias (out_features,)."""

    module: str
    weight: Tensor
    bias: Tensor


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
        reader = _Reader(spec, rows, dtype, torch.device(device))
        for linear in layout.linears:
            yield from _linear(linear, reader)
        for vector in layout.vectors:
            yield VectorWeights(vector.parameter, reader.read(vector.name, ((0, vector.size),), ()))


def _linear(linear: FusedLinear, reader: _Reader) -> Iterator[LinearWeights]:
    for part in linear.parts:
        end = part.start + part.rows
        runs: tuple[tuple[int, int], ...] = ((part.start, end),)
        if linear.swap_halves:
            middle = part.start + part.rows // 2
            runs = ((middle, end), (part.start, middle))
        weight = reader.read(f"{linear.name}.weight", runs, (linear.in_features,))
        yield LinearWeights(part.module, weight, reader.read(f"{linear.name}.bias", runs, ()))


class _Reader:
    """Copies rows out of a file: converted, multiplied by their scale, and checked."""

    def __init__(self, spec: ModelSpec, rows: Callable[[str], Rows], dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self._rows = rows
        self._dtype = dtype
        self._device = device

    def read(self, name: str, runs: tuple[tuple[int, int], ...], columns: tuple[int, ...]) -> Tensor:
        """The rows of all `runs`, one after another, as a tensor of their own."""
        stored = self._spec.stored[name]
        source = self._rows(stored.key)
        scale = None if stored.scale is None else self._scale(stored.scale)
        out = torch.empty((sum(end - start for start, end in runs), *columns), dtype=self._dtype, device=self._device)
        step = max(1, (CPU_CHUNK if self._device.type == "cpu" else DEVICE_CHUNK) // max(1, *columns, 1))
        done = 0
        for begin, end in runs:
            for start in range(begin, end, step):
                stop = min(start + step, end)
                part = out[done : done + stop - start]
                factor = scale if scale is None or not scale.dim() else scale[start:stop]
                decode(source[start:stop].to(self._device), factor, part)
                # A chunk is still in a CPU's cache; on a device every check waits for it.
                if self._device.type == "cpu":
                    self._check(part, stored.key)
                done += stop - start
        if self._device.type != "cpu":
            self._check(out, stored.key)
        return out

    def _scale(self, key: str) -> Tensor:
        """One scale, (), or one for each row, (rows, 1); float32."""
        stored = self._rows(key)
        # A scalar cannot be sliced, and a tensor of the file is one already.
        scale = (stored if isinstance(stored, Tensor) else stored[:]).to(torch.float32, copy=True).flatten()
        if not all_finite(scale) or not bool((scale > 0).all()):
            raise CheckpointError(
                f"'{self._spec.file.name}': the scale '{key}' holds zero, NaN, infinity or a negative number, expected "
                "positive ones. The file is damaged: get it again."
            )
        return scale.reshape(() if scale.numel() == 1 else (-1, 1)).to(self._device)

    def _check(self, values: Tensor, key: str) -> None:
        if not all_finite(values):
            raise CheckpointError(
                f"'{self._spec.file.name}': '{key}' holds NaN or infinity in {self._dtype}. The file is damaged, or "
                "its values do not fit this dtype: get it again, or choose another dtype."
            )
