"""An engine as the `transformer` of diffusers' FluxPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import SettingsError
from ..streams.diffusers_pipeline import EngineInPipeline
from ..streams.positions import pack, unpack
from .config import PATCH_SIZE
from .inputs import Flux1Inputs


class PipelineTransformer(EngineInPipeline):
    """See `EngineInPipeline`."""

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Predict the velocity, as `FluxTransformer2DModel.forward(..., return_dict=False)` does.

        Args:
            hidden_states: (B, rows · columns, 4 C) packed latents, any float dtype.
            timestep: (B,) in 0–1.
            encoder_hidden_states: (B, T, context width).
            pooled_projections: (B, pooled width), or None for zeros.
            img_ids: (rows · columns, 3): 0, row, column, row by row.
            txt_ids: (T, 3) zeros.
            guidance: (B,) or (1,), or None for a model without it.
            joint_attention_kwargs: none.
            return_dict: False.

        Returns:
            A tuple of (B, rows · columns, 64), in the dtype of `hidden_states`.

        Raises:
            SettingsError: something that the engine does not do this way: other positions (Kontext's references), IP
                adapters, or a `scale` for PEFT's layers.
            EngineStateError: the engine is not loaded.
        """
        self._refuse_other_options(joint_attention_kwargs, return_dict)
        rows, columns = _grid(img_ids, txt_ids, hidden_states.shape[1])
        batch = hidden_states.shape[0]
        inputs = Flux1Inputs(
            latent=unpack(hidden_states, rows, columns, PATCH_SIZE).to(self.dtype),
            timestep=timestep.float(),
            encoder_hidden_states=encoder_hidden_states.to(self.dtype),
            pooled_projections=None if pooled_projections is None else pooled_projections.to(self.dtype),
            guidance=None if guidance is None else guidance.float().expand(batch),
        )
        return (pack(self.engine(inputs), PATCH_SIZE).to(hidden_states.dtype),)


def _grid(img_ids: Tensor, txt_ids: Tensor, tokens: int) -> tuple[int, int]:
    """Rows and columns of the one image whose tokens stand where FluxPipeline puts them."""
    rows, columns = (int(last) + 1 for last in img_ids[-1, 1:].tolist())
    expected = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(img_ids)
    if rows * columns != tokens or not torch.equal(img_ids, expected) or txt_ids.any():
        raise SettingsError(
            f"img_ids of {tuple(img_ids.shape)} are not the rows and columns of one image of {tokens} tokens, or "
            "txt_ids are not zero: only FluxPipeline's own positions are served, not those of references."
        )
    return rows, columns
