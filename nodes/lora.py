"""The node that adds a LoRA to an accelerated MODEL."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..accel.engine import Engine
from ..accel.errors import LoraError, SettingsError
from ..accel.lora.adapter import Adapter
from ..accel.lora.schedule import between
from . import contract
from .clip_lora import patch_clip
from .files import CATEGORY, find_file, fingerprint
from .patcher import AcceleratedModelPatcher, accelerated
from .progress import show_text
from .reliance import CLIP_LORAS

FOLDER = "loras"
log = logging.getLogger(__name__)


class FluxHotswapLora(io.ComfyNode):
    """Hotswap LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FluxHotswapLora",
            display_name="Hotswap LoRA",
            category=CATEGORY,
            description="Adds a LoRA to an accelerated model. Chain several to stack them. Changing the file or "
            "the strength binds other tensors to the compiled model: nothing is merged, nothing recompiles.",
            inputs=[*_file_and_strengths(), *_schedule_and_rank()],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: object) -> tuple[int, int]:
        """Run again when the file changes."""
        return fingerprint(FOLDER, lora_name)

    @classmethod
    def execute(
        cls,
        model,
        lora_name: str,
        strength: float,
        clip=None,
        strength_clip: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        max_rank: int = 0,
    ) -> io.NodeOutput:
        """Check the file against the model, and put it on the clone's stack; it is bound when sampling starts."""
        ours = accelerated(model, "Hotswap LoRA", "For other models use ComfyUI's Load LoRA.")
        keyframes = between(start_percent, end_percent)
        if strength == 0.0 and (clip is None or strength_clip == 0.0):
            # As ComfyUI's own loader: a file that is switched off may be anything.
            show_text(f"{lora_name} is off: strength 0")
            return io.NodeOutput(ours.with_max_rank(max_rank), clip)
        path = find_file(FOLDER, lora_name)
        adapter = _read(ours.engine, path, lora_name, clip)
        patched_clip, said = _patch_clip(clip, path, adapter, strength_clip)
        patched = ours.with_lora(adapter, strength, keyframes).with_max_rank(max_rank)
        log.info("Flux Hotswap: LoRA %s: %s", adapter.name, adapter.report)
        show_text("\n".join([str(adapter.report), *said, _describe_cost(patched)]))
        return io.NodeOutput(patched, patched_clip)


def _read(engine: Engine, path: str, name: str, clip: Any) -> Adapter:
    """Check a file against the engine's model.

    Raises:
        LoraError: see `Engine.read_lora`; or it changes text encoders alone, and there is no CLIP.
    """
    adapter = replace(engine.read_lora(path), label=name)
    if clip is None and not (adapter.layers or adapter.vectors):
        count = len(adapter.text_encoder_keys)
        raise LoraError(
            f"LoRA '{name}' changes only text encoders ({count} keys), expected keys for a {engine.spec.family.name} "
            "transformer. Connect clip to use it."
        )
    return adapter


def _describe_cost(model: AcceleratedModelPatcher) -> str:
    """What the stack so far takes, for the node: memory, and products in every step."""
    stack, engine = model.loras.stack, model.engine
    cost = stack.cost
    share = cost.step_share(engine.spec.parameter_count)
    cut = f"; cut to rank {stack.max_rank}" if 0 < stack.max_rank < cost.max_rank else ""
    return (
        f"Stack: {cost}, {cost.megabytes(engine.dtype):,.0f} MB, about {share:.1%} more arithmetic per step{cut}"
    )


def _patch_clip(clip: Any, path: str, adapter: Adapter, strength: float) -> tuple[Any, list[str]]:
    """Apply the text-encoder part of a LoRA; without a CLIP, say that it waits.

    Returns:
        The CLIP, and what to say of the keys for it, if there are any.

    Raises:
        LoraError: the file has keys for text encoders alone, and this CLIP has a place for none of them.
    """
    keys = adapter.text_encoder_keys
    if not keys:
        return clip, []
    if clip is None:
        waits = f"{len(keys)} text encoder keys; connect clip to Hotswap LoRA to use them"
        log.info("Flux Hotswap: '%s' has %s.", adapter.name, waits)
        return None, [f"Not used: {waits}"]
    if strength == 0.0:
        return clip, [f"{len(keys)} keys for text encoders are off: strength_clip 0"]
    if not contract.holds(CLIP_LORAS):
        raise SettingsError(
            f"LoRA '{adapter.name}' has {len(keys)} text encoder keys, which this version of ComfyUI takes in another "
            "way than this pack hands them over (its log says more). Disconnect clip, or update this pack."
        )
    patched, found = patch_clip(clip, path, keys, strength)
    if not (found.applied or adapter.layers or adapter.vectors):
        raise LoraError(f"LoRA '{adapter.name}' changes only text encoders, and nothing of this CLIP: {found}.")
    log.log(logging.WARNING if found.left else logging.INFO, "Flux Hotswap: LoRA %s: %s", adapter.name, found)
    return patched, [str(found)]


def _file_and_strengths() -> list[io.Input]:
    strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
    return [
        io.Model.Input("model", tooltip="From Accelerated Flux Loader, or another Hotswap LoRA."),
        io.Combo.Input(
            "lora_name", options=folder_paths.get_filename_list(FOLDER), tooltip="A file in models/loras."
        ),
        io.Float.Input("strength", **strength, tooltip="Effect on the image model; may be negative."),
        io.Clip.Input(
            "clip", optional=True, tooltip="Connect it when the LoRA was trained on the text encoder too."
        ),
        io.Float.Input(
            "strength_clip", **strength, optional=True, tooltip="Effect on the text encoder, if connected."
        ),
    ]


def _schedule_and_rank() -> list[io.Input]:
    percent = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": True, "advanced": True}
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            **percent,
            tooltip="Where in the sampling the LoRA starts; 0 is the beginning.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            **percent,
            tooltip="Where in the sampling the LoRA stops; 1 is the end. Switching on the way costs milliseconds.",
        ),
        io.Int.Input(
            "max_rank",
            default=0,
            min=0,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="0 leaves the stack as it is: exact, unless another node of the chain says otherwise. Any other "
            "value cuts the whole stack to this rank, by SVD, when its ranks add up to more: less memory and time per "
            "step, with an error that the sampler shows. Of several nodes the last one counts. A LoKr of high rank "
            "always stays exact, and does not count.",
        ),
    ]
