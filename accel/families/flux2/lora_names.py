"""By which names LoRA files call the linears and norms of FLUX.2.

What may stand before such a name, and whether it has dots or underscores, is the same for all models: see
`lora.read.names`.
"""

from __future__ import annotations

from ..base import LoraNames
from ..layout import Layout, LinearPart, LoraTarget
from ..streams.layout import diffusers_block
from ..streams.lora_names import attention_rows, lora_absent, lora_norms, renamed
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
    """Every name that a model of these sizes is known by in LoRA files.

    Blocks count up to the number of the published model that is as wide: more of them are in FLUX.1, whose layers are
    named alike, and in part as large. Of a width in which nothing is published, up to the largest model's number.
    """
    depths = DEPTHS.get(config.hidden_size, max(DEPTHS.values()))
    layout = checkpoint_layout(config)
    return LoraNames(lora_linears(layout), lora_norms(layout), lora_absent(config, _names, depths, "FLUX.2 klein"))


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
        names |= dict.fromkeys(renamed(diffusers_block(linear.name), FUSED_DIFFUSERS), whole)
        for index, part in enumerate(linear.parts):
            # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
            rows = (LinearPart(part.module, 0, part.rows),)
            alone = LoraTarget(rows, linear.in_features, part.rows, False, linear.bias)
            names[part.module] = alone
            if part.module.startswith("single_"):
                names |= dict.fromkeys(renamed(part.module, SINGLE_PARTS), alone)
            if part.module.startswith(EMBEDDERS[0]):
                names[part.module.replace(*EMBEDDERS)] = alone
            if len(linear.parts) > 1:
                names[f"{linear.name}.{index}"] = alone
        if linear.name.endswith(".linear1"):
            qkv = attention_rows(linear)
            names[f"{linear.name}_qkv"] = qkv
            names[f"{diffusers_block(linear.name.removesuffix('linear1'))}attn.to_qkv"] = qkv
    return names


def _names(config: Flux2Config) -> set[str]:
    layout = checkpoint_layout(config)
    return {*lora_linears(layout), *lora_norms(layout)}
