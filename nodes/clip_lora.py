"""The text-encoder part of a LoRA, put on a CLIP by ComfyUI's own patcher, with a word on every key.

ComfyUI's own loader passes over names that it does not know, and over matrices of another size: here each key is
applied, or named with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.lora
from torch import Tensor, nn

from ..accel.files import open_tensors, read_header
from ..accel.lora.kinds import KINDS
from ..accel.lora.read.text_encoders import EncoderKeys, EncoderNames, sort_encoder_keys

# Roles of what ComfyUI adds to a bias.
OF_BIAS = ("diff_b", "b_norm")


def patch_clip(clip: Any, path: str, keys: Sequence[str], strength: float) -> tuple[Any, EncoderKeys]:
    """A clone of a CLIP with a LoRA on it.

    Args:
        clip: any of ComfyUI's; only the clone changes.
        path: the LoRA file.
        keys: of its tensors, the ones for text encoders.
        strength: of the LoRA.

    Returns:
        The clone, and what became of the keys.

    Raises:
        FileError: the file is gone or damaged.
    """
    file, model = read_header(path), clip.cond_stage_model
    known = comfy.lora.model_lora_keys_clip(model, {})
    names = EncoderNames(model.state_dict())
    found = sort_encoder_keys(file.tensors, keys, names, known, lambda weight: _size(model, weight))
    lora: dict[str, Tensor] = {}
    with open_tensors(file) as handle:
        for weight, roles in found.layers.items():
            for role, key in roles.items():
                # A copy: what a CLIP keeps must not map a file that someone may replace.
                lora[weight.removesuffix(".weight") + KINDS.comfyui_endings[role]] = handle.get_tensor(key).clone()
    patches = comfy.lora.load_lora(lora, {weight.removesuffix(".weight"): weight for weight in found.layers})
    patched = clip.clone()
    taken = set(patched.add_patches(patches, strength))
    lost = [weight for weight, roles in found.layers.items() if not _targets(weight, roles) <= taken]
    return patched, found.without(lost, "ComfyUI made nothing of them")


def _targets(weight: str, roles: Sequence[str]) -> set[str]:
    """The parameters that a layer's tensors change."""
    of_bias = {role for role in roles if role in OF_BIAS}
    bias = {f"{weight.removesuffix('.weight')}.bias"} if of_bias else set()
    return bias | ({weight} if set(roles) - of_bias else set())


def _size(model: nn.Module, weight: str) -> tuple[int, int] | None:
    """Rows and columns of a linear, which a quantized weight itself does not tell."""
    layer = model.get_submodule(weight.removesuffix(".weight"))
    size = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return None if None in size else size
