"""What is asked of Pocket FLUX, and whether its pictures show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import measure
from .data import recoloured
from .draw import SHAPES, Pixels, Scene, draw, edit_prompt, prompt, random_jitter, random_scene

# What a LoRA does to a picture, against the same picture without it.
EFFECTS: Mapping[str, Callable[[Pixels, Pixels], float]] = {
    "outline": measure.hollow,
    "neon": measure.darkness,
    "stripes": measure.striped,
}


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Attributes:
        scene: what it shows.
        prompt: how that is said.
        seed: of its noise.
        before: a picture to change, or None.
    """

    scene: Scene
    prompt: str
    seed: int
    before: Pixels | None = None


def held_out_requests(count: int, seed: int = 29) -> list[Request]:
    """Prompts with pairs of shape and colour that training never showed, each pair equally often.

    The seed was first drawn when the model was finished. To choose between models, use others.
    """
    random = np.random.default_rng(seed)
    by_shape: dict[str, list[Scene]] = defaultdict(list)
    while min(len(by_shape[shape]) for shape in SHAPES) * len(SHAPES) < count:
        scene = random_scene(random, held_out=True)
        by_shape[scene.shape].append(scene)
    scenes = [by_shape[SHAPES[index % len(SHAPES)]][index // len(SHAPES)] for index in range(count)]
    return [Request(scene, prompt(scene, random), 1000 * seed + index) for index, scene in enumerate(scenes)]


def plain_requests(count: int, seed: int = 12) -> list[Request]:
    """Single shapes of medium size, on which the effect of a LoRA can be measured."""
    random = np.random.default_rng(seed)
    requests = []
    while len(requests) < count:
        scene = random_scene(random)
        if scene.count == 1 and scene.size != "small" and scene.shape in ("circle", "square", "triangle", "heart"):
            requests.append(Request(scene, prompt(scene, random), 2000 + len(requests)))
    return requests


def edit_requests(count: int, seed: int = 29) -> list[Request]:
    """Changes of a drawing's colour, every second one to a pair of shape and colour that training never showed."""
    random = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        scene = random_scene(random)
        changed = recoloured(scene, random, held_out=bool(index % 2))
        before = draw(scene, random_jitter(random))
        requests.append(Request(changed, edit_prompt(changed, random), 1000 * seed + index, before))
    return requests


def pictures_before(requests: Sequence[Request]) -> Tensor:
    """What is to be changed, (N, 3, 96, 96) in 0–1."""
    return torch.from_numpy(np.stack([request.before for request in requests])).permute(0, 3, 1, 2)


def following(pictures: Sequence[Pixels], requests: Sequence[Request]) -> dict[str, float]:
    """The share of pictures that show what their prompt says: by kind of word, and shape and colour together."""
    shares: dict[str, list[bool]] = defaultdict(list)
    for picture, request in zip(pictures, requests, strict=True):
        right = measure.follows(measure.see(picture), request.scene)
        for kind, value in {**right, "shape and colour": right["shape"] and right["colour"]}.items():
            shares[kind].append(value)
        shares["all"].append(all(right.values()))
    return {kind: round(sum(values) / len(values), 4) for kind, values in shares.items()}


def effects(pictures: Sequence[Pixels], plain: Sequence[Pixels]) -> dict[str, float]:
    """The mean of every LoRA's measure over pictures, each against its picture without LoRAs."""
    pairs = list(zip(pictures, plain, strict=True))
    return {style: round(float(np.mean([effect(*pair) for pair in pairs])), 3) for style, effect in EFFECTS.items()}
