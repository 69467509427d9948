"""Tensors of a file in as few reads as possible: whole runs of it into one buffer, checked while the next ones come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import RawIOBase

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from ..files import FileIdentity, TensorFile
from .buffers import HostBuffers

# Pieces that are checked while the next one is read: small enough to be in the cache still.
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


class BulkReader:
    """Reads tensors on a thread from the moment when it is made, so that their names can be looked at meanwhile.

    A context manager: when the block ends early, what is not read yet is left.

    Attributes:
        keys: of the tensors that it reads.
    """

    def __init__(self, file: TensorFile, keys: Iterable[str], buffers: HostBuffers | None = None) -> None:
        """Begin to read.

        Args:
            file: whose header was read before.
            keys: of tensors in it; none reads nothing.
            buffers: where memory comes from; None takes it from the system.

        Raises:
            FileError: the file is gone, or changed since its header was read.
        """
        now = FileIdentity.of(file.identity.path)
        if now != file.identity:
            raise FileError(f"'{file.name}' was changed after it was read. Queue the prompt again to use the new file.")
        self.keys = frozenset(keys)
        self._places, self._pieces, size = _plan(_places(file, self.keys))
        self._buffer = torch.empty(size, dtype=torch.uint8) if buffers is None else buffers.take(size)
        self._memory = self._buffer.numpy()
        self._stream = open(file.identity.path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._thread = ThreadPoolExecutor(1)
        # One after the other, by one handle: the system then reads ahead of them.
        self._reads = [self._thread.submit(_read, file, self._stream, piece, self._memory) for piece in self._pieces]

    def __enter__(self) -> BulkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._stream.close()

    def result(self) -> BulkRead:
        """The tensors, as soon as they are read and their elements' size is known.

        Raises:
            FileError: the file became shorter.
        """
        views = {place.key: _view(self._buffer, place) for place in self._places}
        spans, peak = _spans(self._places), 0.0
        for piece, read in zip(self._pieces, self._reads, strict=True):
            read.result()
            peak = float(np.max([peak, max_magnitude(self._memory, spans, piece.start, piece.end)]))
        return BulkRead(views, peak)


# Size of an element -> the integers that order magnitudes as their bits do.
_INTEGERS = {1: (np.int8, np.uint8), 2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}


def max_magnitude(memory: np.ndarray, spans: list[tuple[torch.dtype, int, int]], start: int, end: int) -> float:
    """The largest magnitude of the float elements whose bytes begin in a part of a buffer; NaN counts as larger still.

    Compares bits: those of positive floats grow with the value, infinity and NaN above all. numpy needs no other
    threads for it, as torch does, and leaves the interpreter free.

    Args:
        memory: (bytes,) uint8.
        spans: dtype, first byte and byte behind the last of neighbours of one dtype, in order.
        start: first byte of the part; a multiple of every element's size.
        end: byte behind the last.
    """
    peak = 0.0
    for dtype, first, last in spans:
        low, high = max(first, start), min(last, end)
        if low >= high or not dtype.is_floating_point:
            continue
        if dtype.itemsize not in _INTEGERS:  # float64, which only an alpha is
            values = np.abs(memory[low:high].view(np.float64))
            peak = float(np.max([peak, values.max()]))
            continue
        signed, unsigned = _INTEGERS[dtype.itemsize]
        sign = 1 << (8 * dtype.itemsize - 1)
        positive = int(memory[low:high].view(signed).max())
        largest = int(memory[low:high].view(unsigned).max())
        bits = max(positive, largest - sign if largest >= sign else 0, 0)
        value = torch.from_numpy(np.array([bits], dtype=unsigned).view(signed)).view(dtype)
        peak = float(np.max([peak, float(value)]))
    return peak


def _spans(places: Iterable[_Place]) -> list[tuple[torch.dtype, int, int]]:
    """Neighbours of one dtype together: a LoRA has a thousand small tensors."""
    spans: list[tuple[torch.dtype, int, int]] = []
    for place in places:
        if spans and spans[-1][0] is place.dtype and spans[-1][2] == place.start:
            spans[-1] = (place.dtype, spans[-1][1], place.start + place.length)
        else:
            spans.append((place.dtype, place.start, place.start + place.length))
    return spans


def _places(file: TensorFile, keys: Iterable[str]) -> list[_Place]:
    """Where the tensors lie in the file, in its order; the header was checked when it was read."""
    places = []
    for key in keys:
        info = file.tensors[key]
        places.append(_Place(key, info.dtype, info.shape, file.starts[key], info.bytes))
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
        placed.append(replace(place, start=start + place.file_start - first))
    pieces = [
        _Piece(first + offset, min(CHUNK_BYTES, last - first - offset), start + offset)
        for first, last, start in runs
        for offset in range(0, last - first, CHUNK_BYTES)
    ]
    return placed, pieces, size


def _read(file: TensorFile, stream: RawIOBase, piece: _Piece, memory: np.ndarray) -> None:
    target = memoryview(memory)
    done = 0
    stream.seek(piece.file_start)
    while done < piece.length:
        count = stream.readinto(target[piece.start + done : piece.end])
        if not count:
            raise FileError(f"'{file.name}' became shorter while it was read. Get it again, and queue once more.")
        done += count


def _view(buffer: Tensor, place: _Place) -> Tensor:
    part = buffer[place.start : place.start + place.length]
    if place.start % place.dtype.itemsize:
        raise FileError(f"'{place.key}' does not begin at a multiple of its dtype's size. Save the file again.")
    return part.view(place.dtype).view(place.shape)
