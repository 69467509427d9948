"""What a family supplies to ComfyUI's side: the rest of `nodes` asks for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ...accel.engine import Engine
from ...accel.families.layout import VectorWeight
from ...accel.offload.planner import Planner

if TYPE_CHECKING:
    from ..model import AcceleratedModel
    from ..reliance import Reliance


class ComfyFamily(Protocol):
    """A family of models as ComfyUI knows it: FAMILY in `family.py` of its folder.

    A family whose text encoders this pack loads has a class for them in `clip.py`, which `text_encoder_node` makes.

    Attributes:
        name: as in `accel.families`, such as "FLUX.1"; messages and the loader's text show it.
    """

    name: str

    def base_model(self, engine: Engine, planner: Planner) -> AcceleratedModel:
        """Make the BaseModel around an engine; the loader asks.

        It is an `AcceleratedModel`, and ComfyUI's own class for the family, whose sampling settings and conditioning it
        has. Its `diffusion_model` is an `EngineTransformer`, which turns ComfyUI's arguments into the family's inputs.

        Args:
            engine: of this family; nothing has to be loaded.
            planner: what decides how much of the device it takes.
        """

    def scale_names(self, vector: VectorWeight) -> tuple[str, ...]:
        """What versions of ComfyUI call a norm's scale; a patch of a LoRA loader has one of these names."""


class FamilyContract(Protocol):
    """What a family needs of ComfyUI: the module `contract.py` of its folder, which loads in every version of ComfyUI.

    Attributes:
        RELIANCES: what has to be there.
    """

    RELIANCES: Sequence[Reliance]

    def nameless_weights(self) -> Sequence[str]:
        """Weights of linears that ComfyUI's own model, made without data, has no names for: there should be none.

        LoRA loaders match a file's names with these.
        """
