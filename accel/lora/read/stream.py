"""The tensors of a file on their way into memory: in the order that is wanted, checked, usable while the rest comes."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import FileError
from ...files import FileIdentity, TensorFile
from ...memory.buffers import BYTES_ALIGNMENT, HostBuffers

# What is read at once: whole elements of every size, and so much that the thread needs the interpreter seldom.
CHUNK_BYTES = 2**23
# What is read ahead of its use, in chunks: more than comes until the header is understood.
AHEAD_CHUNKS = 8


class BulkReader:
    """Reads a safetensors file on a thread from the moment when it is entered, before anyone looked at its header.

    Nearly all of a LoRA file is wanted, and its header takes as long to understand as a tenth of it to read. While the
    disk works, each tensor is moved to its place: `flatten` can then write whole stretches of them at once. A context
    manager: when the block ends early, what is not read yet is left.

    Attributes:
        peak: no float element of the wanted tensors, as far as they have come, is larger; NaN or infinity where one is
            not finite.
    """

    def __init__(self, path: str | os.PathLike[str], buffers: HostBuffers | None = None) -> None:
        """Make sure that the file is there.

        Args:
            path: a file.
            buffers: where memory comes from; None takes it from the system.

        Raises:
            FileError: the file is not there.
        """
        self._identity = FileIdentity.of(path)
        self._size = self._identity.size_bytes
        self._buffers = buffers or HostBuffers(0)
        self._chunk_bytes = CHUNK_BYTES
        # The file passes through it, each chunk where the one `AHEAD_CHUNKS` before it was.
        self._ring = self._buffers.take(min(self._size, AHEAD_CHUNKS * CHUNK_BYTES)).numpy()
        self._read_bytes = self._used_bytes = 0
        self._error: Exception | None = None
        self._stopped = False
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="flux-hotswap-read", daemon=True)
        self._places: dict[str, int] = {}
        self._checks: deque[_Check] = deque()
        self._moves: deque[_Move] = deque()
        self.peak = 0.0

    def __enter__(self) -> BulkReader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._progress:
            self._stopped = True
            self._progress.notify_all()
        self._thread.join()
        self._error = None  # its frames hold the buffers

    def expect(self, file: TensorFile, keys: Sequence[str]) -> None:
        """Say what is in the file; before the first `tensor`.

        Args:
            file: its header, as `read_header` checks it: all tensors lie within the file.
            keys: of the tensors that are wanted. They will adjoin in this order, but for `BYTES_ALIGNMENT`.

        Raises:
            FileError: the file changed meanwhile, or a tensor begins where its dtype cannot.
        """
        if file.identity != self._identity:
            raise FileError(_changed(file))
        self._file = file
        spans, end = [], 0
        for key in keys:
            if file.starts[key] % file.tensors[key].dtype.itemsize:
                raise FileError(
                    f"'{file.name}': '{key}' does not begin at a multiple of its dtype's size. Save the file again."
                )
            self._places[key] = end
            spans.append((file.starts[key], file.tensors[key].bytes, file.tensors[key].dtype, end))
            end += -(-file.tensors[key].bytes // BYTES_ALIGNMENT) * BYTES_ALIGNMENT
        self._buffer = self._buffers.take(end)
        self._target = self._buffer.numpy()
        for start, size, dtype, place in sorted(spans, key=lambda span: span[0]):
            _append(self._checks, _Check(start, start + size, dtype))
            _append(self._moves, _Move(start, start + size, place))

    def tensor(self, key: str) -> Tensor:
        """One of the wanted tensors on the CPU, as soon as it is read; they share one buffer of their own.

        Raises:
            FileError: the file became shorter or cannot be read.
        """
        info = self._file.tensors[key]
        while self._used_bytes < self._file.starts[key] + info.bytes:
            self._use_chunk()
        place = self._places[key]
        return self._buffer[place : place + info.bytes].view(info.dtype).view(info.shape)

    def finish(self) -> None:
        """Make sure that the file was the same from the first byte that was read to the last.

        Raises:
            FileError: it changed.
        """
        if FileIdentity.of(self._identity.path) != self._identity:
            raise FileError(_changed(self._file))

    def _use_chunk(self) -> None:
        """Wait for the next chunk; check what is wanted of it, and move that to its place."""
        start = self._used_bytes
        end = min(start + self._chunk_bytes, self._size)
        self._wait(end)
        chunk = self._ring[start % len(self._ring) :]
        for check in _before(self._checks, end):
            found = max_magnitude(chunk[check.start - start : check.end - start], check.dtype)
            self.peak = float(np.max([self.peak, found]))  # unlike max, it keeps NaN
        for move in _before(self._moves, end):
            part = chunk[move.start - start : move.end - start]
            self._target[move.place : move.place + len(part)] = part
        with self._progress:
            self._used_bytes = end
            self._progress.notify_all()

    def _wait(self, end: int) -> None:
        with self._progress:
            self._progress.wait_for(lambda: self._read_bytes >= end or self._error is not None)
            if self._read_bytes < end:
                raise FileError(
                    f"'{self._file.name}' became shorter or unreadable while it was read ({self._error}). Get it "
                    "again, and queue once more."
                ) from self._error

    def _read(self) -> None:
        ring, size = memoryview(self._ring), self._size
        try:
            with open(self._identity.path, "rb", buffering=0) as stream:
                while self._read_bytes < size and self._wait_for_room():
                    start = self._read_bytes % len(ring)
                    # At first more at once: the header is being looked at, and whoever does that has the interpreter.
                    ahead = self._chunk_bytes if self._read_bytes else len(ring)
                    ahead = min(ahead, len(ring) - start, self._used_bytes + len(ring) - self._read_bytes)
                    count = stream.readinto(ring[start : start + ahead])
                    if not count:
                        raise EOFError(f"{self._read_bytes:,} of {size:,} bytes")
                    with self._progress:
                        self._read_bytes += count
                        self._progress.notify_all()
        except Exception as exc:
            with self._progress:
                self._error = exc
                self._progress.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until something may be read; False if nothing more is wanted."""
        with self._progress:
            self._progress.wait_for(lambda: self._stopped or self._read_bytes < self._used_bytes + len(self._ring))
            return not self._stopped


def _changed(file: TensorFile) -> str:
    return f"'{file.name}' was changed while it was read. Queue the prompt again to use the new file."


@dataclass
class _Check:
    """Neighbouring tensors of one dtype: first byte in the file, byte behind the last."""

    start: int
    end: int
    dtype: torch.dtype

    def goes_on_with(self, other: _Check) -> bool:
        return self.end == other.start and self.dtype is other.dtype

    def cut(self, at: int) -> _Check:
        """Take off what lies before a byte of the file."""
        first = _Check(self.start, at, self.dtype)
        self.start = at
        return first


@dataclass
class _Move:
    """Neighbouring tensors that stay neighbours: first byte in the file, byte behind the last; where the first goes."""

    start: int
    end: int
    place: int

    def goes_on_with(self, other: _Move) -> bool:
        return self.end == other.start and self.place + self.end - self.start == other.place

    def cut(self, at: int) -> _Move:
        """Take off what lies before a byte of the file."""
        first = _Move(self.start, at, self.place)
        self.start, self.place = at, self.place + at - self.start
        return first


_Span = TypeVar("_Span", _Check, _Move)


def _append(spans: deque[_Span], span: _Span) -> None:
    """One for each group of neighbours: a LoRA has a thousand small tensors. None for empty ones."""
    if span.start == span.end:
        return
    if spans and spans[-1].goes_on_with(span):
        spans[-1].end = span.end
    else:
        spans.append(span)


def _before(spans: deque[_Span], end: int) -> Iterator[_Span]:
    """Take what lies before a byte of the file."""
    while spans and spans[0].start < end:
        yield spans[0].cut(end) if spans[0].end > end else spans.popleft()


# Size of an element -> the integers that order magnitudes as their bits do.
_INTEGERS = {1: (np.int8, np.uint8), 2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}


def max_magnitude(memory: np.ndarray, dtype: torch.dtype) -> float:
    """The largest magnitude of elements of a float type, NaN counting as larger still; 0 for those of another type.

    Compares bits: those of positive floats grow with the value, infinity and NaN above all. numpy needs no other
    threads for it, as torch does, and leaves the interpreter free.

    Args:
        memory: (bytes,) uint8, not empty.
        dtype: of what lies there.
    """
    if not dtype.is_floating_point:
        return 0.0
    if dtype.itemsize not in _INTEGERS:  # float64, which is used as float32
        with np.errstate(over="ignore"):
            return float(np.abs(memory.view(np.float64)).astype(np.float32).max())
    signed, unsigned = _INTEGERS[dtype.itemsize]
    sign = 1 << (8 * dtype.itemsize - 1)
    positive = int(memory.view(signed).max())
    largest = int(memory.view(unsigned).max())
    bits = max(positive, largest - sign if largest >= sign else 0, 0)
    return float(torch.from_numpy(np.array([bits], dtype=unsigned).view(signed)).view(dtype))
