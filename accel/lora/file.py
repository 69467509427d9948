"""Read a LoRA file: recognise every key, check every shape and value, split it over the model's linears."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraError
from ..files import FLOAT_DTYPES, TensorFile, TensorInfo, open_tensors, read_header
from ..layout import LoraTarget
from ..spec import ModelSpec
from .weights import LoraLayer, LoraWeights, check_finite, split

# The last part of a key -> what it is. The first that fits counts, so longer ones stand before their own endings.
ROLES: Mapping[str, str] = {
    ".lora_down.weight": "A",  # sd-scripts, LyCORIS, OneTrainer
    ".lora_up.weight": "B",
    ".lora_A.default.weight": "A",  # PEFT, saved with its adapter's name
    ".lora_B.default.weight": "B",
    ".lora_A.weight": "A",  # PEFT, diffusers, ai-toolkit
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",  # diffusers before PEFT
    ".lora.up.weight": "B",
    ".down.weight": "A",  # XLabs
    ".up.weight": "B",
    ".alpha": "alpha",
}
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "clip_l.", "t5xxl.")
# Names that LoRAs for other models carry, for the message only.
OTHER_MODELS: Mapping[str, str] = {
    "lora_unet_input_blocks_": "Stable Diffusion XL",
    "lora_unet_output_blocks_": "Stable Diffusion XL",
    "lora_unet_down_blocks_": "Stable Diffusion 1.5 or XL",
    "unet.down_blocks.": "Stable Diffusion 1.5 or XL",
    "lora_unet_joint_blocks_": "Stable Diffusion 3",
    "diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "diffusion_model.blocks.": "Wan",
    "diffusion_model.layers.": "Z-Image or Lumina",
    "transformer.transformer_blocks.0.img_mod.": "Qwen-Image",
}
# Kinds of change that are no low-rank pair, by a part of their keys, for the message only.
OTHER_KINDS: Mapping[str, str] = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".lora_mid": "LoCon with a middle matrix",
    ".lora_B.bias": "a bias, as in BFL's control LoRAs",
    ".diff_b": "a difference of biases",
    ".diff": "a difference of whole weights",
    ".set_weight": "whole weights",
    "_norm": "a norm",
}


@dataclass(frozen=True)
class _Pair:
    """Keys of one module in the file."""

    target: LoraTarget
    keys: Mapping[str, str]
    rank: int


def read_lora(path: str, spec: ModelSpec) -> LoraWeights:
    """Read a LoRA for a model. Nothing is returned unless every key, shape, rank and value is right.

    Args:
        path: a safetensors file.
        spec: the model that it must fit.

    Returns:
        Weights on the CPU, unscaled, in the file's dtype.

    Raises:
        FileError: see `files.read_header`.
        LoraError: an unknown key, a missing half, a wrong shape, NaN, or nothing for this model in it.
    """
    file = read_header(path)
    pairs, text_encoder_keys = _recognise(file, spec)
    with torch.inference_mode(False), torch.no_grad(), open_tensors(file) as handle:
        layers = [layer for pair in pairs.values() for layer in _read_pair(file, handle, pair)]
    return LoraWeights(file.identity, tuple(layers), text_encoder_keys)


def _recognise(file: TensorFile, spec: ModelSpec) -> tuple[dict[str, _Pair], tuple[str, ...]]:
    aliases = spec.family.lora_aliases(spec.config)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    text_encoder, unknown = [], []
    for key in file.tensors:
        if key.startswith(TEXT_ENCODER_PREFIXES):
            text_encoder.append(key)
            continue
        suffix = next((suffix for suffix in ROLES if key.endswith(suffix)), None)
        module = key.removesuffix(suffix) if suffix else key
        if suffix is None or module not in aliases:
            unknown.append(key)
            continue
        role = ROLES[suffix]
        if role in found[module]:
            raise LoraError(f"LoRA '{file.name}': '{key}' and '{found[module][role]}' say the same thing twice.")
        found[module][role] = key
    if unknown or not found:
        raise LoraError(_unknown_message(file, spec, unknown, bool(found), text_encoder))
    return {name: _check_pair(file, name, aliases[name], keys) for name, keys in found.items()}, tuple(text_encoder)


def _check_pair(file: TensorFile, name: str, target: LoraTarget, keys: Mapping[str, str]) -> _Pair:
    for role, word in (("A", "lora_down / lora_A"), ("B", "lora_up / lora_B")):
        if role not in keys:
            raise LoraError(
                f"LoRA '{file.name}': '{name}' has {', '.join(keys.values())} but no {word} matrix. The file is "
                "incomplete: get it again."
            )
    lora_A, lora_B = file.tensors[keys["A"]], file.tensors[keys["B"]]
    for info, key, expected in (
        (lora_A, keys["A"], f"(rank, {target.in_features})"),
        (lora_B, keys["B"], f"({target.out_features}, rank)"),
    ):
        fixed = (info.shape[1:], (target.in_features,)) if info is lora_A else (info.shape[:1], (target.out_features,))
        if len(info.shape) != 2 or fixed[0] != fixed[1]:
            raise LoraError(
                f"LoRA '{file.name}': '{key}' is {info.shape}, expected {expected}: this file is for a model of "
                f"another size or kind{_hint(file)}."
            )
        if info.dtype not in FLOAT_DTYPES:
            raise LoraError(f"LoRA '{file.name}': '{key}' is stored as {info.dtype}, expected a float type.")
    rank = lora_A.shape[0]
    if rank < 1 or lora_B.shape[1] != rank:
        raise LoraError(
            f"LoRA '{file.name}': '{keys['A']}' has rank {rank}, '{keys['B']}' has rank {lora_B.shape[1]}; they must "
            "be equal and at least 1. The file is damaged: get it again."
        )
    _check_alpha(file, keys)
    return _Pair(target, keys, rank)


def _check_alpha(file: TensorFile, keys: Mapping[str, str]) -> None:
    alpha: TensorInfo | None = file.tensors.get(keys.get("alpha", ""))
    if alpha is not None and alpha.numel != 1:
        raise LoraError(f"LoRA '{file.name}': '{keys['alpha']}' has shape {alpha.shape}, expected one number.")


def _read_pair(file: TensorFile, handle, pair: _Pair) -> list[LoraLayer]:
    lora_A, lora_B = (_read_finite(file, handle, pair.keys[role]) for role in "AB")
    scale = 1.0
    if "alpha" in pair.keys:
        alpha = float(_read_finite(file, handle, pair.keys["alpha"]))
        scale = alpha / pair.rank
    return split(pair.target, lora_A, lora_B, scale)


def _read_finite(file: TensorFile, handle, key: str) -> Tensor:
    # A copy: the handle's tensors map the file, and a mapped file that shrinks kills the process.
    tensor = handle.get_tensor(key).clone()
    check_finite(f"'{file.name}': '{key}'", tensor)
    return tensor


def _hint(file: TensorFile) -> str:
    for prefix, model in OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in file.tensors):
            return f" ({model} by its names)"
    return ""


def _kind(key: str) -> str:
    for part, kind in OTHER_KINDS.items():
        if part in key:
            return f" ({kind}, which is not supported)"
    return ""


def _unknown_message(
    file: TensorFile, spec: ModelSpec, unknown: list[str], some_fit: bool, text_encoder: list[str]
) -> str:
    model = spec.family.name
    if not unknown:
        return (
            f"LoRA '{file.name}' changes only text encoders ({len(text_encoder)} keys), expected keys for a {model} "
            "transformer. Load it with ComfyUI's Load LoRA node on the CLIP."
        )
    first = f"'{unknown[0]}'{_kind(unknown[0])}"
    if some_fit:
        return (
            f"LoRA '{file.name}': {len(unknown)} of {len(file.tensors)} keys have no place in this {model} model, such "
            f"as {first}. Applying only the rest would not be this LoRA: choose a file without "
            f"them{_hint(file)}."
        )
    return (
        f"LoRA '{file.name}' does not fit {model}{_hint(file)}: none of its {len(file.tensors)} keys has a place in "
        f"the model, such as {first}. Expected names like lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, "
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight or "
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight."
    )
