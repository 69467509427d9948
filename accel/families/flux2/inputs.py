"""What one forward of FLUX.2 reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..streams.inputs import StreamInputs


@dataclass(frozen=True)
class Flux2Inputs(StreamInputs):
    """One forward's inputs, in the transformer's dtype and on its device unless stated; see `StreamInputs`.

    Attributes:
        latent: ``b 128 height width``.
        guidance: ``b`` float32, or None to leave the guidance embedding out.
    """

    guidance: Tensor | None = None
