"""Another strength for a prepared stack: lora_B multiplied anew from its unscaled values, lora_A untouched.

`flatten` folds strength · alpha / rank into lora_B and rounds once. The same product is made here from a flat copy of
the unscaled lora_B that lies on the device: bit for bit what `flatten` would give, at memory speed, in one or a few
operations where the linears' lora_B lie one behind the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraError
from .stack import FlatLora, StackEntry


@dataclass(frozen=True)
class _Strip:
    """Neighbouring columns of lora_B with one factor: strength of entry `entry` · `scale`."""

    entry: int
    scale: float
    columns: int


@dataclass(frozen=True)
class _Run:
    """Neighbouring lora_B of one rank and one division into strips; together a (rows, rank) matrix.

    Attributes:
        start: where it begins in the flat buffer, in elements.
        source_start: where it begins among the unscaled values.
        largest: per strip, the largest absolute value.
    """

    start: int
    source_start: int
    rows: int
    rank: int
    strips: tuple[_Strip, ...]
    largest: tuple[float, ...]


def rescalable(flat: FlatLora) -> bool:
    """Whether a strength changes nothing but lora_B."""
    return not flat.mixing and not flat.vectors


class UnscaledB:
    """The lora_B of a stack before strength and alpha, in the places that they have in its flat buffers."""

    def __init__(
        self, entries: Sequence[StackEntry], flat: FlatLora, upload: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Copy the matrices beside a flat buffer; about the time of one copy of them.

        Args:
            entries: the active entries that `flat` was made of, or the same files at other strengths.
            flat: on the device where the products are wanted.
            upload: brings a host tensor there.
        """
        with torch.inference_mode(False), torch.no_grad():
            matrices = _matrices(entries, flat)
            dtype = flat.buffer.dtype
            if any(tensor.dtype != dtype for _, _, tensors in matrices for tensor in tensors):
                dtype = torch.float32  # holds every LoRA dtype exactly
            groups = _neighbours(matrices, flat)
            total = sum(flat.placed[module].b_shape[0] * rank for rank, _, modules in groups for module, _ in modules)
            host = torch.zeros(total, dtype=dtype)
            self._runs = tuple(_fill(host, groups, flat))
            self._values = host.to(flat.buffer.device) if upload is None else upload(host)

    @property
    def bytes(self) -> int:
        """What the values take on the device."""
        return self._values.nbytes

    def check(self, entries: Sequence[StackEntry], dtype: torch.dtype) -> None:
        """Refuse strengths that `multiply` could not represent.

        Raises:
            LoraError: a matrix would overflow the dtype.
        """
        for run in self._runs:
            for strip, largest in zip(run.strips, run.largest, strict=True):
                factor = entries[strip.entry].strength * strip.scale
                if not torch.isfinite((torch.tensor(largest) * factor).to(dtype)):
                    names = " + ".join(f"'{entry.weights.name}' × {entry.strength:g}" for entry in entries)
                    raise LoraError(f"LoRA {names} overflows {dtype}: lower the strength, or choose another dtype.")

    def multiply(self, entries: Sequence[StackEntry], flat: FlatLora) -> None:
        """Write strength · scale · lora_B into a flat buffer of this stack, rounded once; lora_A stays."""
        with torch.inference_mode(False), torch.no_grad():
            for run in self._runs:
                count = run.rows * run.rank
                source = self._values[run.source_start :][:count]
                target = flat.buffer[run.start :][:count]
                factors = [entries[strip.entry].strength * strip.scale for strip in run.strips]
                if len(set(factors)) == 1:
                    torch.mul(source, factors[0], out=target)
                    continue
                source, target, column = source.view(run.rows, run.rank), target.view(run.rows, run.rank), 0
                for strip, factor in zip(run.strips, factors, strict=True):
                    part = slice(column, column + strip.columns)
                    torch.mul(source[:, part], factor, out=target[:, part])
                    column += strip.columns


# A linear: its module, its strips, its matrices from left to right.
_Matrix = tuple[str, tuple[_Strip, ...], list[Tensor]]
# Linears that lie one behind the other: their rank, their strips, (module, matrices).
_Group = tuple[int, tuple[_Strip, ...], list[tuple[str, list[Tensor]]]]


def _matrices(entries: Sequence[StackEntry], flat: FlatLora) -> list[_Matrix]:
    """What each linear's lora_B consists of, in the order of the flat buffer."""
    strips: dict[str, list[_Strip]] = defaultdict(list)
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    for index, entry in enumerate(entries):
        for layer in entry.weights.layers:
            strips[layer.module].append(_Strip(index, layer.scale, layer.rank))
            tensors[layer.module].append(layer.lora_B)
    modules = sorted(strips, key=lambda module: flat.placed[module].b_start)
    return [(module, tuple(strips[module]), tensors[module]) for module in modules]


def _neighbours(matrices: Sequence[_Matrix], flat: FlatLora) -> list[_Group]:
    groups: list[_Group] = []
    end = -1
    for module, strips, tensors in matrices:
        place = flat.placed[module]
        rows, rank = place.b_shape
        if not groups or place.b_start != end or groups[-1][:2] != (rank, strips):
            groups.append((rank, strips, []))
        groups[-1][2].append((module, tensors))
        end = place.b_start + rows * rank
    return groups


def _fill(host: Tensor, groups: Sequence[_Group], flat: FlatLora) -> list[_Run]:
    runs, start = [], 0
    for rank, strips, modules in groups:
        rows = sum(flat.placed[module].b_shape[0] for module, _ in modules)
        matrix = host[start : start + rows * rank].view(rows, rank)
        row = 0
        for _, tensors in modules:
            column = 0
            for tensor in tensors:
                matrix[row : row + tensor.shape[0], column : column + tensor.shape[1]].copy_(tensor)
                column += tensor.shape[1]
            row += tensors[0].shape[0]
        largest, column = [], 0
        for strip in strips:
            low, high = torch.aminmax(matrix[:, column : column + strip.columns])
            largest.append(max(-float(low), float(high)))
            column += strip.columns
        runs.append(_Run(flat.placed[modules[0][0]].b_start, start, rows, rank, strips, tuple(largest)))
        start += rows * rank
    return runs
