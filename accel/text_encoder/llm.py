"""Recognise a decoder language model from its header: names and sizes, or why it is one that no transformer here takes.

GGUF files have llama.cpp's names. For the architectures that it calls `llama` and `mistral3` its converter also brings
the rows of queries and keys into another order (conversion/llama.py, `LlamaModel.permute`), see `halves`; `qwen3` keeps
Hugging Face's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..checkpoint.gguf_file import ARCHITECTURE
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError
from ..families.text_encoders import LANGUAGE_MODELS, LanguageModel, examples, expected
from ..spec import StoredTensor
from .config import LlmConfig
from .spec import EncoderSpec, complete, find_prefix, layer_count, with_scales
from .tekken import has_vocabulary

LAYER = r"model\.layers\.(\d+)\."
# Names of a layer's tensors, after what stands before them: of the models here, and of whatever language model.
NAMES = rf"((?:.*?\.)?){LAYER}.*"
ANY = re.compile(r"(?:.*\.)?model\.(?:language_model\.)?layers\.\d+\.|blk\.\d+\.")
# Where a norm of each head has no size to tell it: every published one.
HEAD_DIM = 128

# The parts of a layer's names: llama.cpp's -> Hugging Face's.
GGUF_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_PLAIN: Mapping[str, str] = {"token_embd.weight": "model.embed_tokens.weight"}
# llama.cpp's architecture -> whether queries and keys are in its own order.
GGUF_ORDER: Mapping[str, bool] = {"qwen3": False, "llama": True, "mistral3": True}
GGUF_OTHERS: Mapping[str, str] = {
    "qwen2": "Qwen2.5", "qwen2vl": "Qwen2.5-VL", "qwen3vl": "Qwen3-VL", "qwen3moe": "Qwen3 with experts",
    "qwen35": "Qwen3.5", "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3", "llama4": "Llama 4",
    "phi3": "Phi-3", "gpt-oss": "GPT-OSS",
}  # fmt: skip
# What only other language models have, by names of their tensors; the first that is found says which.
OTHERS: Sequence[tuple[str, str]] = (
    (r"deepstack_merger_list\.", "Qwen3-VL"),
    (r"linear_attn\.", "Qwen3.5"),
    (r"(?:pre|post)_feedforward_layernorm\.", "Gemma"),
    (r"(?:mlp\.experts|block_sparse_moe)\.", "a mixture of experts, such as GPT-OSS"),
    (r"(?:^|\.)visual\.", "Qwen2.5-VL"),
    (r"model\.language_model\.", "a language model that sees pictures"),
    (r"self_attn\.[qkv]_proj\.bias$", "Qwen2.5"),
    (r"self_attn\.qkv_proj\.", "Phi-3"),
)
VOCABULARIES: Mapping[int, str] = {128256: "Llama 3", 128320: "Llama 3", 131072: "Mistral without its vocabulary"}
# What no hidden state before the last norm depends on.
BEYOND = re.compile(r"model\.norm\.weight|(?:model\.)?lm_head\.weight|.*rotary_emb\.inv_freq"
                    r"|output(?:_norm)?\.weight|rope_freqs\.weight")  # fmt: skip


def matches(file: Checkpoint) -> bool:
    """Whether a file holds a decoder language model of any kind, complete or not."""
    return any(map(ANY.match, file.tensors))


def read(file: Checkpoint) -> EncoderSpec:
    """The sizes and tensors of a language model of any size, in a file that `matches`.

    Raises:
        CheckpointError: another language model, or tensors missing or of a wrong shape.
    """
    _refuse_others(file)
    names = _names(file)
    model = _model(file, names)
    layers = layer_count(names, LAYER)
    if layers < model.taken[-1]:
        raise CheckpointError(
            f"'{file.name}' is a {model.name} of {layers} layers, expected at least {model.taken[-1]}: the transformer "
            f"reads hidden states from after that many. Choose a file such as {model.example} as t5_name."
        )
    config = _config(file, names, model)
    needed = {name: stored for name, stored in names.items() if not _beyond(name, config.num_layers)}
    return EncoderSpec(file, config, complete(file, needed, config.shapes()), _interleaved(file, config))


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key weight in Hugging Face's order, from llama.cpp's.

    Rotary embedding turns pairs of rows of a head. llama.cpp has the two of a pair side by side; Hugging Face has the
    first of all pairs, then the second of all.

    Args:
        weight: (heads * head_dim, in_features).
        heads: of this weight.

    Returns:
        The same rows, a new tensor.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _refuse_others(file: Checkpoint) -> None:
    architecture = file.metadata.get(ARCHITECTURE)
    if architecture is not None and architecture not in GGUF_ORDER:
        raise _other(file, GGUF_OTHERS.get(architecture, f"a language model of the architecture '{architecture}'"))
    for pattern, what in OTHERS:
        if any(re.search(pattern, key) for key in file.tensors):
            raise _other(file, what)


def _names(file: Checkpoint) -> dict[str, StoredTensor]:
    """The model's tensors by Hugging Face names."""
    if any(key.startswith("blk.") for key in file.tensors):
        return {_from_gguf(key): tensor for key, tensor in with_scales(file, "", file.tensors).items()}
    prefix = find_prefix(file, NAMES) or ""
    wanted = (f"{prefix}model.", f"{prefix}lm_head.")
    return with_scales(file, prefix, (key for key in file.tensors if key.startswith(wanted)))


def _from_gguf(key: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", key)
    if layer and layer[2] in GGUF_LAYER:
        return f"model.layers.{layer[1]}.{GGUF_LAYER[layer[2]]}.weight"
    return GGUF_PLAIN.get(key, key)


def _model(file: Checkpoint, names: Mapping[str, StoredTensor]) -> LanguageModel:
    qk_norm, tekken = "model.layers.0.self_attn.q_norm.weight" in names, has_vocabulary(file)
    for model in LANGUAGE_MODELS:
        if model.qk_norm == qk_norm and (tekken or not model.tekken):
            return model
    embedding = names.get("model.embed_tokens.weight")
    tokens = 0 if embedding is None else embedding.shape[0]
    raise _other(
        file,
        VOCABULARIES.get(tokens, f"a language model like Llama ({tokens:,} tokens)"),
        ". A Mistral needs the tensor 'tekken_model', or in GGUF the vocabulary 'tekken': that is how its text is cut",
    )


def _config(file: Checkpoint, names: Mapping[str, StoredTensor], model: LanguageModel) -> LlmConfig:
    first = "model.layers.0."
    embedding = names.get("model.embed_tokens.weight")
    query, key, gate = (names.get(f"{first}{part}_proj.weight") for part in ("self_attn.q", "self_attn.k", "mlp.gate"))
    if any(stored is None or len(stored.shape) != 2 for stored in (embedding, query, key, gate)):
        raise CheckpointError(
            f"'{file.name}': a part of the first layer, or the token embedding, is missing or is no matrix. The "
            f"{model.name} is incomplete: get the complete text encoder."
        )
    head_dim = names[f"{first}self_attn.q_norm.weight"].shape[0] if model.qk_norm else HEAD_DIM
    for stored in (query, key):
        if stored.shape[0] % head_dim:
            raise CheckpointError(
                f"'{file.name}': '{stored.key}' has {stored.shape[0]} rows, expected a multiple of {head_dim}, the "
                "width of a head. The file is damaged, or another model: get the complete text encoder."
            )
    return LlmConfig(
        model=model,
        hidden_size=embedding.shape[1],
        intermediate_size=gate.shape[0],
        num_heads=query.shape[0] // head_dim,
        num_kv_heads=key.shape[0] // head_dim,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
    )


def _beyond(name: str, layers: int) -> bool:
    """Whether it comes after the last layer that is needed."""
    layer = re.match(LAYER, name)
    return int(layer[1]) >= layers if layer else BEYOND.fullmatch(name) is not None


def _interleaved(file: Checkpoint, config: LlmConfig) -> dict[str, int]:
    if not GGUF_ORDER.get(file.metadata.get(ARCHITECTURE, ""), False):
        return {}
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    layers = range(config.num_layers)
    return {f"model.layers.{index}.{name}.weight": count for index in layers for name, count in heads.items()}


def _other(file: Checkpoint, what: str, more: str = "") -> CheckpointError:
    return CheckpointError(
        f"'{file.name}' is {what}, expected {expected()}{more}. Choose a file such as {examples()} as t5_name."
    )
