"""FLUX.2's text encoder, a language model, as ComfyUI's CLIP.

ComfyUI runs all layers of it, and takes the hidden states after as many as `LanguageModel.taken` says. Here the layers
behind the last of these, and the last norm, are not loaded: nothing that is taken comes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sd1_clip
import comfy.text_encoders.flux
import comfy.text_encoders.llama
import torch
from torch import Tensor, nn

from ....accel.errors import CheckpointError
from ....accel.families.text_encoders import MISTRAL, QWEN3
from ....accel.text_encoder.config import LlmConfig
from ....accel.text_encoder.spec import EncoderSpec
from ....accel.text_encoder.tekken import TENSOR, TekkenTokenizer, read_vocabulary
from ...clip import RememberingClip
from ...encoders import Encoded, Encoders, Extra, interruptible

WIDTH_8B = 4096
PAD_MISTRAL = 11


@dataclass(frozen=True)
class _Kind:
    """What ComfyUI has for a language model.

    Attributes:
        special_tokens: by which it knows the padding of a prompt.
        config: its class of sizes, whose other values (base of the rotary embedding, epsilon) are the model's.
        tokenizer: folders of embeddings and a file -> ComfyUI's tokenizer.
    """

    special_tokens: Mapping[str, int]
    config: Callable[..., Any]
    tokenizer: Callable[[list[str] | None, EncoderSpec], Any]


class Flux2Encoders(Encoders):
    """The language model, under the name that ComfyUI has for the size nearest to it."""

    def __init__(self, spec: EncoderSpec, mode: str) -> None:
        """Have the sizes of the file, without data; `mode` is how it is kept."""
        name = module_name(spec.config)
        super().__init__({name: name}, {name: (_model(spec), spec)}, mode, quantized=name)
        self.name = name
        interruptible(self.get_submodule(name).transformer.model.layers)

    def encode_part(self, part: str, tokens: Any) -> Encoded:
        """Run it.

        Args:
            part: its name.
            tokens: what the tokenizer gave.

        Returns:
            The hidden states that are taken, side by side, (1, T, 3 * hidden) float32; and which tokens are no padding,
            (1, T) int64.
        """
        self.encode_counts[part] += 1
        hidden_states, _, extra = self.get_submodule(part).encode_token_weights(tokens)
        return hidden_states.movedim(1, 2).flatten(2), extra["attention_mask"]

    def conditioning(self, outputs: Mapping[str, Encoded]) -> tuple[Tensor, None, Extra]:
        """As ComfyUI's text encoder for FLUX.2 gives them; there is no pooled vector."""
        hidden_states, attention_mask = outputs[self.name]
        return hidden_states, None, {"attention_mask": attention_mask}


class Flux2Clip(RememberingClip):
    """The CLIP of it."""

    def __init__(
        self,
        spec: EncoderSpec,
        mode: str,
        load_device: torch.device,
        offload_device: torch.device,
        embedding_directory: list[str] | None,
    ) -> None:
        """Make it from a header: no weight is read, only a vocabulary that comes with them.

        Args:
            spec: the file.
            mode: how it is kept, of `accel.text_encoder.modes`.
            load_device: where it computes, unless it lacks a dtype of the file's.
            offload_device: where its weights wait, and then compute.
            embedding_directory: folders of the files that `embedding:name` in a prompt means.

        Raises:
            FileError: the file is gone, or was changed.
            CheckpointError: tokenizer and weights do not go together.
        """
        encoders = Flux2Encoders(spec, mode)
        tokenizer = _KINDS[spec.config.model.name].tokenizer(embedding_directory, spec)
        part = getattr(tokenizer, encoders.name)
        part.embedding_size = spec.config.hidden_size
        tokens = 1 + max(part.inv_vocab)
        if tokens > spec.config.vocab_size:
            raise CheckpointError(
                f"'{spec.file.name}': its vocabulary has {spec.config.vocab_size:,} tokens, expected at least "
                f"{tokens:,}, which its tokenizer has. Choose a file such as {spec.config.model.example}."
            )
        super().__init__(encoders, tokenizer, load_device, offload_device)


def module_name(config: LlmConfig) -> str:
    """ComfyUI's name for the language model, by which LoRAs find its layers."""
    if config.model is MISTRAL:
        return "mistral3_24b"
    return "qwen3_8b" if config.hidden_size == WIDTH_8B else "qwen3_4b"


class _Decoder(comfy.text_encoders.llama.BaseLlama, nn.Module):
    """ComfyUI's decoder in a file's sizes, up to the last layer that is needed."""

    def __init__(self, sizes: dict[str, Any], dtype: torch.dtype, device: Any, operations: Any) -> None:
        super().__init__()
        config, made = sizes["config"], _KINDS[sizes["config"].model.name].config
        decoder_config = made(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            final_norm=False,
        )
        decoder_config.head_dim = config.head_dim  # no field of the class, which has it as 128
        self.num_layers = config.num_layers
        self.model = comfy.text_encoders.llama.Llama2_(decoder_config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


def _model(spec: EncoderSpec) -> nn.Module:
    model = spec.config.model
    return comfy.sd1_clip.SDClipModel(
        device="meta",
        dtype=spec.stored_dtype,
        layer=list(model.taken),
        textmodel_json_config={"config": spec.config},
        special_tokens=dict(_KINDS[model.name].special_tokens),
        layer_norm_hidden_state=False,
        model_class=_Decoder,
        enable_attention_masks=True,
        return_attention_masks=True,
        model_options={"model_name": module_name(spec.config)},
    )


class _MistralTokenizer(comfy.sd1_clip.SDTokenizer):
    """As ComfyUI's `Mistral3Tokenizer`, on our reading of the vocabulary, see `tekken`."""

    def __init__(self, embedding_directory: list[str] | None = None, tokenizer_data: Any = None) -> None:
        self.vocabulary = tokenizer_data[TENSOR]
        made = TekkenTokenizer(tokenizer_data["file"], self.vocabulary)
        super().__init__(
            "",
            max_length=99999999,
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_key="mistral3_24b",
            tokenizer_class=_Made(made),
            has_end_token=False,
            pad_to_max_length=False,
            min_length=1,
            pad_token=PAD_MISTRAL,
            start_token=1,
            pad_left=True,
            disable_weights=True,
            tokenizer_data=tokenizer_data,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What a saved text encoder needs to be loaded again."""
        return {TENSOR: self.vocabulary}


@dataclass(frozen=True)
class _Made:
    """Stands for a class of transformers, from which ComfyUI makes a tokenizer."""

    tokenizer: TekkenTokenizer

    def from_pretrained(self, *_: Any, **__: Any) -> TekkenTokenizer:
        return self.tokenizer


def _klein_tokenizer(embedding_directory: list[str] | None, spec: EncoderSpec) -> Any:
    of_8b = module_name(spec.config) == "qwen3_8b"
    made = comfy.text_encoders.flux.KleinTokenizer8B if of_8b else comfy.text_encoders.flux.KleinTokenizer
    return made(embedding_directory, tokenizer_data={})


def _dev_tokenizer(embedding_directory: list[str] | None, spec: EncoderSpec) -> Any:
    vocabulary = {TENSOR: read_vocabulary(spec.file), "file": spec.file.name}
    chosen = {**vocabulary, "mistral3_24b_tokenizer_class": _MistralTokenizer}
    return comfy.text_encoders.flux.Flux2Tokenizer(embedding_directory, tokenizer_data=chosen)


_KINDS: Mapping[str, _Kind] = {
    QWEN3.name: _Kind({"pad": 151643}, comfy.text_encoders.llama.Qwen3_4BConfig, _klein_tokenizer),
    MISTRAL.name: _Kind({"start": 1, "pad": 0}, comfy.text_encoders.llama.Mistral3Small24BConfig, _dev_tokenizer),
}
