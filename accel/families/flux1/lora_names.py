"""By which names LoRA files call the linears of FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator

from ...layout import FusedLinear, Layout, LinearPart, LoraTarget

# XLabs-AI/x-flux names a LoRA by its place in the attention processor: 1 is the image stream, 2 the text stream.
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}


def lora_aliases(layout: Layout) -> dict[str, LoraTarget]:
    """Module name as written in LoRA files -> the linears that it means.

    Original names, where a fused linear is one module:
        `lora_unet_double_blocks_0_img_attn_qkv` kohya-ss/sd-scripts,
        `diffusion_model.double_blocks.0.img_attn.qkv` ComfyUI, ai-toolkit,
        `double_blocks.0.img_attn.qkv` black-forest-labs,
        `base_model.model.double_blocks.0.img_attn.qkv` fal's Kontext trainer,
        `double_blocks.0.processor.qkv_lora1` XLabs.
    diffusers' names, where it is split:
        `transformer.transformer_blocks.0.attn.to_q` diffusers, PEFT, ai-toolkit, SimpleTuner,
        `transformer_blocks.0.attn.to_q` DiffSynth,
        `lora_transformer_transformer_blocks_0_attn_to_q` OneTrainer,
        `lycoris_transformer_blocks_0_attn_to_q` LyCORIS in SimpleTuner.
    """
    aliases: dict[str, LoraTarget] = {}
    for linear in layout.linears:
        fused = LoraTarget(linear.parts, linear.in_features, linear.out_features, linear.swap_halves)
        for name in _original_names(linear.name):
            aliases[name] = fused
        for part, alone in _split(linear):
            for name in _diffusers_names(part.module):
                aliases[name] = alone
        if linear.name.endswith(".linear1"):
            block = linear.name.removesuffix("linear1")
            aliases[f"{block}processor.qkv_lora"] = aliases[f"diffusion_model.{block}linear1_qkv"] = _attention(linear)
    return aliases


def _original_names(name: str) -> Iterator[str]:
    underscored = name.replace(".", "_")
    yield from (f"lora_unet_{underscored}", f"diffusion_model.{name}", name, f"base_model.model.{name}")
    for suffix, xlabs in XLABS.items():
        if name.endswith(f".{suffix}"):
            yield name.removesuffix(suffix) + xlabs


def _diffusers_names(module: str) -> tuple[str, ...]:
    underscored = module.replace(".", "_")
    return f"transformer.{module}", module, f"lora_transformer_{underscored}", f"lycoris_{underscored}"


def _split(linear: FusedLinear) -> Iterator[tuple[LinearPart, LoraTarget]]:
    # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
    for part in linear.parts:
        yield part, LoraTarget((LinearPart(part.module, 0, part.rows),), linear.in_features, part.rows, False)


def _attention(linear1: FusedLinear) -> LoraTarget:
    """The q, k and v rows of a single block's first linear, without its MLP."""
    parts = linear1.parts[:3]
    return LoraTarget(parts, linear1.in_features, sum(part.rows for part in parts), False)
