"""The node that makes an accelerated MODEL from a checkpoint."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..accel.checkpoint import inspect_checkpoint
from ..accel.settings import ATTENTION_BACKENDS, COMPILE_MODES, DTYPES, EngineSettings, Offload, Quantization
from .engines import FAMILIES, model_of
from .files import CATEGORY, find_model, fingerprint_model, model_files
from .offload import FluxOffload
from .progress import say
from .quantize import FluxQuantization


class FluxAccelLoader(io.ComfyNode):
    """Accelerated Flux Loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxAccelLoader",
            display_name="Accelerated Flux Loader",
            category=CATEGORY,
            description=f"Loads a {_families()} transformer that stays compiled in memory across prompts. Use it in "
            "place of Load Diffusion Model, and add LoRAs with Hotswap LoRA: switching them takes milliseconds.",
            inputs=[_model(), *_computation(), *_configurations()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: object) -> tuple[int, int]:
        """Run again when the file changes."""
        return fingerprint_model(model_name)

    @classmethod
    def execute(
        cls,
        model_name: str,
        dtype: str,
        attention: str,
        compile: str,
        quantization: Quantization | None = None,
        offload: Offload | None = None,
    ) -> io.NodeOutput:
        """Read the header, and hand out a clone of the model that lives in the registry."""
        spec = inspect_checkpoint(find_model(model_name))
        if spec.asks_for_attention:
            say(f"'{model_name}' asks for attention {spec.asks_for_attention}, not used: see 'attention' of this node")
        settings = EngineSettings(
            dtype=dtype,
            attention=attention,
            compile=compile,
            device=str(comfy.model_management.get_torch_device()),
            quantization=quantization or Quantization(),
            offload=offload or Offload(),
        )
        return io.NodeOutput(model_of(spec, settings))


def _families() -> str:
    return " or ".join(FAMILIES)


def _model() -> io.Input:
    return io.Combo.Input(
        "model_name",
        options=model_files(),
        tooltip=f"A {_families()} model in models/diffusion_models or models/checkpoints: safetensors, GGUF, or a "
        "diffusers folder.",
    )


def _computation() -> list[io.Input]:
    return [
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="auto",
            tooltip="What the transformer computes in. auto: the file's own type where the device has it.",
        ),
        io.Combo.Input(
            "attention",
            options=list(ATTENTION_BACKENDS),
            default="auto",
            tooltip="The attention kernel of this model alone. auto: the fastest exact one that is installed, "
            "measured on this machine. sage is faster and approximates. Each is compared with sdpa before it draws "
            "anything.",
        ),
        io.Combo.Input(
            "compile",
            options=list(COMPILE_MODES),
            default=COMPILE_MODES[0],
            tooltip="regional: compile each block type once; the first image takes a minute longer, every later one is "
            "faster, whatever LoRA, size or prompt. regional max-autotune: also try several kernels for each operation "
            "on this GPU; the first image takes minutes longer, later ones a little less. full: all blocks as one "
            "piece; compiles many times longer, saves what starting each block costs; with ControlNet or patches "
            "between blocks it works like regional. off: start at once, run slower. What was compiled is kept for the "
            "next start.",
        ),
    ]


def _configurations() -> list[io.Input]:
    return [
        FluxQuantization.Input(
            "quantization",
            optional=True,
            tooltip="From Quantize Transformer. Without it the weights keep their precision.",
        ),
        FluxOffload.Input(
            "offload",
            optional=True,
            tooltip="From Offload Config. Without it, what does not fit the GPU is copied there block by block in "
            "every step.",
        ),
    ]
