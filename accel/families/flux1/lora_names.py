"""By which names LoRA files call the linears and norms of FLUX.1.

What may stand before such a name, and whether it has dots or underscores, is the same for all models: see
`lora.read.names`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..base import LoraNames
from ..layout import FusedLinear, Layout, LinearPart, LoraTarget, VectorWeight
from ..streams.layout import diffusers_block
from ..wording import KnownKeys
from .config import DEPTH, DEPTH_SINGLE, Flux1Config
from .layout import checkpoint_layout

# XLabs-AI/x-flux names a LoRA by its place in the attention processor: 1 is the image stream, 2 the text stream.
XLABS = {
    ".img_attn.qkv": ".processor.qkv_lora1",
    ".txt_attn.qkv": ".processor.qkv_lora2",
    ".img_attn.proj": ".processor.proj_lora1",
    ".txt_attn.proj": ".processor.proj_lora2",
    ".linear2": ".processor.proj_lora",
}
# Other names for diffusers' modules that LyCORIS files have (ComfyUI, comfy/utils.py, flux_to_diffusers).
LYCORIS = {
    ".ff.net.0.proj": ".ff.linear_in",
    ".ff.net.2": ".ff.linear_out",
    ".ff_context.net.0.proj": ".ff_context.linear_in",
    ".ff_context.net.2": ".ff_context.linear_out",
}
# Ends of fused linears -> what they are called in diffusers' blocks where they stay fused.
FUSED_DIFFUSERS = {
    ".img_attn.qkv": ".attn.to_qkv",
    ".txt_attn.qkv": ".attn.to_added_qkv",
    ".linear1": ".attn.to_qkv_mlp_proj",
    ".linear2": ".attn.to_out",
}

# No name that a LoRA of FLUX.1 is read by has one of these.
RELATIVES = (
    KnownKeys(r"^oft_unet_", "FLUX.1, sd-scripts' OFT, which no loader reads"),
    KnownKeys(r"\.mlp_(context_)?fc[12]\.", "FLUX.1, converted for Nunchaku: get the file that it was made of"),
    KnownKeys(r"processor\.q_loras\.", "FLUX.1, EasyControl"),
    KnownKeys(r"distilled_guidance_layer", "Chroma"),
    KnownKeys(r"double_stream_modulation_|single_stream_modulation|time_guidance_embed", "FLUX.2"),
    KnownKeys(r"transformer_blocks[._]\d+[._](img|txt)_mod[._]1", "Qwen-Image"),
    KnownKeys(
        r"_mlp[._]fc[12]\b|\.(img|txt)_attn_(qkv|proj)\b|_mod[._]linear\b|modulation[._]linear\b", "HunyuanVideo"
    ),
    KnownKeys(
        r"(double_blocks[._]19|single_(transformer_)?blocks[._]3[89])[._]", "a model of more blocks, as HunyuanVideo"
    ),
)


def lora_names(config: Flux1Config) -> LoraNames:
    """Every name that a model of these sizes is known by in LoRA files."""
    layout = checkpoint_layout(config)
    return LoraNames(lora_linears(layout), lora_norms(layout), lora_absent(config))


def lora_linears(layout: Layout) -> dict[str, LoraTarget]:
    """Module name -> the linears that it means.

    Original names, where a fused linear is one module (black-forest-labs, sd-scripts, ComfyUI, ai-toolkit):
        `double_blocks.0.img_attn.qkv`, `single_blocks.0.linear1`; `img_in.proj` in OneTrainer's OMI format;
        `double_blocks.0.processor.qkv_lora1` XLabs.
    Original names with q, k, v and the MLP apart:
        `double_blocks.0.img_attn.qkv.0` OneTrainer (OMI), `single_blocks.0.linear1_qkv` ComfyUI.
    diffusers' names, where it is split (diffusers, PEFT, SimpleTuner, OneTrainer, DiffSynth, LyCORIS):
        `transformer_blocks.0.attn.to_q`; `transformer_blocks.0.ff.linear_in` LyCORIS.
    diffusers' names of layers that stay fused:
        `transformer_blocks.0.attn.to_qkv` SimpleTuner,
        `single_transformer_blocks.0.attn.to_qkv_mlp_proj` as FLUX.2's are called.
    """
    names: dict[str, LoraTarget] = {}
    for linear in layout.linears:
        whole = LoraTarget.whole(linear)
        names[linear.name] = whole
        names |= dict.fromkeys(_renamed(linear.name, XLABS), whole)
        names |= dict.fromkeys(_renamed(diffusers_block(linear.name), FUSED_DIFFUSERS), whole)
        for index, part in enumerate(linear.parts):
            # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
            rows = (LinearPart(part.module, 0, part.rows),)
            alone = LoraTarget(rows, linear.in_features, part.rows, False, linear.bias, linear.narrow_in_features)
            names[part.module] = alone
            names |= dict.fromkeys(_renamed(part.module, LYCORIS), alone)
            if len(linear.parts) > 1:
                names[f"{linear.name}.{index}"] = alone
        if linear.name == "img_in":
            names["img_in.proj"] = whole
        if linear.name.endswith(".linear1"):
            block = linear.name.removesuffix("linear1")
            qkv = _attention(linear)
            names[f"{block}processor.qkv_lora"] = names[f"{block}linear1_qkv"] = qkv
            names[f"{diffusers_block(block)}attn.to_qkv"] = qkv
    return names


def lora_norms(layout: Layout) -> dict[str, VectorWeight]:
    """Name of a norm -> its scale: original names without the `.scale` at their end, and diffusers' names."""
    norms: dict[str, VectorWeight] = {}
    for vector in layout.vectors:
        norms[vector.name.removesuffix(".scale")] = norms[vector.parameter.removesuffix(".weight")] = vector
    return norms


def lora_absent(config: Flux1Config) -> dict[str, str]:
    """Names of linears and norms that other models of the family have and this one lacks -> what to say of their keys.

    Blocks count up to FLUX.1-dev's number: more of them are in other models, HunyuanVideo for one, whose layers are
    named alike and as wide.
    """
    absent: dict[str, str] = {}
    own = _names(config)
    if not config.guidance:
        more = _names(replace(config, guidance=True)) - own
        absent |= dict.fromkeys(more, "of the guidance embedder, which FLUX.1-schnell does not have")
    for field, full, kind in (("depth", DEPTH, "double"), ("depth_single", DEPTH_SINGLE, "single")):
        count = getattr(config, field)
        if count < full:
            more = _names(replace(config, **{field: full})) - own
            absent |= dict.fromkeys(more, f"of {kind} blocks beyond the {count} that this model has")
    return absent


def _names(config: Flux1Config) -> set[str]:
    layout = checkpoint_layout(config)
    return {*lora_linears(layout), *lora_norms(layout)}


def _renamed(name: str, ends: dict[str, str]) -> Iterator[str]:
    for end, other in ends.items():
        if name.endswith(end):
            yield name.removesuffix(end) + other


def _attention(linear1: FusedLinear) -> LoraTarget:
    """The q, k and v rows of a single block's first linear, without its MLP."""
    parts = linear1.parts[:3]
    return LoraTarget(parts, linear1.in_features, sum(part.rows for part in parts), False, linear1.bias)
