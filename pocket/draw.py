"""Pictures of shapes, drawn from a seed, and prompts that say what is on them.

A picture holds one, two or three equal shapes of one colour on a plain ground. Everything is drawn from signed
distances in pixels, so that edges are anti-aliased: a pixel's coverage is how far its centre lies inside, up to half a
pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 96
Pixels = NDArray[np.float32]

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 45, 45),
    "orange": (250, 145, 30),
    "yellow": (250, 215, 50),
    "green": (45, 165, 75),
    "blue": (40, 95, 220),
    "purple": (135, 60, 185),
    "pink": (250, 130, 190),
    "black": (35, 35, 40),
}
GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "": (250, 244, 230),
    "white": (255, 255, 255),
    "gray": (178, 182, 188),
    "light blue": (190, 222, 245),
    "light green": (200, 235, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
PLACES: Mapping[str, tuple[float, float]] = {
    "": (0.5, 0.5),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
}
RADII: Mapping[str, float] = {"": 0.23, "small": 0.18, "large": 0.33}
STYLES = ("flat", "outline", "neon", "stripes", "neon outline", "neon stripes")

STROKE_PX = 5.0
STRIPE_PX = 12.0
NIGHT = (18, 20, 52)
PAPER = (255, 255, 255)


@dataclass(frozen=True)
class Scene:
    """What a prompt says; an empty string is what it leaves out.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        count: 1 to 3 shapes; two beside each other, a third above them.
        place: one of `PLACES`; only of a single shape.
        size: one of `RADII`; only of a single shape.
        ground: one of `GROUNDS`.
    """

    shape: str
    colour: str
    count: int = 1
    place: str = ""
    size: str = ""
    ground: str = ""


@dataclass(frozen=True)
class Jitter:
    """What differs between two pictures of one prompt: shifts in pixels, a factor for the radius, a turn in radians."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    turn: float = 0.0


# Pairs that no training picture shows, one in eight: prompts with them ask for what was never seen together.
HELD_OUT = tuple((shape, tuple(COLOURS)[(3 * index + 2) % len(COLOURS)]) for index, shape in enumerate(SHAPES))


def random_scene(random: np.random.Generator, held_out: bool = False) -> Scene:
    """A scene with a pair of shape and colour from `HELD_OUT`, or with any other."""
    while True:
        shape, colour = str(random.choice(SHAPES)), str(random.choice(list(COLOURS)))
        if ((shape, colour) in HELD_OUT) == held_out:
            break
    ground = str(random.choice(list(GROUNDS))) if random.random() < 0.4 else ""
    count = int(random.choice([1, 1, 1, 2, 3]))
    if count > 1:
        return Scene(shape, colour, count, ground=ground)
    place = str(random.choice(list(PLACES))) if random.random() < 0.7 else ""
    sizes = ["", "small"] if place else list(RADII)
    size = str(random.choice(sizes)) if random.random() < 0.6 else ""
    return Scene(shape, colour, 1, place, size, ground)


def random_jitter(random: np.random.Generator) -> Jitter:
    """Up to 2 pixels, 6 percent and 6 degrees."""
    dx, dy, scale, turn = random.uniform(-1, 1, 4)
    return Jitter(2.0 * dx, 2.0 * dy, 1.0 + 0.06 * scale, math.radians(6.0) * turn)


def prompt(scene: Scene, random: np.random.Generator) -> str:
    """Say a scene in English, in one of several ways."""
    small, large = random.choice(["small ", "little "]), random.choice(["large ", "big "])
    size = {"": "", "small": small, "large": large}[scene.size]
    if scene.count == 1:
        article = random.choice(["an" if not size and scene.colour == "orange" else "a", "one"], p=[0.8, 0.2])
        thing = f"{article} {size}{scene.colour} {scene.shape}"
    else:
        thing = f"{('two', 'three')[scene.count - 2]} {scene.colour} {_plural(scene.shape)}"
    place = {
        "": random.choice(["", " in the middle", " in the center"]) if scene.count == 1 else "",
        "left": random.choice([" on the left", " at the left"]),
        "right": random.choice([" on the right", " at the right"]),
        "top": random.choice([" at the top", " on top"]),
        "bottom": " at the bottom",
    }[scene.place]
    if not scene.ground:
        return str(random.choice(["", "a picture of "], p=[0.8, 0.2])) + thing + place
    ground = random.choice([f" on a {scene.ground} background", f", {scene.ground} background"])
    return thing + place + ground


def edit_prompt(scene: Scene, random: np.random.Generator) -> str:
    """Ask for a drawing's colour to become the scene's, in one of several ways, and for nothing else."""
    it = "it" if scene.count == 1 else "them"
    named = f"the {scene.shape if scene.count == 1 else _plural(scene.shape)}"
    asked = random.choice(
        ["make it", "make", "turn it", "turn", "paint it", "paint", "change the color to", "change the colour to",
         "the same in", "the same, but"]
    )  # fmt: skip
    if asked.endswith("it"):
        return f"{asked.removesuffix('it')}{it} {scene.colour}"
    return f"{asked} {named} {scene.colour}" if asked in ("make", "turn", "paint") else f"{asked} {scene.colour}"


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def draw(scene: Scene, jitter: Jitter = Jitter(), style: str = "flat", size_px: int = SIZE_PX) -> Pixels:
    """Draw a scene.

    Args:
        scene: what.
        jitter: where exactly.
        style: "flat": filled; "outline": only the contour is drawn; "neon": shapes glow in the dark; "stripes": white
            stripes run across the shapes; "neon outline", "neon stripes": the same in the dark.
        size_px: side of the square picture.

    Returns:
        (size_px, size_px, 3) float32 in 0–1.
    """
    distance = distances(scene, jitter, size_px)
    colour = _rgb(COLOURS[scene.colour])
    ground = np.broadcast_to(_rgb(GROUNDS[scene.ground]), (size_px, size_px, 3))
    if style == "flat":
        return _over(ground, colour, _coverage(distance))
    stroke = _coverage(np.abs(distance + STROKE_PX / 2) - STROKE_PX / 2)
    if style == "outline":
        return _over(ground, colour, stroke)
    y, x = _grid(size_px)
    bands = np.abs((x + y) / math.sqrt(2.0) % STRIPE_PX - STRIPE_PX / 2) - STRIPE_PX / 4
    inside, stripes = _coverage(distance), _coverage(distance) * _coverage(bands)
    if style == "stripes":
        return _over(_over(ground, colour, inside), _rgb(PAPER), stripes)
    if style in ("neon", "neon outline", "neon stripes"):
        # Glow fades outwards from the contour; black, which cannot glow, becomes white light.
        light = _rgb((235, 240, 255)) if scene.colour == "black" else colour + (1.0 - colour) * 0.15
        glow = 0.5 * np.exp(-np.maximum(distance, 0.0) / 5.0) * (distance > 0)
        night = np.broadcast_to(_rgb(NIGHT), (size_px, size_px, 3))
        shining = _over(_over(night, light, glow), light, stroke if style == "neon outline" else inside)
        return _over(shining, _rgb(PAPER), stripes) if style == "neon stripes" else shining
    raise ValueError(f"style is '{style}', expected one of: {', '.join(STYLES)}.")


def distances(scene: Scene, jitter: Jitter = Jitter(), size_px: int = SIZE_PX) -> Pixels:
    """Signed distance in pixels of each pixel's centre to the nearest shape, negative inside: (size_px, size_px)."""
    y, x = _grid(size_px)
    result = np.full((size_px, size_px), np.inf, np.float32)
    for centre_x, centre_y, radius in placements(scene, jitter, size_px):
        dx, dy = x - centre_x, y - centre_y
        cos, sin = math.cos(jitter.turn), math.sin(jitter.turn)
        u, v = (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius
        result = np.minimum(result, SHAPE_DISTANCES[scene.shape](u, v) * radius)
    return result.astype(np.float32)


def placements(scene: Scene, jitter: Jitter, size_px: int) -> list[tuple[float, float, float]]:
    """Centre x, y and radius of each shape, in pixels."""
    if scene.count == 1:
        x, y = PLACES[scene.place]
        centres, radius = [(x, y)], RADII[scene.size]
    elif scene.count == 2:
        centres, radius = [(0.27, 0.5), (0.73, 0.5)], 0.19
    else:
        centres, radius = [(0.5, 0.29), (0.27, 0.71), (0.73, 0.71)], 0.18
    unit = size_px / SIZE_PX
    return [
        (x * size_px + jitter.dx * unit, y * size_px + jitter.dy * unit, radius * size_px * jitter.scale)
        for x, y in centres
    ]


def _grid(size_px: int) -> tuple[Pixels, Pixels]:
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32) + 0.5
    return y, x


def _rgb(colour: tuple[int, int, int]) -> Pixels:
    return np.asarray(colour, np.float32) / 255.0


def _coverage(distance: Pixels) -> Pixels:
    return np.clip(0.5 - distance, 0.0, 1.0)


def _over(below: Pixels, colour: Pixels, alpha: Pixels) -> Pixels:
    return below + (colour - below) * alpha[..., None]


# Signed distances in units of the radius; x points right, y down.


def _circle(x: Pixels, y: Pixels) -> Pixels:
    return np.hypot(x, y) - 1.0


def _square(x: Pixels, y: Pixels) -> Pixels:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _ring(x: Pixels, y: Pixels) -> Pixels:
    return np.abs(np.hypot(x, y) - 0.76) - 0.25


def _cross(x: Pixels, y: Pixels) -> Pixels:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.33, y - 1.0), np.maximum(y - 0.33, x - 1.0))


def _moon(x: Pixels, y: Pixels) -> Pixels:
    x, y = 1.1 * x - 0.2, 1.1 * y + 0.05  # between the disc's centre and the crescent's
    return np.maximum(np.hypot(x, y) - 1.0, 0.8 - np.hypot(x - 0.5, y + 0.12)) / 1.1


def _polygon(corners: list[tuple[float, float]]) -> Callable[[Pixels, Pixels], Pixels]:
    """Distance to a polygon: to the nearest edge, negative where a ray crosses an odd number of edges."""

    def distance(x: Pixels, y: Pixels) -> Pixels:
        nearest = np.full(x.shape, np.inf, np.float32)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) / (by - ay if by != ay else 1.0) * ex)
        return np.where(inside, -nearest, nearest)

    return distance


def _star_corners() -> list[tuple[float, float]]:
    radii, turns = (1.12, 0.48), (2 * math.pi * corner / 10 for corner in range(10))
    return [(radii[i % 2] * math.sin(turn), -radii[i % 2] * math.cos(turn)) for i, turn in enumerate(turns)]


def _heart_corners() -> list[tuple[float, float]]:
    # Source: the curve x = 16 sin³ t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t.
    turns = [2 * math.pi * corner / 24 for corner in range(24)]
    x = [math.sin(t) ** 3 for t in turns]
    y = [(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 for t in turns]
    return [(1.05 * a, -1.05 * b - 0.1) for a, b in zip(x, y, strict=True)]


SHAPE_DISTANCES: Mapping[str, Callable[[Pixels, Pixels], Pixels]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon([(0.0, -1.05), (1.05, 0.8), (-1.05, 0.8)]),
    "star": _polygon(_star_corners()),
    "ring": _ring,
    "cross": _cross,
    "heart": _polygon(_heart_corners()),
    "moon": _moon,
}
