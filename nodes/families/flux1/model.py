"""FLUX.1 as ComfyUI's BaseModel."""

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
from .transformer import Flux1Transformer


class AcceleratedFlux(AcceleratedModel, comfy.model_base.Flux):
    """ComfyUI's FLUX.1 around an engine."""

    def __init__(self, family: ComfyFamily, engine: Engine, planner: Planner) -> None:
        """Describe the engine's model as ComfyUI would have detected it: dev, which has guidance, or schnell."""
        config = engine.spec.config
        types, known = comfy.model_base.ModelType, comfy.supported_models
        kind, described = (types.FLUX, known.Flux) if config.guidance else (types.FLOW, known.FluxSchnell)
        model_config = described(unet_config(config))
        model_config.set_inference_dtype(engine.dtype, None)
        skeleton = make_skeleton(model_config.unet_config, engine.dtype)
        super().__init__(family, Flux1Transformer(engine, planner, skeleton), model_config, kind)

    def exact_conditions(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """See `take_guidance`."""
        return take_guidance(conditions)
