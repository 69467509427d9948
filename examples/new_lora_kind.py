"""Write a new kind of LoRA: factors for the rows of a weight, as (IA)³ has them.

`python -m examples.new_lora_kind [PICTURES.png]` from the repository's folder writes a file of that kind for Pocket
FLUX, which multiplies what the last block computes by 0, and draws with it at strengths 0, 0.5 and 1: that is what the
block is for.

A kind says how its tensors are called and shaped, and what they become; its layer says what a weight becomes, which
composes with whatever else is in a stack. In the library the two classes are a module in `accel/lora/kinds`, and the
table gets one line.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from accel import Engine, EngineSettings, LoraStack, inspect_checkpoint
from accel.families.flux1 import Flux1Inputs
from accel.lora import kinds
from accel.lora.kinds.base import Change, Converted, Kind, Values
from accel.lora.kinds.composed import Composed
from accel.lora.kinds.layers import Layer, LayerCost, split_rows
from accel.lora.kinds.shapes import Shapes
from accel.lora.kinds.table import KindTable
from examples.pocket_files import MODEL, STEPS, encode_prompt, save_pictures, starting_noise


@dataclass(frozen=True)
class ScaledRows(Layer):
    """diag(1 + s · (factors - 1)) @ weight at strength s; factors are (out_features,) float32."""

    factors: Tensor

    @property
    def rows(self) -> int:
        """See `Layer`."""
        return len(self.factors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Layer`."""
        return (self.factors,)

    @property
    def cost(self) -> LayerCost:
        """See `Layer`."""
        return LayerCost(self.rows, self.rows)

    def apply(self, state: Composed, strength: float) -> Composed:
        """See `Layer`."""
        return state.mix((1.0 + strength * (self.factors - 1.0))[:, None, None])


class RowScale(Kind):
    """One factor for each row of a weight; in a file, `<layer>.row_scale`."""

    name: ClassVar[str] = "row scale"
    endings: ClassVar[Mapping[str, str]] = {".row_scale": "row_scale"}

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        shapes.vector("row_scale", shapes.target.out_features)
        return 0

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`."""
        parts = split_rows(change.target, values.tensors["row_scale"].float())
        return Converted(tuple(ScaledRows(module, factors) for module, factors in parts))


known = [kind for kind in kinds.KINDS if kind is not kinds.KINDS.bias]
kinds.KINDS = KindTable(*known, RowScale(), bias=kinds.KINDS.bias)

engine = Engine(inspect_checkpoint(MODEL), EngineSettings(dtype="fp32", compile="off"))
engine.load()
with TemporaryDirectory() as folder:
    path = Path(folder) / "without-last-block.safetensors"
    save_file({"single_blocks.3.linear2.row_scale": torch.zeros(128)}, path)
    adapter = engine.read_lora(path)
print(adapter.report)

prompt, drawn = encode_prompt("a large green heart"), []
for strength in (0.0, 0.5, 1.0):
    engine.swap(LoraStack().with_lora(adapter, strength))
    latents = starting_noise(seed=7)
    for sigma, following in pairwise(torch.linspace(1.0, 0.0, STEPS + 1)):
        velocity = engine(Flux1Inputs(latents, sigma.expand(1), prompt))
        latents = latents + (following - sigma) * velocity
    drawn.append(latents)

save_pictures(sys.argv[1] if len(sys.argv) > 1 else "new_lora_kind.png", drawn)
