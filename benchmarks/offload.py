"""A step of FLUX.1-dev that does not fit the device: the copies of its blocks, its computation, and both at once.

On a CPU a pool of host memory stands for the device, a thread for the copy stream; every byte is really copied.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accel.engine import Engine
from accel.families.flux1 import Flux1Config, Flux1Inputs
from accel.memory.budgets import GB, available_host_bytes
from accel.memory.device import DeviceMemory, HostMemory, memory_of
from accel.offload.plan import OffloadPlan, Room, demand_of, lora_share, make_plan
from accel.quantize import find_mode, refusal
from accel.settings import EngineSettings, Offload, Quantization

from .device_memory import peak_bytes, start_peak
from .flux_loras import DTYPE, QUICK
from .load import scaled
from .random_checkpoint import random_spec
from .report import BenchmarkError, Goal, OtherLoad, Report, Row, figure
from .timing import CPU, Stopwatch, Variant, interleave_timed

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
NAMES = ("copy", "compute", "streamed")


@dataclass(frozen=True)
class Case:
    """What is measured: the model, tokens, rounds, and on which device with which quantization."""

    config: Flux1Config
    latent: int
    text_tokens: int
    compile: str
    rounds: int
    device: torch.device = CPU
    mode: str = MODE


QUICK_CASE = Case(QUICK, 16, 16, "off", QUICK_ROUNDS)


def run(quick: bool, scale: float = 1.0, device: str = "cpu") -> Report:
    """Load random weights by a plan, and time the parts of a step in turn.

    Args:
        quick: a narrow model, not compiled.
        scale: share of FLUX.1-dev's blocks.
        device: where it runs.

    Raises:
        BenchmarkError: there is not the memory, or a step did something else than planned.
    """
    case = case_of(quick, scale, torch.device(device))
    planned = plan_of(case)
    needed = planned.weights_bytes + HOST_MARGIN_BYTES
    if not quick and available_host_bytes() < needed:
        raise BenchmarkError(
            f"it needs {needed / GB:.0f} GB of memory for distinct bytes of all blocks, "
            f"{available_host_bytes() / GB:.0f} GB are free: run it later, or with a smaller --scale."
        )
    load = OtherLoad()
    memory = memory_for(case, planned.plan)
    samples = Steps(case, planned.plan, memory).measure()
    return _report(case, planned, memory, samples, load.share())


def case_of(quick: bool, scale: float, device: torch.device) -> Case:
    """The case for a device: a picture of 320 × 320 on a CPU, of 1024 × 1024 elsewhere."""
    if quick:
        return replace(QUICK_CASE, device=device)
    if device.type == "cpu":
        return Case(scaled(scale), 40, 192, "regional", ROUNDS)
    mode = next((name for name in ("fp8", "int8") if refusal(find_mode(name), device) is None), "int8_weight_only")
    return Case(scaled(scale), 128, 512, "regional", ROUNDS, device, mode)


def memory_for(case: Case, plan: OffloadPlan) -> DeviceMemory:
    """The device's memory; on a CPU a pool for what was planned."""
    if case.device.type == "cpu":
        return HostMemory(math.floor(plan.device_bytes * GOAL_PEAK), flat=True)
    return memory_of(case.device)


@dataclass(frozen=True)
class Planned:
    """A plan, the card that it is for, and all weights."""

    plan: OffloadPlan
    card_bytes: int
    weights_bytes: int


def plan_of(case: Case) -> Planned:
    """The plan for a card on which the same share of the blocks stays as of FLUX.1-dev on one of 8 GB."""
    demand = demand_of(random_spec(case.config), DTYPE, case.mode, case.compile != "off")
    weights = demand.weights
    offload = Offload("stream")
    taken = weights.on_device(round(RESIDENT_SHARE * len(weights.blocks)))
    card = taken + lora_share(0) + demand.activation_bytes + round(offload.reserve_gb * GB)
    return Planned(make_plan(demand, offload, Room(card)), card, weights.total)


class Steps:
    """One engine, and the three parts of its step that are timed."""

    def __init__(self, case: Case, plan: OffloadPlan, memory: DeviceMemory) -> None:
        """Draw with all weights on the device; then load by the plan, and compile by running once."""
        self._case = case
        self._plan = plan
        self._memory = memory
        self._inputs = _inputs(case, memory.device)
        self._expected = self._resident()
        self._engine = self._made(plan, memory)
        self._engine(self._inputs)

    def _made(self, plan: OffloadPlan | None, memory: DeviceMemory | None) -> Engine:
        case = self._case
        quantization = Quantization(case.mode)
        settings = EngineSettings(
            compile=case.compile, device=str(case.device), quantization=quantization, offload=Offload("stream")
        )
        engine = Engine(random_spec(case.config, case.device), settings, plan=plan, memory=memory)
        engine.load()
        return engine

    def _resident(self) -> Tensor:
        engine = self._made(None, None)
        output = engine(self._inputs).clone()
        if not output.isfinite().all():
            raise BenchmarkError("the output of random weights is not finite.")
        engine.release()
        del engine
        start_peak(self._case.device)
        return output

    def measure(self, ends: float | None = None) -> dict[str, list[float]]:
        """Seconds of each part, in turn.

        Args:
            ends: begin no further round after this time (`time.monotonic`), if each has a sample.

        Raises:
            BenchmarkError: a step copied other bytes than planned, or computed something else than the resident model.
        """
        parts = zip(NAMES, (self._copy, self._compute, self._stream), strict=True)
        variants = [Variant(name, part) for name, part in parts]
        last = variants[-1]
        variants[-1] = replace(last, check=self._check)
        timed = interleave_timed(variants, self._case.rounds, 1, Stopwatch(self._case.device), ends)
        return {name: [sample.done_ms / 1e3 for sample in samples] for name, samples in timed.items()}

    def _copy(self) -> None:
        """All copies of one step, without what they are for."""
        ring = self._engine._weights.ring
        for block in range(self._plan.total_blocks):
            ring.enter(block)
            ring.leave(block)
        self._memory.finish()

    def _compute(self) -> None:
        """All blocks, each with whatever weights lie in its buffer."""
        with _Replaced(self._memory, "copy", lambda target, pieces, after: self._memory.mark()):
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
        for slot in self._engine._weights.ring._slots:
            for start, piece in self._engine._weights.ring._sources[slot.holds]:
                there = slot.buffer[start : start + piece.numel()]
                if not torch.equal(there, piece.to(there.device)):
                    raise BenchmarkError("the bytes of a block did not arrive.")
        # The buffers were empty before, so the first blocks come once more.
        if not 0 <= self._copied - self._plan.copied_bytes_per_step <= self._plan.device_bytes:
            raise BenchmarkError(
                f"a step copied {self._copied:,} bytes, planned were {self._plan.copied_bytes_per_step:,}."
            )
        if not torch.equal(self._output, self._expected):
            raise BenchmarkError("a streamed step computed something else than the resident model.")


class _Replaced:
    """Puts a function in another's place for the length of a `with`."""

    def __init__(self, owner: object, name: str, function: Callable) -> None:
        self._owner, self._name, self._function = owner, name, function

    def __enter__(self) -> None:
        setattr(self._owner, self._name, self._function)

    def __exit__(self, *_: object) -> None:
        delattr(self._owner, self._name)


def _inputs(case: Case, device: torch.device) -> Flux1Inputs:
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=generator)

    return Flux1Inputs(
        latent=normal(1, 16, case.latent, case.latent),
        timestep=torch.full((1,), 0.7, device=device),
        encoder_hidden_states=normal(1, case.text_tokens, case.config.context_dim),
        pooled_projections=normal(1, case.config.pooled_dim),
        guidance=torch.full((1,), 3.5, device=device),
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
    planned: Planned,
    memory: DeviceMemory,
    samples: Mapping[str, Sequence[float]],
    other_cpu_share: float | None,
) -> Report:
    values = {
        **figures(case, planned, memory, samples),
        "card_gb": planned.card_bytes / GB,
        "group_offloading": group_offloading(),
        "other_cpu_share": other_cpu_share,
    }
    plan, card_gb, overlap = planned.plan, planned.card_bytes / GB, values["overlap"]
    median = {f"{name}_s": values[f"{name}_s"] for name in NAMES}
    pixels = 8 * case.latent
    rows = (
        Row("blocks that stay", f"{plan.resident_blocks} of {plan.total_blocks}", f"a card of {card_gb:.1f} GB"),
        Row("device, planned", f"{plan.device_bytes / GB:.3f} GB", "weights and staging"),
        Row("device, most at once", f"{values['peak_bytes'] / GB:.3f} GB"),
        Row("copied per step", f"{plan.copied_bytes_per_step / GB:.3f} GB"),
        Row("copies alone", f"{figure(median['copy_s'])} s", _rate(plan, median["copy_s"])),
        Row("computation alone", f"{figure(median['compute_s'])} s"),
        Row("one after the other", f"{figure(median['copy_s'] + median['compute_s'])} s", "their sum"),
        Row("streamed step", f"{figure(median['streamed_s'])} s"),
        Row("overlap", f"{overlap:.3f}", "streamed step over the longer of the two; 1 is perfect"),
        Row("diffusers' group offloading", "", values["group_offloading"]),
    )
    notes = (
        []
        if case.device.type != "cpu"
        else [
            "A pool of host memory with a hard limit stands for the device, and a thread for the copy stream: on this "
            "machine a copy takes memory bandwidth and a core from the computation, which on a GPU it does not.",
        ]
    )
    notes += [
        "Random weights of their own for every block: nothing is shared, all bytes are copied. The computation alone "
        "runs with whatever lies in the staging buffers.",
        "Group offloading without streams moves modules between devices, of which a CPU has one, so it copies nothing "
        "here. With fullgraph compiling, or streams and torchao weights, it works nowhere (diffusers 0.42).",
    ]
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile.")
    goals = [Goal("streamed step over the longer of copies and computation", overlap, GOAL_OVERLAP)]
    if case.device.type == "cpu":
        peak = values["peak_bytes"] / plan.device_bytes
        goals.append(Goal("most bytes on the device over the plan", peak, GOAL_PEAK))
    title = (
        f"{plan.total_blocks} blocks, hidden {case.config.hidden_size}, {case.mode}, {pixels}×{pixels} pixels "
        f"and {case.text_tokens} text tokens, streamed, {case.device.type}; medians of {values['rounds']} rounds"
    )
    milliseconds = {name: [1e3 * sample for sample in each] for name, each in samples.items()}
    return Report(title, rows, values, goals, notes, milliseconds)


def figures(
    case: Case, planned: Planned, memory: DeviceMemory, samples: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What a run found, as the JSON file has it; `samples` in seconds, of `Steps.measure`."""
    # Of each round: what else the machine does hits its three parts alike.
    rounds = list(zip(*(samples[name] for name in NAMES), strict=True))
    plan = planned.plan
    most = memory.peak_bytes if isinstance(memory, HostMemory) else peak_bytes(case.device)
    return {
        "planned_peak_bytes": plan.device_bytes,
        "peak_bytes": most,
        "copied_bytes_per_step": plan.copied_bytes_per_step,
        **{f"{name}_s": statistics.median(samples[name]) for name in NAMES},
        "overlap": statistics.median(streamed / max(copy, compute) for copy, compute, streamed in rounds),
        "bit_equal": True,  # else `Steps` has raised
        "resident_blocks": plan.resident_blocks,
        "total_blocks": plan.total_blocks,
        "host_bytes": memory.host_bytes,
        "pinned_bytes": memory.pinned_bytes,
        "rounds": len(rounds),
        "quantization": case.mode,
    }


def _rate(plan: OffloadPlan, copy_s: float) -> str:
    return f"{plan.copied_bytes_per_step / GB / copy_s:.1f} GB/s"
