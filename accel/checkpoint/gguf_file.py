"""A checkpoint in a GGUF file, dequantized row by row through the `gguf` package.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format, city96/ComfyUI-GGUF for what FLUX
files hold: the original tensor names, `comfy.gguf.orig_shape.*` for reshaped tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError
from ..files import FileIdentity, TensorInfo
from .gguf_header import TensorEntry, read_header
from .locate import Located
from .source import Rows

ARCHITECTURE = "general.architecture"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
FLOATS: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A quantized weight has no dtype of its own; bfloat16 holds what its 8 bits and fewer distinguish.
QUANTIZED_DTYPE = torch.bfloat16
_READ_FIELDS = ("general.", ORIGINAL_SHAPE)
# The name of a language model's way to cut text; the vocabulary itself is large, and read by `read_fields`.
VOCABULARY_KIND = "tokenizer.ggml.pre"
# What reading raises for a file that ends early or holds nonsense.
DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError, struct.error)


@dataclass(frozen=True)
class GgufTensor(TensorInfo):
    """One tensor of a GGUF file.

    Attributes:
        type_name: the GGML type, such as "Q4_K".
        offset: its first byte in the file.
        stored_shape: the shape that its blocks follow; differs from `shape` where a converter reshaped it.
        row_bytes: bytes of one stored row.
    """

    type_name: str
    offset: int
    stored_shape: tuple[int, ...]
    row_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.rows * self.row_bytes

    @property
    def rows(self) -> int:
        """Number of stored rows."""
        return prod(self.stored_shape[:-1])

    @property
    def packed(self) -> bool:
        """Whether `dtype` is only what its blocks are unpacked to."""
        return self.type_name not in FLOATS


@dataclass(frozen=True)
class GgufCheckpoint:
    """One model in a GGUF file, of which only the header was read; see `source.Checkpoint`."""

    name: str
    located: Located
    identity: FileIdentity
    tensors: Mapping[str, GgufTensor]
    metadata: Mapping[str, str]

    device: ClassVar[torch.device] = torch.device("cpu")

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Rows]]:
        """Map the file; see `source.Checkpoint.open`."""
        import numpy

        self.check_unchanged()
        gguf = _package(self.name)
        data = numpy.memmap(self.identity.path, mode="r", dtype=numpy.uint8)

        def rows(key: str) -> Rows:
            info = self.tensors[key]
            stored = _GgufRows(data[info.offset : info.offset + info.bytes], info, gguf)
            if info.shape == info.stored_shape:
                return stored
            return stored.whole().reshape(info.shape)

        yield rows

    def check_unchanged(self) -> None:
        """Raise a FileError if the file is another one than the header is of."""
        if self.located.identity() != self.identity:
            raise FileError(f"'{self.name}' was changed after it was read. Queue the prompt again to use the new file.")


class _GgufRows:
    """A tensor's rows, dequantized to float32 as they are asked for; plain floats are views of the file."""

    def __init__(self, data: Any, info: GgufTensor, gguf: ModuleType) -> None:
        self._data = data.reshape(info.rows, info.row_bytes)
        self._info = info
        self._gguf = gguf

    def __getitem__(self, rows: slice) -> Tensor:
        # A vector is one stored row, and yet is asked for by its elements.
        vector = len(self._info.stored_shape) == 1
        values = self._values(self._data if vector else self._data[rows])
        return values[0][rows] if vector else values

    def whole(self) -> Tensor:
        """All rows."""
        return self._values(self._data)

    def _values(self, data: Any) -> Tensor:
        dtype = FLOATS.get(self._info.type_name)
        if dtype is not None:
            return _as_tensor(data).view(dtype)
        kind = self._gguf.GGMLQuantizationType[self._info.type_name]
        import numpy

        # A damaged scale overflows here, and is reported as the infinity that it gives.
        with numpy.errstate(all="ignore"):
            return torch.from_numpy(self._gguf.quants.dequantize(data, kind))


def read_gguf(located: Located) -> GgufCheckpoint:
    """Read the header of a GGUF file; the architecture that it names is in `metadata[ARCHITECTURE]`.

    Raises:
        FileError: not a GGUF file, damaged, truncated, big-endian, or the `gguf` package is missing.
        CheckpointError: a quantization that the package cannot read.
    """
    path, name = located.files[0], located.name
    identity = located.identity()
    with open(path, "rb") as stream:
        start = stream.read(8)
    if start[:4] != b"GGUF":
        raise FileError(f"'{name}' is not a GGUF file: it does not begin with 'GGUF'. Download it again.")
    if len(start) == 8 and int.from_bytes(start[4:], "little") & 0xFFFF == 0:
        raise FileError(f"'{name}' is a big-endian GGUF file. Choose a little-endian one, as nearly all are.")
    gguf = _package(name)
    try:
        fields, entries, size = read_header(path, lambda key: key.startswith(_READ_FIELDS) or key == VOCABULARY_KIND)
        tensors = {entry.name: _describe(entry, fields, name, gguf, size) for entry in entries}
    except DAMAGE as exc:
        raise _damaged(name, identity, exc) from exc
    if not tensors:
        raise FileError(f"'{name}' holds no tensors. Choose another file.")
    _check_kinds(tensors, gguf, name)
    metadata = {key: value for key, value in fields.items() if isinstance(value, str)}
    return GgufCheckpoint(name, located, identity, tensors, metadata)


def read_fields(file: GgufCheckpoint, *keys: str) -> list[Any]:
    """Large fields of a file's metadata, such as a vocabulary; None for each that it lacks.

    Raises:
        FileError: the file was changed since its header was read.
    """
    file.check_unchanged()
    try:
        fields, *_ = read_header(file.identity.path, keys.__contains__)
    except DAMAGE as exc:
        raise _damaged(file.name, file.identity, exc) from exc
    return [fields.get(key) for key in keys]


def _damaged(name: str, identity: FileIdentity, why: Exception) -> FileError:
    return FileError(
        f"'{name}' is truncated or damaged: its {identity.size_bytes:,} bytes are no complete GGUF file ({why}). Its "
        "download or copy did not finish: get it again."
    )


def _package(name: str) -> ModuleType:
    try:
        import gguf
    except ImportError as exc:
        raise FileError(
            f"'{name}' is a GGUF file, and the Python package that reads those is not installed ({exc}). Run "
            f"`pip install gguf` in ComfyUI's environment and restart it, or choose a safetensors file."
        ) from exc
    return gguf


def _describe(tensor: TensorEntry, fields: Mapping[str, Any], name: str, gguf: ModuleType, size: int) -> GgufTensor:
    kind, stored = gguf.GGMLQuantizationType(tensor.kind), tensor.shape
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = prod(stored[:-1]), stored[-1] if stored else 1
    if columns % block:
        raise ValueError(f"'{tensor.name}' has rows of {columns} values, which blocks of {block} do not fill")
    row_bytes = columns // block * block_bytes
    if tensor.offset + rows * row_bytes > size:
        raise ValueError(f"it ends at byte {size:,}, within '{tensor.name}'")
    original = tuple(fields.get(ORIGINAL_SHAPE + tensor.name, stored))
    if prod(original) != prod(stored):
        raise CheckpointError(
            f"'{name}': '{tensor.name}' has shape {stored}, and its metadata says that it was {original}: not the same "
            "number of values. The file is damaged: get it again."
        )
    return GgufTensor(
        shape=original,
        dtype=FLOATS.get(kind.name, QUANTIZED_DTYPE),
        type_name=kind.name,
        offset=tensor.offset,
        stored_shape=stored,
        row_bytes=row_bytes,
    )


def _check_kinds(tensors: Mapping[str, GgufTensor], gguf: ModuleType, name: str) -> None:
    import numpy

    for kind_name in {tensor.type_name for tensor in tensors.values()} - set(FLOATS):
        kind = gguf.GGMLQuantizationType[kind_name]
        try:
            gguf.quants.dequantize(numpy.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
        except NotImplementedError as exc:
            key = next(key for key, tensor in tensors.items() if tensor.type_name == kind_name)
            raise CheckpointError(
                f"'{name}': '{key}' is stored as {kind_name}, which the gguf package does not dequantize. Choose a "
                "file in another quantization, such as Q8_0 or Q4_K_S."
            ) from exc


def _as_tensor(data: Any) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        # The map is read-only, and so is everything that is done with the tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(data)
