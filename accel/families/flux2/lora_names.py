"""By which names LoRA files call the linears and norms of FLUX.2.

What may stand before such a name, and whether it has dots or underscores, is the same for all models: see
`lora.read.names`.
"""

from __future__ import annotations

from dataclasses import replace

from ..base import LoraNames
from ..layout import Layout, LinearPart, LoraTarget, VectorWeight
from ..streams.layout import diffusers_block
from .config import DEPTHS, Flux2Config
from .layout import checkpoint_layout

# Ends of fused linears -> what they are called in diffusers' blocks where they stay fused.
FUSED_DIFFUSERS = {
    ".img_attn.qkv": ".attn.to_qkv",
    ".txt_attn.qkv": ".attn.to_added_qkv",
    ".linear1": ".attn.to_qkv_mlp_proj",
}
# Modules that LoRAs for a part of a single block's first linear name as FLUX.1's.
SINGLE_PARTS = {".attn.to_mlp": ".proj_mlp", ".attn.to_out": ".proj_out"}
# diffusers' names of the embedders as ComfyUI has them, which are FLUX.1's.
EMBEDDERS = ("time_guidance_embed.", "time_text_embed.")


def lora_names(config: Flux2Config) -> LoraNames:
    """Every name that a model of these sizes is known by in LoRA files."""
    layout = checkpoint_layout(config)
    return LoraNames(lora_linears(layout), lora_norms(layout), lora_absent(config))


def lora_linears(layout: Layout) -> dict[str, LoraTarget]:
    """Module name -> the linears that it means.

    Original names, where a fused linear is one module (black-forest-labs, ComfyUI, musubi, ai-toolkit):
        `double_blocks.0.img_attn.qkv`, `single_blocks.0.linear1`, `double_stream_modulation_img.lin`.
    Original names with a part of a fused linear:
        `single_blocks.0.linear1_qkv` ComfyUI, `double_blocks.0.img_attn.qkv.0`.
    diffusers' names (diffusers, PEFT, SimpleTuner, OneTrainer, DiffSynth, LyCORIS):
        `transformer_blocks.0.attn.to_q`, `single_transformer_blocks.0.attn.to_qkv_mlp_proj`,
        `double_stream_modulation_img.linear`, `time_guidance_embed.timestep_embedder.linear_1`.
    diffusers' names with what it keeps apart fused, or what it keeps fused apart, as in FLUX.1:
        `transformer_blocks.0.attn.to_qkv`, `single_transformer_blocks.0.attn.to_q`,
        `single_transformer_blocks.0.proj_mlp`.
    """
    names: dict[str, LoraTarget] = {}
    for linear in layout.linears:
        whole = LoraTarget.whole(linear)
        names[linear.name] = whole
        for end, fused in FUSED_DIFFUSERS.items():
            if linear.name.endswith(end):
                names[diffusers_block(linear.name.removesuffix(end)) + fused] = whole
        for index, part in enumerate(linear.parts):
            # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
            rows = (LinearPart(part.module, 0, part.rows),)
            alone = LoraTarget(rows, linear.in_features, part.rows, False, linear.bias)
            names[part.module] = alone
            for end, other in SINGLE_PARTS.items():
                if part.module.startswith("single_") and part.module.endswith(end):
                    names[part.module.removesuffix(end) + other] = alone
            if part.module.startswith(EMBEDDERS[0]):
                names[part.module.replace(*EMBEDDERS)] = alone
            if len(linear.parts) > 1:
                names[f"{linear.name}.{index}"] = alone
        if linear.name.endswith(".linear1"):
            parts = linear.parts[:3]
            qkv = LoraTarget(parts, linear.in_features, sum(part.rows for part in parts), False, linear.bias)
            names[f"{linear.name}_qkv"] = qkv
            names[f"{diffusers_block(linear.name.removesuffix('linear1'))}attn.to_qkv"] = qkv
    return names


def lora_norms(layout: Layout) -> dict[str, VectorWeight]:
    """Name of a norm -> its scale: original names without the `.scale` at their end, and diffusers' names."""
    norms: dict[str, VectorWeight] = {}
    for vector in layout.vectors:
        norms[vector.name.removesuffix(".scale")] = norms[vector.parameter.removesuffix(".weight")] = vector
    return norms


def lora_absent(config: Flux2Config) -> dict[str, str]:
    """Names of linears and norms that other models of the family have and this one lacks -> what to say of their keys.

    Blocks count up to the number of the published model that is as wide: more of them are in FLUX.1, whose layers are
    named alike, and in part as large. Of a width in which nothing is published, up to the largest model's number.
    """
    absent: dict[str, str] = {}
    own = _names(config)
    if not config.guidance:
        more = _names(replace(config, guidance=True)) - own
        absent |= dict.fromkeys(more, "of the guidance embedder, which FLUX.2 klein does not have")
    depth, depth_single = DEPTHS.get(config.hidden_size, max(DEPTHS.values()))
    for field, full, kind in (("depth", depth, "double"), ("depth_single", depth_single, "single")):
        count = getattr(config, field)
        if count < full:
            more = _names(replace(config, **{field: full})) - own
            absent |= dict.fromkeys(more, f"of {kind} blocks beyond the {count} that this model has")
    return absent


def _names(config: Flux2Config) -> set[str]:
    layout = checkpoint_layout(config)
    return {*lora_linears(layout), *lora_norms(layout)}
