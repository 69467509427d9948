"""What messages say of FLUX.1, and what is often taken for it."""

from __future__ import annotations

from ..wording import STOCK_MODEL, KnownNames, Wording

WORDING = Wording(
    runs="FLUX.1 (dev, schnell, Krea, Kontext, Fill, Canny, Depth)",
    layouts="the original layout (double_blocks.*, single_blocks.*) or in diffusers' (transformer_blocks.*, "
    "single_transformer_blocks.*)",
    example="flux1-dev.safetensors",
    example_gguf="flux1-dev-Q8_0.gguf",
    lora_keys=(
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    ),
    author="Black Forest Labs",
)
# These share block names with FLUX.1, which has none of the names here. They are those that ComfyUI's
# model_detection.py and diffusers' conversion scripts tell these models by.
RELATIVES = (
    KnownNames(r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.", "a FLUX.2 checkpoint", STOCK_MODEL),
    KnownNames(r"distilled_guidance_layer\.", "a Chroma checkpoint", STOCK_MODEL),
    KnownNames(
        r"(txt_in\.individual_token|context_embedder\.token)_refiner\.", "a HunyuanVideo checkpoint", STOCK_MODEL
    ),
    KnownNames(r"double_blocks\.0\.img_mlp\.gate_proj\.", "an Ovis-Image checkpoint", STOCK_MODEL),
    KnownNames(r"(transformer_blocks\.0\.img_mod\.1\.|txt_norm\.weight)", "a Qwen-Image checkpoint", STOCK_MODEL),
    KnownNames(r"(controlnet_|input_hint_block\.)", "a ControlNet", "ComfyUI's own Load ControlNet Model"),
    KnownNames(r"double_blocks\.\d+\.processor\.", "an IP-Adapter", "the node pack that it was made for"),
)
