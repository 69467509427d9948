"""The figures of `pocket.evaluate` as tables in Markdown, for the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(figures: Mapping[str, Any]) -> str:
    """A table per kind of figure, for those that are there, and what they were made on.

    Args:
        figures: what `pocket.evaluate` writes.
    """
    sections = {"modes": _modes, "edits": _edits, "step cache": _step_cache, "svd": _svd, "fp8 merge": _merge}
    sections["loras"] = _loras
    parts = [section(figures[name]) for name, section in sections.items() if name in figures]
    made = figures["made on"]
    cpu = f"{made['machine']['cpu']}, {made['machine']['cores']} cores, torch {made['machine']['torch']}"
    prompts = ", ".join(f"{count} ({kind})" for kind, count in figures["prompts"].items())
    return "\n\n".join([*parts, f"Prompts: {prompts}. {cpu}, {made['date']}."]) + "\n"


def _modes(modes: Mapping[str, Any]) -> str:
    rows = []
    for name, mode in modes.items():
        if "follows" in mode:
            shares = (_percent(mode["follows"][kind]) for kind in ("shape and colour", "count", "place", "all"))
            rows.append([name, _db(mode["psnr_db"]), _db(mode["psnr_db_with_lora"]), *shares])
        else:
            rows.append([name, "cannot run here", "", "", "", "", ""])
    head = ["", "PSNR, dB", "with a LoRA, dB", "shape and colour right", "count", "place", "everything"]
    return _table(head, rows)


def _edits(edits: Mapping[str, Any]) -> str:
    kinds = ("shape", "colour", "shape and colour", "all")
    row = ["a reference in another colour", *(_percent(edits["follows"][kind]) for kind in kinds)]
    head = ["", "shape right", "colour", "shape and colour", "everything", "overlap with the reference"]
    return _table(head, [[*row, _percent(edits["overlap"])]])


def _step_cache(thresholds: Mapping[str, Any]) -> str:
    rows = [
        [name, _percent(found["skipped"]), _db(found["psnr_db"]), _percent(found["follows"]["shape and colour"])]
        for name, found in thresholds.items()
    ]
    return _table(["Step cache", "skipped", "PSNR, dB", "shape and colour right"], rows)


def _svd(ranks: Mapping[str, Any]) -> str:
    rows = [
        [name, _db(cut["psnr_db"]), f"{cut['effect']:.2f}", f"{cut['effect_of_whole']:.2f}"]
        for name, cut in ranks.items()
    ]
    return _table(["LoRA cut by SVD", "PSNR, dB", "effect", "of the whole LoRA"], rows)


def _merge(styles: Mapping[str, Any]) -> str:
    ways = list(next(iter(styles.values())))
    head = ["LoRA on fp8 weights", *(f"{way}, {what}" for way in ways for what in ("PSNR, dB", "effect"))]
    rows = [
        [style, *(cell for way in ways for cell in (_db(found[way]["psnr_db"]), f"{found[way]['effect']:.2f}"))]
        for style, found in styles.items()
    ]
    return _table(head, rows)


def _loras(stacks: Mapping[str, Any]) -> str:
    effects = {name: found for name, found in stacks.items() if isinstance(found, Mapping)}
    styles = list(next(iter(effects.values())))
    rows = [[name, *(f"{found[style]:.2f}" for style in styles)] for name, found in effects.items()]
    return _table(["LoRAs", *(f"{style}, measured" for style in styles)], rows)


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
