"""Matrices on their way into a flat buffer: joined, scaled in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# at::internal::GRAIN_SIZE: elementwise operations on fewer elements take one thread (ATen/Parallel.h, torch 2.14).
SERIAL_ELEMENTS = 32768
# So many that an operation is worth waking the other threads for, whatever else they do; what a conversion makes on the
# way is then still in a processor's last cache.
PARALLEL_ELEMENTS = 2**20


class Scaled(NamedTuple):
    """A matrix and what it is multiplied with."""

    matrix: Tensor
    factor: float


class Writer:
    """Fills a flat buffer matrix by matrix; places do not overlap.

    What adjoins in the buffer as it does where it comes from is written in one operation: a thousand small ones, as
    many as a LoRA has matrices, take longer than the memory does. `BulkReader` lays files out for that.

    Attributes:
        buffer: what is filled.
    """

    def __init__(self, buffer: Tensor, *, background: bool = False) -> None:
        """Begin; nothing is there for sure before `finish`.

        Args:
            buffer: (elements,).
            background: whether to write on the calling thread alone, for something else is in a hurry.
        """
        self.buffer = buffer
        self._background = background
        self._run: _Run | None = None

    def write(self, start: int, shape: tuple[int, int], terms: Sequence[Scaled], axis: int = 0) -> None:
        """Write factor · matrix of each term side by side, and zeros behind them.

        Args:
            start: the first element.
            shape: of the place.
            terms: what fills it, or less; at least one.
            axis: along which they are joined.
        """
        matrix, factor = terms[0]
        if len(terms) > 1 or matrix.shape != shape or not matrix.is_contiguous():
            self._fill(self.buffer[start:][: shape[0] * shape[1]].view(shape), terms, axis)
        elif self._run is None or not self._run.append(start, matrix, factor):
            self.finish()
            self._run = _Run(start, matrix, factor)

    def finish(self) -> None:
        """Write what is still to be written."""
        if self._run is not None:
            self._write_scaled(*self._run.columns(self.buffer), self._run.factor)
            self._run = None

    def _fill(self, place: Tensor, terms: Sequence[Scaled], axis: int) -> None:
        end = 0
        for matrix, factor in terms:
            self._write_scaled(place.narrow(axis, end, matrix.shape[axis]), matrix, factor)
            end += matrix.shape[axis]
        if end < place.shape[axis]:
            place.narrow(axis, end, place.shape[axis] - end).zero_()

    def _write_scaled(self, place: Tensor, matrix: Tensor, factor: float) -> None:
        """Write factor · matrix, rounded once."""
        # Of two small dtypes torch would round to the matrix's before the place's.
        widen = matrix.dtype not in (place.dtype, torch.float32)
        for part, values in self._parts(place, matrix):
            if factor == 1.0:
                part.copy_(values)
            else:
                torch.mul(values.float() if widen else values, factor, out=part)

    def _parts(self, place: Tensor, matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of both, in parts that torch works on with the calling thread alone, unless they are very many.

        A thousand small operations that each wait for other threads are slow on a busy machine. Where dtypes differ,
        torch makes a copy of what it multiplies: of parts, not of a whole LoRA.
        """
        parallel = not self._background and place.numel() >= PARALLEL_ELEMENTS
        if parallel and matrix.dtype == place.dtype:
            yield place, matrix
            return
        rows = max(1, (PARALLEL_ELEMENTS if parallel else SERIAL_ELEMENTS - 1) // max(1, place.shape[1]))
        if rows >= len(place):
            yield place, matrix
        else:
            yield from zip(place.split(rows), matrix.split(rows), strict=True)


class _Run:
    """Matrices of one factor that adjoin in both memories."""

    def __init__(self, start: int, matrix: Tensor, factor: float) -> None:
        self.factor = factor
        self._start, self._end = start, start + matrix.numel()
        self._first = matrix
        self._storage = matrix.untyped_storage().data_ptr()
        self._source_end = matrix.data_ptr() + matrix.nbytes

    def append(self, start: int, matrix: Tensor, factor: float) -> bool:
        """Take one more matrix, if it belongs here."""
        if (
            (start, factor, matrix.data_ptr()) != (self._end, self.factor, self._source_end)
            or matrix.dtype != self._first.dtype
            or matrix.untyped_storage().data_ptr() != self._storage  # neighbours by chance
        ):
            return False
        self._end += matrix.numel()
        self._source_end += matrix.nbytes
        return True

    def columns(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Their place in a buffer and they themselves, each as one column."""
        column = (self._end - self._start, 1)
        return buffer[self._start : self._end].view(column), self._first.as_strided(column, (1, 1))
