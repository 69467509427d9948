"""Checkpoint files: recognised by their header, then read tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CheckpointError
from .families import FAMILIES
from .files import FLOAT_DTYPES, TensorFile, TensorInfo, open_tensors, read_header
from .layout import FusedLinear, swap_halves
from .spec import ModelSpec
from .tensors import all_finite

# Names that other files are known by, for the message only.
OTHER_MODELS: Mapping[str, str] = {
    "model.diffusion_model.input_blocks.": "a Stable Diffusion or SDXL checkpoint",
    "input_blocks.": "a Stable Diffusion or SDXL UNet",
    "conditioner.embedders.": "an SDXL checkpoint",
    "encoder.conv_in.": "a VAE",
    "decoder.conv_in.": "a VAE",
    "first_stage_model.": "a VAE",
    "taesd_": "a tiny autoencoder (TAESD)",
    "text_model.": "a CLIP text encoder",
    "encoder.block.": "a T5 text encoder",
    "lora_unet_": "a LoRA",
    "lora_te": "a LoRA",
    "model.diffusion_model.double_blocks.": "an all-in-one FLUX checkpoint",
    "transformer_blocks.": "a checkpoint in the diffusers layout",
}


@dataclass(frozen=True)
class LinearWeights:
    """One linear of the model: its diffusers name, weight (out_features, in_features) and bias (out_features,)."""

    module: str
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class VectorWeights:
    """A parameter that is no linear's, such as the scale of an RMS norm: its full diffusers name and value (size,)."""

    parameter: str
    value: Tensor


def inspect_checkpoint(path: str) -> ModelSpec:
    """Recognise a checkpoint from its header.

    Raises:
        FileError: see `files.read_header`.
        CheckpointError: no known family, a tensor missing, unknown, or of another shape than the sizes demand.
    """
    file = read_header(path)
    for family in FAMILIES:
        config = family.recognise(file.tensors, file.name)
        if config is not None:
            _check_complete(file, family.layout(config).expected_shapes())
            stored = Counter()
            for info in file.tensors.values():
                stored[info.dtype] += info.bytes
            return ModelSpec(file, family, config, stored.most_common(1)[0][0])
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"'{file.name}' is {_guess(file)}, expected a {known} transformer in the original layout "
        "(double_blocks.*, single_blocks.*). Choose a file such as flux1-dev.safetensors."
    )


def read_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Iterator[LinearWeights | VectorWeights]:
    """Read a checkpoint tensor by tensor, as the model's modules want it.

    Args:
        spec: what `inspect_checkpoint` gave.
        dtype: what the tensors are converted to.
        device: where they go.

    Yields:
        Every linear and every vector of the layout once; nothing of the file stays in memory behind them.

    Raises:
        FileError: the file is gone or was changed since it was inspected.
        CheckpointError: a tensor holds NaN or infinity.
    """
    layout = spec.family.layout(spec.config)
    with open_tensors(spec.file) as handle:

        def read(key: str) -> Tensor:
            tensor = handle.get_tensor(key).to(device=device, dtype=dtype, copy=True)
            if not all_finite(tensor):
                raise CheckpointError(
                    f"'{spec.file.name}': '{key}' holds NaN or infinity in {dtype}. The file is damaged, or its "
                    "values do not fit this dtype: get it again, or choose another dtype."
                )
            return tensor

        for linear in layout.linears:
            yield from _split(linear, read(f"{linear.name}.weight"), read(f"{linear.name}.bias"))
        for vector in layout.vectors:
            yield VectorWeights(vector.parameter, read(vector.name))


def _split(linear: FusedLinear, weight: Tensor, bias: Tensor) -> Iterator[LinearWeights]:
    if linear.swap_halves:
        weight, bias = swap_halves(weight), swap_halves(bias)
    alone = len(linear.parts) == 1
    for part in linear.parts:
        rows = slice(part.start, part.start + part.rows)
        # A view would keep the fused tensor alive as long as any of its parts.
        yield LinearWeights(
            part.module, weight[rows] if alone else weight[rows].clone(), bias[rows] if alone else bias[rows].clone()
        )


def _check_complete(file: TensorFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [key for key in expected if key not in file.tensors]
    if missing:
        raise CheckpointError(
            f"'{file.name}': {len(missing)} of {len(expected)} tensors are missing, such as '{missing[0]}'. It is "
            "incomplete, or from a trainer that left them out: get the complete transformer."
        )
    unknown = [key for key in file.tensors if key not in expected]
    if unknown:
        scaled = [key for key in unknown if key.endswith(("scale_weight", "scaled_fp8", "input_scale", "comfy_quant"))]
        reason = (
            "its weights are scaled fp8, which this loader does not read: choose the bf16 or the plain fp8 file"
            if scaled
            else "they belong to another model, or to an extension that this loader does not know"
        )
        raise CheckpointError(
            f"'{file.name}': {len(unknown)} tensors have no place in the model, such as '{unknown[0]}': {reason}."
        )
    for key, shape in expected.items():
        _check_tensor(file, key, file.tensors[key], shape)


def _check_tensor(file: TensorFile, key: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"'{file.name}': '{key}' has shape {info.shape}, expected {shape} from the file's other tensors. The file "
            "is damaged, or mixed from two models."
        )
    if info.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise CheckpointError(f"'{file.name}': '{key}' is stored as {info.dtype}, expected one of: {names}.")


def _guess(file: TensorFile) -> str:
    for prefix, what in OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in file.tensors):
            return what
    return f"not a model that this pack knows (its first tensor is '{next(iter(file.tensors))}')"
