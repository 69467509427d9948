"""The tensors of a file on their way into memory: in the order that is wanted, checked, usable while the rest comes."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from ..files import FileIdentity, TensorFile
from .buffers import BYTES_ALIGNMENT, HostBuffers

# What is read at once: as much as Linux reads ahead, few enough for the thread to need the interpreter seldom.
CHUNK_BYTES = 2**23
# What is read ahead of its use, in chunks: more than comes until the header is understood.
AHEAD_CHUNKS = 8


class BulkReader:
    """Reads a safetensors file on a thread from the moment when it is made, before anyone has looked at its header.

    Nearly all of a LoRA file is wanted, and its header takes as long to understand as a tenth of it to read. While the
    disk works, each tensor is moved to its place: `flatten` can then write whole stretches of them at once. A context
    manager: when the block ends early, what is not read yet is left.

    Attributes:
        peak: no float element of what has come so far is larger; NaN or infinity where one is not finite.
    """

    def __init__(self, path: str | os.PathLike[str], buffers: HostBuffers | None = None) -> None:
        """Begin to read.

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
        self.peak = 0.0
        self._thread.start()

    def __enter__(self) -> BulkReader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._progress:
            self._stopped = True
            self._progress.notify_all()
        self._thread.join()

    def expect(self, file: TensorFile, keys: Sequence[str]) -> None:
        """Say what is in the file; before the first `tensor`.

        Args:
            file: its header.
            keys: of the tensors that are wanted. They will adjoin in this order, but for `BYTES_ALIGNMENT`.

        Raises:
            FileError: the file changed meanwhile, or a tensor begins where its dtype cannot.
        """
        if file.identity != self._identity:
            raise FileError(_changed(file))
        self._file = file
        places, end = {}, 0
        for key in keys:
            if file.starts[key] % file.tensors[key].dtype.itemsize:
                raise FileError(
                    f"'{file.name}': '{key}' does not begin at a multiple of its dtype's size. Save the file again."
                )
            places[key] = end
            end += -(-file.tensors[key].bytes // BYTES_ALIGNMENT) * BYTES_ALIGNMENT
        self._buffer = self._buffers.take(end)
        self._target = self._buffer.numpy()
        spans = [
            _Span(file.starts[key], file.starts[key] + file.tensors[key].bytes, file.tensors[key].dtype, place)
            for key, place in places.items()
        ]
        spans.sort(key=lambda span: span.start)
        self._checks = _join(spans, lambda one, other: one.dtype is other.dtype)
        self._moves = _join(spans, lambda one, other: one.place + one.bytes == other.place)
        self._places = places

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
        for span in _before(self._checks, end):
            found = max_magnitude(chunk[span.start - start : span.end - start], span.dtype)
            self.peak = float(np.max([self.peak, found]))  # unlike max, it keeps NaN
        for span in _before(self._moves, end):
            self._target[span.place : span.place + span.bytes] = chunk[span.start - start : span.end - start]
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


@dataclass(frozen=True)
class _Span:
    """Neighbouring tensors of a file.

    Attributes:
        start: first byte in the file.
        end: byte behind the last.
        dtype: of all of them, where that matters.
        place: where they go, in bytes.
    """

    start: int
    end: int
    dtype: torch.dtype
    place: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    def cut(self, at: int) -> tuple[_Span, _Span]:
        """What lies before a byte of the file, and what lies behind it."""
        return replace(self, end=at), replace(self, start=at, place=self.place + at - self.start)


def _join(spans: Iterable[_Span], belong: Callable[[_Span, _Span], bool]) -> deque[_Span]:
    """One span for each group of neighbours that belong together: a LoRA has a thousand small tensors."""
    joined: list[_Span] = []
    for span in spans:
        if joined and joined[-1].end == span.start and belong(joined[-1], span):
            joined[-1] = replace(joined[-1], end=span.end)
        else:
            joined.append(span)
    return deque(joined)


def _before(spans: deque[_Span], end: int) -> Iterator[_Span]:
    """Take what lies before a byte of the file."""
    while spans and spans[0].start < end:
        span = spans.popleft()
        if span.end > end:
            span, rest = span.cut(end)
            spans.appendleft(rest)
        yield span


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
    if dtype.itemsize not in _INTEGERS:  # float64, which only an alpha is
        return float(np.abs(memory.view(np.float64)).max())
    signed, unsigned = _INTEGERS[dtype.itemsize]
    sign = 1 << (8 * dtype.itemsize - 1)
    positive = int(memory.view(signed).max())
    largest = int(memory.view(unsigned).max())
    bits = max(positive, largest - sign if largest >= sign else 0, 0)
    return float(torch.from_numpy(np.array([bits], dtype=unsigned).view(signed)).view(dtype))
