"""What `offload` found, as figures and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from accel.memory.base import DeviceMemory
from accel.memory.budgets import GB
from accel.memory.cpu import HostMemory
from accel.offload.plan import OffloadPlan

from .device_memory import peak_bytes
from .offload_case import GOAL_PEAK, NAMES, Case, Planned
from .report import Goal, Report, Row, figure

QUIET_SHARE = 0.05
GOAL_OVERLAP = 1.15
POOL_NOTE = (
    "A pool of host memory with a hard limit stands for the device, and a thread for the copy stream: on this "
    "machine a copy takes memory bandwidth and a core from the computation, which on a GPU it does not."
)
NOTES = (
    "Random weights of their own for every block: nothing is shared, all bytes are copied. The computation alone "
    "runs with whatever lies in the staging buffers.",
    "Group offloading without streams moves modules between devices, of which a CPU has one, so it copies nothing "
    "here. With fullgraph compiling, or streams and torchao weights, it works nowhere (diffusers 0.42).",
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


def report_of(
    case: Case,
    planned: Planned,
    memory: DeviceMemory,
    samples: Mapping[str, Sequence[float]],
    other_cpu_share: float | None,
) -> Report:
    """The table, the figures and the goals of a run; `samples` in seconds, of `offload.Steps.measure`."""
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
    notes = [*([POOL_NOTE] if case.device.type == "cpu" else []), *NOTES]
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
