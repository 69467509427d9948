"""What the demo reports: figures from the server's log, one table, and a contact sheet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
SHOWN_PX = 288
GAP, TITLE, HEADING, LABEL = 16, 36, 30, 80
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_SUMMARY = re.compile(
    r"Flux Hotswap: LoRAs (?P<loras>.*) \| swap (?P<swap_ms>[\d.]+) ms \((?P<source>[^)]*)\) \| "
    r"compiled (?P<compiled>\d+) \| recompiles (?P<recompiles>\d+) \| sampling"
)
_COMPILED = re.compile(r"Flux Hotswap: compiled the .* blocks in ([\d.]+) s")


class DemoFailed(RuntimeError):
    """The demo did not show what it should; the message says what happened instead."""


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt of the demo.

    Attributes:
        name: what the table calls it.
        loras: (file, strength) of each LoRA, first applied first; at most as many as the workflow has nodes for.
        file_name: of its image.
        workflow: the bundled one that it queues, by the name of its file.
        samplings: how many the workflow has.
        shown: which of the workflow's pictures is its image, in the order of the nodes that save them.
    """

    name: str
    loras: tuple[tuple[str, float], ...]
    file_name: str
    workflow: str = "flux_hotswap_pocket"
    samplings: int = 1
    shown: int = 0

    @property
    def lora_text(self) -> str:
        """Files and strengths, for people."""
        return " + ".join(f"{Path(file).stem} ({strength:g})" for file, strength in self.loras) or "no LoRA"


@dataclass(frozen=True)
class Report:
    """What the pack's log says about one prompt.

    Attributes:
        loras: the stack that was bound.
        swap_ms: time to bind it, for the first of its samplings; it stays bound for the others.
        source: where its weights came from.
        recompiles: compiles of what had been compiled before.
        compile_s: time of first compiles, zero after the first prompt.
    """

    loras: str
    swap_ms: float
    source: str
    recompiles: int
    compile_s: float


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    prompt: DemoPrompt
    seconds: float
    report: Report
    image: Path


def read_report(log: str, samplings: int = 1) -> Report:
    """Read the pack's lines in a part of the server's log.

    Raises:
        DemoFailed: it does not hold exactly so many samplings.
    """
    found = list(_SUMMARY.finditer(log))
    if len(found) != samplings:
        raise DemoFailed(
            f"Expected {samplings} of 'Flux Hotswap: LoRAs … | swap … ms' in the server's log, found {len(found)}. "
            f"The log says:\n{log.rstrip()}"
        )
    first = found[0]
    return Report(
        loras=first["loras"],
        swap_ms=float(first["swap_ms"]),
        source=first["source"],
        recompiles=sum(int(line["recompiles"]) for line in found),
        compile_s=sum(map(float, _COMPILED.findall(log))),
    )


def contact_sheet(sections: Sequence[tuple[str, Sequence[Row]]]) -> Image.Image:
    """Draw all images in lines of `COLUMNS`, each with its LoRAs, strengths and figures.

    Args:
        sections: a heading, such as the model and the prompt's text, and what is below it; images are square files,
            shown `SHOWN_PX` wide.
    """
    title, small = ImageFont.load_default(17), ImageFont.load_default(13)
    cell = SHOWN_PX + LABEL + GAP
    lines = [-(-len(rows) // COLUMNS) for _, rows in sections]
    height = TITLE + sum(HEADING + count * cell for count in lines)
    sheet = Image.new("RGB", (GAP + COLUMNS * (SHOWN_PX + GAP), height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 10), "Flux Hotswap: one prompt, one seed, one model; only the LoRAs change", "black", title)
    top = TITLE
    for (heading, rows), count in zip(sections, lines, strict=True):
        draw.text((GAP, top), heading, "dimgray", small)
        for index, row in enumerate(rows):
            x, y = GAP + index % COLUMNS * (SHOWN_PX + GAP), top + HEADING + index // COLUMNS * cell
            with Image.open(row.image) as image:
                sheet.paste(image.resize((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS), (x, y))
            _label(draw, row, x, y + SHOWN_PX, title, small)
        top += HEADING + count * cell
    return sheet


def _label(draw: ImageDraw.ImageDraw, row: Row, x: int, y: int, title: Font, small: Font) -> None:
    draw.text((x, y + 4), row.prompt.name, "black", title)
    draw.text((x, y + 26), row.prompt.lora_text.replace(" + ", "\n+ "), "black", small, spacing=1)
    figures = f"swap {row.report.swap_ms:.2f} ms ({row.report.source}), recompiles {row.report.recompiles}"
    draw.text((x, y + 60), figures, "dimgray", small)


def table(rows: Sequence[Row]) -> str:
    """The figures as text, one line per prompt."""
    head = ("prompt", "LoRAs", "seconds", "of it compile s", "swap ms", "", "recompiles", "image file")
    lines = [
        (
            row.prompt.name,
            row.prompt.lora_text,
            f"{row.seconds:.2f}",
            f"{row.report.compile_s:.1f}" if row.report.compile_s else "–",
            f"{row.report.swap_ms:.2f}",
            row.report.source,
            str(row.report.recompiles),
            readable(row.image),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    left = {0, 1, 5, len(head) - 1}

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, lines)])


def readable(path: Path) -> str:
    """The path for people: relative to the working directory where it is inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
