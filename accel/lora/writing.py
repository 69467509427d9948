"""Matrices on their way into a flat buffer: joined, scaled in float32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# at::internal::GRAIN_SIZE: elementwise operations on fewer elements take one thread (ATen/Parallel.h, torch 2.14).
SERIAL_ELEMENTS = 32768
# So many that an operation is worth waking the other threads for, whatever else they do.
PARALLEL_ELEMENTS = 2**21


class Scaled(NamedTuple):
    """A matrix and what it is multiplied with."""

    matrix: Tensor
    factor: float


class Writer:
    """Fills a flat buffer matrix by matrix.

    What adjoins in the buffer as it does where it comes from is written in one operation: a thousand small ones, as
    many as a LoRA has matrices, take longer than the memory does. `BulkReader` lays files out for that.
    """

    def __init__(self, buffer: Tensor, *, background: bool = False) -> None:
        """Begin; nothing is there for sure before `finish`.

        Args:
            buffer: (elements,).
            background: whether to leave the other processors to those who are in a hurry.
        """
        self.buffer = buffer
        self._parallel_elements = math.inf if background else PARALLEL_ELEMENTS
        self._run: _Run | None = None

    def write(self, start: int, shape: tuple[int, int], terms: Sequence[Scaled], axis: int = 0) -> None:
        """Write factor · matrix of each term side by side, and zeros behind them.

        Args:
            start: the first element.
            shape: of the place.
            terms: what fills it, or less.
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
            self._put(*self._run.matrices(self.buffer))
            self._run = None

    def _fill(self, place: Tensor, terms: Sequence[Scaled], axis: int) -> None:
        end = 0
        for matrix, factor in terms:
            self._put(place.narrow(axis, end, matrix.shape[axis]), matrix, factor)
            end += matrix.shape[axis]
        if end < place.shape[axis]:
            place.narrow(axis, end, place.shape[axis] - end).zero_()

    def _put(self, place: Tensor, matrix: Tensor, factor: float) -> None:
        """Write factor · matrix, rounded once, without a temporary where the kernel computes in float32 by itself."""
        if factor == 1.0:
            for part, values in self._parts(place, matrix):
                part.copy_(values)
            return
        if matrix.dtype not in (place.dtype, torch.float32):
            matrix = matrix.float()  # torch would round to the matrix's dtype before the place's
        for part, values in self._parts(place, matrix):
            torch.mul(values, factor, out=part)

    def _parts(self, place: Tensor, matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of both, in parts that torch works on with the calling thread alone, unless they are very many.

        A thousand small operations that wait for other threads each take five times as long on a machine that is busy.
        """
        rows = max(1, (SERIAL_ELEMENTS - 1) // max(1, place.shape[1]))
        if rows >= len(place) or place.numel() >= self._parallel_elements:
            yield place, matrix
        else:
            yield from zip(place.split(rows), matrix.split(rows), strict=True)


class _Run:
    """Matrices of one factor that adjoin in both memories."""

    def __init__(self, start: int, matrix: Tensor, factor: float) -> None:
        self._start, self._end = start, start + matrix.numel()
        self._first, self._factor = matrix, factor
        self._source_end = matrix.data_ptr() + matrix.nbytes

    def append(self, start: int, matrix: Tensor, factor: float) -> bool:
        """Take one more matrix, if it belongs here."""
        if (
            (start, factor, matrix.data_ptr()) != (self._end, self._factor, self._source_end)
            or matrix.dtype != self._first.dtype
            # Neighbours by chance otherwise.
            or matrix.untyped_storage().data_ptr() != self._first.untyped_storage().data_ptr()
        ):
            return False
        self._end += matrix.numel()
        self._source_end += matrix.nbytes
        return True

    def matrices(self, buffer: Tensor) -> tuple[Tensor, Tensor, float]:
        """Their place in a buffer, they themselves, each as one column, and the factor."""
        column = (self._end - self._start, 1)
        return buffer[self._start : self._end].view(column), self._first.as_strided(column, (1, 1)), self._factor
