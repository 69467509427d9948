"""Files of tensors: who they are, what the header of a safetensors file says, and why one cannot be read."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import FileError
from .memory.mapped import MappedTensors, check_entries

# The names that safetensors writes in its header, https://github.com/huggingface/safetensors#format
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Block scales of mxfp8, so that such a file is refused by its name; older versions of torch lack the type.
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES = {**DTYPES, "F8_E8M0": torch.float8_e8m0fnu}
# What weights may be stored as.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class FileIdentity:
    """What tells one state of a file, or of several that belong together, from another without reading them.

    Attributes:
        path: the real path; of several files the folder or the index that names them.
        mtime_ns: when it was last written; of several the latest.
        size_bytes: its size; of several all together.
        parts: of several files each one's identity. Compare or hash the whole object, not the first three fields.
        given: the name under which it was asked for, which a link may have; it does not count in comparisons.
    """

    path: str
    mtime_ns: int
    size_bytes: int
    parts: tuple[FileIdentity, ...] = ()
    given: str = field(default="", compare=False)

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """Identify the file that `path` names now, links resolved.

        Raises:
            FileError: there is no such file.
        """
        real = os.path.realpath(path)
        try:
            stat = os.stat(real)
        except OSError as exc:
            raise FileError(
                f"'{path}' cannot be opened ({exc.strerror}): it was moved or deleted, or is not readable. "
                "Choose another file, or put it back and queue again."
            ) from exc
        return cls(real, stat.st_mtime_ns, stat.st_size, given=os.path.basename(path))

    @classmethod
    def of_all(cls, path: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> FileIdentity:
        """Identify several files that are one model.

        Args:
            path: what names them all, such as their folder.
            files: every file whose change matters.

        Raises:
            FileError: one of them is not there.
        """
        parts = tuple(cls.of(file) for file in files)
        return cls(
            os.path.realpath(path), max(part.mtime_ns for part in parts), sum(part.size_bytes for part in parts), parts
        )

    @property
    def name(self) -> str:
        """The file's name without its folder, as messages show it."""
        return self.given or Path(self.path).name


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """Whether it lies in blocks that must be unpacked, so that `dtype` is not what is stored."""
        return False

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of which only the header was read.

    Attributes:
        identity: its state then.
        tensors: key -> what the header says of it.
        metadata: what the file says of itself.
        starts: key -> the tensor's first byte in the file.
    """

    identity: FileIdentity
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.identity.name


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """Read the names, shapes and dtypes of a safetensors file, none of its data.

    Raises:
        FileError: missing, empty, truncated, not a safetensors file, or of an unknown dtype.
    """
    identity = FileIdentity.of(path)
    layout = _diagnose(identity)
    tensors, starts = {}, {}
    if layout.longer:
        metadata = layout.header.get("__metadata__") or {}
    else:
        with _opened(identity) as handle:  # safetensors checks that the entries are whole and do not overlap
            metadata = handle.metadata() or {}
    for key, entry in layout.header.items():
        if key == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise FileError(
                f"'{identity.name}': tensor '{key}' is stored as {entry['dtype']}, which is not supported. "
                f"Supported are {', '.join(DTYPES)}: save the file in one of them."
            )
        tensors[key] = TensorInfo(tuple(entry["shape"]), dtype)
        starts[key] = layout.data_start + entry["data_offsets"][0]
    return TensorFile(identity, tensors, metadata, starts)


@contextmanager
def open_tensors(file: TensorFile) -> Iterator[safe_open | MappedTensors]:
    """Open the data of a file whose header was read before, and make sure that it is still the same file.

    Yields:
        A handle whose `get_tensor(key)` gives CPU tensors that may map the file: copy them.

    Raises:
        FileError: the file is gone, damaged, or changed since `read_header`.
    """
    now = FileIdentity.of(file.identity.path)
    if now != file.identity:
        raise FileError(f"'{file.name}' was changed after it was read. Queue the prompt again to use the new file.")
    layout = _diagnose(now)
    if layout.longer:
        yield MappedTensors(now.path, layout.data_start, layout.header, DTYPES)
        return
    with _opened(now) as handle:
        yield handle


@contextmanager
def _opened(identity: FileIdentity) -> Iterator[safe_open]:
    try:
        handle = safe_open(identity.path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as exc:
        raise FileError(
            f"'{identity.name}' is not a readable safetensors file ({exc}). Download or save it again."
        ) from exc
    with handle:
        yield handle


@dataclass(frozen=True)
class _FileLayout:
    """What lies where in a safetensors file.

    Attributes:
        data_start: its first byte of data.
        header: what it says of its tensors.
        longer: whether bytes follow that the header does not name.
    """

    data_start: int
    header: dict[str, Any]
    longer: bool


def _diagnose(identity: FileIdentity) -> _FileLayout:
    """Check a file before safetensors opens it, whose own messages ("HeaderTooLarge") do not tell what happened."""
    name, size = identity.name, identity.size_bytes
    if size == 0:
        raise FileError(f"'{name}' is empty (0 bytes): its download or save did not finish. Get it again.")
    with open(identity.path, "rb") as stream:
        start = stream.read(512)
        looks = _other_format(start)
        if looks:
            raise FileError(f"'{name}' is not a safetensors file: it {looks}.")
        header_bytes = int.from_bytes(start[:8], "little")
        if size < 8 or header_bytes > size - 8:
            raise FileError(
                f"'{name}' is damaged: its first 8 bytes announce a header of {header_bytes:,} bytes, but the file has "
                f"{size:,} bytes. It is truncated or not a safetensors file: get it again."
            )
        stream.seek(8)
        try:
            header = json.loads(stream.read(header_bytes))
            ends = [operator.index(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
            raise FileError(
                f"'{name}' is damaged: its header is not the JSON of a safetensors file ({exc}). Get it again."
            ) from exc
    if not ends:
        raise FileError(f"'{name}' holds no tensors. Choose another file.")
    expected = 8 + header_bytes + max(ends)
    if size < expected:
        raise FileError(
            f"'{name}' is truncated: {size:,} of {expected:,} bytes. Its download or copy did not finish: get it again."
        )
    if size > expected:  # safetensors would call it incomplete
        check_entries(name, header, DTYPES)
    return _FileLayout(8 + header_bytes, header, size > expected)


def _other_format(start: bytes) -> str | None:
    if start[8:9] == b"{":  # the length of a safetensors header may begin like a pickle: 640 bytes are 80 02
        return None
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "holds a web page, as when a download link needs a login. Download it again while signed in"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data. Fetch it with `git lfs pull` or download it directly"
    if start.startswith(b"PK\x03\x04") and b"data.pkl" not in start:
        return "is a ZIP archive. Unpack it, and choose the safetensors file in it"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickle (.pt/.ckpt), which can run code when opened. Convert it to safetensors"
    if start.startswith(b"GGUF"):
        return "is a GGUF file. Choose a safetensors file"
    if start[:8].isascii() and all(letter.isprintable() or letter.isspace() for letter in start[:8].decode()):
        # As a number, the length of a header of 10**18 bytes.
        shown = " ".join(start[:60].decode(errors="replace").split())
        return f"holds text ('{shown}'), as when a download fails. Download it again, signed in where that is needed"
    return None
