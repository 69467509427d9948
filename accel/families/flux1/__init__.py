"""FLUX.1: dev, schnell, Krea, Kontext, Fill, Canny, Depth, and models of other sizes with the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...files import TensorInfo
from ..base import Autoencoder, BlockWeights, Family, LoraNames, Region, TextEncoder, Workspace
from ..layout import Layout
from ..streams.forward import Regions
from ..streams.layout import HEAD_DIM, canonical
from .activations import activation_bytes
from .config import DIFFUSERS, MODELS_BY_CHANNELS, PATCH_SIZE, POSITIONS, Flux1Config
from .config import recognise as recognise_config
from .forward import Flux1Forward
from .inputs import Flux1Inputs
from .layout import checkpoint_layout
from .lora_names import RELATIVES as LORA_RELATIVES
from .lora_names import lora_names
from .wording import RELATIVES, WORDING

if TYPE_CHECKING:
    from ...attention import Attention

__all__ = ["PATCH_SIZE", "POSITIONS", "Flux1", "Flux1Config", "Flux1Inputs"]


class Flux1(Family[Flux1Config]):
    """What the rest of `accel` needs to know about FLUX.1; see `Family`."""

    name = "FLUX.1"
    wording = WORDING
    diffusers_class = "FluxTransformer2DModel"
    gguf_architecture = "flux"
    relatives = RELATIVES
    lora_relatives = LORA_RELATIVES
    image_embedder = "x_embedder"
    models_by_channels = MODELS_BY_CHANNELS
    text_tokens = 512
    pixels_per_latent = 8
    pixels_per_token = 16
    # In bf16, and comfy/sd.py: 2178 · 64 / 64 elements for each pixel.
    autoencoder = Autoencoder(167_666_902, 2178 * 2)
    published: Mapping[str, Flux1Config] = {
        "flux1-dev": Flux1Config(3072, 19, 38, 64, 64, 4096, 768, 12288, True),
        "flux1-schnell": Flux1Config(3072, 19, 38, 64, 64, 4096, 768, 12288, False),
    }

    def recognise(self, tensors: Mapping[str, TensorInfo], file_name: str) -> tuple[Flux1Config, Layout] | None:
        """The configuration of a checkpoint and the layout that it follows; see `config.recognise`."""
        config = recognise_config(tensors, file_name)
        if config is not None:
            return config, checkpoint_layout(config)
        config = recognise_config(tensors, file_name, DIFFUSERS)
        return None if config is None else (config, checkpoint_layout(config).separate())

    def canonical(self, name: str) -> str:
        """See `streams.layout.canonical`."""
        return canonical(name)

    def diffusers_config(self, config: Flux1Config) -> Mapping[str, Any]:
        """What diffusers' `config.json` says about a model with these sizes."""
        return {
            "patch_size": 1,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth,
            "num_single_layers": config.depth_single,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": config.num_heads,
            "joint_attention_dim": config.context_dim,
            "pooled_projection_dim": config.pooled_dim,
            "guidance_embeds": config.guidance,
            "axes_dims_rope": POSITIONS.axes_dim,
        }

    def layout(self, config: Flux1Config) -> Layout:
        """See `layout.checkpoint_layout`."""
        return checkpoint_layout(config)

    def lora_names(self, config: Flux1Config) -> LoraNames:
        """See `lora_names.lora_names`."""
        return lora_names(config)

    def build(self, config: Flux1Config) -> nn.Module:
        """Make diffusers' model."""
        from ..diffusers_models import model_class

        return model_class(self.diffusers_class)(**self.diffusers_config(config))

    def heads(self, config: Flux1Config) -> tuple[int, int]:
        """Heads of 128."""
        return config.num_heads, HEAD_DIM

    def regions(self, attention: Attention) -> tuple[Region, Region]:
        """The functions that run a double and a single block."""
        from .regions import block_regions

        return block_regions(attention)

    def whole(self, attention: Attention) -> Region:
        """The function that runs all blocks."""
        from .regions import whole_region

        return whole_region(attention)

    def forward(
        self,
        config: Flux1Config,
        model: nn.Module,
        regions: Sequence[Region],
        attention: Attention,
        weights: BlockWeights | None = None,
    ) -> Flux1Forward:
        """See `forward.Flux1Forward`."""
        from .regions import open_regions

        double, single, *whole = regions
        made = Regions(double, single, whole[0] if whole else None, *open_regions(attention))
        return Flux1Forward(config, model, made, weights)

    def activation_bytes(
        self, config: Flux1Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
    ) -> int:
        """See `activations`."""
        return activation_bytes(config, tokens, dtype, workspace, compiled)

    def text_encoders(self, config: Flux1Config) -> tuple[TextEncoder, ...]:
        """T5-XXL by how Flux Text Encoder Loader keeps it, and CLIP-L in fp16."""
        t5 = {"none": 9_524_621_312, "int8": 4_900_000_000, "nf4": 2_900_000_000}
        return TextEncoder("T5", t5), TextEncoder("CLIP-L", {"none": 246_144_152})
