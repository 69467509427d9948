"""How much of the device an engine may take, from what ComfyUI says of it; and what to say when that was too much."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import torch

from ..accel.engine import Engine
from ..accel.errors import DeviceMemoryError
from ..accel.memory.budgets import GB
from ..accel.offload.plan import Room, check_device, demand_of, gb
from ..accel.offload.planner import SPARE_BYTES, Planner
from ..accel.settings import Offload
from .progress import say


def planner_for(engine: Engine) -> Planner:
    """Plan an engine on its device as ComfyUI has it now, and say what comes out.

    Raises:
        SettingsError: it does not fit; see `plan.make_plan`.
    """
    settings, device = engine.settings, engine.device
    check_device(settings.offload, device)
    compiled = settings.compile != "off"
    demand = demand_of(engine.spec, engine.dtype, settings.quantization.mode, compiled, device=device)
    planner = Planner(demand, _with_reserve(settings.offload), _room_on(device))
    say(f"offload {planner.plan.sentence}")
    return planner


def _room_on(device: torch.device) -> Room:
    """What a device has for an engine, now: other models of ComfyUI give way when it loads."""
    models = comfy.model_management.current_loaded_models
    held = sum(each.model_loaded_memory() for each in models if each.device == device and each.model is not None)
    shared = device.type == "cpu"
    return Room(int(comfy.model_management.get_free_memory(device)), 0 if shared else int(held), shared)


def _with_reserve(settings: Offload) -> Offload:
    """The settings with at least the reserve of ComfyUI's --reserve-vram."""
    least = comfy.model_management.extra_reserved_memory() / GB
    return dataclasses.replace(settings, reserve_gb=max(settings.reserve_gb, least))


def further_reserve(settings: Offload) -> float:
    """Bytes that the user reserves beyond what ComfyUI keeps free by itself when it says what a model may take."""
    if settings.vram_budget_gb:
        return 0.0
    return max(0.0, settings.reserve_gb * GB - comfy.model_management.extra_reserved_memory())


def may_pin() -> bool:
    """Whether host memory may be page-locked: not with --disable-pinned-memory."""
    return getattr(comfy.model_management, "MAX_PINNED_MEMORY", 0) > 0


def out_of_memory(engine: Engine, planner: Planner, during: str) -> DeviceMemoryError:
    """Free an engine's part of the device, and make the error that says what to change.

    Args:
        engine: its weights go to host memory; the next prompt brings them back.
        planner: leaves more room from then on, where it may.
        during: what needed the memory.
    """
    plan, held = planner.plan, engine.device_bytes + engine.library.device_bytes
    engine.offload()
    change = "choose 'auto' or 'stream' in Offload Config"
    if planner.ran_out():
        change = (
            f"the next prompt leaves {gb(SPARE_BYTES)} more to it by itself, as would a vram_budget_gb below "
            f"{(plan.peak_bytes / GB):.1f} or a higher reserve_gb in Offload Config"
        )
    return DeviceMemoryError(
        f"{engine.device} ran out of memory in {during}. The accelerated model held {gb(held)} there ({plan.mode}, "
        f"{plan.resident_blocks} of {plan.total_blocks} blocks) and has given them back. What to change: {change}; or "
        "a smaller picture or batch; or a quantization that takes less; or close other programs on the GPU."
    )
