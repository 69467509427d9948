"""What the rest of `nodes` asks about FLUX.1; see `ComfyFamily`."""

from __future__ import annotations

from ....accel.engine import Engine
from ....accel.families.flux1 import Flux1
from ....accel.families.layout import VectorWeight
from ....accel.offload.planner import Planner
from ..streams.family import scale_names
from .model import AcceleratedFlux


class Flux1InComfy:
    """FLUX.1: dev, schnell, Krea, Kontext, Fill, Canny and Depth."""

    name = Flux1.name

    def base_model(self, engine: Engine, planner: Planner) -> AcceleratedFlux:
        """See `model.AcceleratedFlux`."""
        return AcceleratedFlux(self, engine, planner)

    def scale_names(self, vector: VectorWeight) -> tuple[str, ...]:
        """See `streams.family.scale_names`."""
        return scale_names(vector)


FAMILY = Flux1InComfy()
