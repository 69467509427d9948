"""By which names LoRA files call the linears and norms of FLUX.1.

What may stand before such a name, and whether it has dots or underscores, is the same for all models: see
`lora.read.names`.
"""

from __future__ import annotations

from ..base import LoraNames
from ..layout import Layout, LinearPart, LoraTarget
from ..streams.layout import diffusers_block
from ..streams.lora_names import attention_rows, lora_absent, lora_norms, renamed
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
    """Every name that a model of these sizes is known by in LoRA files.

    Blocks count up to FLUX.1-dev's number: more of them are in other models, HunyuanVideo for one, whose layers are
    named alike and as wide.
    """
    layout = checkpoint_layout(config)
    absent = lora_absent(config, _names, (DEPTH, DEPTH_SINGLE), "FLUX.1-schnell")
    return LoraNames(lora_linears(layout), lora_norms(layout), absent)


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
        names |= dict.fromkeys(renamed(linear.name, XLABS), whole)
        names |= dict.fromkeys(renamed(diffusers_block(linear.name), FUSED_DIFFUSERS), whole)
        for index, part in enumerate(linear.parts):
            # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
            rows = (LinearPart(part.module, 0, part.rows),)
            alone = LoraTarget(rows, linear.in_features, part.rows, False, linear.bias, linear.narrow_in_features)
            names[part.module] = alone
            names |= dict.fromkeys(renamed(part.module, LYCORIS), alone)
            if len(linear.parts) > 1:
                names[f"{linear.name}.{index}"] = alone
        if linear.name == "img_in":
            names["img_in.proj"] = whole
        if linear.name.endswith(".linear1"):
            block = linear.name.removesuffix("linear1")
            qkv = attention_rows(linear)
            names[f"{block}processor.qkv_lora"] = names[f"{block}linear1_qkv"] = qkv
            names[f"{diffusers_block(block)}attn.to_qkv"] = qkv
    return names


def _names(config: Flux1Config) -> set[str]:
    layout = checkpoint_layout(config)
    return {*lora_linears(layout), *lora_norms(layout)}
