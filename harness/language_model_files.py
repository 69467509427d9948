"""Small language models in the formats that FLUX.2's users have: Qwen3 and Mistral, safetensors and GGUF."""

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import text_encoder_files as formats
from .tensor_files import json_tensor, write_tensors
from .tiny_models import seeded_normal

PREFIX = "text_encoders.qwen3_4b.transformer."
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
           "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")  # fmt: skip
MERGED = (b"he", b"th", b"the", b" the", b" a", b"ed", b"ox", b"fox", b"in", b"ing", b" re", b" red")
PATTERN = r" ?[\p{L}]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class TinyLanguageModel:
    """Shape of a decoder; Qwen3-4B has 36 layers of 2560, inner 9728, 32 heads of 128, 8 for keys and values.

    FLUX.2 takes hidden states after 27 layers of a Qwen3, 30 of a Mistral: one layer more than that is here.
    """

    layers: int = 28
    hidden: int = 64
    inner: int = 96
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 128
    vocab: int = 151936
    qk_norm: bool = True
    lm_head: bool = False


TINY_QWEN3 = TinyLanguageModel()
TINY_MISTRAL = TinyLanguageModel(layers=31, kv_heads=2, heads=4, vocab=len(SPECIAL) + 256 + len(MERGED), qk_norm=False)


def language_model_shapes(config: TinyLanguageModel) -> dict[str, tuple[int, ...]]:
    """Every tensor in Hugging Face's layout."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, config.hidden)}
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (config.hidden,),
        "self_attn.q_proj": (queries, config.hidden),
        "self_attn.k_proj": (keys, config.hidden),
        "self_attn.v_proj": (keys, config.hidden),
        "self_attn.o_proj": (config.hidden, queries),
        "post_attention_layernorm": (config.hidden,),
        "mlp.gate_proj": (config.inner, config.hidden),
        "mlp.up_proj": (config.inner, config.hidden),
        "mlp.down_proj": (config.hidden, config.inner),
    }
    if config.qk_norm:
        of_layer |= {f"self_attn.{name}_norm": (config.head_dim,) for name in "qk"}
    for index in range(config.layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (config.hidden,)
    if config.lm_head:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    return shapes


def language_model_state_dict(config: TinyLanguageModel = TINY_QWEN3, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, float32, whose layers all change what goes through them."""
    tensors = {}
    for name, shape in language_model_shapes(config).items():
        if "norm" in name:
            tensors[name] = 1.0 + seeded_normal(seed, name, shape, 0.1)
        else:
            gain = 1.0 if "embed" in name else 1.0 / math.sqrt(shape[-1])
            tensors[name] = seeded_normal(seed, name, shape, gain)
    return tensors


def tekken() -> dict[str, Any]:
    """A vocabulary in Mistral's form: special tokens, every byte, and some words."""
    values = [*(bytes([byte]) for byte in range(256)), *MERGED]
    return {
        "config": {
            "pattern": PATTERN, "num_vocab_tokens": len(values), "default_vocab_size": len(values) + len(SPECIAL),
            "default_num_special_tokens": len(SPECIAL), "version": "v7",
        },
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(value).decode(), "token_str": None}
                  for rank, value in enumerate(values)],
        "special_tokens": [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(SPECIAL)],
    }  # fmt: skip


def with_tekken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Mistral as ComfyUI's own files have it."""
    return {**tensors, "tekken_model": json_tensor(tekken())}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    if name in plain:
        return plain[name]
    _, _, index, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[part]}.weight"


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp's converter orders them (conversion/llama.py, LlamaModel.permute)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    config: TinyLanguageModel = TINY_QWEN3,
    kind: str = "Q8_0",
    architecture: str = "qwen3",
    vocabulary: str | None = None,
) -> Path:
    """Write a language model as llama.cpp converts it: matrices in blocks, norms in F32.

    Args:
        path: The file.
        tensors: In Hugging Face's layout, float32.
        config: Their sizes.
        kind: A `gguf.GGMLQuantizationType` that the package can write.
        architecture: llama.cpp's; `llama` and `mistral3` have their own order of queries and keys.
        vocabulary: "tekken": that of `tekken`; None: none.
    Returns:
        `path`.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    if vocabulary is not None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        spell, values = bytes_to_unicode(), [*(bytes([byte]) for byte in range(256)), *MERGED]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary)
        writer.add_token_list([*SPECIAL, *("".join(spell[byte] for byte in value) for value in values)])
        control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
        writer.add_token_types([control] * len(SPECIAL) + [normal] * len(values))
    for name, tensor in tensors.items():
        if architecture != "qwen3" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permuted(tensor, config.heads if "q_proj" in name else config.kv_heads)
        kind_of = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        values = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind_of)
        writer.add_tensor(gguf_name(name), values, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_formats(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Path]:
    """One Qwen3 in every format: float32 tensors -> path by the format's name."""
    contents = {
        "fp32": tensors,
        "fp16": formats.cast(tensors, torch.float16),
        "bf16": formats.cast(tensors, torch.bfloat16),
        "fp8": formats.cast(tensors, torch.float8_e4m3fn),
        "scaled-old": formats.scaled_fp8_old(tensors),
        "scaled-new": formats.scaled_fp8_new(tensors),
        "scaled-rows": formats.scaled_fp8_new(tensors, rows=True),
        "prefixed": formats.prefixed(formats.cast(tensors, torch.bfloat16), PREFIX),
    }
    paths = {name: write_tensors(folder / f"qwen-{name}.safetensors", content) for name, content in contents.items()}
    for kind in ("Q8_0", "Q4_0", "BF16"):
        paths[f"gguf-{kind}"] = write_gguf(folder / f"qwen-{kind}.gguf", tensors, kind=kind)
    return paths
