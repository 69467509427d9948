"""LoRA: scaling · B @ A, with a middle matrix (LoCon) B @ mid @ A; with PEFT's lora_bias a bias beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from ...errors import LoraError
from ...tensors import own_vector, to_float
from .base import ALPHA, Change, ComfyAdapter, Converted, Kind, Values
from .layers import split_bias, split_low_rank
from .shapes import Shapes, TensorHeader


class Lora(Kind):
    """Two thin matrices."""

    name: ClassVar[str] = "LoRA"
    endings: ClassVar[Mapping[str, str]] = {
        ".lora_down.weight": "A",  # sd-scripts, LyCORIS, OneTrainer, ComfyUI
        ".lora_up.weight": "B",
        ".lora_A.weight": "A",  # PEFT, diffusers, ai-toolkit, SimpleTuner
        ".lora_B.weight": "B",
        ".lora_A": "A",  # the matrices themselves as parameters
        ".lora_B": "B",
        ".lora.down.weight": "A",  # diffusers before PEFT
        ".lora.up.weight": "B",
        "_lora.down.weight": "A",
        "_lora.up.weight": "B",
        ".lora_linear_layer.down.weight": "A",
        ".lora_linear_layer.up.weight": "B",
        ".down.weight": "A",  # XLabs
        ".up.weight": "B",
        ".lora_mid.weight": "mid",
        ".lora_B.bias": "up_bias",  # PEFT with lora_bias, BFL
    }
    placed_first: ClassVar[tuple[str, ...]] = ("A", "B")
    companions: ClassVar[tuple[str, ...]] = (ALPHA, "dora_scale", "magnitude")
    adapter_heads: ClassVar[tuple[str, ...]] = (".lora_A.", ".lora_B.")
    unread_by_comfyui: ClassVar[tuple[str, ...]] = ("up_bias",)
    bias_roles: ClassVar[tuple[str, ...]] = ("up_bias",)
    scaled_by_config: ClassVar[bool] = True
    comfyui: ClassVar[ComfyAdapter] = ComfyAdapter(
        "LoRAAdapter", ("B", "A", ALPHA, "mid", "dora_scale", "reshape_weight")
    )

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        target = shapes.target
        shapes.need("A", "lora_down / lora_A")
        shapes.need("B", "lora_up / lora_B")
        rank, columns = shapes.matrix("A")
        rows, other = shapes.matrix("B")
        shapes.expect("A", columns in (target.in_features, target.narrow_in_features), f"(rank, {target.in_features})")
        shapes.expect("B", rows == target.out_features, f"({target.out_features}, rank)")
        if rank != other:
            raise LoraError(
                f"{shapes.source}: '{shapes.headers['A'].key}' has rank {rank}, '{shapes.headers['B'].key}' has rank "
                f"{other}; they must be equal and at least 1. The file is damaged: get it again."
            )
        if "mid" in shapes:
            shapes.expect("mid", shapes.matrix("mid") == (rank, rank), f"({rank}, {rank}, 1, 1)")
        if "up_bias" in shapes:
            shapes.vector("up_bias", target.out_features)
        return rank

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`."""
        tensors, target = values.tensors, change.target
        lora_A, lora_B = tensors["A"].flatten(1), tensors["B"].flatten(1)
        if "mid" in tensors:
            lora_A = to_float(tensors["mid"]).flatten(1) @ to_float(lora_A)
        if lora_A.shape[1] < target.in_features:
            # For a model that reads less, see `FusedLinear`: what this one reads besides does not concern it.
            lora_A = nn.functional.pad(to_float(lora_A), (0, target.in_features - lora_A.shape[1]))
        layers = split_low_rank(target, lora_A, lora_B, values.scaling)
        if "up_bias" not in tensors:
            return Converted(layers)
        return Converted(layers, split_bias(target, own_vector(tensors["up_bias"]), values.scaling))

    def is_stored(self, headers: Mapping[str, TensorHeader]) -> bool:
        """See `Kind`."""
        return "mid" not in headers
