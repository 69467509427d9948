"""An engine as the `transformer` of diffusers' Flux2Pipeline and Flux2KleinPipeline, with references or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import SettingsError
from ..streams.diffusers_pipeline import EngineInPipeline
from ..streams.positions import pack, unpack
from .config import PATCH_SIZE, POSITIONS
from .inputs import Flux2Inputs


class PipelineTransformer(EngineInPipeline):
    """See `EngineInPipeline`."""

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Predict the velocity, as `Flux2Transformer2DModel.forward(..., return_dict=False)` does.

        Args:
            hidden_states: (B, N, 128) tokens of the image, then of each reference, any float dtype.
            timestep: (B,) in 0–1.
            encoder_hidden_states: (B, T, context width).
            img_ids: (N, 4) or (B, N, 4): image, row, column, 0; references count 10, 20, …
            txt_ids: (T, 4) or (B, T, 4): 0, 0, 0, index.
            guidance: (B,) or (1,), or None for a model without it.
            joint_attention_kwargs: none.
            return_dict: False.

        Returns:
            A tuple of (B, rows · columns, 128) for the image alone, in the dtype of `hidden_states`.

        Raises:
            SettingsError: something that the engine does not do this way: other positions, or a `scale` for PEFT's
                layers.
            EngineStateError: the engine is not loaded.
        """
        self._refuse_other_options(joint_attention_kwargs, return_dict)
        batch = hidden_states.shape[0]
        image, *references = self._latents(hidden_states, img_ids, txt_ids)
        inputs = Flux2Inputs(
            latent=image,
            timestep=timestep.float(),
            encoder_hidden_states=encoder_hidden_states.to(self.dtype),
            guidance=None if guidance is None else guidance.float().expand(batch),
            references=references,
        )
        return (pack(self.engine(inputs), PATCH_SIZE).to(hidden_states.dtype),)

    def _latents(self, tokens: Tensor, img_ids: Tensor, txt_ids: Tensor) -> list[Tensor]:
        """The image and its references, (B, 128, rows, columns) each, where the pipelines put their tokens."""
        image_ids, text_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        _, lengths = torch.unique_consecutive(image_ids[:, 0], return_counts=True)
        latents, start = [], 0
        for length in lengths.tolist():
            rows, columns = (int(last) + 1 for last in image_ids[start + length - 1, 1:3].tolist())
            if rows * columns != length or start + length > tokens.shape[1]:
                raise self._other_positions(img_ids, txt_ids)
            latents.append(unpack(tokens[:, start : start + length], rows, columns, PATCH_SIZE).to(self.dtype))
            start += length
        placement = POSITIONS.place(latents[0], latents[1:], None, len(text_ids))
        expected = (
            POSITIONS.image_ids(placement, image_ids.device),
            POSITIONS.text_ids(placement, text_ids.device),
        )
        given = (image_ids.float(), text_ids.float())
        if start != tokens.shape[1] or not all(map(torch.equal, expected, given)):
            raise self._other_positions(img_ids, txt_ids)
        return latents

    def _other_positions(self, img_ids: Tensor, txt_ids: Tensor) -> SettingsError:
        return SettingsError(
            f"img_ids of {tuple(img_ids.shape)} and txt_ids of {tuple(txt_ids.shape)} are not where Flux2Pipeline puts "
            "one image, its references behind it and the prompt: only those positions are served."
        )
