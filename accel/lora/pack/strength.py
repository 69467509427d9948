"""Another strength for a prepared stack: lora_B multiplied anew from its unscaled values, lora_A untouched.

`flatten` folds strength · alpha / rank into lora_B and rounds once. The same product is made here from a flat copy of
the unscaled lora_B that lies on the device: bit for bit what `flatten` would give, at memory speed, in one or a few
operations where the linears' lora_B lie one behind the other. The left matrix of a Kronecker product is to it what
lora_B is to a LoRA.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...memory.buffers import HostBuffers
from ..stack import StackEntry, overflow
from .flat import FlatLora
from .write import Scaled, Writer


@dataclass(frozen=True)
class _Strip:
    """Neighbouring columns of a matrix with one factor: strength of entry `entry` · `scale`."""

    entry: int
    scale: float
    columns: int


@dataclass(frozen=True)
class _Run:
    """Neighbouring matrices of one rank and one division into strips; together a (rows, rank) matrix.

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

    @property
    def elements(self) -> int:
        return self.rows * self.rank


class UnscaledB:
    """The lora_B and left matrices of a stack before strength and alpha, in their places in its flat buffers."""

    def __init__(
        self,
        entries: Sequence[StackEntry],
        flat: FlatLora,
        upload: Callable[[Tensor], Tensor] | None = None,
        buffers: HostBuffers | None = None,
    ) -> None:
        """Copy the matrices beside a flat buffer; about the time of one copy of them.

        Args:
            entries: the active entries that `flat` was made of, or the same files at other strengths.
            flat: on the device where the products are wanted.
            upload: copies a host tensor there.
            buffers: where host memory comes from; None takes it from the system, which is slower.
        """
        with torch.inference_mode(False), torch.no_grad():
            matrices = _matrices(entries, flat)
            dtype = flat.buffer.dtype
            if any(tensor.dtype != dtype for matrix in matrices for tensor in matrix.tensors):
                dtype = torch.float32  # holds every LoRA dtype exactly
            elements = sum(matrix.rows * matrix.rank for matrix in matrices)
            host = (buffers or HostBuffers(0)).take(elements * dtype.itemsize).view(dtype)
            self._placed, self._kroneckers = flat.placed, flat.kroneckers
            self._runs = tuple(_fill(host, _neighbours(matrices)))
            self._values = host.to(flat.buffer.device) if upload is None else upload(host)
            self._sources = [self._values.narrow(0, run.source_start, run.elements) for run in self._runs]

    @property
    def bytes(self) -> int:
        """What the values take on the device."""
        return self._values.nbytes

    def belongs_to(self, flat: FlatLora) -> bool:
        """Whether a flat buffer has the layout that these values were laid out for.

        Of one stack there may be others: a file that was read twice shares less with itself than one read once.
        """
        if self._placed is not flat.placed or self._kroneckers is not flat.kroneckers:
            if (self._placed, self._kroneckers) != (flat.placed, flat.kroneckers):
                return False
            self._placed, self._kroneckers = flat.placed, flat.kroneckers  # the next comparison is cheap
        return True

    def check(self, entries: Sequence[StackEntry], dtype: torch.dtype) -> None:
        """Refuse strengths that `multiply` could not represent.

        Raises:
            LoraError: a matrix would overflow the dtype.
        """
        surely = torch.finfo(dtype).max
        for run in self._runs:
            for strip, largest in zip(run.strips, run.largest, strict=True):
                factor = entries[strip.entry].strength * strip.scale
                if largest * abs(factor) > surely and not torch.isfinite((torch.tensor(largest) * factor).to(dtype)):
                    raise overflow(entries, dtype)

    def multiply(self, entries: Sequence[StackEntry], flat: FlatLora) -> None:
        """Write strength · scale · lora_B, or left, into a flat buffer of this stack, rounded once; the rest stays."""
        with torch.inference_mode(False), torch.no_grad():
            for run, source in zip(self._runs, self._sources, strict=True):
                target = flat.buffer.narrow(0, run.start, run.elements)
                factors = [entries[strip.entry].strength * strip.scale for strip in run.strips]
                if len(set(factors)) == 1:
                    torch.mul(source, factors[0], out=target)
                    continue
                source, target, column = source.view(run.rows, run.rank), target.view(run.rows, run.rank), 0
                for strip, factor in zip(run.strips, factors, strict=True):
                    part = slice(column, column + strip.columns)
                    torch.mul(source[:, part], factor, out=target[:, part])
                    column += strip.columns


@dataclass(frozen=True)
class _Matrix:
    """A linear's lora_B, or a left matrix, in the flat buffer.

    Attributes:
        start: where it begins, in elements.
        strips: what its columns belong to, from left to right.
        tensors: the unscaled values of each strip.
    """

    start: int
    rows: int
    rank: int
    strips: list[_Strip] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def append(self, strip: _Strip, tensor: Tensor) -> None:
        """Add columns on the right."""
        self.strips.append(strip)
        self.tensors.append(tensor)


def _matrices(entries: Sequence[StackEntry], flat: FlatLora) -> list[_Matrix]:
    """What is scaled, in the order of the flat buffer."""
    found = {module: _Matrix(place.b_start, *place.b_shape) for module, place in flat.placed.items()}
    lefts: list[_Matrix] = []
    seen: dict[str, int] = defaultdict(int)
    for index, entry in enumerate(entries):
        for layer in entry.adapter.layers:
            if layer.kronecker is not None:
                term = flat.kroneckers[layer.module][seen[layer.module]]
                seen[layer.module] += 1
                lefts.append(_Matrix(term.left, term.a, term.b))
                lefts[-1].append(_Strip(index, layer.kronecker.scale, term.b), layer.kronecker.left)
            if layer.low_rank is not None:
                scale = layer.low_rank.factors(flat.buffer.dtype)[1]
                found[layer.module].append(_Strip(index, scale, layer.rank), layer.low_rank.lora_B)
    return sorted([*found.values(), *lefts], key=lambda matrix: matrix.start)


def _neighbours(matrices: Sequence[_Matrix]) -> list[list[_Matrix]]:
    """Matrices that lie one behind the other, of one rank and with the same strips."""
    groups: list[list[_Matrix]] = []
    end = -1
    for matrix in matrices:
        same = groups and (groups[-1][0].rank, groups[-1][0].strips) == (matrix.rank, matrix.strips)
        if matrix.start == end and same:
            groups[-1].append(matrix)
        else:
            groups.append([matrix])
        end = matrix.start + matrix.rows * matrix.rank
    return groups


def _fill(host: Tensor, groups: Sequence[Sequence[_Matrix]]) -> list[_Run]:
    writer, start = Writer(host), 0
    for matrix in (matrix for group in groups for matrix in group):
        writer.write(start, (matrix.rows, matrix.rank), [Scaled(tensor, 1.0) for tensor in matrix.tensors], axis=1)
        start += matrix.rows * matrix.rank
    writer.finish()
    runs, start = [], 0
    for group in groups:
        first, rows = group[0], sum(matrix.rows for matrix in group)
        whole = host[start : start + rows * first.rank].view(rows, first.rank)
        largest, column = [], 0
        for strip in first.strips:
            low, high = torch.aminmax(whole[:, column : column + strip.columns])
            largest.append(max(-float(low), float(high)))
            column += strip.columns
        runs.append(_Run(first.start, start, rows, first.rank, tuple(first.strips), tuple(largest)))
        start += rows * first.rank
    return runs
