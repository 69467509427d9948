"""The node that says what an accelerated model may take of the GPU's memory."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..accel.offload.plan import check_device
from ..accel.settings import OFFLOAD_MODES, Offload
from .files import CATEGORY

FluxOffload = io.Custom("FLUX_OFFLOAD")


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
                    tooltip="What of the free memory stays for other programs when vram_budget_gb is 0. Never less "
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
