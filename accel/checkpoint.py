"""From a checkpoint file to a diffusers model: recognise it by its header, then load it tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .families import FAMILIES
from .files import FLOAT_DTYPES, TensorFile, TensorInfo, open_tensors, read_header
from .layout import FusedLinear, swap_halves
from .spec import ModelSpec
from .tensors import all_finite

Progress = Callable[[int, int], None]

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


def load_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device, on_progress: Progress) -> nn.Module:
    """Read the weights into a new diffusers model, one tensor at a time.

    Args:
        spec: what `inspect_checkpoint` gave.
        dtype: dtype of all parameters.
        device: where they go.
        on_progress: called with (tensors read, tensors in all).

    Returns:
        The model in eval mode; its parameters do not require gradients, and are no inference tensors.

    Raises:
        FileError: the file is gone or was changed since it was inspected.
        CheckpointError: a tensor holds NaN or infinity.
    """
    layout = spec.family.layout(spec.config)
    # Parameters made under inference_mode could not be rebound outside it.
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            model = spec.family.build(spec.config).eval().requires_grad_(False)
        total = len(spec.file.tensors)
        done = 0
        with open_tensors(spec.file) as handle:

            def read(key: str) -> Tensor:
                nonlocal done
                tensor = handle.get_tensor(key).to(device=device, dtype=dtype, copy=True)
                if not all_finite(tensor):
                    raise CheckpointError(
                        f"'{spec.file.name}': '{key}' holds NaN or infinity in {dtype}. The file is damaged, or its "
                        "values do not fit this dtype: get it again, or choose another dtype."
                    )
                done += 1
                on_progress(done, total)
                return tensor

            for linear in layout.linears:
                _assign_linear(model, linear, read(f"{linear.name}.weight"), read(f"{linear.name}.bias"))
            for vector in layout.vectors:
                _assign(model, vector.parameter, read(vector.name))
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"'{spec.file.name}': no tensor for {', '.join(left[:3])}: a wrong layout.")
    return model


def _assign_linear(model: nn.Module, linear: FusedLinear, weight: Tensor, bias: Tensor) -> None:
    if linear.swap_halves:
        weight, bias = swap_halves(weight), swap_halves(bias)
    for part in linear.parts:
        rows = slice(part.start, part.start + part.rows)
        alone = len(linear.parts) == 1
        # A view would keep the fused tensor alive as long as any of its parts.
        _assign(model, f"{part.module}.weight", weight[rows] if alone else weight[rows].clone())
        _assign(model, f"{part.module}.bias", bias[rows] if alone else bias[rows].clone())


def _assign(model: nn.Module, parameter: str, tensor: Tensor) -> None:
    module_name, _, name = parameter.rpartition(".")
    module = model.get_submodule(module_name)
    expected = tuple(module._parameters[name].shape)
    if expected != tuple(tensor.shape):
        raise CheckpointError(f"{parameter} is {tuple(tensor.shape)}, diffusers expects {expected}.")
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


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
