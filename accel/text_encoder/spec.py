"""Recognise a T5 or CLIP-L file from its header: names and sizes, or why it is the wrong file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.other_models import OTHERS as OTHER_MODELS
from ..checkpoint.other_models import first_match, is_lora
from ..checkpoint.recognise import looks_like
from ..checkpoint.scales import STORED_AS, find_scales
from ..checkpoint.source import Checkpoint
from ..checkpoint.stored import check_stored
from ..errors import CheckpointError
from ..spec import StoredTensor
from .config import ClipConfig, T5Config

TOKENS_T5, TOKENS_UMT5 = 32100, 256384

# Names of an encoder's tensors in Hugging Face's layout, after what stands before them.
T5_NAMES = r"(.*?)encoder\.(?:block\.\d+\.layer\.\d+\.|final_layer_norm\.).*"
CLIP_NAMES = r"(.*?)text_model\.(?:encoder\.layers\.|embeddings\.|final_layer_norm\.).*"

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
class EncoderSpec:
    """A recognised file: its sizes, and where it holds each parameter of the encoder."""

    file: Checkpoint
    config: T5Config | ClipConfig
    weights: Mapping[str, StoredTensor]

    @property
    def stored_dtype(self) -> torch.dtype:
        """The float dtype of most of its bytes; GGUF blocks count as float16, which they are unpacked to."""
        count: Counter[torch.dtype] = Counter()
        for stored in self.weights.values():
            integer = not stored.info.dtype.is_floating_point
            dtype = torch.float16 if stored.info.packed else torch.bfloat16 if integer else stored.info.dtype
            count[dtype] += stored.info.bytes
        return count.most_common(1)[0][0]


def check_not_swapped(t5: Checkpoint, clip: Checkpoint | None) -> None:
    """Tell two files in each other's place from two wrong files.

    Raises:
        CheckpointError: they are swapped.
    """
    if clip is not None and _is_clip(t5) and not _is_t5(t5) and _is_t5(clip) and not _is_clip(clip):
        raise CheckpointError(
            f"The two files are swapped: '{t5.name}' is a CLIP text encoder and '{clip.name}' is a T5. Choose "
            f"'{clip.name}' as t5_name and '{t5.name}' as clip_l_name."
        )


def t5_spec(file: Checkpoint) -> EncoderSpec:
    """Recognise a T5 v1.1 encoder of any size.

    Raises:
        CheckpointError: another model, or tensors missing or of a wrong shape.
    """
    prefix = _t5_prefix(file)
    if prefix is None:
        raise CheckpointError(
            f"'{file.name}' is {_guess(file)}, expected a T5 v1.1 text encoder (encoder.block.*, or enc.blk.* in "
            "GGUF). Choose a file such as t5xxl_fp16.safetensors as t5_name."
        )
    names = _t5_names(file, prefix)
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


def clip_spec(file: Checkpoint) -> EncoderSpec:
    """Recognise a CLIP-L text encoder of any size.

    Raises:
        CheckpointError: another model, or tensors missing or of a wrong shape.
    """
    prefix = _clip_prefix(file)
    if prefix is None:
        raise CheckpointError(
            f"'{file.name}' is {_guess(file)}, expected a CLIP-L text encoder (text_model.*). Choose a file such as "
            "clip_l.safetensors as clip_l_name, or 'none'."
        )
    names = _clip_names(file, prefix)
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
            f"'{file.name}' is {other}, expected CLIP-L: the transformer was trained with that one. "
            "Choose clip_l.safetensors."
        )
    config = ClipConfig(layers, tokens.shape[1], fc1.shape[0], positions.shape[0])
    shapes = config.shapes()
    if "text_projection.weight" in names:
        shapes["text_projection.weight"] = (config.hidden_size, config.hidden_size)
    return EncoderSpec(file, config, _complete(file, names, shapes))


def _t5_prefix(file: Checkpoint) -> str | None:
    """What stands before the encoder's names; None if there are none."""
    return "" if _has_llama_names(file) else _prefix(file, T5_NAMES)


def _has_llama_names(file: Checkpoint) -> bool:
    return "enc.output_norm.weight" in file.tensors or any(key.startswith("enc.blk.") for key in file.tensors)


def _t5_names(file: Checkpoint, prefix: str) -> dict[str, StoredTensor]:
    """The encoder's tensors by Hugging Face names."""
    if _has_llama_names(file):
        stored = _with_scales(file, "", (key for key in file.tensors if not key.startswith("dec.")))
        return {_from_gguf(key): tensor for key, tensor in stored.items()}
    wanted = (f"{prefix}encoder.", f"{prefix}shared.")
    names = _with_scales(file, prefix, (key for key in file.tensors if key.startswith(wanted)))
    tied = names.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        names.setdefault("shared.weight", tied)
    return names


def _with_scales(file: Checkpoint, prefix: str, keys: Iterable[str]) -> dict[str, StoredTensor]:
    """The weights among these keys, by their names without the prefix, each knowing its scale."""
    names = {key.removeprefix(prefix): file.tensors[key] for key in keys}
    scales, consumed = find_scales(file, prefix, names)
    weights = {name: StoredTensor(prefix + name, info) for name, info in names.items() if name not in consumed}
    for layer, scale in scales.items():
        name, info = f"{layer}.weight", names[f"{layer}.weight"]
        if info.dtype not in STORED_AS.values():
            raise CheckpointError(
                f"'{file.name}': '{prefix}{scale}' is the scale of '{prefix}{name}', which is stored as {info.dtype}; "
                "expected fp8 (e4m3 or e5m2) or int8. Choose a bf16, fp16, fp8, scaled fp8 or GGUF file."
            )
        weights[name] = StoredTensor(prefix + name, info, prefix + scale, names[scale].numel)
    return weights


def _from_gguf(key: str) -> str:
    plain = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", key)
    if block and block[2] in GGUF_BLOCK:
        return f"encoder.block.{block[1]}.{GGUF_BLOCK[block[2]]}.weight"
    return plain.get(key, key)


def _clip_prefix(file: Checkpoint) -> str | None:
    """See `_t5_prefix`."""
    return _prefix(file, CLIP_NAMES)


def _clip_names(file: Checkpoint, prefix: str) -> dict[str, StoredTensor]:
    # Beside the text model, published files may hold the picture half, a temperature and token positions.
    wanted = (f"{prefix}text_model.", f"{prefix}text_projection.weight")
    keys = (key for key in file.tensors if key.startswith(wanted) and not key.endswith(".position_ids"))
    return _with_scales(file, prefix, keys)


def _prefix(file: Checkpoint, pattern: str) -> str | None:
    """What stands before the encoder's names; of several encoders CLIP-L's."""
    found = {match[1] for key in file.tensors if (match := re.fullmatch(pattern, key))}
    return min(found, key=lambda prefix: ("clip_l" not in prefix, prefix)) if found else None


def _is_t5(file: Checkpoint) -> bool:
    return _t5_prefix(file) is not None


def _is_clip(file: Checkpoint) -> bool:
    return _clip_prefix(file) is not None


def _count(names: Mapping[str, StoredTensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _refuse_other_t5(file: Checkpoint, names: Mapping[str, StoredTensor]) -> None:
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


def _complete(
    file: Checkpoint, names: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
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
        check_stored(file, names[name], shape)
    return {name: names[name] for name in shapes}


OTHERS: tuple[tuple[Callable[[Checkpoint], bool], str], ...] = (
    (_is_t5, "a T5 text encoder"),
    (_is_clip, "a CLIP text encoder"),
    (lambda file: any(key.startswith("decoder.block.") for key in file.tensors), "the decoder half of a T5"),
    (lambda file: any(".resblocks." in key for key in file.tensors), "a CLIP in OpenCLIP's layout"),
    (lambda file: is_lora(file.tensors), "a LoRA"),
)


def _guess(file: Checkpoint) -> str:
    for matches, what in OTHERS:
        if matches(file):
            return what
    family = looks_like(file)
    if family is not None:
        return f"a {family.name} transformer"
    known = first_match(OTHER_MODELS, file.tensors)
    if known is not None:
        return known.what
    return f"not a text encoder that this pack knows (its first tensor is '{next(iter(file.tensors), '')}')"
