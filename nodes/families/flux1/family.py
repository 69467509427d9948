"""What the rest of `nodes` asks about FLUX.1; see `ComfyFamily`."""

from __future__ import annotations

from ....accel.engine import Engine
from ....accel.families.flux1 import Flux1
from ....accel.families.layout import VectorWeight
from ....accel.offload.planner import Planner
from .model import AcceleratedFlux


class Flux1InComfy:
    """FLUX.1: dev, schnell, Krea, Kontext, Fill, Canny and Depth."""

    name = Flux1.name

    def base_model(self, engine: Engine, planner: Planner) -> AcceleratedFlux:
        """See `model.AcceleratedFlux`."""
        return AcceleratedFlux(self, engine, planner)

    def scale_names(self, vector: VectorWeight) -> tuple[str, ...]:
        """ComfyUI calls the scale of an RMS norm `scale` up to 0.18 and `weight` later."""
        stem = vector.name.removesuffix("scale")
        return f"{stem}scale", f"{stem}weight"


FAMILY = Flux1InComfy()
