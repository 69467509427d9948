"""FLUX.2 as ComfyUI's BaseModel."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.supported_models

from ....accel.engine import Engine
from ....accel.offload.planner import Planner
from ...model import AcceleratedModel
from ..base import ComfyFamily
from ..streams.skeleton import make_skeleton
from ..streams.transformer import take_guidance
from .skeleton import unet_config
from .transformer import Flux2Transformer


class AcceleratedFlux2(AcceleratedModel, comfy.model_base.Flux2):
    """ComfyUI's FLUX.2 around an engine."""

    def __init__(self, family: ComfyFamily, engine: Engine, planner: Planner) -> None:
        """Describe the engine's model as ComfyUI would have detected it."""
        model_config = comfy.supported_models.Flux2(unet_config(engine.spec.config))
        model_config.set_inference_dtype(engine.dtype, None)
        skeleton = make_skeleton(model_config.unet_config, engine.dtype)
        transformer = Flux2Transformer(engine, planner, skeleton)
        super().__init__(family, transformer, model_config, comfy.model_base.ModelType.FLUX)

    def exact_conditions(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """See `take_guidance`."""
        return take_guidance(conditions)
