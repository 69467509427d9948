"""By which names LoRA files call the linears of FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator

from ...layout import FusedLinear, Layout, LinearPart, LoraTarget


def lora_aliases(layout: Layout) -> dict[str, LoraTarget]:
    """Module name as written in LoRA files -> the linears that it means.

    Three conventions, each over every linear of the model:
        `lora_unet_double_blocks_0_img_attn_qkv` (kohya-ss/sd-scripts: original names, underscores, fused),
        `diffusion_model.double_blocks.0.img_attn.qkv` (ComfyUI and BFL: original names, fused),
        `transformer.transformer_blocks.0.attn.to_q` (diffusers and PEFT: diffusers' names, split).
    """
    aliases: dict[str, LoraTarget] = {}
    for linear in layout.linears:
        fused = LoraTarget(linear.parts, linear.in_features, linear.out_features, linear.swap_halves)
        aliases[f"lora_unet_{linear.name.replace('.', '_')}"] = fused
        aliases[f"diffusion_model.{linear.name}"] = fused
        for part, alone in _split(linear):
            aliases[f"transformer.{part.module}"] = alone
    return aliases


def _split(linear: FusedLinear) -> Iterator[tuple[LinearPart, LoraTarget]]:
    # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
    for part in linear.parts:
        yield part, LoraTarget((LinearPart(part.module, 0, part.rows),), linear.in_features, part.rows, False)
