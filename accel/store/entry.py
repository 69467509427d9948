"""One entry of a disk store: a safetensors file that says what it was made from, and is checked before it is used.

Beside what the safetensors format asks for, its metadata holds

- `key`: what it was made from, as canonical JSON;
- `content`: JSON that belongs to the tensors;
- `crc32`: the CRC-32 of every 32 MiB of data;
- `header_crc32`: that of the header itself, as JSON with sorted keys, without this one.

It is written tensor by tensor, with the header last; `safetensors.torch.save_file` wants all tensors in memory at once,
and checks no data. Tensors begin at multiples of 64 bytes, so that computing may use the mapped file itself.
"""

from __future__ import annotations

import json
import mmap
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import DTYPES
from ..memory.buffers import BYTES_ALIGNMENT

RUN_BYTES = 32 * 2**20
# What a thread reads at a time: it is checked while it is in the processor's cache.
READ_BYTES = 2**20
CHECK_THREADS = 8
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Key:
    """Everything that an entry's content depends on.

    Attributes:
        text: canonical JSON of it.
        label: how its file's name begins, for people.
    """

    text: str
    label: str = ""

    @classmethod
    def of(cls, facts: Mapping[str, Any], label: str = "") -> Key:
        """The key of facts; values that JSON cannot hold are stored as `str(value)`."""
        return cls(json.dumps(facts, sort_keys=True, default=str), label)


@dataclass(frozen=True)
class Entry:
    """A whole, checked file, mapped.

    Attributes:
        tensors: by name, on the CPU: views of the file, read-only by convention. They keep it mapped.
        content: the JSON that was stored beside them.
        name: of the file.
        bytes: size of the file.
    """

    tensors: Mapping[str, Tensor]
    content: Any
    name: str
    bytes: int


class EntryWriter:
    """Writes one entry. Call order: `add` for every tensor, then `finish`; or `discard`, as whatever fails does."""

    def __init__(self, path: Path, key: Key, header_bytes: int) -> None:
        """Begin a temporary file beside `path`; `header_bytes` are kept free for what is known last."""
        self._path = path
        self._key = key
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        self._start = _aligned(8 + header_bytes)
        self._entries: dict[str, dict[str, Any]] = {}
        self._odd: list[tuple[str, Tensor]] = []
        self._offset = 0
        self._checksums: list[int] = []
        self._stream = open(self._temporary, "wb")  # noqa: SIM115 - closed by finish or discard
        self._stream.seek(self._start)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. It is written before this returns if its size is a multiple of 64 bytes, else by `finish`.

        Raises:
            OSError: the disk is full.
        """
        if tensor.nbytes % BYTES_ALIGNMENT:
            self._odd.append((name, tensor.cpu().clone()))
        else:
            with self._discarded_on_error():
                self._write(name, tensor)

    def finish(self, content: Any = None) -> None:
        """Write the header with JSON beside the tensors, and give the file its name.

        Raises:
            OSError: the disk is full, or Windows has the file that is to be replaced open.
        """
        with self._discarded_on_error():
            # Tensors of odd sizes come last, so that they do not shift the others; the widest types first among them.
            for name, tensor in sorted(self._odd, key=lambda item: -item[1].element_size()):
                self._write(name, tensor)
            metadata = {"key": self._key.text, "content": json.dumps(content), "crc32": json.dumps(self._checksums)}
            metadata["header_crc32"] = _header_checksum({"__metadata__": metadata, **self._entries})
            header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
            if len(header) > self._start - 8:
                raise OSError(f"its header of {len(header):,} bytes is larger than planned")
            self._stream.seek(0)
            self._stream.write((self._start - 8).to_bytes(8, "little") + header.ljust(self._start - 8))
            # Not synced to the disk: after a power failure the checksums tell what is missing.
            self._stream.close()
            os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Remove what was written; nothing after `finish`."""
        with suppress(OSError):  # what was buffered does not fit on the disk
            self._stream.close()
        with suppress(OSError):  # gone already
            self._temporary.unlink()

    def _write(self, name: str, tensor: Tensor) -> None:
        data = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        offsets = [self._offset, self._offset + len(data)]
        self._entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        while len(data):
            place = self._offset % RUN_BYTES
            if place == 0:
                self._checksums.append(0)
            part = data[: RUN_BYTES - place]
            self._checksums[-1] = zlib.crc32(part, self._checksums[-1])
            self._stream.write(part)
            self._offset += len(part)
            data = data[len(part) :]

    @contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise


def read_entry(stream: BinaryIO, key: Key, on_progress: Progress) -> Entry:
    """Check and map a file.

    Args:
        stream: of the file, at its beginning; may be closed afterwards.
        key: what it must have been made from.
        on_progress: called with (runs checked, runs in all).

    Raises:
        ValueError: it is cut off, was changed, or was made from something else.
        LookupError, TypeError, AttributeError, RecursionError: it is a file of another kind.
        OSError: the disk does not give it.
    """
    header, start = _read_header(stream, key)
    metadata = header.pop("__metadata__")
    _check_data(stream.name, start, json.loads(metadata["crc32"]), on_progress)
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = {name: _view(data, start, entry) for name, entry in header.items()}
    return Entry(tensors, json.loads(metadata["content"]), Path(stream.name).name, len(mapped))


def _read_header(stream: BinaryIO, key: Key) -> tuple[dict[str, Any], int]:
    """The header without its checksum, and where the data begins."""
    length = int.from_bytes(stream.read(8), "little")
    size = os.fstat(stream.fileno()).st_size
    if not 0 < length <= size - 8:
        raise ValueError("it is cut off")
    header = json.loads(stream.read(length))
    if header["__metadata__"].pop("header_crc32") != _header_checksum(header):
        raise ValueError("its header was changed")
    if header["__metadata__"]["key"] != key.text:
        raise ValueError("it was made from something else")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise ValueError("it is cut off")
    return header, 8 + length


def _check_data(path: str, start: int, expected: list[int], on_progress: Progress) -> None:
    """Compare the checksum of every run; several threads at a time, each with a small buffer."""

    def checksum(index: int) -> int:
        value, left = 0, RUN_BYTES
        buffer = memoryview(bytearray(READ_BYTES))
        with open(path, "rb", buffering=0) as stream:
            stream.seek(start + index * RUN_BYTES)
            while left and (count := stream.readinto(buffer[: min(left, READ_BYTES)])):
                value = zlib.crc32(buffer[:count], value)
                left -= count
        return value

    with ThreadPoolExecutor(min(CHECK_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for index, found in enumerate(pool.map(checksum, range(len(expected)))):
                if found != expected[index]:
                    raise ValueError("its content was changed")
                on_progress(index + 1, len(expected))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _view(data: Tensor, start: int, entry: Mapping[str, Any]) -> Tensor:
    first, end = (start + offset for offset in entry["data_offsets"])
    values = data[first:end]
    if first % BYTES_ALIGNMENT:  # compiled kernels assume the alignment of the pointers that they saw
        values = values.clone()
    return values.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _header_checksum(header: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"


def _aligned(count: int) -> int:
    return -(-count // BYTES_ALIGNMENT) * BYTES_ALIGNMENT
