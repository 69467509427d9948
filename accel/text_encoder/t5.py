"""Recognise a T5 v1.1 encoder from its header: names and sizes, or why it is the wrong T5."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError
from ..spec import StoredTensor
from .config import T5Config
from .spec import EncoderSpec, complete, find_prefix, layer_count, with_scales

TOKENS_T5, TOKENS_UMT5 = 32100, 256384

# Names of the encoder's tensors in Hugging Face's layout, after what stands before them.
NAMES = r"(.*?)encoder\.(?:block\.\d+\.layer\.\d+\.|final_layer_norm\.).*"

# The parts of a T5 block's names: llama.cpp's (city96's GGUF files) -> Hugging Face's.
GGUF_BLOCK: Mapping[str, str] = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}


def matches(file: Checkpoint) -> bool:
    """Whether a file holds a T5's encoder, complete or not."""
    return _prefix(file) is not None


def read(file: Checkpoint) -> EncoderSpec:
    """The sizes and tensors of a T5 v1.1 encoder of any size, in a file that `matches`.

    Raises:
        CheckpointError: another T5, or tensors missing or of a wrong shape.
    """
    names = _names(file, _prefix(file) or "")
    _refuse_others(file, names)
    embedding = names.get("shared.weight")
    bias = names.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    query = names.get("encoder.block.0.layer.0.SelfAttention.q.weight")
    wi = names.get("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    if any(stored is None or len(stored.shape) != 2 for stored in (embedding, bias, query, wi)):
        raise CheckpointError(
            f"'{file.name}': a part of the first block, or the token embedding, is missing or is no matrix. The T5 is "
            "incomplete: get the complete text encoder."
        )
    heads = bias.shape[1]
    config = T5Config(
        num_layers=layer_count(names, r"encoder\.block\.(\d+)\."),
        d_model=embedding.shape[1],
        d_ff=wi.shape[0],
        d_kv=query.shape[0] // heads,
        num_heads=heads,
        vocab_size=embedding.shape[0],
    )
    if config.vocab_size < TOKENS_T5:
        raise CheckpointError(
            f"'{file.name}': its vocabulary has {config.vocab_size:,} tokens, expected at least {TOKENS_T5:,}: T5's "
            "own tokenizer does not fit it. Choose a T5 v1.1 encoder."
        )
    return EncoderSpec(file, config, complete(file, names, config.shapes()))


def _prefix(file: Checkpoint) -> str | None:
    """What stands before the encoder's names; None if there are none."""
    return "" if _has_llama_names(file) else find_prefix(file, NAMES)


def _has_llama_names(file: Checkpoint) -> bool:
    return "enc.output_norm.weight" in file.tensors or any(key.startswith("enc.blk.") for key in file.tensors)


def _names(file: Checkpoint, prefix: str) -> dict[str, StoredTensor]:
    """The encoder's tensors by Hugging Face names."""
    if _has_llama_names(file):
        stored = with_scales(file, "", (key for key in file.tensors if not key.startswith("dec.")))
        return {_from_gguf(key): tensor for key, tensor in stored.items()}
    wanted = (f"{prefix}encoder.", f"{prefix}shared.")
    names = with_scales(file, prefix, (key for key in file.tensors if key.startswith(wanted)))
    tied = names.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        names.setdefault("shared.weight", tied)
    return names


def _from_gguf(key: str) -> str:
    plain = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", key)
    if block and block[2] in GGUF_BLOCK:
        return f"encoder.block.{block[1]}.{GGUF_BLOCK[block[2]]}.weight"
    return plain.get(key, key)


def _refuse_others(file: Checkpoint, names: Mapping[str, StoredTensor]) -> None:
    embedding = names.get("shared.weight")
    if embedding is not None and embedding.shape[0] == TOKENS_UMT5:
        raise CheckpointError(
            f"'{file.name}' is UMT5 (the text encoder of Wan; {TOKENS_UMT5:,} tokens), expected T5 v1.1: the "
            "transformer was trained with that one. Choose a file such as t5xxl_fp16.safetensors."
        )
    if any(name.endswith("DenseReluDense.wi.weight") for name in names):
        raise CheckpointError(
            f"'{file.name}' is a T5 v1.0 (its feed-forward layers have no gate), expected T5 v1.1. Choose a file such "
            "as t5xxl_fp16.safetensors."
        )
