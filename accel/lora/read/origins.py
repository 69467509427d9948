"""Where a LoRA file comes from, by its names and its trainer's own note: for messages only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...families.base import Family
from ...families.layout import Layout
from ...families.wording import KnownKeys
from ...files import TensorFile
from ...spec import ModelSpec

# Signs in a file's metadata that a trainer wrote it.
TRAINERS = (("ai-toolkit", '"ai-toolkit"'), ("OneTrainer", "OneTrainer"), ("SimpleTuner", "SimpleTuner"))
# Parts of keys that LoRAs for other models carry; what is easily taken for a family's is in its `lora_relatives`.
OTHERS: Sequence[KnownKeys] = (
    KnownKeys(r"lora_unet_(input|middle|output)_blocks?_", "Stable Diffusion XL"),
    KnownKeys(r"lora_unet_(down|mid|up)_blocks?_|^unet\.(down|mid|up)_blocks?\.", "Stable Diffusion 1.5 or XL"),
    KnownKeys(r"joint_blocks[._]\d", "Stable Diffusion 3"),
    KnownKeys(r"diffusion_model\.blocks\.|lora_unet_+blocks_", "Wan"),
    KnownKeys(r"diffusion_model\.layers\.|lora_unet_layers_", "Z-Image or Lumina"),
)


def name_format(file: TensorFile, spec: ModelSpec) -> str:
    """The format of a file as a person knows it, from the trainer's own note in it or from its names."""
    for trainer, sign in TRAINERS:
        if any(sign in value for value in file.metadata.values()):
            return trainer
    formats = _formats(spec.layout, spec.family.wording.author)
    return next((name for start, name in formats if _any(re.compile(start).match, file.tensors)), "other names")


def origin(keys: Iterable[str], family: Family) -> str | None:
    """What other model or program's format keys belong to that are not this family's; None: not known."""
    keys = tuple(keys)
    known = (*family.lora_relatives, *OTHERS)
    return next((what for part, what in known if _any(re.compile(part).search, keys)), None)


def _formats(layout: Layout, author: str) -> Sequence[tuple[str, str]]:
    """How a key begins -> the format as a person knows it. A trainer is named where no other spells names so."""
    inside = (linear.name for linear in layout.linears if layout.block_of(linear.parts[0].module) is not None)
    original, diffusers = _alternatives(inside), _alternatives(layout.blocks)
    return (
        (r"lycoris_", "LyCORIS"),
        (r"lora_transformer_", "OneTrainer"),
        (rf"lora_unet_{diffusers}_", "diffusers' names in sd-scripts' spelling"),
        (r"lora_unet_", "Kohya sd-scripts"),
        (r"(.*\.)?processor\.(qkv|proj)_lora", "XLabs"),
        (r"(.*\.)?base_model\.model\.", "PEFT"),
        (rf"diffusion_model\.{diffusers}\.", "diffusers' names behind ComfyUI's prefix"),
        (r"diffusion_model\.", "ComfyUI"),
        (rf"transformer\.{original}\..*\.\d\.(lora_down|lora_up|alpha)", "OneTrainer"),
        (rf"transformer\.{original}\.", f"{author}' names behind diffusers' prefix"),
        (r"transformer\.", "diffusers / PEFT"),
        (rf"{original}\.", author),
        (rf"{diffusers}\..*\.lora_[AB]\.default\.", "DiffSynth"),
        (rf"{diffusers}\.", "diffusers without a prefix"),
    )


def _alternatives(names: Iterable[str]) -> str:
    """A pattern for what stands before a block's number in any of the names: `(double_blocks|single_blocks)`."""
    kinds = dict.fromkeys(re.split(r"\.\d", name)[0] for name in names)
    return f"({'|'.join(map(re.escape, kinds))})"


def _any(finds, keys: Iterable[str]) -> bool:
    return any(finds(key) for key in keys)
