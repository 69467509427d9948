"""What a picture shows, measured from its pixels: no model judges another here.

The ground is the border's colour; what differs from it is the drawing. Its connected parts are counted. A part's colour
is the nearest one of the palette, its shape the one whose silhouette, turned by a few degrees at most and made as large
as the part, covers it best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draw import COLOURS, GROUNDS, NIGHT, SHAPE_DISTANCES, STRIPE_PX, STROKE_PX, Pixels, Scene

Mask = NDArray[np.bool_]

DIFFERS = 0.16  # distance from the ground's colour, where white and black are 1.73 apart
SMALLEST = 0.006  # of the picture's area; less is a speck
TURNS = tuple(math.radians(degrees) for degrees in (-8, -4, 0, 4, 8))


@dataclass(frozen=True)
class Seen:
    """What was measured.

    Attributes:
        shape: one of `draw.SHAPES`, or "" when nothing is drawn; of the largest part.
        colour: one of `draw.COLOURS`, or "".
        count: parts.
        x: of the drawing's centre, 0 (left) to 1.
        y: likewise, 0 (top) to 1.
        area: of the largest part, of the picture's.
        ground: one of `draw.GROUNDS`.
        overlap: how well the shape covers the largest part: intersection over union, 0–1.
    """

    shape: str
    colour: str
    count: int
    x: float
    y: float
    area: float
    ground: str
    overlap: float


def see(picture: Pixels) -> Seen:
    """Measure a picture (H, W, 3), 0–1."""
    drawn = drawing(picture)
    found = [part for part in parts(drawn) if part.sum() >= SMALLEST * drawn.size]
    ground = _nearest(ground_colour(picture), GROUNDS)
    if not found:
        return Seen("", "", 0, 0.5, 0.5, 0.0, ground, 0.0)
    largest = max(found, key=np.sum)
    inner = _eroded(largest)
    colour = np.median(picture[inner if inner.any() else largest], axis=0)
    y, x = np.nonzero(drawn)
    scores = {shape: _overlap(largest, shape) for shape in SHAPE_DISTANCES}
    shape = max(scores, key=scores.get)
    height, width = drawn.shape
    return Seen(
        shape,
        _nearest(colour, COLOURS),
        len(found),
        float(x.mean() + 0.5) / width,
        float(y.mean() + 0.5) / height,
        float(largest.sum()) / drawn.size,
        ground,
        scores[shape],
    )


def follows(seen: Seen, scene: Scene) -> dict[str, bool]:
    """Which of a prompt's words the picture shows: those that the prompt has, by kind."""
    result = {
        "shape": seen.shape == scene.shape,
        "colour": seen.colour == scene.colour,
        "count": seen.count == scene.count,
        "ground": seen.ground == scene.ground,
    }
    if scene.count == 1:
        nearest = {
            "left": seen.x < 0.4,
            "right": seen.x > 0.6,
            "top": seen.y < 0.4,
            "bottom": seen.y > 0.6,
            "": max(abs(seen.x - 0.5), abs(seen.y - 0.5)) < 0.1,
        }
        result["place"] = nearest[scene.place]
    return result


def ground_colour(picture: Pixels) -> Pixels:
    """The median of a border of two pixels: (3,)."""
    edge = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, :2].reshape(-1, 3),
                           picture[:, -2:].reshape(-1, 3)])
    return np.median(edge, axis=0)


def drawing(picture: Pixels) -> Mask:
    """Where the picture differs from its ground: (H, W)."""
    return np.linalg.norm(picture - ground_colour(picture), axis=-1) > DIFFERS


def parts(mask: Mask) -> list[Mask]:
    """Connected parts of a mask; pixels that touch at a corner are connected."""
    left, found = mask.copy(), []
    while left.any():
        part = np.zeros_like(mask)
        stack = [tuple(np.argwhere(left)[0])]
        left[stack[0]] = False
        while stack:
            y, x = stack.pop()
            part[y, x] = True
            top, start = max(y - 1, 0), max(x - 1, 0)
            window = left[top : y + 2, start : x + 2]
            stack += [(top + dy, start + dx) for dy, dx in np.argwhere(window)]
            window[:] = False
        found.append(part)
    return found


def same_place(picture: Pixels, other: Pixels) -> float:
    """How well what two pictures show covers each other: intersection over union, 0–1."""
    first, second = drawing(picture), drawing(other)
    either = (first | second).sum()
    return float((first & second).sum() / either) if either else 0.0


def hollow(picture: Pixels, plain: Pixels) -> float:
    """How much of the inside of what `plain` shows has the ground's colour: about 0 where filled, 1 in an outline."""
    inside = _eroded(drawing(plain), times=math.ceil(STROKE_PX * math.sqrt(2.0)))
    return float((~drawing(picture))[inside].mean()) if inside.any() else 0.0


def darkness(picture: Pixels, plain: Pixels) -> float:
    """How far the ground's brightness went from that of `plain` to the night's: 0 to 1."""
    night, before = np.mean(NIGHT) / 255.0, ground_colour(plain).mean()
    return float((before - ground_colour(picture).mean()) / (before - night))


def striped(picture: Pixels, plain: Pixels) -> float:
    """How strongly white stripes of the texture's width and direction run over what `plain` shows: 0 to 1."""
    inside = _eroded(drawing(plain))
    y, x = np.nonzero(inside)
    white = np.linalg.norm(picture[inside] - 1.0, axis=-1) < 0.5
    wave = np.exp(2j * np.pi * ((x + y + 1.0) / math.sqrt(2.0)) / STRIPE_PX)
    # A mean of zero: what is white all over has no stripes.
    return float(abs(((white - white.mean()) * wave).mean())) * math.pi if len(x) else 0.0


def psnr(pictures: Iterable[Pixels], references: Iterable[Pixels]) -> float | None:
    """Peak signal-to-noise ratio over all pictures, in dB; values 0–1. None when nothing differs."""
    error = np.mean([np.square(a - b).mean() for a, b in zip(pictures, references, strict=True)])
    return float(10 * np.log10(1.0 / error)) if error else None


def _nearest(colour: Pixels, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: np.linalg.norm(colour - np.asarray(palette[name]) / 255.0))


def _eroded(mask: Mask, times: int = 2) -> Mask:
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = padded[1:-1, 1:-1] & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask


@functools.lru_cache(maxsize=64)
def _unit(shape: str, turn: float) -> tuple[float, float, float]:
    """Area and centroid x, y of a turned shape of radius 1."""
    y, x = (np.mgrid[0:240, 0:240].astype(np.float32) + 0.5) / 100.0 - 1.2
    inside = _inside(shape, turn, x, y)
    return float(inside.mean()) * 2.4**2, float(x[inside].mean()), float(y[inside].mean())


def _inside(shape: str, turn: float, x: Pixels, y: Pixels) -> Mask:
    cos, sin = math.cos(turn), math.sin(turn)
    return SHAPE_DISTANCES[shape](x * cos + y * sin, y * cos - x * sin) < 0


def _overlap(part: Mask, shape: str) -> float:
    """Intersection over union of a part and the silhouette that fits it best."""
    y, x = np.mgrid[0 : part.shape[0], 0 : part.shape[1]].astype(np.float32)
    best = 0.0
    for turn in TURNS:
        area, centre_x, centre_y = _unit(shape, turn)
        radius = math.sqrt(part.sum() / area)
        u, v = (x - x[part].mean()) / radius + centre_x, (y - y[part].mean()) / radius + centre_y
        template = _inside(shape, turn, u, v)
        best = max(best, float((template & part).sum() / (template | part).sum()))
    return best
