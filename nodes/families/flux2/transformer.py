"""ComfyUI's call of the FLUX.2 transformer as the engine's inputs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from comfy.ldm.flux.layers import ModulationOut
from torch import Tensor

from ....accel.families.flux2 import PATCH_SIZE, Flux2Inputs
from ....accel.families.flux2.forward import Conditioning
from ..streams.hooks import Vec
from ..streams.transformer import StreamTransformer


class Flux2Vec:
    """The vec of FLUX.2's blocks: the modulations that they share.

    Those of images and of texts in double blocks, each a pair, for attention and for the MLP; one in single blocks.
    """

    def of(self, conditioning: Conditioning, kind: str) -> Any:
        """See `Vec`."""
        if kind == "double":
            return _modulations(conditioning.image, 2), _modulations(conditioning.text, 2)
        return _modulations(conditioning.single, 1)[0]

    def changed(self, conditioning: Conditioning, vec: Any, kind: str) -> Conditioning:
        """See `Vec`."""
        if kind == "double":
            image, text = (_joined(*pair) for pair in vec)
            return dataclasses.replace(conditioning, image=image, text=text)
        return dataclasses.replace(conditioning, single=_joined(vec))


class Flux2Transformer(StreamTransformer):
    """An engine of FLUX.2: latents of 128 channels, no pooled text."""

    patch_size = PATCH_SIZE
    vec: ClassVar[Vec] = Flux2Vec()

    def _inputs(self, y: Tensor | None, guidance: Tensor | None, common: dict[str, Any]) -> Flux2Inputs:
        return Flux2Inputs(guidance=guidance, **common)


def _modulations(modulation: Tensor, count: int) -> tuple[ModulationOut, ...]:
    """Shift, scale and gate, (B, M, H) each, `count` times, of (B, M, count · 3 H)."""
    return tuple(ModulationOut(*one.chunk(3, dim=-1)) for one in modulation.chunk(count, dim=-1))


def _joined(*modulations: ModulationOut) -> Tensor:
    """The opposite of `_modulations`."""
    return torch.cat([each for one in modulations for each in (one.shift, one.scale, one.gate)], dim=-1)
