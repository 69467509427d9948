"""FLUX.1's text encoders, T5 and CLIP-L, as ComfyUI's CLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import comfy.clip_model
import comfy.model_management
import comfy.sd1_clip
import comfy.text_encoders.flux
import comfy.text_encoders.t5
import torch
from torch import Tensor, nn

from ....accel.text_encoder.spec import EncoderSpec
from ...clip import RememberingClip
from ...encoders import Encoded, Encoders, Extra, interruptible

# The width of CLIP-L's pooled vector where there is no CLIP-L.
POOLED = 768


class FluxEncoders(Encoders):
    """T5 and CLIP-L; the latter may be missing."""

    def __init__(self, t5: EncoderSpec, clip: EncoderSpec | None, mode: str) -> None:
        """Have the sizes of the files, without data; `mode` is how the T5 is kept."""
        encoders = {"t5xxl": (_t5_model(t5), t5)}
        if clip is not None:
            encoders["clip_l"] = (_clip_model(clip), clip)
        super().__init__({"t5xxl": "t5xxl", "l": "clip_l"}, encoders, mode, quantized="t5xxl")
        interruptible(self.t5xxl.transformer.encoder.block)

    def encode_part(self, part: str, tokens: Any) -> Encoded:
        """Run one of the two.

        Args:
            part: "t5xxl" -> (1, T, d_model) float32; "l" -> the pooled vector (1, hidden) float32, which is zero
                without CLIP-L.
            tokens: what the tokenizer gave for it.
        """
        if not self.has(part):
            return (torch.zeros(1, POOLED, device=comfy.model_management.intermediate_device()),)
        self.encode_counts[part] += 1
        encoder = self.get_submodule(self.modules_of[part])
        hidden_states, pooled = encoder.encode_token_weights(tokens)[:2]
        return (hidden_states if part == "t5xxl" else pooled,)

    def conditioning(self, outputs: Mapping[str, Encoded]) -> tuple[Tensor, Tensor, Extra]:
        """T5's hidden states and CLIP-L's pooled vector, as ComfyUI's FLUX text encoder gives them."""
        (hidden_states,), (pooled,) = outputs["t5xxl"], outputs["l"]
        return hidden_states, pooled, {}


class FluxClip(RememberingClip):
    """The CLIP of both."""

    def __init__(
        self,
        t5: EncoderSpec,
        clip: EncoderSpec | None,
        mode: str,
        load_device: torch.device,
        offload_device: torch.device,
        embedding_directory: list[str] | None,
    ) -> None:
        """Make it from headers: nothing is read.

        Args:
            t5: the T5's file.
            clip: CLIP-L's; None: the pooled vector is zero.
            mode: how the T5 is kept, of `accel.text_encoder.modes`.
            load_device: where they compute, unless it lacks a dtype of theirs.
            offload_device: where their weights wait, and then compute.
            embedding_directory: folders of the files that `embedding:name` in a prompt means.
        """
        positions = {} if clip is None else {"clip_l_max_length": clip.config.max_position_embeddings}
        tokenizer = comfy.text_encoders.flux.FluxTokenizer(embedding_directory, tokenizer_data=positions)
        tokenizer.t5xxl.embedding_size = t5.config.d_model
        if clip is not None:
            tokenizer.clip_l.embedding_size = clip.config.hidden_size
        super().__init__(FluxEncoders(t5, clip, mode), tokenizer, load_device, offload_device)


def _t5_model(spec: EncoderSpec) -> nn.Module:
    config = {**dataclasses.asdict(spec.config), "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}
    return comfy.sd1_clip.SDClipModel(
        device="meta",
        dtype=spec.stored_dtype,
        textmodel_json_config={**config, "model_type": "t5"},
        special_tokens={"end": 1, "pad": 0},
        model_class=comfy.text_encoders.t5.T5,
        model_options={"model_name": "t5xxl"},
    )


def _clip_model(spec: EncoderSpec) -> nn.Module:
    config = {**dataclasses.asdict(spec.config), "num_attention_heads": spec.config.num_attention_heads}
    model = comfy.sd1_clip.SDClipModel(
        device="meta",
        dtype=spec.stored_dtype,
        max_length=spec.config.max_position_embeddings,
        textmodel_json_config={**config, "hidden_act": "quick_gelu", "eos_token_id": 49407},
        model_class=comfy.clip_model.CLIPTextModel,
        return_projected_pooled=False,
        model_options={"model_name": "clip_l"},
    )
    if "text_projection.weight" not in spec.weights:
        # FLUX takes the pooled vector before the projection; ComfyUI's model computes it all the same.
        model.transformer.text_projection = nn.Identity()
    return model
