"""What of a model stays on the device, and what comes block by block: decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import SettingsError
from ..hardware import hardware_of
from ..memory.budgets import GB, device_pool_bytes, with_strengths
from ..quantize.modes import MODES, find_mode
from ..settings import Offload
from ..spec import ModelSpec
from .sizes import WeightSizes, Workload, weight_sizes


@dataclass(frozen=True)
class OffloadPlan:
    """Where an engine's weights go.

    Attributes:
        mode: "none" (all on the device), "model" (all on the device while it samples, on the host between phases) or
            "stream" (some blocks on the device, the others copied there one after another in every step).
        resident_blocks: how many blocks stay on the device under "stream"; the others share a ring of staging buffers.
        total_blocks: blocks of the model.
        device_bytes: what the engine will take of the device: resident weights and staging, without LoRAs and
            activations.
        copied_bytes_per_step: host-to-device bytes of one forward.
        sentence: one line that says what it does and why.
        lora_bytes: what LoRAs may keep of the device.
        activation_bytes: what one forward needs beside the weights.
    """

    mode: str
    resident_blocks: int
    total_blocks: int
    device_bytes: int
    copied_bytes_per_step: int
    sentence: str
    lora_bytes: int = 0
    activation_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """What the device holds while the engine computes."""
        return self.device_bytes + self.lora_bytes + self.activation_bytes


@dataclass(frozen=True)
class Room:
    """A device's memory before an engine is loaded.

    Attributes:
        free_bytes: what nothing uses.
        held_bytes: what other models hold, and give back when the engine asks for it.
        shared: whether it is the host's own memory, as on a CPU.
    """

    free_bytes: int
    held_bytes: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Demand:
    """What an engine asks of a device.

    Attributes:
        weights: of the checkpoint, in the form in which they are kept.
        activation_bytes: of one forward of `workload`.
        workload: what that forward computes, for the sentence.
        quantized: (mode, bytes it needs with every block streamed, LoRAs not counted) of each mode, for a refusal.
    """

    weights: WeightSizes
    activation_bytes: int
    workload: str
    quantized: Sequence[tuple[str, int]] = ()


def demand_of(
    spec: ModelSpec,
    dtype: torch.dtype,
    quantization: str,
    compiled: bool,
    workload: Workload = Workload(),
    device: torch.device | None = None,
) -> Demand:
    """What an engine will ask for, from the checkpoint's header alone.

    Args:
        spec: the checkpoint.
        dtype: what the engine computes in.
        quantization: one of `settings.QUANTIZATION_MODES`.
        compiled: whether its blocks are compiled.
        workload: what one forward computes.
        device: a refusal names only quantizations that run on it; None: any.
    """
    chosen = find_mode(quantization)
    weights = weight_sizes(spec, dtype, chosen)
    activations = workload.activation_bytes(spec, dtype, chosen, compiled)
    quantized = []
    for mode in MODES.values():
        if device is None or mode.missing(hardware_of(device)) is None:
            # Quantized rows of activations take memory too: a mode with smaller weights may need more in all.
            streamed = weight_sizes(spec, dtype, mode).on_device(0)
            quantized.append((mode.name, streamed + workload.activation_bytes(spec, dtype, mode, compiled)))
    return Demand(weights, activations, str(workload), tuple(quantized))


def check_device(offload: Offload, device: torch.device) -> None:
    """Make sure that a mode makes sense on a device.

    Raises:
        SettingsError: it does not.
    """
    if offload.mode == "model" and device.type == "cpu":
        raise SettingsError(
            "offload is 'model', which moves the weights between a GPU and host memory, but the transformer runs on "
            "the CPU: choose 'auto' or 'none'."
        )


def make_plan(demand: Demand, offload: Offload, room: Room) -> OffloadPlan:
    """Decide where the weights go.

    Returns:
        Under "auto": "none" when everything fits the device while the engine computes, else "stream" with as many
        resident blocks as fit; on a CPU always "none".

    Raises:
        SettingsError: it does not fit; with the numbers, and what would.
    """
    if room.shared and offload.mode in ("auto", "none"):
        count, size = len(demand.weights.blocks), demand.weights.total
        sentence = f"none: {gb(size)} of weights stay where they are, because the transformer runs on the CPU"
        return OffloadPlan("none", count, count, size, 0, sentence, lora_share(0), demand.activation_bytes)
    budget = _budget(offload, room)
    left = budget.bytes - demand.activation_bytes
    lora_bytes = lora_share(left - demand.weights.total)
    if offload.mode != "stream" and demand.weights.total + lora_bytes <= left:
        mode = "none" if offload.mode == "auto" else offload.mode
        return _whole(mode, demand, lora_bytes, f"of {budget}")
    lora_bytes = lora_share(0)
    resident = demand.weights.most_resident(left - lora_bytes)
    if offload.mode in ("none", "model") or resident is None:
        raise SettingsError(_refusal(demand, offload, budget, resident))
    return _streamed(demand, resident, lora_bytes, f"of {budget}")


def lora_share(free_bytes: int) -> int:
    """What LoRAs take of a device at most: their pool, and what is kept for changes of strength."""
    return with_strengths(device_pool_bytes(free_bytes))


def refit(demand: Demand, offload: Offload, weights_bytes: float) -> OffloadPlan:
    """Plan for a device whose owner says how much weights and staging may take of it: never refuses.

    Args:
        demand: what the engine asks for.
        offload: what the user chose; "none" and "model" keep everything on the device all the same.
        weights_bytes: what weights and staging may take, `lora_share(0)` for LoRAs not counted; when not even 0
            resident blocks fit, there are none.
    """
    weights = demand.weights
    if offload.mode in ("none", "model") or (offload.mode == "auto" and weights.total <= weights_bytes):
        mode = "none" if offload.mode == "auto" else offload.mode
        left = int(max(0, weights_bytes - weights.total))
        return _whole(mode, demand, lora_share(lora_share(0) + left), "of what is free now")
    resident = weights.most_resident(weights_bytes) or 0
    return _streamed(demand, resident, lora_share(0), "of what is free now")


@dataclass(frozen=True)
class _Budget:
    """Bytes that an engine may take in all, and where they come from."""

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{gb(self.bytes)} ({self.source})"


def _budget(offload: Offload, room: Room) -> _Budget:
    there = room.free_bytes + room.held_bytes
    held = f", {gb(room.held_bytes)} in other models, which give way" if room.held_bytes else ""
    if offload.vram_budget_gb:
        asked = round(offload.vram_budget_gb * GB)
        if asked <= there:
            return _Budget(asked, "vram_budget_gb")
        return _Budget(there, f"vram_budget_gb is {gb(asked)}, but only {gb(room.free_bytes)} are free{held}")
    reserve = round(offload.reserve_gb * GB)
    return _Budget(max(0, there - reserve), f"{gb(room.free_bytes)} free{held}, {gb(reserve)} in reserve")


def _whole(mode: str, demand: Demand, lora_bytes: int, why: str) -> OffloadPlan:
    weights = demand.weights
    peak = weights.total + lora_bytes + demand.activation_bytes
    between = "; on the host between samplings" if mode == "model" else ""
    sentence = (
        f"{mode}: {_parts(weights.total, lora_bytes, demand)} = {gb(peak)} {why}; all weights stay on the "
        f"device while it samples{between}"
    )
    count = len(weights.blocks)
    return OffloadPlan(mode, count, count, weights.total, 0, sentence, lora_bytes, demand.activation_bytes)


def _streamed(demand: Demand, resident: int, lora_bytes: int, why: str) -> OffloadPlan:
    weights = demand.weights
    count, taken = len(weights.blocks), weights.on_device(resident)
    peak = taken + lora_bytes + demand.activation_bytes
    staging = weights.staging(resident)
    copied = weights.copied_per_step(resident)
    sentence = (
        f"stream: all {gb(weights.total)} of weights do not fit, {resident} of {count} blocks stay and "
        f"{gb(copied)} are copied in each step: {_parts(taken - staging, lora_bytes, demand)} + "
        f"{gb(staging)} staging = {gb(peak)} {why}"
    )
    return OffloadPlan("stream", resident, count, taken, copied, sentence, lora_bytes, demand.activation_bytes)


def _parts(weights: int, lora_bytes: int, demand: Demand) -> str:
    return (
        f"{gb(weights)} weights + {gb(lora_bytes)} LoRAs + {gb(demand.activation_bytes)} for a step of "
        f"{demand.workload}"
    )


def _refusal(demand: Demand, offload: Offload, budget: _Budget, resident: int | None) -> str:
    weights, lora_bytes = demand.weights, lora_share(0)
    beside = lora_bytes + demand.activation_bytes
    if resident is not None:
        needed = weights.total + beside
        return (
            f"offload is '{offload.mode}', which needs {_parts(weights.total, lora_bytes, demand)} = "
            f"{gb(needed)}, but the engine may take {budget}. Choose 'auto' or 'stream': it would fit with {resident} "
            f"of {len(weights.blocks)} blocks on the device."
        )
    least = weights.on_device(0) + beside
    fits = [name for name, needed in demand.quantized if needed + lora_bytes <= budget.bytes]
    ways = [f"quantization '{fits[0]}'"] if fits else []
    ways.append(f"{gb(least)} for the engine (a higher vram_budget_gb, a lower reserve, or other programs closed)")
    ways.append("a smaller picture or batch")
    return (
        f"offload: even with every block streamed the engine needs {gb(weights.rest)} of weights outside the blocks + "
        f"{gb(weights.staging(0))} staging + {gb(lora_bytes)} LoRAs + {gb(demand.activation_bytes)} for a step of "
        f"{demand.workload} = {gb(least)}, but it may take {budget}. What would fit: {'; or '.join(ways)}."
    )


def gb(size: int) -> str:
    """A size for people, with about three digits."""
    if size < GB // 10:
        return f"{size / 1e6:.1f} MB"
    return f"{size / GB:.1f} GB" if size >= 9.995 * GB else f"{size / GB:.2f} GB"
