"""`python -m harness.template_pictures`: the pictures of the templates, from those of `make demo`.

A template for real files of FLUX cannot be drawn without them, so its picture shows Pocket FLUX and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from harness.demo import PROMPTS
from harness.paths import REPO

SIDE_PX = 512
HEAD_PX = 58
CAPTION_PX = 22


@dataclass(frozen=True)
class Template:
    """What a template's picture shows.

    Attributes:
        name: of its file.
        title: what it does.
        note: whose pictures these are.
        shown: names of the demo's prompts, with their captions.
    """

    name: str
    title: str
    note: str
    shown: Sequence[tuple[str, str]]


OTHERS = "Shown with Pocket FLUX; this template uses FLUX.1 dev"
FLUX2 = "Shown with Pocket FLUX.2; this template uses FLUX.2 klein"
DRAWN, NEON, OUTLINE, EDITED = "FLUX.2, none", "FLUX.2, D: neon", "FLUX.2, E: outline", "FLUX.2, none, edited"
TEMPLATES = (
    Template(
        "flux_hotswap_pocket",
        "Pocket FLUX: nothing to download",
        "One prompt, one seed; LoRAs change without a recompile",
        (("none", "no LoRA"), ("A: neon", "neon 1.0"), ("B: stripes", "stripes 1.0"), ("A + B", "neon + stripes")),
    ),
    Template(
        "flux_hotswap_text_to_image",
        "Text to image with a LoRA",
        OTHERS,
        (("none", "no LoRA"), ("C: outline", "with a LoRA")),
    ),
    Template(
        "flux_hotswap_two_loras",
        "Two LoRAs, any strengths",
        OTHERS,
        (("none", "no LoRA"), ("A: neon", "LoRA A"), ("C: outline", "LoRA B"), ("A + C", "LoRA A + LoRA B")),
    ),
    Template(
        "flux_hotswap_low_vram",
        "Small card: fewer bits, offload",
        OTHERS,
        (("none", "no LoRA"), ("B: stripes", "with a LoRA")),
    ),
    Template(
        "flux_hotswap_flux2_two_loras",
        "FLUX.2 klein: two LoRAs, 4 steps",
        FLUX2,
        ((DRAWN, "no LoRA"), (NEON, "LoRA A"), (OUTLINE, "LoRA B"), (EDITED, "edited")),
    ),
    Template(
        "flux_hotswap_flux2_edit",
        "FLUX.2 klein: edit a picture with a LoRA",
        FLUX2,
        ((DRAWN, "a picture"), (EDITED, "“make it blue”")),
    ),
    Template(
        "flux_hotswap_flux2_low_vram",
        "FLUX.2 klein 9B on a small card",
        FLUX2,
        ((DRAWN, "no LoRA"), (NEON, "with a LoRA")),
    ),
    Template(
        "flux_hotswap_pocket_flux2",
        "Pocket FLUX.2: nothing to download",
        "It draws, and edits what it drew; LoRAs change without a recompile",
        ((DRAWN, "no LoRA"), (NEON, "neon 1.0"), (OUTLINE, "outline 1.0"), (EDITED, "“make it blue”")),
    ),
)


def picture(template: Template, demo_output: Path) -> Image.Image:
    """A square picture: title, note, and two or four of the demo's images with their captions.

    Raises:
        FileNotFoundError: the demo has not been run.
    """
    files = {prompt.name: demo_output / prompt.file_name for prompt in PROMPTS}
    sheet = Image.new("RGB", (SIDE_PX, SIDE_PX), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 6), template.title, "black", ImageFont.load_default(22))
    draw.text((10, 34), template.note, "dimgray", ImageFont.load_default(15))
    lines = len(template.shown) // 2
    top = HEAD_PX + (2 - lines) * 50
    cell_px, side_px = SIDE_PX // 2, (SIDE_PX - HEAD_PX) // 2 - CAPTION_PX - 2
    side_px = side_px if lines == 2 else cell_px - 8
    for index, (name, caption) in enumerate(template.shown):
        x = index % 2 * cell_px + (cell_px - side_px) // 2
        y = top + index // 2 * (side_px + CAPTION_PX + 2)
        with Image.open(files[name]) as image:
            sheet.paste(image.resize((side_px, side_px), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + side_px + 2), caption, "black", ImageFont.load_default(16))
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Write every template's picture; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m harness.template_pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=REPO / "demo-output", help="folder of the demo's images")
    parser.add_argument("--output", type=Path, default=REPO / "example_workflows", help="folder of the pictures")
    options = parser.parse_args(arguments)
    try:
        for template in TEMPLATES:
            picture(template, options.demo).save(options.output / f"{template.name}.jpg", quality=90)
    except FileNotFoundError as error:
        print(f"error: {error}. Run `make demo` first.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
