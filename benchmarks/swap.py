"""Switching a LoRA, at FLUX.1-dev's sizes: every way to do it, side by side in one run.

The base weights are on the meta device, the LoRAs are real. Each switch is checked: what is bound afterwards must be,
bit for bit, the LoRA that was asked for, and must not have been bound before.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from accel.families.flux1 import Flux1Config
from accel.files import FileIdentity
from accel.lora.buffers import HostBuffers
from accel.lora.device import DeviceLoras
from accel.lora.file import read_lora
from accel.lora.flatten import FlatLora, flatten
from accel.lora.library import BUFFERS_BYTES
from accel.lora.stack import LoraStack
from accel.lora.weights import LoraLayer, LoraWeights
from harness.paths import CACHE

from . import flux_loras
from .cold_files import ColdFiles, read_into
from .flux_loras import DTYPE, KEY_PREFIX, RANK, STRENGTH, FusedLora, RandomLora, check_bound, random_lora
from .peers import DiffusersHotswap, PeftHotswap
from .pooled import POOLED, SHORT_RUNS, Pooled
from .prefetching import Prefetching, slowdown
from .report import BenchmarkError, Goal, OtherLoad, Report, Row, Variant, counted, figure, interleave, spread
from .stock_merge import StockMerge

CPU = torch.device("cpu")
ROUNDS = 11
QUICK_ROUNDS = 3
# Two fit on the device and three take turns, so that every `put` finds its LoRA gone.
LORA_COUNT = 3
RESIDENT_COUNT = 2
# See `Variant.runs`. Of what takes tens of milliseconds: the first ones use every buffer; of three others one may find
# the disk busy.
LONG_RUNS = RESIDENT_COUNT + 3
# Formats of the cold files beside the main one, diffusers'.
FUSED_FORMATS = ("kohya", "native")
# The system itself takes a percent or two.
QUIET_SHARE = 0.05
NOTES = (
    "No GPU: a second buffer in CPU memory stands in for the device (share_host=False). hot does the same work on a "
    "GPU; warm and memcpy show what the code adds to a copy, not how long a copy over PCIe takes.",
    "The pack, PEFT and diffusers each switch a whole model of their own with its base weights on the meta device; "
    "PEFT and diffusers put the LoRA there too, so its layers got real memory before the first switch.",
    "PEFT and diffusers find their tensors in memory and are not prepared for torch.compile, which would slow them.",
    f"In each round all but ComfyUI's merge and the steps run {LONG_RUNS} or {SHORT_RUNS} times on end; the median of "
    "the second half is the round's sample, because memory that lay idle while others ran is slow at first.",
    "The step of the prefetch figure is plain matrix products on all cores, not a model; neighbours are compared.",
)


def run(quick: bool) -> Report:
    """Measure all variants in turn.

    Args:
        quick: a small model and few rounds.

    Raises:
        BenchmarkError: a variant did not do its work.
    """
    config, rounds = (flux_loras.QUICK, QUICK_ROUNDS) if quick else (flux_loras.DEV, ROUNDS)
    load = OtherLoad()
    loras = [random_lora(config, f"lora-{seed}", seed) for seed in range(LORA_COUNT)]
    CACHE.mkdir(parents=True, exist_ok=True)  # not the system's temporary folder, which may be a RAM disk
    with (
        tempfile.TemporaryDirectory(prefix="bench-swap-", dir=CACHE) as folder,
        closing(StockMerge(config, {lora.name: lora for lora in loras})) as stock,
    ):
        switch = Switch(config, loras, ColdFiles(Path(folder)))
        variants = [*switch.variants(), *peer_variants(config, loras)]
        pooled = Pooled(config, loras)
        variants += pooled.variants()
        prefetching = Prefetching(config, loras, Path(folder), quick)
        variants += prefetching.variants()
        variants.append(in_turn("stock_merge", loras, lambda lora: stock.merge(lora.name)))
        samples = interleave(variants, rounds, warm_up=LORA_COUNT)
    return _report(config, samples, switch, stock, load.share())


def in_turn(
    name: str,
    loras: Sequence[Any],
    run: Callable[[Any], float | None],
    check: Callable[[Any], None] = lambda lora: None,
    prepare: Callable[[Any], None] = lambda lora: None,
    runs: int = 1,
) -> Variant:
    """A variant that takes another LoRA each time, in order."""
    turns, lora = itertools.cycle(loras), loras[0]

    def before() -> None:
        nonlocal lora
        lora = next(turns)
        prepare(lora)

    return Variant(name, lambda: run(lora), before, lambda: check(lora), runs)


def peer_variants(config: Flux1Config, loras: Sequence[RandomLora]) -> Iterator[Variant]:
    """PEFT and diffusers; both have the last LoRA loaded, so that the first switch changes something."""
    for name, kind in (("peft", PeftHotswap), ("diffusers", DiffusersHotswap)):
        peer = kind(config, loras[-1])
        yield in_turn(name, loras, lambda lora, peer=peer: peer.swap(), peer.check, peer.prepare, LONG_RUNS)


class Switch:
    """The pack's three ways to switch, and what they are measured against: one copy, one read.

    Attributes:
        layer_count: linears that a LoRA changes.
        lora_bytes: what one switch brings to the device.
        files: the cold files.
        cold_phases_ms: where the time of `cold` goes; for each of its runs, those that do not count included.
    """

    def __init__(self, config: Flux1Config, loras: Sequence[RandomLora], files: ColdFiles) -> None:
        """Prepare the LoRAs on the host, two of them on the device."""
        self.files = files
        self.cold_phases_ms: dict[str, list[float]] = defaultdict(list)
        self._loras = loras
        self._spec = flux_loras.spec_of(config)
        self._model, self._slots = flux_loras.slots_of(config)
        self._flats = {lora.name: _flatten(lora) for lora in loras}
        for lora in loras:
            files.add(lora.name, lora.state_dict(KEY_PREFIX))
        self.layer_count = len(loras[0].pairs)
        self.lora_bytes = self._flats[loras[0].name].bytes
        self._hot, self._warm, self._cold = (self._device_loras() for _ in range(3))
        for lora in loras[:RESIDENT_COUNT]:
            self._hot.put(lora.name, self._flats[lora.name])
        # As many targets as the device has buffers: memcpy and warm then touch equally much memory.
        targets = [torch.zeros_like(self._flats[loras[0].name].buffer) for _ in range(RESIDENT_COUNT)]
        self._targets = itertools.cycle(targets)
        self._target = targets[0]
        self._read_target = memoryview(bytearray())
        self._bound: Sequence[torch.Tensor] = ()
        self._warm_storages: set[int] = set()
        self._held: object = None
        # As an engine that has read a few LoRAs: their memory is used again.
        self._buffers = HostBuffers(BUFFERS_BYTES)
        linears = self._spec.family.layout(config).linears
        self._order = tuple(part.module for linear in linears for part in linear.parts)
        self._fused = [flux_loras.fused_lora(config, f"fused-{seed}", seed) for seed in range(RESIDENT_COUNT)]
        for lora, format in itertools.product(self._fused, FUSED_FORMATS):
            files.add(f"{format}-{lora.name}", lora.state_dict(format))

    def variants(self) -> list[Variant]:
        """hot, warm, memcpy, read, cold and cold by format."""
        residents = self._loras[:RESIDENT_COUNT]
        return [
            in_turn("hot", residents, self._bind_hot, lambda lora: self._check("hot", lora), self._step, SHORT_RUNS),
            in_turn("warm", self._loras, self._put_and_bind, self._check_warm, self._expect_absent, SHORT_RUNS),
            in_turn("memcpy", self._loras, self._copy, self._check_copy, self._choose_target, SHORT_RUNS),
            in_turn("read", self._loras, self._read, lambda lora: self.files.note_read(), self._drop, LONG_RUNS),
            in_turn("cold", self._loras, self._read_and_bind, self._check_cold, self._drop, LONG_RUNS),
            *(self._cold_fused(format) for format in FUSED_FORMATS),
        ]

    def _cold_fused(self, format: str) -> Variant:
        name = f"cold_{format}"

        def drop(lora: FusedLora) -> None:
            self._held = None
            self.files.drop(f"{format}-{lora.name}")

        def bind(lora: FusedLora) -> None:
            self._bind_file()

        def check(lora: FusedLora) -> None:
            self.files.note_read()
            self._check(name, lora)

        return in_turn(name, self._fused, bind, check, drop, LONG_RUNS)

    def _choose_target(self, lora: RandomLora) -> None:
        self._target = next(self._targets)

    def _copy(self, lora: RandomLora) -> None:
        self._target.copy_(self._flats[lora.name].buffer)

    def _check_copy(self, lora: RandomLora) -> None:
        if not flux_loras.same_bits(self._target, self._flats[lora.name].buffer):
            raise BenchmarkError(f"memcpy: the target does not hold '{lora.name}'.")

    def _step(self, lora: RandomLora) -> None:
        """Touch what a step touches: a switch follows a step, whose guards have just read every LoRA layer.

        Without this, hot measures how long the operating system takes to bring back pages that lay idle while the other
        variants ran (0.3 to 2.7 ms here, from run to run).
        """
        other = next(resident for resident in self._loras[:RESIDENT_COUNT] if resident.name != lora.name)
        self._hot.bind(other.name)

    def _bind_hot(self, lora: RandomLora) -> None:
        self._hot.bind(lora.name)

    def _expect_absent(self, lora: RandomLora) -> None:
        if lora.name in self._warm:
            raise BenchmarkError(f"warm: '{lora.name}' is still on the device, so there would be nothing to copy.")

    def _put_and_bind(self, lora: RandomLora) -> None:
        self._warm.put(lora.name, self._flats[lora.name])
        self._warm.bind(lora.name)

    def _check_warm(self, lora: RandomLora) -> None:
        self._check("warm", lora)
        storage = self._bound[0].untyped_storage().data_ptr()
        self._warm_storages.add(storage)
        if storage == self._flats[lora.name].buffer.untyped_storage().data_ptr():
            raise BenchmarkError("warm: the host buffer itself is bound; nothing was copied.")
        if len(self._warm_storages) > RESIDENT_COUNT:
            raise BenchmarkError(f"warm: a buffer was allocated though {RESIDENT_COUNT} could be reused.")

    def _drop(self, lora: RandomLora) -> None:
        self._held = None
        path = self.files.drop(lora.name)
        if len(self._read_target) != path.stat().st_size:
            self._read_target = memoryview(bytearray(b"\1" * path.stat().st_size))  # written, so it is really there

    def _read(self, lora: RandomLora) -> None:
        count = read_into(self.files.path, self._read_target)
        if count != len(self._read_target):
            raise BenchmarkError(f"read: {count:,} of {len(self._read_target):,} bytes came.")

    def _read_and_bind(self, lora: RandomLora) -> None:
        for phase, phase_ms in self._bind_file().items():
            self.cold_phases_ms[phase].append(phase_ms)

    def _bind_file(self) -> dict[str, float]:
        # What Engine.read_lora and Engine.swap do with a file that they have not seen.
        times = [time.perf_counter()]
        weights = read_lora(str(self.files.path), self._spec, buffers=self._buffers)
        times.append(time.perf_counter())
        stack = LoraStack().with_lora(weights, STRENGTH)
        flat = flatten(stack.active, DTYPE, pin=False, buffers=self._buffers, order=self._order)
        times.append(time.perf_counter())
        self._cold.put(stack.key, flat)
        self._cold.bind(stack.key)
        times.append(time.perf_counter())
        self._held = weights, flat  # the engine's pools keep both; freeing them is not part of the switch
        phases = zip(("read_lora", "flatten", "put_and_bind"), times, times[1:], strict=False)
        return {phase: (end - start) * 1e3 for phase, start, end in phases}

    def _check_cold(self, lora: RandomLora) -> None:
        self.files.note_read()
        self._check("cold", lora)

    def _check(self, variant: str, lora: RandomLora | FusedLora) -> None:
        bound = check_bound(variant, self._model, None, lora.scaled)
        if any(new is old for new, old in zip(bound, self._bound, strict=False)):
            raise BenchmarkError(f"{variant}: Parameters that were bound before are still bound.")
        self._bound = bound

    def _device_loras(self) -> DeviceLoras:
        return DeviceLoras(self._slots, CPU, RESIDENT_COUNT * self.lora_bytes, share_host=False)


def _flatten(lora: RandomLora) -> FlatLora:
    layers = tuple(LoraLayer(module, a, b, 1.0) for module, (a, b) in lora.pairs.items())
    weights = LoraWeights(FileIdentity(lora.name, 0, 0), layers, ())
    return flatten(LoraStack().with_lora(weights, STRENGTH).active, DTYPE, pin=False)


def _report(
    config: Flux1Config,
    samples: Mapping[str, Sequence[float]],
    switch: Switch,
    stock: StockMerge,
    other_cpu_share: float | None,
) -> Report:
    rounds = len(samples["hot"])
    ms = {name: statistics.median(values) for name, values in samples.items()}
    values = {
        "lora_bytes": switch.lora_bytes,
        **{f"{name}_ms": value for name, value in ms.items()},
        "cold_diffusers_ms": ms["cold"],
        "prefetch_slowdown": slowdown(samples),
        "warm_over_memcpy": _over(samples, "warm", ["memcpy"]),
        "hot_over_memcpy": _over(samples, "hot", ["memcpy"]),
        "cold_over_read_plus_memcpy": _over(samples, "cold", ["read", "memcpy"]),
        "peft_over_hot": _over(samples, "peft", ["hot"]),
        "diffusers_over_hot": _over(samples, "diffusers", ["hot"]),
        "stock_over_hot": _over(samples, "stock_merge", ["hot"]),
        "strength_over_multiply": _over(samples, "strength", ["multiply"]),
        "strength_minus_multiply_ms": _minus(samples, "strength", "multiply"),
        "stock_merge_sampled_layers": stock.sampled_layers,
        "stock_merge_layers": stock.layers,
        "cold_phases_ms": {
            phase: statistics.median(itertools.chain(*map(counted, _turns(each[-rounds * LONG_RUNS :]))))
            for phase, each in switch.cold_phases_ms.items()
        },
        "other_cpu_share": other_cpu_share,
        "rounds": rounds,
        "model": {"hidden": config.hidden_size, "double_blocks": config.depth, "single_blocks": config.depth_single},
    }
    goals = (
        Goal("hot, ms, against a hundredth of PEFT's hotswap", ms["hot"], ms["peft"] / 100),
        Goal("hot, ms, against a tenth of one memcpy", ms["hot"], ms["memcpy"] / 10),
        Goal("warm over memcpy", values["warm_over_memcpy"], 1.1),
        Goal("cold over read and memcpy", values["cold_over_read_plus_memcpy"], 1.5),
        Goal("another strength, ms, against 2 × hot and the product", ms["strength"], 2 * ms["hot"] + ms["multiply"]),
        Goal("prefetched, ms, against 2 × hot", ms["prefetched"], 2 * ms["hot"]),
        Goal("slowdown of a step while LoRAs are prepared without pause", values["prefetch_slowdown"], 0.03),
        Goal("300 × hot, ms, against diffusers", 300 * ms["hot"], ms["diffusers"]),
    )
    stock_note = (
        f"ComfyUI {stock.version}'s merge ran on {stock.sampled_layers} of {stock.layers} weights, one block of each "
        "type, CPU, bf16; stock_merge_ms multiplies each block's time by how many of its type the model has."
    )
    title = (
        f"Switch a LoRA: rank {RANK} on all {switch.layer_count} block linears of FLUX.1, hidden {config.hidden_size}, "
        f"{config.depth} + {config.depth_single} blocks, bf16, {switch.lora_bytes / 1e6:,.1f} MB; "
        f"medians of {rounds} interleaved rounds"
    )
    notes = [*NOTES, switch.files.describe(), stock_note]
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(
            f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile: all figures are too high, "
            "most of all those of many small operations. Run it again alone."
        )
    return Report(title, tuple(_rows(samples, values)), values, goals, notes, samples)


def _turns(runs: Sequence[float]) -> list[Sequence[float]]:
    return [runs[start : start + LONG_RUNS] for start in range(0, len(runs), LONG_RUNS)]


def _over(samples: Mapping[str, Sequence[float]], name: str, others: Sequence[str]) -> float:
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
        "stock_merge": f"ComfyUI, scaled up from a sample; {values['stock_over_hot']:,.0f} × hot",
    }
    yield Row("", "median ms", "middle half of the samples")
    for name, remark in remarks.items():
        yield Row(name, figure(values[f"{name}_ms"]), f"{spread(samples[name]):<17}  {remark}")
    for phase, phase_ms in values["cold_phases_ms"].items():
        yield Row(f"  cold: {phase}", figure(phase_ms))
