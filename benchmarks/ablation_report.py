"""What the ablation found, as figures: the table, the ratios to peers, the goals, the picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from accel.memory.budgets import GB

from .ablation_rows import ALL, BASELINE, PUBLISHED_S, Configuration
from .report import BenchmarkError, Goal, Report, Row, figure

# The system itself takes a percent or two.
QUIET_SHARE = 0.05
# Relative L2 between what two ways made of the same noise: rounding to bfloat16 or to 8 bits, through all steps.
SAME = {"none": 0.05, "int8": 0.15, "fp8": 0.3}
PUBLISHED_STEPS = 28
COLUMNS = (
    "configuration", "first image, s", "switch + image, s", "image, s", "× baseline", "peak, GB", "distance",
    "what",
)  # fmt: skip
NOTES = (
    "first image: read the weights, bind a LoRA, compile without any cache (not with --quick), draw; libraries are "
    "imported before. switch + image: the first image after a switch of LoRAs. image: another one with the same LoRA.",
    "× baseline: how many times faster than the baseline's image of the same round. peak: memory of the process, on a "
    "GPU the card's. distance: relative L2 between what it and the baseline made of the same noise.",
    "Every row draws from the same files, noise, timesteps and text embeddings; these are random numbers. Its LoRA is "
    "of rank 16 on all block linears unless files were given. PEFT finds its LoRA tensors in memory.",
)
PEER_NOTES = (
    "Peers and both compiled rows of this pack took turns; a ratio is the median over rounds. …_ms is a steady step, "
    "from the end of the step before. …_switch_s: read and apply the other LoRA, draw the first image.",
)


@dataclass
class Measured:
    """What one configuration did; lists hold one sample per image.

    Attributes:
        configuration: which one.
        failed: why it does not run here, or "".
        first_ms: load, compile, first image.
        peak_bytes: the most memory; None where the system does not tell.
        switch_ms: the first image after a switch of LoRAs, with the switch.
        image_ms: a further image with the same LoRA.
        steps_ms: median time of its steps.
        baseline_ms: the baseline's image of the same round.
        over_baseline: median of how many times faster than that it is; None where they did not take turns.
        changes: by LoRA ("A", "B" or "none"), what it made of the noise.
    """

    configuration: Configuration
    failed: str = ""
    first_ms: float = 0.0
    peak_bytes: int | None = None
    switch_ms: list[float] = field(default_factory=list)
    image_ms: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)
    over_baseline: float | None = None
    changes: dict[str, np.ndarray] = field(default_factory=dict)


def distance(change: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(change - reference) / np.linalg.norm(reference))


def check_changes(measured: Mapping[str, Measured]) -> None:
    """Make sure that nobody is fast by computing something else.

    Raises:
        BenchmarkError: a configuration is too far from the baseline, or nearer to its image with another LoRA.
    """
    baseline = measured[BASELINE]
    if baseline.failed:
        return
    for name, each in measured.items():
        for lora, change in each.changes.items():
            own = distance(change, baseline.changes[lora])
            limit = SAME[each.configuration.setup.quantization]
            if not own < limit:
                raise BenchmarkError(
                    f"{name}: with LoRA {lora} it is {own:.3g} from the baseline (relative L2), expected < {limit:g}."
                )
            others = {other: distance(change, value) for other, value in baseline.changes.items() if other != lora}
            for other, to_other in others.items():
                if not own < to_other / 2:
                    raise BenchmarkError(
                        f"{name}: with LoRA {lora} it is {own:.3g} from the baseline with that one, and {to_other:.3g} "
                        f"from it with LoRA {other}: not the LoRA that was asked for."
                    )


def report(
    title: str,
    measured: Mapping[str, Measured],
    quantized: str,
    steps: int,
    card: str,
    other_cpu_share: float | None,
) -> Report:
    """Put everything together.

    Args:
        title: what was measured.
        measured: by configuration.
        quantized: the mode that stands in the place of "fp8".
        steps: of an image.
        card: whose published figures stand beside; "" for none.
        other_cpu_share: see `report.OtherLoad`.
    """
    values = {name: _own_values(each, measured[BASELINE]) for name, each in measured.items()}
    compared = _compared(measured, quantized)
    published = PUBLISHED_S.get(card, {})
    columns = [*COLUMNS[:-1], *([f"published, {card}, s"] if card else []), COLUMNS[-1]]
    lines = [_line(name, measured[name], values[name], published if card else None) for name in measured]
    content = {
        **compared,
        "steps": steps,
        "quantization": quantized,
        "other_cpu_share": other_cpu_share,
        "configurations": values,
    }
    notes = [*NOTES, *(PEER_NOTES if compared else ())]
    if "switch_s" in compared:
        notes.append(_longer(measured, quantized, steps))
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(
            f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile: the times are too high, the "
            "ratios uncertain. Run it again alone."
        )
    return Report(
        title, tuple(_rows(columns, lines)), content, tuple(_goals(compared, quantized)), notes, _samples(measured),
        partial(draw, values), columns=columns, lines=lines,
    )  # fmt: skip


def _own_values(each: Measured, baseline: Measured) -> dict[str, Any]:
    if each.failed:
        return {"failed": each.failed}
    values: dict[str, Any] = {
        "first_image_s": each.first_ms / 1e3,
        "switch_s": statistics.median(each.switch_ms) / 1e3 if each.switch_ms else None,
        "image_s": statistics.median(each.image_ms) / 1e3,
        "step_ms": statistics.median(each.steps_ms),
        "over_baseline": each.over_baseline,
        "peak_bytes": each.peak_bytes,
    }
    shared = each.changes.keys() & baseline.changes.keys()
    values["distance"] = max((distance(each.changes[lora], baseline.changes[lora]) for lora in shared), default=None)
    return values


def _compared(measured: Mapping[str, Measured], quantized: str) -> dict[str, float]:
    """The ratios to peers, as far as they were measured; `_over_`: how many times faster this pack is."""
    pack = {quantized: measured.get(ALL), "bf16": measured.get(f"all but {quantized}")}
    peers = {
        name: measured.get(name.replace("_", " "))
        for name in ("stock_bf16", "stock_default", "stock_compile", "plain_compile", "diffusers_hotswap")
    }
    if not any(peer is not None and not peer.failed for peer in peers.values()):
        return {}
    peers = {name: peer for name, peer in peers.items() if peer is not None and not peer.failed}
    pack = {name: each for name, each in pack.items() if each is not None and not each.failed}
    values = {f"{name}_ms": statistics.median(each.steps_ms) for name, each in peers.items()}
    values |= {f"compiled_{name}_ms": statistics.median(each.steps_ms) for name, each in pack.items()}
    for name, each in pack.items():
        for peer, other in peers.items():
            values[f"{name}_over_{peer}"] = _faster(each.steps_ms, other.steps_ms)
    if "plain_compile" in peers and "bf16" in pack:
        values["lora_over_plain_compile"] = values.pop("bf16_over_plain_compile")
    switches = {"stock": "stock_bf16", "stock_default": "stock_default", "stock_compile": "stock_compile",
                "diffusers_hotswap": "diffusers_hotswap"}  # fmt: skip
    for name, prefix in ((quantized, "switch"), ("bf16", "bf16_switch")):
        if name not in pack:
            continue
        values[f"{prefix}_s"] = statistics.median(pack[name].switch_ms) / 1e3
        for short, peer in switches.items():
            if peer in peers:
                values[f"{short}_switch_s"] = statistics.median(peers[peer].switch_ms) / 1e3
                values[f"{prefix}_over_{short}"] = _faster(pack[name].switch_ms, peers[peer].switch_ms)
    return values


def _faster(own: Sequence[float], other: Sequence[float]) -> float:
    """Median of the ratios of the same round."""
    return statistics.median(theirs / ours for ours, theirs in zip(own, other, strict=True))


def _goals(compared: Mapping[str, float], quantized: str) -> Iterator[Goal]:
    limits = {
        f"{quantized}_over_stock_bf16": (f"step with {quantized}, times faster than stock ComfyUI in bf16", 1.6),
        f"{quantized}_over_stock_default": (
            f"step with {quantized}, times faster than stock ComfyUI as it starts on a CPU", 6.0,
        ),
        "bf16_over_stock_bf16": ("step with bf16, times faster than stock ComfyUI in bf16", 1.08),
        "lora_over_plain_compile": (
            "step with bf16 and a LoRA of rank 16, times faster than torch.compile without any LoRA", 1 / 1.03,
        ),
        "switch_over_stock_compile": (
            "first image after a switch, times faster than stock ComfyUI with TorchCompileModel", 5.0,
        ),
        "switch_over_stock": ("first image after a switch, times faster than stock ComfyUI in bf16", 2.0),
    }  # fmt: skip
    for key, (statement, limit) in limits.items():
        if key in compared:
            yield Goal(statement, compared[key], limit, at_least=True)


def _longer(measured: Mapping[str, Measured], quantized: str, steps: int) -> str:
    """A switch is paid once per image, so its ratio depends on the steps: say what it would be at the usual number."""

    def image_s(name: str) -> float | None:
        each = measured.get(name)
        if each is None or each.failed:
            return None
        more = (PUBLISHED_STEPS - steps) * statistics.median(each.steps_ms)
        return (statistics.median(each.switch_ms) + more) / 1e3

    own, parts = image_s(ALL), []
    for name in ("stock bf16", "stock default", "stock compile"):
        other = image_s(name)
        if other is not None:
            parts.append(f"{name} {other / own:.2f} ×")
    return (
        f"The first image after a switch has {steps} steps here. With {PUBLISHED_STEPS} steps of the measured length "
        f"it would take this pack ({quantized}) {own:.1f} s; the others: {', '.join(parts)} that."
    )


def _line(name: str, each: Measured, values: Mapping[str, Any], published: Mapping[str, float] | None) -> list[str]:
    beside = [] if published is None else [f"{published[name]:.3f}" if name in published else ""]
    if each.failed:
        return [name, *["—"] * 6, *beside, f"does not run: {each.failed}"]

    def cell(key: str, scale: float = 1.0) -> str:
        return "—" if values[key] is None else figure(values[key] / scale)

    cells = [cell("first_image_s"), cell("switch_s"), cell("image_s"), cell("over_baseline"), cell("peak_bytes", GB)]
    return [name, *cells, cell("distance"), *beside, each.configuration.what]


def _rows(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[Row]:
    table = [columns, *lines]
    widths = [max(len(line[index]) for line in table) for index in range(1, len(columns) - 1)]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line[1:-1], widths, strict=True)]
        yield Row(line[0], cells[0], "  ".join([*cells[1:], line[-1]]))


def _samples(measured: Mapping[str, Measured]) -> dict[str, Sequence[float]]:
    samples: dict[str, Sequence[float]] = {}
    for name, each in measured.items():
        if not each.failed:
            samples[f"{name}: switch"] = each.switch_ms
            samples[f"{name}: image"] = each.image_ms
            samples[f"{name}: step"] = each.steps_ms
    return samples


def draw(values: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a switch with its image and a further image of each configuration as bars."""
    from matplotlib.figure import Figure

    shown = {name: each for name, each in values.items() if "failed" not in each}
    picture = Figure(figsize=(8, 0.8 + 0.45 * len(shown)), layout="constrained")
    axes = picture.subplots()
    places = np.arange(len(shown))
    for offset, key, label, color in (
        (-0.2, "switch_s", "first image after a LoRA switch", "#d9822b"),
        (0.2, "image_s", "further image", "#2f7ed8"),
    ):
        amounts = [each[key] or 0.0 for each in shown.values()]
        bars = axes.barh(places + offset, amounts, 0.38, color=color, label=label)
        axes.bar_label(bars, [f" {figure(amount)}" if amount else "" for amount in amounts], fontsize=8)
    axes.set_yticks(places, list(shown))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=150)
