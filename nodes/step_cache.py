"""The node that lets an accelerated MODEL skip most of a step."""

from __future__ import annotations

from comfy_api.latest import io

from ..accel.step_cache import StepCacheSettings
from .files import CATEGORY
from .patcher import accelerated


class FluxStepCache(io.ComfyNode):
    """Flux Step Cache."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": True, "advanced": True}
        return io.Schema(
            node_id="FluxStepCache",
            display_name="Flux Step Cache",
            category=CATEGORY,
            description="Skips most of a step when its first block does nearly what it did in the last computed step: "
            "faster, and a little less exact. For samplings of 12 steps and more. The sampler's text shows how many "
            "were skipped.",
            inputs=[
                io.Model.Input("model", tooltip="From Accelerated Flux Loader or Hotswap LoRA; before or after LoRAs."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="How much the first block's change may differ from the last computed step's for a step to "
                    "be skipped. Higher is faster and less exact; 0 skips nothing.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **percent,
                    tooltip="Skip no step before this point of the sampling; 0 is the beginning.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, **percent, tooltip="Skip no step after this point; 1 is the end."
                ),
                io.Int.Input(
                    "max_skips",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="How many steps in a row may be skipped. 0: any number.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model, threshold: float, start_percent: float = 0.0, end_percent: float = 1.0, max_skips: int = 0
    ) -> io.NodeOutput:
        """Put the settings on a clone; each sampling of it starts with an empty cache."""
        ours = accelerated(model, "Flux Step Cache", "For other models use ComfyUI's EasyCache.")
        settings = StepCacheSettings(threshold, start_percent, end_percent, max_skips)
        return io.NodeOutput(ours.with_step_cache(settings))
