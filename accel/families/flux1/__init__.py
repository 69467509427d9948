"""FLUX.1: dev, schnell, Krea, Kontext, Fill, Canny, Depth, and models of other sizes with the same architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ...attention import Attention
from ...files import TensorInfo
from ...layout import Layout, LoraTarget, VectorWeight
from . import blocks
from .config import AXES_DIM, HEAD_DIM, PATCH_SIZE, Flux1Config
from .config import recognise as recognise_config
from .forward import Flux1Forward, Flux1Inputs
from .layout import checkpoint_layout
from .lora_names import lora_aliases, lora_norms

__all__ = ["AXES_DIM", "PATCH_SIZE", "Flux1", "Flux1Config", "Flux1Inputs"]


class Flux1:
    """What the rest of `accel` needs to know about FLUX.1."""

    name = "FLUX.1"

    def recognise(self, tensors: Mapping[str, TensorInfo], file_name: str) -> Flux1Config | None:
        """See `config.recognise`."""
        return recognise_config(tensors, file_name)

    def layout(self, config: Flux1Config) -> Layout:
        """See `layout.checkpoint_layout`."""
        return checkpoint_layout(config)

    def lora_aliases(self, config: Flux1Config) -> dict[str, LoraTarget]:
        """See `lora_names.lora_aliases`."""
        return lora_aliases(checkpoint_layout(config))

    def lora_norms(self, config: Flux1Config) -> dict[str, VectorWeight]:
        """See `lora_names.lora_norms`."""
        return lora_norms(checkpoint_layout(config))

    def build(self, config: Flux1Config) -> nn.Module:
        """Make the diffusers model; inside `torch.device("meta")` it costs no memory."""
        from diffusers import FluxTransformer2DModel  # takes seconds to import: only when a model is built

        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim,
            guidance_embeds=config.guidance,
            axes_dims_rope=AXES_DIM,
        )

    def regions(self, attention: Attention) -> tuple[Callable, Callable]:
        """The functions that run a double and a single block: the regions that are compiled."""

        def double(block, hidden_states, encoder_hidden_states, temb, rotary, mask):
            return blocks.double_block(block, hidden_states, encoder_hidden_states, temb, rotary, mask, attention)

        def single(block, hidden_states, temb, rotary, mask):
            return blocks.single_block(block, hidden_states, temb, rotary, mask, attention)

        return double, single

    def forward(self, config: Flux1Config, model: nn.Module, regions: Sequence[Callable]) -> Flux1Forward:
        """Tie a model that `build` made to its regions, compiled or not."""
        return Flux1Forward(config, model, *regions)
