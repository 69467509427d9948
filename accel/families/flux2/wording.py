"""What messages say of FLUX.2, and what is often taken for it."""

from __future__ import annotations

from ..wording import KnownKeys, Wording

WORDING = Wording(
    runs="FLUX.2 (dev, klein 9B, klein 4B)",
    layouts="the original layout (double_blocks.*, double_stream_modulation_img.lin) or in diffusers' "
    "(transformer_blocks.*, double_stream_modulation_img.linear)",
    example="flux-2-klein-4b.safetensors",
    example_gguf="flux-2-klein-4b-Q8_0.gguf",
    lora_keys=(
        "diffusion_model.single_blocks.0.linear1.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    ),
    author="Black Forest Labs",
)

# No name that a LoRA of FLUX.2 is read by has one of these.
LORA_RELATIVES = (
    KnownKeys(r"distilled_guidance_layer", "Chroma"),
    KnownKeys(r"transformer_blocks[._]\d+[._](img|txt)_mod[._]1", "Qwen-Image"),
    KnownKeys(
        r"_mlp[._]fc[12]\b|\.(img|txt)_attn_(qkv|proj)\b|_mod[._]linear\b|\bmodulation[._]linear\b", "HunyuanVideo"
    ),
    KnownKeys(
        r"double_blocks[._]\d+[._](img|txt)_mod[._]lin\b|single_blocks[._]\d+[._]modulation|vector_in|"
        r"time_text_embed[._]text_embedder|transformer_blocks[._]\d+[._]norm1?(_context)?[._]linear|"
        r"ff(_context)?[._]net[._]|processor\.(qkv|proj)_lora",
        "FLUX.1",
    ),
    KnownKeys(r"^oft_unet_", "sd-scripts' OFT, which no loader reads"),
)
