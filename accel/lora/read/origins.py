"""Where a LoRA file comes from, by its names and its trainer's own note: for messages only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...files import TensorFile

# Signs in a file's metadata that a trainer wrote it.
TRAINERS = (("ai-toolkit", '"ai-toolkit"'), ("OneTrainer", "OneTrainer"), ("SimpleTuner", "SimpleTuner"))
# How a key begins -> the format as a person knows it. A trainer is named where no other spells names so.
FORMATS: Sequence[tuple[str, str]] = (
    (r"lycoris_", "LyCORIS"),
    (r"lora_transformer_", "OneTrainer"),
    (r"lora_unet_(single_)?transformer_blocks_", "diffusers' names in sd-scripts' spelling"),
    (r"lora_unet_", "Kohya sd-scripts"),
    (r"(.*\.)?processor\.(qkv|proj)_lora", "XLabs"),
    (r"(.*\.)?base_model\.model\.", "PEFT"),
    (r"diffusion_model\.(single_)?transformer_blocks\.", "diffusers' names behind ComfyUI's prefix"),
    (r"diffusion_model\.", "ComfyUI"),
    (r"transformer\.(double|single)_blocks\..*\.\d\.(lora_down|lora_up|alpha)", "OneTrainer"),
    (r"transformer\.(double|single)_blocks\.", "Black Forest Labs' names behind diffusers' prefix"),
    (r"transformer\.", "diffusers / PEFT"),
    (r"(double|single)_blocks\.", "Black Forest Labs"),
    (r"(single_)?transformer_blocks\..*\.lora_[AB]\.default\.", "DiffSynth"),
    (r"(single_)?transformer_blocks\.", "diffusers without a prefix"),
)
# Parts of names that LoRAs for other models or in other programs' own formats carry -> what that is. No name that a
# LoRA of FLUX.1 is read by has one of them.
ORIGINS: Sequence[tuple[str, str]] = (
    (r"^oft_unet_", "FLUX.1, sd-scripts' OFT, which no loader reads"),
    (r"\.mlp_(context_)?fc[12]\.", "FLUX.1, converted for Nunchaku: get the file that it was made of"),
    (r"processor\.q_loras\.", "FLUX.1, EasyControl"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"double_stream_modulation_", "FLUX.2"),
    (r"transformer_blocks[._]\d+[._](img|txt)_mod[._]1", "Qwen-Image"),
    (r"_mlp[._]fc[12]\b|\.(img|txt)_attn_(qkv|proj)\b|_mod[._]linear\b|modulation[._]linear\b", "HunyuanVideo"),
    (r"lora_unet_(input|middle|output)_blocks?_", "Stable Diffusion XL"),
    (r"lora_unet_(down|mid|up)_blocks?_|^unet\.(down|mid|up)_blocks?\.", "Stable Diffusion 1.5 or XL"),
    (r"joint_blocks[._]\d", "Stable Diffusion 3"),
    (r"diffusion_model\.blocks\.|lora_unet_+blocks_", "Wan"),
    (r"diffusion_model\.layers\.|lora_unet_layers_", "Z-Image or Lumina"),
    (r"(double_blocks[._]19|single_(transformer_)?blocks[._]3[89])[._]", "a model of more blocks, as HunyuanVideo"),
)


def name_format(file: TensorFile) -> str:
    """The format of a file as a person knows it, from the trainer's own note in it or from its names."""
    for trainer, sign in TRAINERS:
        if any(sign in value for value in file.metadata.values()):
            return trainer
    return next((name for start, name in FORMATS if _any(re.compile(start).match, file.tensors)), "other names")


def origin(keys: Iterable[str]) -> str | None:
    """What other model or program's format keys belong to; None: not known."""
    keys = tuple(keys)
    return next((what for part, what in ORIGINS if _any(re.compile(part).search, keys)), None)


def _any(finds, keys: Iterable[str]) -> bool:
    return any(finds(key) for key in keys)
