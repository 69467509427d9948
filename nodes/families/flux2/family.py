"""What the rest of `nodes` asks about FLUX.2; see `ComfyFamily`."""

from __future__ import annotations

from ....accel.engine import Engine
from ....accel.families.flux2 import Flux2
from ....accel.families.layout import VectorWeight
from ....accel.offload.planner import Planner
from ..streams.family import scale_names
from .model import AcceleratedFlux2


class Flux2InComfy:
    """FLUX.2: dev, klein 9B and klein 4B."""

    name = Flux2.name

    def base_model(self, engine: Engine, planner: Planner) -> AcceleratedFlux2:
        """See `model.AcceleratedFlux2`."""
        return AcceleratedFlux2(self, engine, planner)

    def scale_names(self, vector: VectorWeight) -> tuple[str, ...]:
        """See `streams.family.scale_names`."""
        return scale_names(vector)


FAMILY = Flux2InComfy()
