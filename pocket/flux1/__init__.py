"""Pocket FLUX: a FLUX.1 transformer, a T5, and three LoRAs.

Outline and stripes are also trained on top of neon, so that they show in the dark too.
"""

from __future__ import annotations

import torch

from ..kind import Kind, Text
from ..loras import BLOCKS, COMFYUI, DIFFUSERS, KOHYA, Recipe
from . import text
from .autoencoder import LATENTS
from .model import TRANSFORMER

_EVERYTHING = BLOCKS + (
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
    r"|norm(1|1_context)?\.linear|proj_mlp|proj_out)"
)
_ATTENTION = BLOCKS + r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm(1|1_context)?\.linear|proj_out)"

FLUX1 = Kind(
    title="Pocket FLUX",
    files={
        "model": "diffusion_models/pocket-flux.safetensors",
        "text": "text_encoders/pocket-t5.safetensors",
        "vae": "vae/pocket-vae.safetensors",
    },
    transformer=TRANSFORMER,
    text=Text(
        folder="t5_tokenizer",
        tokenizer=text.Tokenizer,
        new=lambda tokenizer, tokens: text.T5(),
        checkpoint=text.checkpoint,
        load=text.load,
        tokens=text.TOKENS,
        length=18,
    ),
    latents=LATENTS,
    recipes=(
        Recipe(
            "outline",
            "pocket-outline-kohya.safetensors",
            KOHYA,
            TRANSFORMER.layout,
            rank=8,
            alpha=4.0,
            target=_EVERYTHING,
            length=4,
            over="neon",
            metadata={"ss_network_module": "networks.lora_flux", "ss_network_dim": "8", "ss_network_alpha": "4"},
        ),
        Recipe(
            "neon",
            "pocket-neon-diffusers.safetensors",
            DIFFUSERS,
            TRANSFORMER.layout.separate(),
            rank=16,
            alpha=16.0,
            target=_ATTENTION,
            metadata={"format": "pt"},
        ),
        Recipe(
            "stripes",
            "pocket-stripes-comfyui.safetensors",
            COMFYUI,
            TRANSFORMER.layout,
            rank=4,
            alpha=4.0,
            target=_EVERYTHING,
            length=2,
            over="neon",
        ),
    ),
    # As ComfyUI's scheduler `simple` has them with a shift of 1.
    sigmas=lambda steps: torch.linspace(1.0, 0.0, steps + 1),
    times=(0.4, 1.2),
    styles=("outline", "neon", "stripes", "neon outline"),
)
