"""A whole file of tensors on its way into memory: used tensor by tensor, and checked, while the rest still comes."""

from __future__ import annotations

import os
import threading

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from ..files import FileIdentity, TensorFile
from .buffers import HostBuffers

# What is read at once: as much as Linux reads ahead, few enough for the thread to need the interpreter seldom.
CHUNK_BYTES = 2**23
FIRST_BYTES = 2**26
# Larger files are no LoRAs, most likely: they are read once their header says so.
EAGER_BYTES = 2**32


class BulkReader:
    """Reads a safetensors file on a thread from the moment when it is made, before anyone has looked at its header.

    Nearly all of a LoRA file is wanted, and its header takes as long to understand as a tenth of it to read. A context
    manager: when the block ends early, what is not read yet is left.

    Attributes:
        peak: no float element of a tensor that `tensor` has given is larger; NaN or infinity where one is not finite.
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
        self._buffers = buffers or HostBuffers(0)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._spans: list[tuple[torch.dtype, int, int]] = []
        self._read_bytes = self._checked_bytes = 0
        self._error: Exception | None = None
        self._stopped = False
        self._progress = threading.Condition()
        self._thread: threading.Thread | None = None
        self.peak = 0.0
        if self._identity.size_bytes <= EAGER_BYTES:
            self._start()

    def __enter__(self) -> BulkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        if self._thread is not None:
            self._thread.join()

    def expect(self, file: TensorFile) -> None:
        """Say what is in the file; before the first `tensor`.

        Raises:
            FileError: the file changed meanwhile.
        """
        if file.identity != self._identity:
            raise FileError(_changed(file))
        self._file = file
        self._spans = _spans(file)
        if self._thread is None:
            self._start()

    def tensor(self, key: str) -> Tensor:
        """One tensor on the CPU, as soon as it is read; all share one buffer, which no change of the file reaches.

        Raises:
            FileError: the file became shorter or cannot be read, or the tensor begins where its dtype cannot.
        """
        info, start = self._file.tensors[key], self._file.starts[key]
        if start % info.dtype.itemsize:
            raise FileError(f"'{key}' does not begin at a multiple of its dtype's size. Save the file again.")
        end = start + info.bytes
        while self._checked_bytes < end:
            # Whole elements, whatever their size.
            low, high = self._checked_bytes, min(self._checked_bytes + CHUNK_BYTES, self._identity.size_bytes)
            self._wait(high)
            found = max_magnitude(self._memory, self._spans, low, high)
            self.peak = float(np.max([self.peak, found]))
            self._checked_bytes = high
        return self._buffer[start:end].view(info.dtype).view(info.shape)

    def finish(self) -> None:
        """Wait for the whole file, and make sure that it was the same from its first byte to its last.

        Raises:
            FileError: it changed, or see `tensor`.
        """
        self._wait(self._identity.size_bytes)
        if FileIdentity.of(self._identity.path) != self._identity:
            raise FileError(_changed(self._file))

    def _start(self) -> None:
        self._buffer = self._buffers.take(self._identity.size_bytes)
        self._memory = self._buffer.numpy()
        self._thread = threading.Thread(target=self._read, name="flux-hotswap-read", daemon=True)
        self._thread.start()

    def _wait(self, end: int) -> None:
        with self._progress:
            self._progress.wait_for(lambda: self._read_bytes >= end or self._error is not None)
            if self._read_bytes < end:
                raise FileError(
                    f"'{self._file.name}' became shorter or unreadable while it was read ({self._error}). Get it "
                    "again, and queue once more."
                ) from self._error

    def _read(self) -> None:
        target, size = memoryview(self._memory), self._identity.size_bytes
        try:
            with open(self._identity.path, "rb", buffering=0) as stream:
                while self._read_bytes < size and not self._stopped:
                    # At first more at once: the header is being looked at, and whoever does that has the interpreter.
                    ahead = CHUNK_BYTES if self._read_bytes else FIRST_BYTES
                    count = stream.readinto(target[self._read_bytes : self._read_bytes + ahead])
                    if not count:
                        raise EOFError(f"{self._read_bytes:,} of {size:,} bytes")
                    with self._progress:
                        self._read_bytes += count
                        self._progress.notify_all()
        except Exception as exc:
            with self._progress:
                self._error = exc
                self._progress.notify_all()


def _changed(file: TensorFile) -> str:
    return f"'{file.name}' was changed while it was read. Queue the prompt again to use the new file."


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


def _spans(file: TensorFile) -> list[tuple[torch.dtype, int, int]]:
    """Neighbours of one dtype together: a LoRA has a thousand small tensors. Without those that begin at odd places."""
    spans: list[tuple[torch.dtype, int, int]] = []
    for key in sorted(file.starts, key=file.starts.__getitem__):
        info, start = file.tensors[key], file.starts[key]
        if start % info.dtype.itemsize:
            continue
        if spans and spans[-1][0] is info.dtype and spans[-1][2] == start:
            spans[-1] = (info.dtype, spans[-1][1], start + info.bytes)
        else:
            spans.append((info.dtype, start, start + info.bytes))
    return spans
