"""The node that decides how an accelerated model's weights are stored."""

from __future__ import annotations

import logging

import comfy.model_management
from comfy_api.latest import io

from ..accel.memory.budgets import GB
from ..accel.quantize import choose
from ..accel.settings import QUANTIZATION_MODES, Quantization, QuantizedCache
from .files import CATEGORY, cache_folder
from .progress import show_text

FluxQuantization = io.Custom("FLUX_QUANTIZATION")
log = logging.getLogger(__name__)


class FluxQuantizeTransformer(io.ComfyNode):
    """Quantize Transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxQuantizeTransformer",
            display_name="Quantize Transformer",
            category=CATEGORY,
            description="Stores the weights of Accelerated Flux Loader's model in 8 or 4 bits, to need less memory "
            "and, compiled, less time. LoRAs stay exact and switch as fast. The result is kept on disk for the next "
            "start.",
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=["auto", *QUANTIZATION_MODES],
                    default="auto",
                    tooltip="auto: the best that this machine runs. fp8, int8: weights and activations, fast when "
                    "compiled. …_weight_only: more exact, no faster. int4, nvfp4, nf4: a quarter of the memory, less "
                    "exact. nvfp4, mxfp8: NVIDIA Blackwell. nf4 needs bitsandbytes.",
                ),
                io.Boolean.Input(
                    "cache",
                    default=True,
                    tooltip="Keep the quantized weights in models/flux_hotswap_cache (or the folder of that name in "
                    "extra_model_paths.yaml), so that the next start loads half or a quarter of the file and converts "
                    "nothing.",
                ),
                io.Int.Input(
                    "cache_limit_gb",
                    default=50,
                    min=1,
                    max=100_000,
                    tooltip="What the cache may take on the disk; what has gone unused for longest is deleted first.",
                ),
            ],
            outputs=[FluxQuantization.Output(display_name="quantization")],
        )

    @classmethod
    def execute(cls, mode: str, cache: bool = True, cache_limit_gb: int = 50) -> io.NodeOutput:
        """Resolve the mode for this machine, or say why it does not run here."""
        choice = choose(mode, comfy.model_management.get_torch_device())
        text = f"{choice.mode}: {choice.reason}"
        log.info("Flux Hotswap: quantization %s", f"auto is {text}" if mode == "auto" else text)
        show_text(text)
        kept = QuantizedCache(cache_folder(), cache_limit_gb * GB) if cache else None
        return io.NodeOutput(Quantization(choice.mode, kept))
