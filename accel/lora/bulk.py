"""Tensors of a file in as few reads as possible: whole runs of it into one buffer, checked while the next ones come."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FileError
from ..files import DTYPES, FileIdentity, TensorFile

# Pieces in which reading and checking overlap: few enough to cost nothing, small enough to be in the cache still.
CHUNK_BYTES = 2**22
# Bytes that nobody asked for are read along when they are fewer than this: one long read is faster than two.
GAP_BYTES = 2**16
ALIGNMENT = 64


@dataclass(frozen=True)
class BulkRead:
    """What one pass over a file gave.

    Attributes:
        tensors: key -> CPU tensor; they share one buffer, which changes no more when the file does.
        peak: no element is larger; NaN or infinity where one is not finite.
    """

    tensors: Mapping[str, Tensor]
    peak: float


@dataclass(frozen=True)
class _Place:
    """A tensor's bytes in the file and in the buffer."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file_start: int
    length: int
    start: int = 0


@dataclass(frozen=True)
class _Piece:
    """Bytes that are read at once."""

    file_start: int
    length: int
    start: int

    @property
    def end(self) -> int:
        """Behind its last byte in the buffer."""
        return self.start + self.length


def read_tensors(file: TensorFile, keys: Iterable[str]) -> BulkRead:
    """Read tensors, and find out how large their elements are.

    Args:
        file: whose header was read before.
        keys: of tensors in it.

    Raises:
        FileError: the file is gone, shorter, or changed since its header was read.
    """
    now = FileIdentity.of(file.identity.path)
    if now != file.identity:
        raise FileError(f"'{file.name}' was changed after it was read. Queue the prompt again to use the new file.")
    places, pieces, size = _plan(_places(file, set(keys)))
    buffer = torch.empty(size, dtype=torch.uint8)
    views = {place.key: _view(buffer, place) for place in places}
    check = _PeakCheck(buffer, places)
    if len(pieces) == 1:
        _read(file, pieces[0], buffer)
    else:
        with ThreadPoolExecutor(1) as thread:
            reads = [thread.submit(_read, file, piece, buffer) for piece in pieces]
            for read, piece in zip(reads, pieces, strict=True):
                read.result()
                check.advance(piece.end)
    check.advance(size)
    return BulkRead(views, check.peak)


class _PeakCheck:
    """Follows the reads through the buffer, and looks at every element of a float type once."""

    def __init__(self, buffer: Tensor, places: Iterable[_Place]) -> None:
        self.peak = 0.0
        self._buffer = buffer
        # Neighbours of one dtype are looked at together: a LoRA has a thousand small tensors.
        self._spans: list[list] = []
        for place in places:
            if not place.dtype.is_floating_point or place.start % place.dtype.itemsize or not place.length:
                continue
            last = self._spans[-1] if self._spans else None
            if last is not None and last[0] is place.dtype and last[2] == place.start:
                last[2] += place.length
            else:
                self._spans.append([place.dtype, place.start, place.start + place.length])
        self._next = 0

    def advance(self, end: int) -> None:
        """Look at everything before `end` that was not looked at yet."""
        while self._next < len(self._spans):
            dtype, start, stop = self._spans[self._next]
            reached = min(stop, end - (end - start) % dtype.itemsize)
            if reached > start:
                self._look(self._buffer[start:reached].view(dtype))
                self._spans[self._next][1] = reached
            if reached < stop:
                return
            self._next += 1

    def _look(self, values: Tensor) -> None:
        if values.dtype.itemsize == 1:  # float8 has no aminmax; every value of it is exact in bfloat16
            values = values.to(torch.bfloat16)
        low, high = (float(bound) for bound in torch.aminmax(values))  # NaN comes out of both
        peak = max(-low, high) if low == low else math.nan
        self.peak = peak if peak != peak else max(self.peak, peak) if self.peak == self.peak else math.nan


def _places(file: TensorFile, keys: set[str]) -> list[_Place]:
    """Where the tensors lie in the file, in its order; the header was checked when it was read first."""
    with open(file.identity.path, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    places = []
    for key in keys:
        start, end = header[key]["data_offsets"]
        places.append(
            _Place(key, DTYPES[header[key]["dtype"]], tuple(header[key]["shape"]), 8 + header_bytes + start, end - start)
        )
    return sorted(places, key=lambda place: place.file_start)


def _plan(places: list[_Place]) -> tuple[list[_Place], list[_Piece], int]:
    """Give every tensor its place in the buffer; say what is read where; the buffer's size."""
    runs: list[list[int]] = []  # [first byte in the file, behind the last, first byte in the buffer]
    placed, size = [], 0
    for place in places:
        end = place.file_start + place.length
        if not runs or place.file_start > runs[-1][1] + GAP_BYTES:
            # As aligned in the buffer as the first tensor of the run may need.
            runs.append([place.file_start, end, -(-size // ALIGNMENT) * ALIGNMENT])
        first, last, start = runs[-1]
        runs[-1][1] = max(last, end)
        size = start + runs[-1][1] - first
        placed.append(_Place(place.key, place.dtype, place.shape, place.file_start, place.length,
                             start + place.file_start - first))
    pieces = [
        _Piece(first + offset, min(CHUNK_BYTES, last - first - offset), start + offset)
        for first, last, start in runs
        for offset in range(0, last - first, CHUNK_BYTES)
    ]
    return placed, pieces, size


def _read(file: TensorFile, piece: _Piece, buffer: Tensor) -> None:
    memory = memoryview(buffer.numpy())
    done = 0
    with open(file.identity.path, "rb", buffering=0) as stream:
        stream.seek(piece.file_start)
        while done < piece.length:
            count = stream.readinto(memory[piece.start + done : piece.end])
            if not count:
                raise FileError(f"'{file.name}' became shorter while it was read. Get it again, and queue once more.")
            done += count


def _view(buffer: Tensor, place: _Place) -> Tensor:
    part = buffer[place.start : place.start + place.length]
    if place.start % place.dtype.itemsize:
        raise FileError(f"'{place.key}' does not begin at a multiple of its dtype's size. Save the file again.")
    return part.view(place.dtype).view(place.shape)
