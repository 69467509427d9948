"""A family as small as one can be, and as unlike the others: one kind of block, two linears in each, no biases.

A block reads normed tokens with one linear, which gives q, k, v and a gate, and writes attention and gate with another.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel.attention import Attention
from accel.errors import CheckpointError
from accel.families.base import (
    Autoencoder,
    BlockWeights,
    Family,
    LoraNames,
    TextEncoder,
    Workspace,
)
from accel.families.layout import FusedLinear, Layout, LoraTarget, VectorWeight
from accel.families.wording import KnownModels, Wording
from accel.files import TensorInfo

from .model import HEAD_WIDTH, ToyForward, ToyModel, block_region, whole_region


@dataclass(frozen=True)
class ToyConfig:
    """The sizes of one model."""

    hidden: int = 128
    depth: int = 3
    channels: int = 4
    text_width: int = 32

    variant = "small"

    @property
    def sizes(self) -> str:
        return f"{self.depth} stages, hidden size {self.hidden}"


def layout_of(config: ToyConfig) -> Layout:
    hidden = config.hidden
    linears = [
        FusedLinear.of("patch_in", config.channels, ("embed", hidden), bias=False),
        FusedLinear.of("text_in", config.text_width, ("text_embed", hidden), bias=False),
    ]
    vectors = []
    for index in range(config.depth):
        old, new = f"stages.{index}", f"layers.{index}"
        linears.append(FusedLinear.of(f"{old}.inward", hidden, (f"{new}.read", 4 * hidden), bias=False))
        linears.append(FusedLinear.of(f"{old}.outward", 2 * hidden, (f"{new}.write", hidden), bias=False))
        vectors.append(VectorWeight(f"{old}.norm.scale", f"{new}.norm.weight", hidden))
    linears.append(FusedLinear.of("last", hidden, ("head", config.channels), bias=False))
    return Layout(tuple(linears), tuple(vectors), tuple(f"layers.{index}" for index in range(config.depth)))


class Toy(Family[ToyConfig]):
    """The family."""

    name = "Toy"
    wording = Wording(
        runs="Toy (small)",
        layouts="its only layout (stages.*)",
        example="toy.safetensors",
        example_gguf="toy.gguf",
        lora_keys=("lora_unet_stages_0_inward.lora_down.weight", "transformer.layers.0.read.lora_A.weight"),
        author="Nobody",
    )
    diffusers_class = "ToyModel"
    gguf_architecture = "toy"
    image_embedder = "embed"
    models_by_channels: Mapping[int, KnownModels] = {4: KnownModels("Toy small", True)}
    text_tokens = 16
    pixels_per_latent = 8
    pixels_per_token = 8
    autoencoder = Autoencoder(1_000_000, 100)
    published: Mapping[str, ToyConfig] = {"toy-small": ToyConfig()}

    def recognise(self, tensors: Mapping[str, TensorInfo], file_name: str) -> tuple[ToyConfig, Layout] | None:
        depth = len({match[1] for name in tensors if (match := re.match(r"stages\.(\d+)\.inward\.", name))})
        if not depth:
            return None
        if not {"patch_in.weight", "text_in.weight"} <= tensors.keys():
            raise CheckpointError(f"'{file_name}': looks like Toy, but its embedders are missing.")
        hidden, channels = tensors["patch_in.weight"].shape
        config = ToyConfig(hidden, depth, channels, tensors["text_in.weight"].shape[1])
        return config, layout_of(config)

    def diffusers_config(self, config: ToyConfig) -> Mapping[str, Any]:
        return {"depth": config.depth}

    def layout(self, config: ToyConfig) -> Layout:
        return layout_of(config)

    def lora_names(self, config: ToyConfig) -> LoraNames:
        layout = layout_of(config)
        linears = {linear.name: LoraTarget.whole(linear) for linear in layout.linears}
        linears |= {linear.parts[0].module: linears[linear.name] for linear in layout.linears}
        norms = {vector.parameter.removesuffix(".weight"): vector for vector in layout.vectors}
        return LoraNames(linears, norms, {"stages.9.inward": "of stages beyond those that this model has"})

    def build(self, config: ToyConfig) -> nn.Module:
        return ToyModel(config.hidden, config.depth, config.channels, config.text_width)

    def heads(self, config: ToyConfig) -> tuple[int, int]:
        return config.hidden // HEAD_WIDTH, HEAD_WIDTH

    def regions(self, attention: Attention) -> tuple[Callable, ...]:
        return (block_region(attention),)

    def whole(self, attention: Attention) -> Callable:
        return whole_region(attention)

    def forward(
        self,
        config: ToyConfig,
        model: nn.Module,
        regions: Sequence[Callable],
        attention: Attention,
        weights: BlockWeights | None = None,
    ) -> ToyForward:
        return ToyForward(model, *regions, weights=weights)

    def activation_bytes(
        self, config: ToyConfig, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
    ) -> int:
        return tokens * config.hidden * (8 * dtype.itemsize + 2 * workspace.input_bytes)

    def text_encoders(self, config: ToyConfig) -> Sequence[TextEncoder]:
        return (TextEncoder("Speller", {"none": 2_000_000, "int8": 1_000_000}),)
