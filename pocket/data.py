"""Training sets: pictures that `draw` made, as the averages that the encoder begins with, and their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .autoencoder import average
from .draw import draw, prompt, random_jitter, random_scene


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures.

    Attributes:
        quarters: (N, 3, 24, 24) uint8, averages of 4x4 pixels.
        prompts: one per picture.
        full: (M, 3, 96, 96) uint8, the first M of them in full.
    """

    quarters: Tensor
    prompts: list[str]
    full: Tensor


def make_pictures(
    count: int, seed: int, styles: tuple[str, ...], full: int, progress: Callable[[int, int], None]
) -> Pictures:
    """Draw pictures of random scenes, none of them with a held-out pair.

    Args:
        count: how many.
        seed: equal seeds draw equal scenes, whatever the styles.
        styles: of the pictures, in turn.
        full: how many to keep in full.
        progress: called with (done, all).
    """
    random = np.random.default_rng(seed)
    quarters, prompts, kept = [], [], []
    for index in range(count):
        scene, jitter = random_scene(random), random_jitter(random)
        prompts.append(prompt(scene, random))
        pixels = torch.from_numpy(draw(scene, jitter, styles[index % len(styles)])).permute(2, 0, 1)
        quarters.append(_uint8(average(pixels[None])))
        if index < full:
            kept.append(_uint8(pixels[None]))
        if not (index + 1) % 500:
            progress(index + 1, count)
    return Pictures(torch.cat(quarters), prompts, torch.cat(kept) if kept else torch.zeros(0, 3, 96, 96))


def _uint8(pictures: Tensor) -> Tensor:
    return (pictures * 255).round().to(torch.uint8)
