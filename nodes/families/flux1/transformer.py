"""ComfyUI's call of the FLUX.1 transformer as the engine's inputs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ....accel.families.flux1 import PATCH_SIZE, Flux1Inputs
from ....accel.families.flux1.forward import Conditioning
from ..streams.hooks import Vec
from ..streams.transformer import StreamTransformer


class Flux1Vec:
    """The vec of FLUX.1's blocks, (B, H): the embedding of timestep, guidance and pooled text."""

    def of(self, conditioning: Conditioning, kind: str) -> Tensor:
        """See `Vec`."""
        return conditioning.temb

    def changed(self, conditioning: Conditioning, vec: Tensor, kind: str) -> Conditioning:
        """See `Vec`."""
        return Conditioning.of(vec)


class Flux1Transformer(StreamTransformer):
    """An engine of FLUX.1: latents of 16 channels, 32 or 96 with what ComfyUI concatenates; pooled text (B, 768)."""

    patch_size = PATCH_SIZE
    vec: ClassVar[Vec] = Flux1Vec()

    def _inputs(self, y: Tensor | None, guidance: Tensor | None, common: dict[str, Any]) -> Flux1Inputs:
        pooled = None if y is None else y.to(self.dtype)
        return Flux1Inputs(pooled_projections=pooled, guidance=guidance, **common)
