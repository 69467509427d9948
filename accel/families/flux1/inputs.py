"""What one forward of FLUX.1 reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..streams.inputs import StreamInputs


@dataclass(frozen=True)
class Flux1Inputs(StreamInputs):
    """One forward's inputs, in the transformer's dtype and on its device unless stated; see `StreamInputs`.

    Attributes:
        latent: ``b c height width``; c is 16, or 32 / 96 with what a control or fill model concatenates.
        pooled_projections: ``b pooled_dim``, further columns are not read; None for zeros.
        guidance: ``b`` float32, or None to leave the guidance embedding out.
    """

    pooled_projections: Tensor | None = None
    guidance: Tensor | None = None
