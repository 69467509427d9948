"""FLUX.2: dev, klein 9B and 4B, distilled or base, and models of other sizes with the same architecture."""

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
from .config import CHANNELS, DEPTHS, DIFFUSERS, MODELS_BY_CHANNELS, PATCH_SIZE, POSITIONS, Flux2Config
from .config import recognise as recognise_config
from .forward import Flux2Forward
from .inputs import Flux2Inputs
from .layout import checkpoint_layout, diffusers_layout
from .lora_names import lora_names
from .text_encoders import text_encoder
from .wording import LORA_RELATIVES, WORDING

if TYPE_CHECKING:
    from ...attention import Attention

__all__ = ["CHANNELS", "PATCH_SIZE", "POSITIONS", "Flux2", "Flux2Config", "Flux2Inputs"]


class Flux2(Family[Flux2Config]):
    """What the rest of `accel` needs to know about FLUX.2; see `Family`."""

    name = "FLUX.2"
    wording = WORDING
    diffusers_class = "Flux2Transformer2DModel"
    gguf_architecture = "flux"
    lora_relatives = LORA_RELATIVES
    image_embedder = "x_embedder"
    models_by_channels = MODELS_BY_CHANNELS
    text_tokens = 512
    pixels_per_latent = 16
    pixels_per_token = 16
    # In bf16, and comfy/sd.py: 4 · 2178 · 64 elements for each latent of 16 × 16 pixels.
    autoencoder = Autoencoder(168_120_878, 2178 * 2)
    published: Mapping[str, Flux2Config] = {
        "flux2-dev": Flux2Config(6144, *DEPTHS[6144], 15360, 18432, True),
        "flux2-klein-9b": Flux2Config(4096, *DEPTHS[4096], 12288, 12288, False),
        "flux2-klein-4b": Flux2Config(3072, *DEPTHS[3072], 7680, 9216, False),
    }

    def recognise(self, tensors: Mapping[str, TensorInfo], file_name: str) -> tuple[Flux2Config, Layout] | None:
        """The configuration of a checkpoint and the layout that it follows; see `config.recognise`."""
        config = recognise_config(tensors, file_name)
        if config is not None:
            return config, checkpoint_layout(config)
        config = recognise_config(tensors, file_name, DIFFUSERS)
        return None if config is None else (config, diffusers_layout(config))

    def canonical(self, name: str) -> str:
        """See `streams.layout.canonical`."""
        return canonical(name)

    def diffusers_config(self, config: Flux2Config) -> Mapping[str, Any]:
        """What diffusers' `config.json` says about a model with these sizes."""
        return {
            "patch_size": PATCH_SIZE,
            "in_channels": CHANNELS,
            "num_layers": config.depth,
            "num_single_layers": config.depth_single,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": config.num_heads,
            "joint_attention_dim": config.context_dim,
            "mlp_ratio": config.mlp_dim / config.hidden_size,
            "axes_dims_rope": POSITIONS.axes_dim,
            "rope_theta": int(POSITIONS.theta),
            "guidance_embeds": config.guidance,
        }

    def layout(self, config: Flux2Config) -> Layout:
        """See `layout.checkpoint_layout`."""
        return checkpoint_layout(config)

    def lora_names(self, config: Flux2Config) -> LoraNames:
        """See `lora_names.lora_names`."""
        return lora_names(config)

    def build(self, config: Flux2Config) -> nn.Module:
        """See `model.build`."""
        from .model import build

        return build(self.diffusers_class, self.diffusers_config(config), config)

    def heads(self, config: Flux2Config) -> tuple[int, int]:
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
        config: Flux2Config,
        model: nn.Module,
        regions: Sequence[Region],
        attention: Attention,
        weights: BlockWeights | None = None,
    ) -> Flux2Forward:
        """See `forward.Flux2Forward`."""
        from .regions import open_regions

        double, single, *whole = regions
        made = Regions(double, single, whole[0] if whole else None, *open_regions(attention))
        return Flux2Forward(config, model, made, weights)

    def activation_bytes(
        self, config: Flux2Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
    ) -> int:
        """See `activations`."""
        return activation_bytes(config, tokens, dtype, workspace, compiled)

    def text_encoders(self, config: Flux2Config) -> tuple[TextEncoder, ...]:
        """The language model three of whose layers it reads."""
        return (text_encoder(config.context_dim),)
