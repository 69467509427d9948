"""FLUX.1 as ComfyUI's BaseModel."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.supported_models
from torch import Tensor

from ....accel.engine import Engine
from ....accel.offload.planner import Planner
from ...model import AcceleratedModel
from ..base import ComfyFamily
from .skeleton import make_skeleton, unet_config
from .transformer import GUIDANCE, Flux1Transformer


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

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """See `AcceleratedModel`; guidance, (B,) float32, goes past ComfyUI's model."""
        # That casts every condition to the model's dtype, and guidance is multiplied by 1000 afterwards: 3.5 would
        # become 3504 in bfloat16. It travels beside the others, in float32.
        options = {**(transformer_options or {}), GUIDANCE: kwargs.pop("guidance", None)}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)
