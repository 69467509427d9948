"""A step of FLUX.1-dev that does not fit the device: the copies of its blocks, its computation, and both at once.

A pool of host memory stands for the device, a thread for the copy stream; every byte is really copied.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.build import empty_model, linears
from accel.engine import Engine
from accel.families.flux1 import Flux1Config, Flux1Inputs
from accel.memory import available_host_bytes
from accel.offload.memory import HostMemory
from accel.offload.plan import GB, OffloadPlan, Room, demand_of, lora_share, make_plan
from accel.offload.weights import Weights
from accel.quantize import find_mode
from accel.settings import EngineSettings, Offload, Quantization

from .flux_loras import DTYPE, QUICK, spec_of
from .load import scaled
from .report import BenchmarkError, Goal, OtherLoad, Report, Row, figure

# Eager fp8 is emulated on a CPU, a hundred times slower than int8; either takes as many bytes.
MODE = "int8"
ROUNDS = 5
QUICK_ROUNDS = 3
QUIET_SHARE = 0.05
# What stays of FLUX.1-dev in 8 bits on a card of 8 GB.
RESIDENT_SHARE = 15 / 57
GOAL_OVERLAP = 1.15
GOAL_PEAK = 1.02
# Beside the weights: Python, libraries, activations, a block twice.
HOST_MARGIN_BYTES = 3 * GB
POOL = 2**24
# Random weights of this size keep the residual stream finite through all blocks.
WEIGHT_STD = 0.02
NAMES = ("copy", "compute", "streamed")


@dataclass(frozen=True)
class Case:
    """What is measured: the model, tokens, rounds."""

    config: Flux1Config
    latent: int
    text_tokens: int
    compile: str
    rounds: int


QUICK_CASE = Case(QUICK, 16, 16, "off", QUICK_ROUNDS)


def run(quick: bool, scale: float = 1.0) -> Report:
    """Load random weights by a plan, and time the parts of a step in turn.

    Args:
        quick: a narrow model, not compiled.
        scale: share of FLUX.1-dev's blocks.

    Raises:
        BenchmarkError: there is not the memory, or a step did something else than planned.
    """
    case = QUICK_CASE if quick else Case(scaled(scale), 40, 192, "regional", ROUNDS)
    plan = _plan(case)
    needed = plan.weights_bytes + HOST_MARGIN_BYTES
    if not quick and available_host_bytes() < needed:
        raise BenchmarkError(
            f"it needs {needed / GB:.0f} GB of memory for distinct bytes of all blocks, "
            f"{available_host_bytes() / GB:.0f} GB are free: run it later, or with a smaller --scale."
        )
    memory = HostMemory(math.floor(plan.plan.device_bytes * GOAL_PEAK), flat=True)
    steps = Steps(case, plan.plan, memory)
    load = OtherLoad()
    samples = steps.measure()
    return _report(case, plan, memory, samples, load.share())


@dataclass(frozen=True)
class _Planned:
    """A plan, the card that it is for, and all weights."""

    plan: OffloadPlan
    card_bytes: int
    weights_bytes: int


def _plan(case: Case) -> _Planned:
    """The plan for a card on which the same share of the blocks stays as of FLUX.1-dev on one of 8 GB."""
    demand = demand_of(spec_of(case.config), DTYPE, MODE, case.compile != "off")
    weights = demand.weights
    offload = Offload("stream")
    taken = weights.on_device(round(RESIDENT_SHARE * len(weights.blocks)))
    card = taken + lora_share(0) + demand.activation_bytes + round(offload.reserve_gb * GB)
    return _Planned(make_plan(demand, offload, Room(card)), card, weights.total)


class RandomEngine(Engine):
    """An engine whose weights are random bytes, different ones for every block, made without a checkpoint."""

    def _read_model(self, weights: Weights) -> nn.Module:
        family, config = self.spec.family, self.spec.config
        mode = find_mode(self.settings.quantization.mode)
        # Random numbers are made once; each weight is a stretch of them from a random place, converted on its own.
        generator = torch.Generator().manual_seed(0)
        largest = max(rows * columns for _, rows, columns in linears(self.spec))
        pool = torch.empty(largest + POOL, dtype=self.dtype).normal_(0.0, WEIGHT_STD, generator=generator)
        with torch.inference_mode(False), torch.no_grad():
            model = empty_model(self.spec)
            weights.begin(model)
            for vector in family.layout(config).vectors:
                self._put(model, weights, vector.parameter, torch.ones(vector.size, dtype=self.dtype))
            for name, out_features, in_features in linears(self.spec):
                start = int(torch.randint(POOL, (1,), generator=generator))
                weight = pool[start : start + out_features * in_features].view(out_features, in_features)
                bias = torch.zeros(out_features, dtype=self.dtype)
                if family.quantizable(name):
                    model.set_submodule(name, mode.convert(weight, bias, family.per_picture(name)).eval())
                    weights.placed(name)
                else:
                    self._put(model, weights, f"{name}.bias", bias)
                    self._put(model, weights, f"{name}.weight", weight.clone())
            weights.complete()
        return model

    def _put(self, model: nn.Module, weights: Weights, parameter: str, value: Tensor) -> None:
        module, _, name = parameter.rpartition(".")
        model.get_submodule(module)._parameters[name] = nn.Parameter(value, requires_grad=False)
        if name == "weight":
            weights.placed(module)


class Steps:
    """One engine, and the three parts of its step that are timed."""

    def __init__(self, case: Case, plan: OffloadPlan, memory: HostMemory) -> None:
        """Load by the plan, and compile by running once."""
        self._case = case
        self._plan = plan
        self._memory = memory
        settings = EngineSettings(compile=case.compile, quantization=Quantization(MODE), offload=Offload("stream"))
        self._engine = RandomEngine(spec_of(case.config), settings, plan=plan, memory=memory)
        self._engine.load()
        self._inputs = _inputs(case)
        self._expected = self._engine(self._inputs)
        if not self._expected.isfinite().all():
            raise BenchmarkError("the output of random weights is not finite.")

    def measure(self) -> dict[str, list[float]]:
        """Seconds of each part, in turn.

        Raises:
            BenchmarkError: a step copied other bytes than planned, or computed something else.
        """
        samples: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(self._case.rounds + 1):
            for name, part in zip(NAMES, (self._copy, self._compute, self._stream), strict=True):
                start = time.perf_counter()
                part()
                if number:  # the first round warms up
                    samples[name].append(time.perf_counter() - start)
            self._check()
        return samples

    def _copy(self) -> None:
        """All copies of one step, without what they are for."""
        ring = self._engine._weights.ring
        for block in range(self._plan.total_blocks):
            ring.enter(block)
            ring.leave(block)
        self._memory.finish()

    def _compute(self) -> None:
        """All blocks, each with whatever weights lie in its buffer."""
        with _Replaced(self._memory, "copy", lambda target, pieces, after: None):
            self._engine(self._inputs)
        # What it did not copy counts as there: the next step must not believe that.
        for slot in self._engine._weights.ring._slots:
            slot.holds = None

    def _stream(self) -> None:
        before = self._engine._weights.ring.copied_bytes
        self._output = self._engine(self._inputs)
        self._memory.finish()
        self._copied = self._engine._weights.ring.copied_bytes - before

    def _check(self) -> None:
        if not torch.equal(self._output, self._expected):
            raise BenchmarkError("a streamed step computed something else than the first one.")
        for slot in self._engine._weights.ring._slots:
            for start, piece in self._engine._weights.ring._sources[slot.holds]:
                if not torch.equal(slot.buffer[start : start + piece.numel()], piece):
                    raise BenchmarkError("the bytes of a block did not arrive.")
        # The buffers were empty before, so the first blocks come once more.
        largest = self._memory.peak_bytes
        if not 0 <= self._copied - self._plan.copied_bytes_per_step <= largest:
            raise BenchmarkError(
                f"a step copied {self._copied:,} bytes, planned were {self._plan.copied_bytes_per_step:,}."
            )


class _Replaced:
    """Puts a function in another's place for the length of a `with`."""

    def __init__(self, owner: object, name: str, function: Callable) -> None:
        self._owner, self._name, self._function = owner, name, function

    def __enter__(self) -> None:
        setattr(self._owner, self._name, self._function)

    def __exit__(self, *_: object) -> None:
        delattr(self._owner, self._name)


def _inputs(case: Case) -> Flux1Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE).normal_(generator=generator)

    return Flux1Inputs(
        latent=normal(1, 16, case.latent, case.latent),
        timestep=torch.full((1,), 0.7),
        encoder_hidden_states=normal(1, case.text_tokens, case.config.context_dim),
        pooled_projections=normal(1, case.config.pooled_dim),
        guidance=torch.full((1,), 3.5),
    )


def group_offloading() -> str:
    """What diffusers' own offloading by blocks with streams says on this machine."""
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    try:
        apply_group_offloading(nn.ModuleList([nn.Linear(8, 8)]), cpu, cpu, "block_level", 1, use_stream=True)
    except ValueError as error:
        return f"does not run: {error}"
    return "runs"


def _report(
    case: Case,
    planned: _Planned,
    memory: HostMemory,
    samples: Mapping[str, Sequence[float]],
    other_cpu_share: float | None,
) -> Report:
    median = {f"{name}_s": statistics.median(samples[name]) for name in NAMES}
    # Of each round: what else the machine does hits its three parts alike.
    rounds = zip(*(samples[name] for name in NAMES), strict=True)
    overlap = statistics.median(streamed / max(copy, compute) for copy, compute, streamed in rounds)
    plan, card_gb = planned.plan, planned.card_bytes / GB
    values: dict[str, Any] = {
        "planned_peak_bytes": plan.device_bytes,
        "peak_bytes": memory.peak_bytes,
        "copied_bytes_per_step": plan.copied_bytes_per_step,
        **median,
        "overlap": overlap,
        "resident_blocks": plan.resident_blocks,
        "total_blocks": plan.total_blocks,
        "host_bytes": memory.host_bytes,
        "card_gb": card_gb,
        "rounds": case.rounds,
        "quantization": MODE,
        "group_offloading": group_offloading(),
        "other_cpu_share": other_cpu_share,
    }
    pixels = 8 * case.latent
    rows = (
        Row("blocks that stay", f"{plan.resident_blocks} of {plan.total_blocks}", f"a card of {card_gb:.1f} GB"),
        Row("device, planned", f"{plan.device_bytes / GB:.3f} GB", "weights and staging"),
        Row("device, most at once", f"{memory.peak_bytes / GB:.3f} GB"),
        Row("copied per step", f"{plan.copied_bytes_per_step / GB:.3f} GB"),
        Row("copies alone", f"{figure(median['copy_s'])} s", _rate(plan, median["copy_s"])),
        Row("computation alone", f"{figure(median['compute_s'])} s"),
        Row("one after the other", f"{figure(median['copy_s'] + median['compute_s'])} s", "their sum"),
        Row("streamed step", f"{figure(median['streamed_s'])} s"),
        Row("overlap", f"{overlap:.3f}", "streamed step over the longer of the two; 1 is perfect"),
        Row("diffusers' group offloading", "", values["group_offloading"]),
    )
    notes = [
        "A pool of host memory with a hard limit stands for the device, and a thread for the copy stream: on this "
        "machine a copy takes memory bandwidth and a core from the computation, which on a GPU it does not.",
        "Random weights of their own for every block: nothing is shared, all bytes are copied. The computation alone "
        "runs with whatever lies in the staging buffers.",
        "Group offloading without streams moves modules between devices, of which a CPU has one, so it copies nothing "
        "here. With fullgraph compiling, or streams and torchao weights, it works nowhere (diffusers 0.42).",
    ]
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile.")
    goals = (
        Goal("streamed step over the longer of copies and computation", overlap, GOAL_OVERLAP),
        Goal("most bytes on the device over the plan", memory.peak_bytes / plan.device_bytes, GOAL_PEAK),
    )
    title = (
        f"{plan.total_blocks} blocks, hidden {case.config.hidden_size}, {MODE}, {pixels}×{pixels} pixels and "
        f"{case.text_tokens} text tokens, streamed on a CPU; medians of {case.rounds} rounds"
    )
    milliseconds = {name: [1e3 * sample for sample in each] for name, each in samples.items()}
    return Report(title, rows, values, goals, notes, milliseconds)


def _rate(plan: OffloadPlan, copy_s: float) -> str:
    return f"{plan.copied_bytes_per_step / GB / copy_s:.1f} GB/s"
