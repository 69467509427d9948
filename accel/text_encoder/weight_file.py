"""Open a text encoder file, safetensors or GGUF, and give its weights one by one with their scales."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError, SettingsError
from ..files import FLOAT_DTYPES, FileIdentity, TensorFile, open_tensors, read_header
from ..tensors import all_finite

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The names that scaled fp8 files give to what belongs to `X.weight`, without the X. The first form is ComfyUI's old
# one (`scaled_fp8` marks the file), the second the newer one (`comfy_quant`, or metadata).
SCALES = (".scale_weight", ".weight_scale")
# They concern fp8 activations, which nothing here has; or mark the format.
IGNORED = (".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True)
class StoredWeight:
    """One weight as its file holds it.

    Attributes:
        key: its name in the file.
        shape: of the weight, not of what it is packed into.
        dtype: as stored; None: packed in GGUF blocks, which are read as float32.
        bytes: what it takes in the file.
        scale_key: where the file holds the factor of an fp8 weight.
        scale_numel: how many factors that are: one, or one per row.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    bytes: int
    scale_key: str | None = None
    scale_numel: int = 0


class WeightReader(Protocol):
    """An open file."""

    def read(self, stored: StoredWeight) -> tuple[Tensor, Tensor | None]:
        """The weight on the CPU, a copy, and its float32 scale of shape (1, 1) or (rows, 1), if it has one."""


@dataclass(frozen=True)
class WeightFile:
    """A file of which only the header was read. `weights` is by the keys of the file."""

    identity: FileIdentity
    weights: Mapping[str, StoredWeight]
    source: TensorFile | None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.identity.name

    @contextmanager
    def open(self) -> Iterator[WeightReader]:
        """Open the data.

        Raises:
            FileError: the file is gone, or was changed since its header was read.
        """
        if self.source is not None:
            with open_tensors(self.source) as handle:
                yield _SafetensorsReader(self.name, handle)
            return
        if FileIdentity.of(self.identity.path) != self.identity:
            raise FileError(f"'{self.name}' was changed after it was read. Queue the prompt again to use the new file.")
        yield _GgufReader(self.name, open_gguf(self.identity))


def read_weight_file(path: str) -> WeightFile:
    """Read the header of a safetensors or GGUF file.

    Raises:
        FileError: missing, damaged, or of another format.
        CheckpointError: quantized in a way that is not read here.
        SettingsError: a GGUF file, and the package `gguf` is not installed.
    """
    identity = FileIdentity.of(path)
    with open(identity.path, "rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    if is_gguf:
        reader = open_gguf(identity)
        return WeightFile(identity, {tensor.name: _stored_gguf(tensor) for tensor in reader.tensors}, None)
    source = read_header(path)
    return WeightFile(source.identity, _fold_scales(source), source)


def _fold_scales(file: TensorFile) -> dict[str, StoredWeight]:
    """Weights alone, each knowing its scale."""
    weights, scales = {}, {}
    for key, info in file.tensors.items():
        base = next((key.removesuffix(end) for end in SCALES if key.endswith(end)), None)
        if base is not None:
            scales[f"{base}.weight"] = key
        elif not key.endswith(IGNORED) and key.rsplit(".", 1)[-1] != "scaled_fp8":
            weights[key] = StoredWeight(key, info.shape, info.dtype, info.bytes)
    _refuse_other_formats(file)
    for key, scale_key in scales.items():
        stored = weights.get(key)
        if stored is None or stored.dtype not in FP8:
            found = "is missing" if stored is None else f"is stored as {stored.dtype}"
            raise CheckpointError(
                f"'{file.name}': '{scale_key}' is the scale of '{key}', which {found}; expected fp8 (e4m3 or e5m2). "
                "Choose a bf16, fp16, fp8, scaled fp8 or GGUF file."
            )
        rows, numel = (stored.shape[0] if stored.shape else 1), file.tensors[scale_key].numel
        if numel not in (1, rows):
            raise CheckpointError(
                f"'{file.name}': '{scale_key}' has shape {file.tensors[scale_key].shape}, expected one value, or one "
                f"per row of '{key}' ({rows}). The file is damaged, or scaled in a way that is not supported."
            )
        weights[key] = replace(stored, scale_key=scale_key, scale_numel=numel)
    return weights


def _refuse_other_formats(file: TensorFile) -> None:
    formats: dict[str, Any] = {}
    try:
        layers = json.loads(file.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        formats = {layer: entry.get("format") for layer, entry in layers.items()}
        markers = [key for key in file.tensors if key.endswith(".comfy_quant")]
        if markers:
            with open_tensors(file) as handle:
                for key in markers:
                    entry = json.loads(handle.get_tensor(key).numpy().tobytes())
                    formats[key.removesuffix(".comfy_quant")] = entry.get("format")
    except (ValueError, AttributeError) as exc:
        raise CheckpointError(
            f"'{file.name}': its description of quantized layers is not the expected JSON ({exc}). Get the file again."
        ) from exc
    for layer, name in formats.items():
        if name not in ("float8_e4m3fn", "float8_e5m2"):
            raise CheckpointError(
                f"'{file.name}': '{layer}' is quantized as {name}, expected float8_e4m3fn or float8_e5m2. Choose a "
                "bf16, fp16, fp8, scaled fp8 or GGUF file, and quantize it here."
            )


def _check_finite(name: str, key: str, tensor: Tensor) -> Tensor:
    if not all_finite(tensor):
        raise CheckpointError(f"'{name}': '{key}' holds NaN or infinity. The file is damaged: get it again.")
    return tensor


class _SafetensorsReader:
    def __init__(self, name: str, handle: Any) -> None:
        self._name, self._handle = name, handle

    def read(self, stored: StoredWeight) -> tuple[Tensor, Tensor | None]:
        if stored.dtype not in FLOAT_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise CheckpointError(
                f"'{self._name}': '{stored.key}' is stored as {stored.dtype}, expected one of: {names}."
            )
        weight = _check_finite(self._name, stored.key, self._handle.get_tensor(stored.key).clone())
        if stored.scale_key is None:
            return weight, None
        scale = self._handle.get_tensor(stored.scale_key).to(torch.float32, copy=True).reshape(-1, 1)
        return weight, _check_finite(self._name, stored.scale_key, scale)


# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


def open_gguf(identity: FileIdentity) -> Any:
    """Map a GGUF file: `gguf.GGUFReader`.

    Raises:
        SettingsError: the package `gguf` is not installed.
        FileError: the file is damaged.
    """
    try:
        import gguf
    except ImportError as exc:
        raise SettingsError(
            f"'{identity.name}' is a GGUF file, and the Python package 'gguf' that reads it is not installed. Install "
            "it where ComfyUI runs (python -m pip install gguf), or choose a safetensors file."
        ) from exc
    try:
        return gguf.GGUFReader(identity.path)
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as exc:
        raise FileError(f"'{identity.name}' is not a readable GGUF file ({exc}): it is truncated or damaged. "
                        "Get it again.") from exc


def _stored_gguf(tensor: Any) -> StoredWeight:
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.tensor_type.name)
    shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF names the innermost dimension first
    return StoredWeight(tensor.name, shape, plain, int(tensor.n_bytes))


class _GgufReader:
    def __init__(self, name: str, reader: Any) -> None:
        self._name = name
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(self, stored: StoredWeight) -> tuple[Tensor, Tensor | None]:
        import gguf

        tensor = self._tensors[stored.key]
        if stored.dtype in (None, torch.bfloat16):  # numpy has no bfloat16
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as exc:
                raise CheckpointError(
                    f"'{self._name}': '{stored.key}' is packed as {tensor.tensor_type.name}, which the package 'gguf' "
                    "cannot read. Choose a file with another quantization, such as Q8_0 or Q4_K_M."
                ) from exc
            weight = torch.from_numpy(values).to(stored.dtype or torch.float32)
        else:
            weight = torch.from_numpy(tensor.data.copy())
        return _check_finite(self._name, stored.key, weight.reshape(stored.shape)), None
