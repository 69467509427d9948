"""What LoRA layers cost per step: compiled blocks of real width on one device, with and without them, in one process.

All variants share their base weights, and take turns. A ratio is the median, over the rounds, of the ratio to the bare
blocks of the same round: so what else the machine does hits both alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .block_steps import NAMES, Case, Steps
from .families.base import Tokens
from .families.registry import DEFAULT, config_of, of
from .report import Goal, OtherLoad, Report, Row, figure
from .timing import Stopwatch, Timed, interleave_timed, median

ROUNDS = 41
QUICK_ROUNDS = 3
WARM_UP = 2
# The system itself takes a percent or two.
QUIET_SHARE = 0.05
GOALS = {"empty": 1.01, "rank16": 1.03, "rank128": 1.09}
TEXT_TOKENS = 512
NOTES = (
    "none: our block functions over bare linears. empty to stack4: the same functions over the pack's LoRA layers, one "
    "compiled code for all of them. peft_rank16: the same functions over PEFT's layers, which hold the LoRA of rank16.",
    "Each LoRA is on all linears of both blocks; stack4 is four LoRAs of rank 16.",
)


FULL_TOKENS, QUICK_TOKENS = Tokens(400, 192), Tokens(24, 8)


def run(
    quick: bool,
    device: str = "cpu",
    resolution: int | None = None,
    quantization: str = "none",
    family: str = DEFAULT,
) -> Report:
    """Compile, check that all variants compute what they should, and time them in turn.

    Args:
        quick: narrow blocks and few rounds.
        device: where it runs.
        resolution: of the picture; by default 320 × 320 on a CPU, with a shorter prompt, and 1024 × 1024 elsewhere.
        quantization: of the blocks' linears.
        family: name of a published model, whose width the blocks have.

    Raises:
        BenchmarkError: a variant computed something else, or compiled again.
    """
    case = case_of(quick, torch.device(device), resolution, quantization, family)
    load = OtherLoad()
    return _report(case, measure(case).samples, load.share())


def case_of(
    quick: bool, device: torch.device, resolution: int | None, mode: str, family: str = DEFAULT
) -> Case:
    """See `run`."""
    whole = config_of(family, quick)
    config = of(whole).one_of_each(whole.hidden_size)
    case = Case(config, QUICK_TOKENS, QUICK_ROUNDS) if quick else Case(config, FULL_TOKENS, ROUNDS)
    if device.type != "cpu":
        case = replace(case, device=device, attention="auto")
        resolution = resolution or (None if quick else 1024)
    if resolution is not None:
        image = (resolution // of(whole).family.pixels_per_token) ** 2
        case = replace(case, tokens=Tokens(image, QUICK_TOKENS.text if quick else TEXT_TOKENS))
    return replace(case, mode=mode)


@dataclass(frozen=True)
class Measured:
    """Samples of each variant, and what was measured, to go on with."""

    samples: Mapping[str, Sequence[Timed]]
    steps: Steps


def measure(case: Case, ends: float | None = None) -> Measured:
    """Check and time all variants.

    Args:
        case: what and where.
        ends: begin no further round after this time (`time.monotonic`), if each has a sample.

    Raises:
        BenchmarkError: a variant computed something else, or compiled again.
    """
    with torch.inference_mode(False), torch.no_grad():
        steps = Steps(case)
    steps.check_relations()
    stopwatch = Stopwatch(case.device)
    samples = interleave_timed(steps.variants(), case.rounds, WARM_UP, stopwatch, ends, rotate=True)
    steps.check_compiles()
    return Measured(samples, steps)


def figures(samples: Mapping[str, Sequence[Timed]]) -> dict[str, float]:
    """The JSON file's keys: `_ms` is the step between two events of the device, `_host_ms` the time to launch it."""
    ratios = _ratios(samples)
    return {
        **{f"{name}_ms": median(samples[name]).device_ms for name in NAMES},
        **{f"{name}_host_ms": median(samples[name]).host_ms for name in NAMES},
        **{f"{name}_over_none": statistics.median(ratios[name]) for name in NAMES if name != "none"},
    }


def _ratios(samples: Mapping[str, Sequence[Timed]]) -> dict[str, list[float]]:
    bare = samples["none"]
    return {
        name: [step.device_ms / other.device_ms for step, other in zip(samples[name], bare, strict=True)]
        for name in NAMES
    }


def _report(case: Case, samples: Mapping[str, Sequence[Timed]], other_cpu_share: float | None) -> Report:
    values, rounds, family = figures(samples), len(samples["none"]), of(case.config).family.name
    goals = tuple(
        Goal(f"{name}, step over that of a model without LoRA layers", values[f"{name}_over_none"], limit)
        for name, limit in GOALS.items()
    )
    content = {
        **values,
        "other_cpu_share": other_cpu_share,
        "rounds": rounds,
        "quantization": case.mode,
        "model": {
            "family": family,
            "hidden": case.config.hidden_size,
            "image_tokens": case.tokens.image,
            "text_tokens": case.tokens.text,
        },
    }
    what = "bf16" if case.mode == "none" else case.mode
    title = (
        f"A compiled step of one double and one single block of {family}, hidden {case.config.hidden_size}, "
        f"{case.tokens.image} image and {case.tokens.text} text tokens, {what}, "
        f"{case.device.type}; medians of {rounds} interleaved rounds"
    )
    notes = list(NOTES)
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(
            f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile: the times are too high, the "
            "ratios uncertain. Run it again alone."
        )
    steps_ms = {name: [step.device_ms for step in each] for name, each in samples.items()}
    return Report(title, tuple(_rows(content, _ratios(samples))), content, goals, notes, steps_ms)


def _rows(values: Mapping[str, float], ratios: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    yield Row("", "median ms", "over none, and the middle half of the rounds")
    for name in NAMES:
        ratio = values.get(f"{name}_over_none")
        remark = "" if ratio is None else f"{ratio:.3f}  ({_spread(ratios[name])})"
        yield Row(name, figure(values[f"{name}_ms"]), remark)


def _spread(ratios: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{low:.3f} – {high:.3f}"
