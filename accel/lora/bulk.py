"""Tensors of a file in as few reads as possible: whole runs of it into one buffer, checked while the next ones come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from ..files import FileIdentity, TensorFile
from .buffers import HostBuffers

# Pieces that are checked while the next one is read: small enough to be in the cache still.
CHUNK_BYTES = 2**23
# Bytes that nobody asked for are read along when they are fewer than this: one long read is faster than two.
GAP_BYTES = 2**16
ALIGNMENT = 64


class _Place(NamedTuple):
    """A tensor's bytes in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class _Piece(NamedTuple):
    """Bytes that are read at once."""

    file_start: int
    length: int
    start: int

    @property
    def end(self) -> int:
        """Behind its last byte in the buffer."""
        return self.start + self.length


class BulkReader:
    """Reads tensors on a thread from the moment when it is made, so that they can be named and used meanwhile.

    A context manager: when the block ends early, what is not read yet is left.

    Attributes:
        keys: of the tensors that it reads.
        peak: no float element of a tensor that `tensor` has given is larger; NaN or infinity where one is not finite.
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
        self._places, self._pieces, size = _plan(file, frozenset(keys))
        self.keys = self._places.keys()
        self.peak = 0.0
        self._buffer = torch.empty(size, dtype=torch.uint8) if buffers is None else buffers.take(size)
        self._memory = self._buffer.numpy()
        self._stream = open(file.identity.path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._thread = ThreadPoolExecutor(1)
        # One after the other, by one handle: the system then reads ahead of them.
        reads = [self._thread.submit(_read, file, self._stream, piece, self._memory) for piece in self._pieces]
        self._coming = deque(zip(self._pieces, reads, strict=True))
        self._spans = _spans(self._places.values())

    def __enter__(self) -> BulkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._stream.close()

    def tensor(self, key: str) -> Tensor:
        """One tensor on the CPU, as soon as it is read; all share one buffer, which no change of the file reaches.

        Raises:
            FileError: the file became shorter, or the tensor begins where its dtype cannot.
        """
        place = self._places[key]
        while self._coming and self._coming[0][0].start < place.end:
            piece, read = self._coming.popleft()
            read.result()
            self.peak = float(np.max([self.peak, max_magnitude(self._memory, self._spans, piece.start, piece.end)]))
        if place.start % place.dtype.itemsize:
            raise FileError(f"'{key}' does not begin at a multiple of its dtype's size. Save the file again.")
        return self._buffer[place.start : place.end].view(place.dtype).view(place.shape)


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
            spans[-1] = (place.dtype, spans[-1][1], place.end)
        else:
            spans.append((place.dtype, place.start, place.end))
    return spans


def _plan(file: TensorFile, keys: Iterable[str]) -> tuple[dict[str, _Place], list[_Piece], int]:
    """Give every tensor its place in the buffer, in the file's order; say what is read where; the buffer's size."""
    runs: list[list[int]] = []  # [first byte in the file, behind the last, first byte in the buffer]
    places, size = {}, 0
    for key in sorted(keys, key=file.starts.__getitem__):
        info, first = file.tensors[key], file.starts[key]
        end = first + info.bytes
        if not runs or first > runs[-1][1] + GAP_BYTES:
            # As aligned in the buffer as the first tensor of the run may need.
            runs.append([first, end, -(-size // ALIGNMENT) * ALIGNMENT])
        run = runs[-1]
        run[1] = max(run[1], end)
        size = run[2] + run[1] - run[0]
        start = run[2] + first - run[0]
        places[key] = _Place(info.dtype, info.shape, start, start + end - first)
    pieces = [
        _Piece(first + offset, min(CHUNK_BYTES, last - first - offset), start + offset)
        for first, last, start in runs
        for offset in range(0, last - first, CHUNK_BYTES)
    ]
    return places, pieces, size


def _read(file: TensorFile, stream: RawIOBase, piece: _Piece, memory: np.ndarray) -> None:
    target = memoryview(memory)
    done = 0
    stream.seek(piece.file_start)
    while done < piece.length:
        count = stream.readinto(target[piece.start + done : piece.end])
        if not count:
            raise FileError(f"'{file.name}' became shorter while it was read. Get it again, and queue once more.")
        done += count
