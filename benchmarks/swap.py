"""Switching a LoRA, at a published model's sizes: every way to do it, side by side in one run.

The base weights are on the meta device, the LoRAs are real. Each switch is checked: what is bound afterwards must be,
bit for bit, the LoRA that was asked for, and must not have been bound before.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from harness.paths import CACHE

from .cold_files import ColdFiles
from .families.base import Config
from .families.registry import DEFAULT, config_of, of
from .flux_loras import RANK, RandomLora, random_lora
from .peers import DiffusersHotswap, PeftHotswap
from .pooled import POOLED, SHORT_RUNS, Pooled
from .prefetching import Prefetching, slowdown
from .report import Goal, OtherLoad, Report, Row, figure, spread
from .stock_merge import StockMerge
from .switch import LONG_RUNS, LORA_COUNT, Switch, in_turn
from .timing import Stopwatch, Variant, counted, interleave_timed

ROUNDS = 11
QUICK_ROUNDS = 3
# The system itself takes a percent or two.
QUIET_SHARE = 0.05
NO_GPU = (
    "No GPU: a second buffer in CPU memory stands in for the device (share_host=False). hot does the same work on a "
    "GPU; warm and memcpy show what the code adds to a copy, not how long a copy over PCIe takes."
)
NOTES = (
    "The pack, PEFT and diffusers each switch a whole model of their own with its base weights on the meta device; "
    "PEFT and diffusers put the LoRA there too, so its layers got real memory before the first switch.",
    "PEFT and diffusers find their tensors in memory and are not prepared for torch.compile, which would slow them.",
    f"In each round all but ComfyUI's merge and the steps run {LONG_RUNS} or {SHORT_RUNS} times on end; the median of "
    "the second half is the round's sample, because memory that lay idle while others ran is slow at first.",
    "The step of the prefetch figure is plain matrix products on all cores, not a model; neighbours are compared.",
)


def run(quick: bool, device: str = "cpu", family: str = DEFAULT) -> Report:
    """Measure all variants in turn; ComfyUI's merge on a CPU only.

    Args:
        quick: a small model and few rounds.
        device: where the LoRAs go.
        family: name of a published model.

    Raises:
        BenchmarkError: a variant did not do its work.
    """
    rounds, where = QUICK_ROUNDS if quick else ROUNDS, torch.device(device)
    load = OtherLoad()
    with ExitStack() as stack:
        swaps = stack.enter_context(Swaps.made(quick, where, family))
        variants = [variant for group in GROUPS for variant in swaps.group(group)]
        stock = None
        if where.type == "cpu":
            loras = swaps.loras
            stock = stack.enter_context(closing(StockMerge(swaps.config, {lora.name: lora for lora in loras})))
            variants.append(in_turn("stock_merge", loras, lambda lora: stock.merge(lora.name)))
        timed = interleave_timed(variants, rounds, LORA_COUNT, Stopwatch(where))
        samples = {name: [sample.done_ms for sample in each] for name, each in timed.items()}
        return _report(swaps, samples, stock, load.share())


GROUPS = ("pack", "peers", "pools", "prefetching")


class Swaps:
    """What switches LoRAs on one device, by group; each is made when it is asked for.

    Attributes:
        config: the model's sizes.
        loras: those that take turns.
        device: where they go.
        switch: the group "pack", once it was made.
    """

    def __init__(self, quick: bool, device: torch.device, folder: Path, family: str = DEFAULT) -> None:
        """Make the LoRAs; `folder` is for files that are read cold, `family` names a published model."""
        self.config = config_of(family, quick)
        self.loras = [random_lora(self.config, f"lora-{seed}", seed, device=device) for seed in range(LORA_COUNT)]
        self.device = device
        self.switch: Switch | None = None
        self._folder = folder
        self._quick = quick

    @classmethod
    @contextmanager
    def made(cls, quick: bool, device: torch.device, family: str = DEFAULT) -> Iterator[Swaps]:
        """With a folder of its own, for the length of a `with`."""
        CACHE.mkdir(parents=True, exist_ok=True)  # not the system's temporary folder, which may be a RAM disk
        with tempfile.TemporaryDirectory(prefix="bench-swap-", dir=CACHE) as folder:
            yield cls(quick, device, Path(folder), family)

    def group(self, name: str) -> list[Variant]:
        """The variants of one of `GROUPS`."""
        if name == "pack":
            self.switch = Switch(self.config, self.loras, ColdFiles(self._folder), self.device)
            return self.switch.variants()
        if name == "peers":
            return list(peer_variants(self.config, self.loras, self.device))
        if name == "pools":
            return Pooled(self.config, self.loras, self.device).variants()
        return Prefetching(self.config, self.loras, self._folder, self._quick, self.device).variants()


def peer_variants(config: Config, loras: Sequence[RandomLora], device: torch.device) -> Iterator[Variant]:
    """PEFT and diffusers; both have the last LoRA loaded, so that the first switch changes something."""
    for name, kind in (("peft", PeftHotswap), ("diffusers", DiffusersHotswap)):
        peer = kind(config, loras[-1], device)
        yield in_turn(name, loras, lambda lora, peer=peer: peer.swap(), peer.check, peer.prepare, LONG_RUNS)


def _report(
    swaps: Swaps, samples: Mapping[str, Sequence[float]], stock: StockMerge | None, other_cpu_share: float | None
) -> Report:
    config, switch, rounds = swaps.config, swaps.switch, len(samples["hot"])
    values = {
        **_figures(samples, switch),
        "other_cpu_share": other_cpu_share,
        "rounds": rounds,
        "model": {
            "family": of(config).family.name,
            "hidden": config.hidden_size,
            "double_blocks": config.depth,
            "single_blocks": config.depth_single,
        },
    }
    notes = [*([NO_GPU] if swaps.device.type == "cpu" else []), *NOTES, switch.files.describe()]
    if stock is not None:
        values["stock_over_hot"] = over(samples, "stock_merge", ["hot"])
        values |= {"stock_merge_sampled_layers": stock.sampled_layers, "stock_merge_layers": stock.layers}
        notes.append(
            f"ComfyUI {stock.version}'s merge ran on {stock.sampled_layers} of {stock.layers} weights, one block of "
            "each type, CPU, bf16; stock_merge_ms multiplies each block's time by how many of its type the model has."
        )
    title = (
        f"Switch a LoRA: rank {RANK} on all {switch.layer_count} block linears of {of(config).family.name}, hidden "
        f"{config.hidden_size}, {config.depth} + {config.depth_single} blocks, bf16, "
        f"{switch.lora_bytes / 1e6:,.1f} MB, {swaps.device.type}; medians of {rounds} interleaved rounds"
    )
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(
            f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile: all figures are too high, "
            "most of all those of many small operations. Run it again alone."
        )
    return Report(title, tuple(_rows(samples, values)), values, _goals(values), notes, samples)


def _figures(samples: Mapping[str, Sequence[float]], switch: Switch) -> dict[str, Any]:
    """What the JSON file has of the samples: medians, and ratios of variants within their rounds."""
    ms = {name: statistics.median(values) for name, values in samples.items()}
    rounds = len(samples["hot"])
    return {
        "lora_bytes": switch.lora_bytes,
        **{f"{name}_ms": value for name, value in ms.items()},
        "cold_diffusers_ms": ms["cold"],
        "prefetch_slowdown": slowdown(samples),
        "warm_over_memcpy": over(samples, "warm", ["memcpy"]),
        "hot_over_memcpy": over(samples, "hot", ["memcpy"]),
        "cold_over_read_plus_memcpy": over(samples, "cold", ["read", "memcpy"]),
        "peft_over_hot": over(samples, "peft", ["hot"]),
        "diffusers_over_hot": over(samples, "diffusers", ["hot"]),
        "strength_over_multiply": over(samples, "strength", ["multiply"]),
        "strength_minus_multiply_ms": _minus(samples, "strength", "multiply"),
        "cold_phases_ms": {
            phase: statistics.median(itertools.chain(*map(counted, _turns(each[-rounds * LONG_RUNS :]))))
            for phase, each in switch.cold_phases_ms.items()
        },
    }


def _goals(values: Mapping[str, Any]) -> tuple[Goal, ...]:
    hot, multiply = values["hot_ms"], values["multiply_ms"]
    return (
        Goal("hot, ms, against a hundredth of PEFT's hotswap", hot, values["peft_ms"] / 100),
        Goal("hot, ms, against a tenth of one memcpy", hot, values["memcpy_ms"] / 10),
        Goal("warm over memcpy", values["warm_over_memcpy"], 1.1),
        Goal("cold over read and memcpy", values["cold_over_read_plus_memcpy"], 1.5),
        Goal("another strength, ms, against 2 × hot and the product", values["strength_ms"], 2 * hot + multiply),
        Goal("prefetched, ms, against 2 × hot", values["prefetched_ms"], 2 * hot),
        Goal("slowdown of a step while LoRAs are prepared without pause", values["prefetch_slowdown"], 0.03),
        Goal("300 × hot, ms, against diffusers", 300 * hot, values["diffusers_ms"]),
    )


def _turns(runs: Sequence[float]) -> list[Sequence[float]]:
    return [runs[start : start + LONG_RUNS] for start in range(0, len(runs), LONG_RUNS)]


def over(samples: Mapping[str, Sequence[float]], name: str, others: Sequence[str]) -> float:
    """How many times the others a variant takes: the median over rounds, each of which finds one state of a machine."""
    sums = map(sum, zip(*(samples[other] for other in others), strict=True))
    return statistics.median(own / whole for own, whole in zip(samples[name], sums, strict=True))


def _minus(samples: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """How much longer a variant takes than its neighbour, ms: likewise."""
    return statistics.median(own - its for own, its in zip(samples[name], samples[other], strict=True))


def _rows(samples: Mapping[str, Sequence[float]], values: Mapping[str, float]) -> Iterator[Row]:
    remarks = {
        "memcpy": "one copy of the same bytes, for comparison",
        "hot": "on the device: bind, right after a step",
        "warm": f"in host memory: one copy, bind; {values['warm_over_memcpy']:.2f} × memcpy",
        "read": "one read of the cold file, for comparison",
        "cold": f"from a cold file; {values['cold_over_read_plus_memcpy']:.2f} × (read + memcpy)",
        "cold_kohya": "from a cold file of sd-scripts: q, k and v share lora_A, so it is smaller",
        "cold_native": "from a cold file in ComfyUI's names, likewise",
        **POOLED,
        "step_alone": "matrix products of the model's width on all cores, for comparison",
        "step_prefetching": f"while LoRAs are prepared behind it without pause: {values['prefetch_slowdown']:+.1%}",
        "peft": f"hotswap_adapter_from_state_dict; {values['peft_over_hot']:,.0f} × hot",
        "diffusers": f"load_lora_adapter(hotswap=True); {values['diffusers_over_hot']:,.0f} × hot",
    }
    if "stock_merge" in samples:
        remarks["stock_merge"] = f"ComfyUI, scaled up from a sample; {values['stock_over_hot']:,.0f} × hot"
    yield Row("", "median ms", "middle half of the samples")
    for name, remark in remarks.items():
        yield Row(name, figure(values[f"{name}_ms"]), f"{spread(samples[name]):<17}  {remark}")
    for phase, phase_ms in values["cold_phases_ms"].items():
        yield Row(f"  cold: {phase}", figure(phase_ms))
