"""The node that says what an accelerated model may take of the GPU's memory."""

from __future__ import annotations

import dataclasses
import logging

import comfy.model_management
import torch
from comfy_api.latest import io

from ..accel.engine import Engine
from ..accel.errors import DeviceMemoryError
from ..accel.offload.plan import GB, Room, check_device, demand_of, gb
from ..accel.offload.planner import SPARE_BYTES, Planner
from ..accel.settings import OFFLOAD_MODES, Offload
from .files import CATEGORY
from .progress import show_text

FluxOffload = io.Custom("FLUX_OFFLOAD")
log = logging.getLogger(__name__)


class FluxOffloadConfig(io.ComfyNode):
    """Offload Config."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxOffloadConfig",
            display_name="Offload Config",
            category=CATEGORY,
            description="Runs Accelerated Flux Loader's model on a GPU that it does not fit: some blocks stay there, "
            "the others are copied there in every step while the one before them computes. With quantization, "
            "compiling and LoRAs, and with exactly the same picture.",
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=list(OFFLOAD_MODES),
                    default=OFFLOAD_MODES[0],
                    tooltip="auto: all on the GPU when it fits, else stream; the loader says which, and why. none: all "
                    "on the GPU. model: all on the GPU while it samples, in host memory afterwards. stream: as many "
                    "blocks on the GPU as fit, the others copied in each step.",
                ),
                io.Float.Input(
                    "vram_budget_gb",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="What the model may take of the GPU in all: weights, LoRAs and what a step needs. 0: what "
                    "is free.",
                ),
                io.Float.Input(
                    "reserve_gb",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.25,
                    tooltip="What of the free memory stays for other programs, when vram_budget_gb is 0. Never less "
                    "than ComfyUI's --reserve-vram.",
                ),
            ],
            outputs=[FluxOffload.Output(display_name="offload")],
        )

    @classmethod
    def execute(cls, mode: str, vram_budget_gb: float = 0.0, reserve_gb: float = 1.0) -> io.NodeOutput:
        """Check the settings against the machine; the loader plans with them."""
        settings = Offload(mode, vram_budget_gb, reserve_gb)
        check_device(settings, comfy.model_management.get_torch_device())
        return io.NodeOutput(settings)


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
    log.info("Flux Hotswap: offload %s", planner.plan.sentence)
    show_text(f"offload {planner.plan.sentence}")
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
