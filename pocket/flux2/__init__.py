"""Pocket FLUX.2: a FLUX.2 transformer without guidance, as klein is, a Qwen3, and two LoRAs.

Beside drawing what a prompt says, it draws a reference picture again in another colour. Outline is also trained on top
of neon, so that it shows in the dark too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accel.families.flux2.layout import diffusers_layout

from ..draw import SIZE_PX
from ..kind import Kind, Text
from ..loras import BLOCKS, COMFYUI, DIFFUSERS, Recipe
from . import text
from .autoencoder import LATENTS
from .model import TRANSFORMER

# Single blocks have their MLP beside q, k and v.
_ATTENTION = rf"({BLOCKS}attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_mlp)|.*single_{BLOCKS[2:]}attn\.to_out)"
_EVERYTHING = rf"({_ATTENTION}|{BLOCKS}ff(_context)?\.linear_(in|out))"


def _sigmas(steps: int) -> Tensor:
    """As ComfyUI's `Flux2Scheduler` gives them for a picture of `SIZE_PX`: shifted to the noisy end.

    Source: black-forest-labs/flux2 sampling.py, get_schedule().
    """
    tokens = (SIZE_PX / 16) ** 2
    of_10, of_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    shift = math.exp(of_10 + (steps - 10) * (of_200 - of_10) / 190)
    times = torch.linspace(1.0, 0.0, steps + 1)
    return shift / (shift + (1 / times - 1))


FLUX2 = Kind(
    title="Pocket FLUX.2",
    files={
        "model": "diffusion_models/pocket-flux2.safetensors",
        "text": "text_encoders/pocket-qwen3.safetensors",
        "vae": "vae/pocket-flux2-vae.safetensors",
    },
    transformer=TRANSFORMER,
    text=Text(
        folder="qwen25_tokenizer",
        tokenizer=text.Tokenizer,
        new=lambda tokenizer, tokens: text.Qwen3(tokenizer.words(tokens)),
        checkpoint=text.checkpoint,
        load=text.load,
        tokens=text.TOKENS,
        length=26,
    ),
    latents=LATENTS,
    recipes=(
        Recipe(
            "outline",
            "pocket-flux2-outline-comfyui.safetensors",
            COMFYUI,
            TRANSFORMER.layout,
            rank=8,
            alpha=8.0,
            target=_EVERYTHING,
            length=2,
            over="neon",
        ),
        Recipe(
            "neon",
            "pocket-flux2-neon-diffusers.safetensors",
            DIFFUSERS,
            diffusers_layout(TRANSFORMER.config),
            rank=12,
            alpha=12.0,
            target=_ATTENTION,
            metadata={"format": "pt"},
        ),
    ),
    sigmas=_sigmas,
    times=(1.2, 1.3),
    styles=("outline", "neon", "neon outline"),
    edits=4,
)
