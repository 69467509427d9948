"""What else a user may choose by mistake, by the names of its tensors: for messages only.

What shares names with a family is in that family's `relatives`. The names are those that ComfyUI's model_detection.py
and diffusers' conversion scripts tell these models by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..families.wording import STOCK_CHECKPOINT, STOCK_MODEL, KnownNames

TEXT_ENCODER = "Flux Text Encoder Loader"

OTHERS: Sequence[KnownNames] = tuple(KnownNames(*entry) for entry in (
    (r"(cap_embedder\.|noise_refiner\.0\.)", "a Z-Image or Lumina 2 checkpoint", STOCK_MODEL),
    (r"(head\.modulation|condition_embedder\.time_embedder\.)", "a Wan checkpoint", STOCK_MODEL),
    (r"adaln_single\.emb\.", "an LTX-Video or PixArt checkpoint", STOCK_MODEL),
    (r"(joint_blocks\.0\.|pos_embed\.proj\.)", "an SD3 checkpoint", STOCK_MODEL),
    (r"caption_projection\.0\.linear\.", "a HiDream checkpoint", STOCK_MODEL),
    (r"(double_layers\.0\.|joint_transformer_blocks\.0\.)", "an AuraFlow checkpoint", STOCK_MODEL),
    (r"t5_yproj\.", "a Mochi checkpoint", STOCK_MODEL),
    (r"visual_transformer_blocks\.0\.", "a Kandinsky 5 checkpoint", STOCK_MODEL),
    (r"txtfusion\.projector\.", "a Krea 2 checkpoint", STOCK_MODEL),
    (r"(input_blocks\.0\.|label_emb\.|conditioner\.|cond_stage_model\.)", "a Stable Diffusion or SDXL checkpoint",
     STOCK_CHECKPOINT),
    (r"(down_blocks\.0\.|mid_block\.)", "a Stable Diffusion or SDXL UNet", STOCK_MODEL),
    (r"(vision_model\.|redux_)", "an image encoder or a Redux model", "Load CLIP Vision or Load Style Model"),
    (r"((encoder|decoder)\.(conv_in|mid)\.|first_stage_model\.|taesd_)", "a VAE", "ComfyUI's own Load VAE"),
    (r"((encoder|enc)\.(block|blk)\.\d|shared\.weight)", "a T5 text encoder", TEXT_ENCODER),
    (r"(text_model\.|text_projection|transformer\.resblocks\.)", "a CLIP text encoder", TEXT_ENCODER),
    (r"(model\.layers\.\d+\.|blk\.\d+\.)", "a language model", TEXT_ENCODER),
))  # fmt: skip

LORA = re.compile(r"(^lora_(unet|te)|\.lora_[AB]\.|\.lora_(down|up)\.|\.(lokr_w1|hada_w1_a|dora_scale)|_lora[12]?\.)")

# Weights that only their own library reads, by the end of a name.
FOREIGN_QUANTIZATION: Sequence[tuple[str, str]] = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes FP4"),
    (".weight.absmax", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes 8-bit"),
    (".qweight", "SVDQuant (Nunchaku)"),
    (".wscales", "SVDQuant (Nunchaku)"),
    (".weight._data", "optimum-quanto"),
    (".weight_packed", "compressed-tensors"),
)


def first_match(table: Sequence[KnownNames], names: Iterable[str]) -> KnownNames | None:
    """The first entry of a table that any of the names begins with."""
    names = tuple(names)
    for known in table:
        matches = re.compile(known.pattern).match
        if any(matches(name) for name in names):
            return known
    return None


def is_lora(names: Iterable[str]) -> bool:
    """Whether a LoRA has such names."""
    return any(LORA.search(name) for name in names)


def foreign_quantization(names: Iterable[str]) -> tuple[str, str] | None:
    """A quantization that only its own library reads, and a name that shows it."""
    for name in names:
        for suffix, what in FOREIGN_QUANTIZATION:
            if name.endswith(suffix):
                return what, name
    return None
