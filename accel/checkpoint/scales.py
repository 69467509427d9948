"""The scales of quantized weights in ComfyUI's files: where they lie, and what they must look like.

Two forms, told by ComfyUI's `convert_old_quants` (comfy/utils.py) and `_load_quantized_module` (comfy/ops.py):

```
old   scaled_fp8 (a marker)   X.weight float8   X.scale_weight ()          X.scale_input ()
new   X.comfy_quant           X.weight float8   X.weight_scale () or (rows, 1)   X.input_scale ()
      (JSON bytes, {"format": "float8_e4m3fn"}; or `_quantization_metadata` of the file: {"layers": {"X": …}})
```
A weight is `stored * scale`. Input scales serve matrix products in fp8 that the file's author calibrated, and are not
needed to have the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import TensorInfo
from ..hardware import dtype_name
from .source import Checkpoint

MARKER = "scaled_fp8"
DESCRIPTION = ".comfy_quant"
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
METADATA = "_quantization_metadata"
STORED_AS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
# What stands beside a weight that no description names -> the format that it is a part of.
UNDESCRIBED = {
    ".weight_scale_2": "nvfp4",  # ModelOpt, ComfyUI
    ".weight_s_rel": "w4a8 or w6a8",
    ".smooth_factor": "svdquant_w4a4",
}


def find_scales(file: Checkpoint, prefix: str, names: Mapping[str, TensorInfo]) -> tuple[dict[str, str], set[str]]:
    """Assign every scale to its layer.

    Args:
        file: the checkpoint.
        prefix: what stands before the model's names in the file.
        names: the model's tensors, without the prefix.

    Returns:
        Layer -> name of its weight scale; and every name that is no weight: scales, markers, descriptions.

    Raises:
        CheckpointError: a format that is not supported, or a scale that is missing, left over or of another shape.
    """
    scales: dict[str, str] = {}
    consumed = {name for name in names if name == MARKER or name.endswith((*INPUT_SCALES, DESCRIPTION))}
    formats = _formats(file, prefix, names)
    _check_undescribed(file, prefix, names, formats)
    for layer, described in formats.items():
        _check_format(file, prefix + layer, described, names.get(f"{layer}.weight"))
    for name in names:
        for suffix in WEIGHT_SCALES:
            if name.endswith(suffix):
                layer = name.removesuffix(suffix)
                _check_scale(file, prefix, name, layer, names)
                if layer in scales:
                    raise CheckpointError(
                        f"'{file.name}': '{prefix}{layer}.weight' has two scales, '{scales[layer]}' and '{name}', "
                        "expected one. The file is mixed from two: get it again."
                    )
                scales[layer] = name
    for layer in formats:
        if layer not in scales:
            raise CheckpointError(
                f"'{file.name}': '{prefix}{layer}' is quantized by the file's own description, and has no "
                f"'{prefix}{layer}.weight_scale'. The file is incomplete: get it again."
            )
    return scales, consumed | set(scales.values())


def _formats(file: Checkpoint, prefix: str, names: Mapping[str, TensorInfo]) -> dict[str, Mapping[str, Any]]:
    """Layer -> its description, from both forms of the newer format; layers of other parts of the file left out."""
    formats: dict[str, Mapping[str, Any]] = {}
    if METADATA in file.metadata:
        described = _parse(file, METADATA, file.metadata[METADATA]).get("layers", {})
        if not isinstance(described, dict):
            raise CheckpointError(f"'{file.name}': 'layers' of its {METADATA} is no object. Get the file again.")
        for layer, description in described.items():
            if layer.startswith(prefix):
                formats[layer.removeprefix(prefix)] = description
    keys = [name for name in names if name.endswith(DESCRIPTION)]
    if keys:
        with file.open() as rows:
            for name in keys:
                content = rows(prefix + name)[:]
                text = content.to(torch.uint8).numpy().tobytes().decode("utf-8", "replace")
                formats[name.removesuffix(DESCRIPTION)] = _parse(file, prefix + name, text)
    return {layer: description for layer, description in formats.items() if prefix or f"{layer}.weight" in names}


def _parse(file: Checkpoint, what: str, text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as exc:
        raise CheckpointError(f"'{file.name}': '{what}' is not readable JSON ({exc}). Get the file again.") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file.name}': '{what}' is no JSON object. Get the file again.")
    return content


def _check_format(file: Checkpoint, layer: str, described: Any, weight: TensorInfo | None) -> None:
    kind = described.get("format") if isinstance(described, dict) else described
    parameters = described.get("params") if isinstance(described, dict) else None
    rotated = isinstance(described, dict) and (
        described.get("convrot") or (isinstance(parameters, dict) and parameters.get("convrot"))
    )
    if kind not in STORED_AS or rotated:
        raise _unread(file, layer, f"as '{kind}'{' with a rotation' if rotated else ''}")
    if weight is None:
        raise CheckpointError(
            f"'{file.name}': the file describes '{layer}' as '{kind}', and holds no '{layer}.weight'. It is "
            "incomplete: get it again."
        )
    if weight.dtype != STORED_AS[kind]:
        raise CheckpointError(
            f"'{file.name}': '{layer}.weight' is stored as {weight.dtype}, and the file describes it as '{kind}'. It "
            "is damaged, or mixed from two: get it again."
        )


def _check_undescribed(
    file: Checkpoint, prefix: str, names: Mapping[str, TensorInfo], described: Collection[str]
) -> None:
    """Refuse packed weights of which nothing says the format, by what stands beside them."""
    for name, info in names.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer in described or info.packed or len(info.shape) != 2:
            continue
        found = next((end for end in UNDESCRIBED if layer + end in names), None)
        if found is not None:
            raise _unread(file, prefix + layer, f"as '{UNDESCRIBED[found]}' (it has '{prefix}{layer}{found}')")
        scale = next((names[layer + end] for end in WEIGHT_SCALES if layer + end in names), None)
        if scale is not None and scale.dtype == getattr(torch, "float8_e8m0fnu", None):
            raise _unread(file, prefix + layer, "as 'mxfp8' (its scales are float8_e8m0)")
        if info.dtype == torch.uint8 or (info.dtype == torch.int8 and scale is None):
            raise _unread(file, prefix + layer, f"as packed {dtype_name(info.dtype)} values, of a "
                          "format that the file does not name")  # fmt: skip


def _unread(file: Checkpoint, layer: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"'{file.name}': '{layer}' is quantized {how}, which this loader does not read. It reads "
        f"{', '.join(STORED_AS)} with one scale per tensor or row: choose such a file, the bf16 one, or a GGUF file."
    )


def _check_scale(file: Checkpoint, prefix: str, name: str, layer: str, names: Mapping[str, TensorInfo]) -> None:
    info, weight = names[name], names.get(f"{layer}.weight")
    if weight is None:
        raise CheckpointError(
            f"'{file.name}': '{prefix}{name}' is a scale without a weight: it needs '{prefix}{layer}.weight', which is "
            "missing. The file is incomplete: get it again."
        )
    rows = weight.shape[0] if len(weight.shape) == 2 else 1
    allowed = ((), (1,), (1, 1), (rows,), (rows, 1))
    if info.shape not in allowed or info.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(
            f"'{file.name}': '{prefix}{name}' is {info.dtype} of shape {info.shape}, expected one floating-point scale "
            f"for the tensor or one for each of its {rows} rows (float8 or int8). Blocks with scales of their own, as "
            "in nvfp4 and mxfp8, are not read: choose the fp8, bf16 or GGUF file."
        )
