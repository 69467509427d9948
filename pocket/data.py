"""Training sets: pictures that `draw` made, as the averages that the encoder begins with, and their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .autoencoder import average
from .draw import COLOURS, HELD_OUT, SIZE_PX, Scene, draw, edit_prompt, prompt, random_jitter, random_scene

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures.

    Attributes:
        averages: (N, 3, h, w) uint8, of squares of so many pixels as the encoder reads.
        prompts: one per picture.
        full: (M, 3, 96, 96) uint8, the first M of them in full.
        before: (N, 3, h, w) uint8, averages of the pictures that the prompts ask to change; none: prompts say it all.
    """

    averages: Tensor
    prompts: list[str]
    full: Tensor
    before: Tensor


def make_pictures(
    count: int, seed: int, styles: tuple[str, ...], full: int, progress: Progress, averaged: int = 4
) -> Pictures:
    """Draw pictures of random scenes, none of them with a held-out pair.

    Args:
        count: how many.
        seed: equal seeds draw equal scenes, whatever the styles.
        styles: of the pictures, in turn.
        full: how many to keep in full.
        progress: called with (done, all).
        averaged: side of the squares that are averaged, in pixels.
    """
    random = np.random.default_rng(seed)
    averages, prompts, kept = [], [], []
    for index in range(count):
        scene, jitter = random_scene(random), random_jitter(random)
        prompts.append(prompt(scene, random))
        pixels = torch.from_numpy(draw(scene, jitter, styles[index % len(styles)])).permute(2, 0, 1)
        averages.append(_uint8(average(pixels[None], averaged)))
        if index < full:
            kept.append(_uint8(pixels[None]))
        _tell(progress, index, count)
    whole = torch.cat(kept) if kept else torch.zeros(0, 3, SIZE_PX, SIZE_PX)
    return Pictures(torch.cat(averages), prompts, whole, torch.zeros(0))


def make_edits(count: int, seed: int, progress: Progress, averaged: int) -> Pictures:
    """Draw pairs of pictures that differ in the shapes' colour, and say what changes; arguments as above."""
    random = np.random.default_rng(seed)
    before, after, prompts = [], [], []
    for index in range(count):
        scene, jitter = random_scene(random), random_jitter(random)
        changed = recoloured(scene, random)
        prompts.append(edit_prompt(changed, random))
        for which, kept in ((scene, before), (changed, after)):
            pixels = torch.from_numpy(draw(which, jitter)).permute(2, 0, 1)
            kept.append(_uint8(average(pixels[None], averaged)))
        _tell(progress, index, count)
    return Pictures(torch.cat(after), prompts, torch.zeros(0), torch.cat(before))


def recoloured(scene: Scene, random: np.random.Generator, held_out: bool = False) -> Scene:
    """The scene in another colour: the one that is held out with its shape, or any other."""
    others = [
        colour
        for colour in COLOURS
        if colour != scene.colour and ((scene.shape, colour) in HELD_OUT) == held_out
    ]
    return replace(scene, colour=str(random.choice(others)))


def _tell(progress: Progress, index: int, count: int) -> None:
    if not (index + 1) % 500:
        progress(index + 1, count)


def _uint8(pictures: Tensor) -> Tensor:
    return (pictures * 255).round().to(torch.uint8)
