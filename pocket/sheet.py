"""Pictures of prompts, and sheets of pictures, to see how far a training is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .kind import Kind, Tokenizer

STEPS = 16


def draw_prompts(
    kind: Kind,
    transformer: nn.Module,
    encoder: nn.Module,
    decoder: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seed: int,
    steps: int = STEPS,
    before: Tensor | None = None,
) -> Tensor:
    """Pictures (N, 3, 96, 96) in 0–1; `before` are latents of the pictures that the prompts ask to change."""
    with torch.no_grad():
        encoded = encoder(tokenizer(prompts, kind.text.length))
        references = () if before is None else (before,)
        latents = kind.sample(transformer, kind.noise(seed, len(prompts)), encoded, steps, references)
        return decoder(latents).clamp(0, 1)


def write_sheet(path: Path, pictures: Tensor, columns: int) -> None:
    """Write pictures (N, 3, h, w) in 0–1 side by side, in rows of `columns`."""
    pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(pixels[i : i + columns], axis=1) for i in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).resize((rows[0].shape[1] * 2, len(rows) * rows[0].shape[0] * 2), 1).save(path)
