"""Quantized weights on disk, so that they are made once: safetensors files that the next start maps.

A file is written tensor by tensor while the model is converted, under a temporary name, and takes its own name when it
is whole. Its header carries what it was made from, how to put quantized parameters together again, and a checksum for
each run of the data; a file that does not match in any of these is deleted and made again. Files are replaced and
deleted, never changed in place, so those that another process has mapped stay whole for it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import DTYPES, FileIdentity
from ..settings import QuantizedCache
from .codec import described_modules, flatten

# Raise it when the same key would give other content.
FORMAT = "flux-hotswap-quantized-1"
# Only files of this name are ever deleted: a user may point the cache at a folder that holds others.
SUFFIX = ".flux-hotswap.safetensors"
# Compiled kernels assume the alignment of the pointers that they saw.
ALIGNMENT = 64
RUN_BYTES = 32 * 2**20
# What a thread reads at a time: it is checked while it is in the processor's cache.
READ_BYTES = 2**20
CHECK_THREADS = 8
# For each tensor, in the header that is written last but stands first.
HEADER_BYTES_PER_TENSOR = 1024
ABANDONED_S = 3600
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Notice = Callable[[str], None]


class DamagedCacheError(Exception):
    """A cache file is not what was once written."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the stored tensors depend on."""

    source: FileIdentity
    mode: str
    dtype: str
    device_type: str
    libraries: tuple[str, ...]

    @property
    def text(self) -> str:
        """The key as canonical JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @property
    def file_name(self) -> str:
        """Readable, and different for different keys."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return f"{Path(self.source.path).stem}-{self.mode}-{digest}{SUFFIX}"


@dataclass(frozen=True)
class CachedModel:
    """A whole, checked cache file, mapped.

    Attributes:
        tensors: plain tensors by name, on the CPU: views of the file, read-only by convention.
        parameters: parameter name -> description for `codec.unflatten`.
        modules: module name -> description for `codec.make_module`.
        bytes: size of the file.
    """

    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Any]
    modules: Mapping[str, Any]
    bytes: int


def open_cached(cache: QuantizedCache, key: CacheKey, on_progress: Callable[[int, int], None]) -> CachedModel | None:
    """Check and map the file of a key.

    Args:
        on_progress: called with (runs checked, runs in all).

    Returns:
        None when there is none.

    Raises:
        DamagedCacheError: there is one, but it is damaged; it was deleted.
    """
    path = Path(cache.folder) / key.file_name
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed below, whatever is in it
    except OSError:  # none, or out of reach: then writing will say so
        return None
    try:
        with stream:
            header, start = _read_header(stream, key)
            _check_data(path, start, header["__metadata__"], on_progress)
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError, KeyError, TypeError, DamagedCacheError) as exc:
        with suppress(OSError):
            path.unlink()
        raise DamagedCacheError(f"'{path.name}' is damaged ({exc})") from exc
    with suppress(OSError):
        os.utime(path)  # used now: others are older
    content = json.loads(header.pop("__metadata__")["content"])
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = {name: _view(data, start, entry) for name, entry in header.items()}
    return CachedModel(tensors, content["parameters"], content["modules"], len(mapped))


class CacheWriter:
    """Writes one cache file. What goes wrong with the disk is told once and ends the writing, not the load.

    Call order: `add` for every parameter, then `finish`; or `discard`.
    """

    def __init__(self, cache: QuantizedCache, key: CacheKey, expected_bytes: int, tensors: int, notice: Notice) -> None:
        """Make room and begin the file.

        Args:
            expected_bytes: what the tensors will take.
            tensors: about how many parameters there will be.
            notice: gets a sentence for the user if the result cannot be stored.
        """
        self._key = key
        self._notice = notice
        self._path = Path(cache.folder) / key.file_name
        self._temporary = self._path.with_name(f".{key.file_name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        self._start = _rounded(8 + HEADER_BYTES_PER_TENSOR * (tensors + 16))
        self._entries: dict[str, dict[str, Any]] = {}
        self._parameters: dict[str, Any] = {}
        self._small: list[tuple[str, Tensor]] = []
        self._offset = 0
        self._checksums: list[int] = []
        self._stream = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(cache, expected_bytes + self._start)
            self._stream = open(self._temporary, "wb")  # noqa: SIM115 - closed by finish or discard
            self._stream.seek(self._start)
        except OSError as exc:
            self._give_up(exc)

    def add(self, name: str, parameter: Tensor) -> None:
        """Append a parameter; its data is written before this returns."""
        if self._stream is None:
            return
        tensors, description = flatten(name, parameter.detach())
        self._parameters[name] = description
        try:
            for part, tensor in tensors.items():
                if tensor.numel() * tensor.element_size() % ALIGNMENT:
                    self._small.append((part, tensor.cpu().clone()))
                else:
                    self._write(part, tensor)
        except OSError as exc:
            self._give_up(exc)

    def finish(self, model: nn.Module) -> None:
        """Write the header, and give the file its name."""
        if self._stream is None:
            return
        try:
            # The few tensors of odd sizes come last, so that they do not shift the others.
            for name, tensor in sorted(self._small, key=lambda item: -item[1].element_size()):
                self._write(name, tensor)
            content = {"parameters": self._parameters, "modules": dict(described_modules(model))}
            header = {"__metadata__": self._metadata(content), **self._entries}
            encoded = _encode(header).ljust(self._start - 8)
            if len(encoded) > self._start - 8:
                raise OSError(f"its header of {len(encoded):,} bytes is larger than planned")
            self._stream.seek(0)
            self._stream.write((self._start - 8).to_bytes(8, "little") + encoded)
            # Not synced to the disk: after a power failure the checksums tell what is missing.
            self._stream.close()
            os.replace(self._temporary, self._path)
            self._stream = None
        except OSError as exc:
            self._give_up(exc)

    def discard(self) -> None:
        """Remove what was written."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError):  # what was buffered does not fit on the disk
                stream.close()
            self._temporary.unlink(missing_ok=True)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        end = self._offset + len(data)
        self._entries[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._offset, end]
        }
        while len(data):
            place = self._offset % RUN_BYTES
            if place == 0:
                self._checksums.append(0)
            part = data[: RUN_BYTES - place]
            self._checksums[-1] = zlib.crc32(part, self._checksums[-1])
            self._stream.write(part)
            self._offset += len(part)
            data = data[len(part) :]

    def _metadata(self, content: dict[str, Any]) -> dict[str, str]:
        metadata = {
            "key": self._key.text,
            "content": json.dumps(content),
            "crc32": json.dumps(self._checksums),
        }
        return {**metadata, "header_crc32": _header_checksum({"__metadata__": metadata, **self._entries})}

    def _give_up(self, exc: OSError) -> None:
        self.discard()
        self._notice(
            f"the quantized weights could not be stored in '{self._path.parent}' ({exc.strerror or exc}); the model "
            "works, and the next start converts it again. Free space there, or switch the cache off in Quantize "
            "Transformer."
        )


def _read_header(stream: Any, key: CacheKey) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(stream.read(8), "little")
    size = os.fstat(stream.fileno()).st_size
    if not 0 < length <= size - 8:
        raise DamagedCacheError("it is cut off")
    header = json.loads(stream.read(length))
    metadata = header["__metadata__"]
    announced = metadata.pop("header_crc32")
    if announced != _header_checksum(header):
        raise DamagedCacheError("its header was changed")
    if metadata["key"] != key.text:
        raise DamagedCacheError("it was made from something else")
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if size != 8 + length + end:
        raise DamagedCacheError("it is cut off")
    return header, 8 + length


def _check_data(path: Path, start: int, metadata: Mapping[str, str], on_progress: Callable[[int, int], None]) -> None:
    """Compare the checksum of every run; several threads at a time, each with a small buffer."""
    expected = json.loads(metadata["crc32"])

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
                    raise DamagedCacheError("its content was changed")
                on_progress(index + 1, len(expected))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _view(data: Tensor, start: int, entry: Mapping[str, Any]) -> Tensor:
    first, end = (start + offset for offset in entry["data_offsets"])
    piece = data[first:end]
    if first % ALIGNMENT:
        piece = piece.clone()
    return piece.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _make_room(cache: QuantizedCache, needed: int) -> None:
    """Delete the least recently used files, and what broken-off writes left behind.

    Raises:
        OSError: there is no room.
    """
    folder = Path(cache.folder)
    for temporary in folder.glob(f".*{SUFFIX}.*.tmp"):
        _delete(temporary, older_than_s=ABANDONED_S)
    if needed > cache.limit_bytes:
        raise OSError(
            f"they take {needed / 1e9:.1f} GB, and the limit of the cache is {cache.limit_bytes / 1e9:.1f} GB"
        )
    files = sorted(_files(folder), key=lambda item: item[1])
    total = sum(size for _, _, size in files)
    for path, _, size in files:
        free = shutil.disk_usage(folder).free
        if total + needed <= cache.limit_bytes and needed < free:
            break
        _delete(path)
        total -= size
    free = shutil.disk_usage(folder).free
    if needed >= free:
        raise OSError(f"they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """(path, time of last use, bytes) of every cache file."""
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            stat = path.stat()
        except OSError:  # another process deleted it
            continue
        yield path, stat.st_mtime_ns, stat.st_size


def _delete(path: Path, older_than_s: float = 0.0) -> None:
    try:
        if time.time() - path.stat().st_mtime >= older_than_s:
            path.unlink()
    except OSError:  # gone already, or in use on Windows
        pass


def _header_checksum(header: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"


def _encode(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _rounded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
