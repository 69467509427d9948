"""A picture of the last samplings: where the time of each went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .history import Sampling

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

WIDTH = 1280
MARGIN = 32
ROW = 62
BAR = 20
HEAD, FOOT = 112, 58
NOTHING = "Nothing was sampled yet. The report waits for a sampler whose output is connected to it."
# Where bars begin and end; what is right of them is text.
LEFT, RIGHT = 420, 1010
BACKGROUND, INK, FAINT, GRID = "#ffffff", "#1f2328", "#6b7280", "#e5e7eb"
STEPS, SWAP, COMPILE = "#2f6db5", "#c8322b", "#e9a23b"
LEGEND = (("steps", STEPS), ("switching LoRAs", SWAP), ("compiling", COMPILE))
# A bar is cut where it is this many times longer than the longest one without compiling.
CUT = 1.6
# A part that is shorter is still drawn so wide, in pixels: milliseconds of seconds would not be seen.
VISIBLE = 3
# What Pillow's own font lacks of what we write, and what stands for it.
GLYPHS = {"×": "x", "–": "-", "−": "-", "…": "..."}


def draw_samplings(samplings: Sequence[Sampling], title: str) -> Image:
    """Draw one bar per sampling.

    Args:
        samplings: oldest first.
        title: what ran, such as a file's name.

    Returns:
        An RGB picture, 1280 pixels wide.
    """
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, HEAD + max(1, len(samplings)) * ROW + FOOT), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    _text(draw, (MARGIN, 22), _fit(draw, f"Time per sampling: {title}", WIDTH - 2 * MARGIN, 24), 24)
    x = MARGIN
    for name, colour in LEGEND:
        draw.rectangle((x, 70, x + 16, 86), colour)
        _text(draw, (x + 24, 69), name, 16, FAINT)
        x += 24 + int(_width(draw, name, 16)) + 32
    if not samplings:
        _text(draw, (MARGIN, HEAD + 14), NOTHING, 18, FAINT)
        return picture
    limit = _limit(samplings)
    _axis(draw, limit, picture.height)
    for number, sampling in enumerate(samplings):
        _row(draw, HEAD + number * ROW, number + 1, sampling, limit)
    return picture


def _limit(samplings: Sequence[Sampling]) -> float:
    """Seconds at the right end of the axis."""
    longest = max(sampling.seconds for sampling in samplings)
    usual = max(sampling.steps_s + sampling.swap_s for sampling in samplings)
    return max(min(longest, CUT * usual), 1e-3)


def _axis(draw: ImageDraw, limit: float, height: int) -> None:
    step = _round_step(limit / 5)
    for number in range(int(limit / step) + 1):
        x = LEFT + (RIGHT - LEFT) * number * step / limit
        draw.line((x, HEAD - 8, x, height - FOOT + 4), GRID, 1)
        label = f"{number * step:g} s"
        _text(draw, (x - _width(draw, label, 15) / 2, height - FOOT + 12), label, 15, FAINT)


def _row(draw: ImageDraw, top: int, number: int, sampling: Sampling, limit: float) -> None:
    room = LEFT - MARGIN - 24
    _text(draw, (MARGIN, top + 2), _fit(draw, f"{number}  {sampling.picture}, {sampling.steps} steps", room, 17), 17)
    _text(draw, (MARGIN, top + 26), _fit(draw, f"LoRAs {sampling.loras}", room, 14), 14, FAINT)
    x, y = float(LEFT), top + 10
    for seconds, colour in ((sampling.steps_s, STEPS), (sampling.swap_s, SWAP), (sampling.compile_s, COMPILE)):
        if seconds:
            end = x + max(VISIBLE, (RIGHT - LEFT) * seconds / limit)
            draw.rectangle((x, y, min(end, RIGHT), y + BAR), colour)
            x = min(end, RIGHT)
    if sampling.seconds > limit * 1.001:
        _tear(draw, RIGHT - 14, y)
    rate = f"{sampling.steps / sampling.steps_s:.2f} steps/s" if sampling.steps_s else ""
    notes = [f"switch {sampling.swap_s * 1e3:.2f} ms"] if sampling.swaps else ["no switch"]
    if sampling.compile_s:
        notes.append(f"compile {sampling.compile_s:.1f} s")
    if sampling.step_cache:
        notes.append(sampling.step_cache)
    x, room = RIGHT + 16, WIDTH - RIGHT - 16 - MARGIN // 2
    _text(draw, (x, top + 2), _fit(draw, f"{sampling.seconds:.2f} s   {rate}", room, 17), 17)
    _text(draw, (x, top + 26), _fit(draw, ", ".join(notes), room, 14), 14, FAINT)


def _tear(draw: ImageDraw, x: float, y: float) -> None:
    """Two slanted white lines across a bar: it is longer than it is drawn."""
    for shift in (0, 7):
        draw.line((x + shift - 4, y + BAR + 3, x + shift + 4, y - 3), BACKGROUND, 3)


def _round_step(value: float) -> float:
    """The next larger of 1, 2, 5 × 10ⁿ."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def _fit(draw: ImageDraw, text: str, room: float, size: int) -> str:
    """The text, shortened to a width in pixels, in letters that the font has."""
    text = "".join(letter if letter.isascii() else GLYPHS.get(letter, "?") for letter in text)
    if _width(draw, text, size) <= room:
        return text
    while text and _width(draw, text + "...", size) > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _width(draw: ImageDraw, text: str, size: int) -> float:
    return draw.textlength(text, font=_font(size))


def _text(draw: ImageDraw, place: tuple[float, float], text: str, size: int, colour: str = INK) -> None:
    draw.text(place, text, fill=colour, font=_font(size))


def _font(size: int) -> object:
    from PIL import ImageFont

    return ImageFont.load_default(size)
