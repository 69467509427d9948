"""Recognise a T5 or CLIP-L file from its header: names and sizes, or why it is the wrong file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .weight_file import StoredWeight, WeightFile

TOKENS_T5, TOKENS_UMT5, TOKENS_CLIP = 32100, 256384, 49408
BUCKETS = 32
HEAD_CLIP = 64

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


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder (gated GELU, one relative position bias for all blocks)."""

    num_layers: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    vocab_size: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear as (out_features, in_features), in the order in which a forward uses them."""
        inner = self.d_kv * self.num_heads
        linears = {}
        for index in range(self.num_layers):
            block = f"encoder.block.{index}.layer"
            linears |= {f"{block}.0.SelfAttention.{name}": (inner, self.d_model) for name in "qkv"}
            linears[f"{block}.0.SelfAttention.o"] = (self.d_model, inner)
            linears |= {f"{block}.1.DenseReluDense.{name}": (self.d_ff, self.d_model) for name in ("wi_0", "wi_1")}
            linears[f"{block}.1.DenseReluDense.wo"] = (self.d_model, self.d_ff)
        return linears

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {"shared.weight": (self.vocab_size, self.d_model)}
        shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (BUCKETS, self.num_heads)
        shapes |= {f"{name}.weight": shape for name, shape in self.linears.items()}
        for index in range(self.num_layers):
            shapes |= {f"encoder.block.{index}.layer.{layer}.layer_norm.weight": (self.d_model,) for layer in (0, 1)}
        return {**shapes, "encoder.final_layer_norm.weight": (self.d_model,)}


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP text encoder; heads are 64 wide, as in every published one."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int

    @property
    def num_attention_heads(self) -> int:
        """Heads of width 64, or one for a narrower model."""
        return max(1, self.hidden_size // HEAD_CLIP)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its Hugging Face name; without `text_projection`, which FLUX does not use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "text_model.embeddings.token_embedding.weight": (TOKENS_CLIP, hidden),
            "text_model.embeddings.position_embedding.weight": (self.max_position_embeddings, hidden),
        }
        linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
        for index in range(self.num_hidden_layers):
            layer = f"text_model.encoder.layers.{index}"
            for name, shape in linears.items():
                shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{layer}.{norm}.weight": (hidden,), f"{layer}.{norm}.bias": (hidden,)}
        norm = "text_model.final_layer_norm"
        return {**shapes, f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}


@dataclass(frozen=True)
class EncoderSpec:
    """A recognised file: its sizes, and where it holds each parameter of the encoder."""

    file: WeightFile
    config: T5Config | ClipConfig
    weights: Mapping[str, StoredWeight]

    @property
    def stored_bytes(self) -> int:
        """What the encoder's weights take in the file."""
        return sum(stored.bytes for stored in self.weights.values())

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of most of its bytes; GGUF blocks count as float16, which they are unpacked to."""
        count: Counter[torch.dtype] = Counter()
        for stored in self.weights.values():
            count[stored.dtype or torch.float16] += stored.bytes
        return count.most_common(1)[0][0]


def check_not_swapped(t5: WeightFile, clip: WeightFile | None) -> None:
    """Tell two files in each other's place from two wrong files.

    Raises:
        CheckpointError: they are swapped.
    """
    if clip is not None and _is_clip(t5) and not _is_t5(t5) and _is_t5(clip) and not _is_clip(clip):
        raise CheckpointError(
            f"The two files are swapped: '{t5.name}' is a CLIP text encoder and '{clip.name}' is a T5. Choose "
            f"'{clip.name}' as t5_name and '{t5.name}' as clip_l_name."
        )


def t5_spec(file: WeightFile) -> EncoderSpec:
    """Recognise a T5 v1.1 encoder of any size.

    Raises:
        CheckpointError: another model, or tensors missing or of a wrong shape.
    """
    names = _t5_names(file)
    if not names:
        raise CheckpointError(
            f"'{file.name}' is {_guess(file)}, expected a T5 v1.1 text encoder (encoder.block.*, or enc.blk.* in "
            "GGUF). Choose a file such as t5xxl_fp16.safetensors as t5_name."
        )
    _refuse_other_t5(file, names)
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
        num_layers=_count(names, r"encoder\.block\.(\d+)\."),
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
    return EncoderSpec(file, config, _complete(file, names, config.shapes()))


def clip_spec(file: WeightFile) -> EncoderSpec:
    """Recognise a CLIP-L text encoder of any size.

    Raises:
        CheckpointError: another model, or tensors missing or of a wrong shape.
    """
    names = _clip_names(file)
    if not names:
        raise CheckpointError(
            f"'{file.name}' is {_guess(file)}, expected a CLIP-L text encoder (text_model.*). Choose a file such as "
            "clip_l.safetensors as clip_l_name, or 'none'."
        )
    tokens, positions = (names.get(f"text_model.embeddings.{part}_embedding.weight") for part in ("token", "position"))
    fc1 = names.get("text_model.encoder.layers.0.mlp.fc1.weight")
    if any(stored is None or len(stored.shape) != 2 for stored in (tokens, positions, fc1)):
        raise CheckpointError(
            f"'{file.name}': the embeddings or the first layer are missing, or are no matrices. The CLIP is "
            "incomplete: get the complete text encoder."
        )
    layers = _count(names, r"text_model\.encoder\.layers\.(\d+)\.")
    known = {(1280, 32): "CLIP-G (of SDXL and SD3)", (1024, 24): "CLIP-H (of Stable Diffusion 2)"}
    other = known.get((tokens.shape[1], layers))
    if other:
        raise CheckpointError(
            f"'{file.name}' is {other}, expected CLIP-L: FLUX was trained with that one. Choose clip_l.safetensors."
        )
    config = ClipConfig(layers, tokens.shape[1], fc1.shape[0], positions.shape[0])
    shapes = config.shapes()
    if "text_projection.weight" in names:
        shapes["text_projection.weight"] = (config.hidden_size, config.hidden_size)
    return EncoderSpec(file, config, _complete(file, names, shapes))


def _t5_names(file: WeightFile) -> dict[str, StoredWeight]:
    """The encoder's tensors by Hugging Face names, whatever stands before them; empty if there are none."""
    if "enc.output_norm.weight" in file.weights or any(key.startswith("enc.blk.") for key in file.weights):
        return {_from_gguf(key): stored for key, stored in file.weights.items() if not key.startswith("dec.")}
    prefix = _prefix(file, r"(.*?)encoder\.(?:block\.\d+\.layer\.\d+\.|final_layer_norm\.).*")
    if prefix is None:
        return {}
    names = {
        key.removeprefix(prefix): stored
        for key, stored in file.weights.items()
        if key.startswith((f"{prefix}encoder.", f"{prefix}shared."))
    }
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


def _clip_names(file: WeightFile) -> dict[str, StoredWeight]:
    prefix = _prefix(file, r"(.*?)text_model\.(?:encoder\.layers\.|embeddings\.|final_layer_norm\.).*")
    if prefix is None:
        return {}
    # Beside the text model, published files may hold the picture half, a temperature and token positions.
    wanted = (f"{prefix}text_model.", f"{prefix}text_projection.weight")
    return {
        key.removeprefix(prefix): stored
        for key, stored in file.weights.items()
        if key.startswith(wanted) and not key.endswith(".position_ids")
    }


def _prefix(file: WeightFile, pattern: str) -> str | None:
    """What stands before the encoder's names; of several encoders CLIP-L's."""
    found = {match[1] for key in file.weights if (match := re.fullmatch(pattern, key))}
    return min(found, key=lambda prefix: ("clip_l" not in prefix, prefix)) if found else None


def _is_t5(file: WeightFile) -> bool:
    return bool(_t5_names(file))


def _is_clip(file: WeightFile) -> bool:
    return bool(_clip_names(file))


def _count(names: Mapping[str, StoredWeight], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _refuse_other_t5(file: WeightFile, names: Mapping[str, StoredWeight]) -> None:
    embedding = names.get("shared.weight")
    if embedding is not None and embedding.shape[0] == TOKENS_UMT5:
        raise CheckpointError(
            f"'{file.name}' is UMT5 (the text encoder of Wan; {TOKENS_UMT5:,} tokens), expected T5 v1.1: FLUX was "
            "trained with that one. Choose a file such as t5xxl_fp16.safetensors."
        )
    if any(name.endswith("DenseReluDense.wi.weight") for name in names):
        raise CheckpointError(
            f"'{file.name}' is a T5 v1.0 (its feed-forward layers have no gate), expected T5 v1.1. Choose a file such "
            "as t5xxl_fp16.safetensors."
        )


def _complete(
    file: WeightFile, names: Mapping[str, StoredWeight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredWeight]:
    """The weights of an encoder, in its own order; every one is there, none is left over."""
    missing = [name for name in shapes if name not in names]
    if missing:
        raise CheckpointError(
            f"'{file.name}': {len(missing)} of {len(shapes)} tensors are missing, such as '{missing[0]}'. It is "
            "incomplete: get the complete text encoder."
        )
    unknown = [stored.key for name, stored in names.items() if name not in shapes]
    if unknown:
        raise CheckpointError(
            f"'{file.name}': {len(unknown)} tensors have no place in the encoder, such as '{unknown[0]}': it belongs "
            "to another model. Choose the text encoder alone."
        )
    for name, shape in shapes.items():
        if names[name].shape != shape:
            raise CheckpointError(
                f"'{file.name}': '{names[name].key}' has shape {names[name].shape}, expected {shape} from the file's "
                "other tensors. The file is damaged, or mixed from two models."
            )
    return {name: names[name] for name in shapes}


OTHERS: tuple[tuple[Callable[[WeightFile], bool], str], ...] = (
    (_is_t5, "a T5 text encoder"),
    (_is_clip, "a CLIP text encoder"),
    (lambda file: any(key.startswith("decoder.block.") for key in file.weights), "the decoder half of a T5"),
    (lambda file: any(".resblocks." in key for key in file.weights), "a CLIP in OpenCLIP's layout"),
    (lambda file: any("double_blocks." in key for key in file.weights), "a FLUX transformer"),
    (lambda file: any("model.layers." in key or key.startswith("blk.") for key in file.weights), "a language model"),
    (lambda file: any("lora" in key for key in file.weights), "a LoRA"),
    (lambda file: any(key.startswith(("decoder.conv_in", "taesd_")) for key in file.weights), "a VAE"),
)


def _guess(file: WeightFile) -> str:
    for matches, what in OTHERS:
        if matches(file):
            return what
    return f"not a text encoder that this pack knows (its first tensor is '{next(iter(file.weights), '')}')"
