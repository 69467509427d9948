"""The sizes of text encoders, and the parameters that follow from them, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..families.text_encoders import LanguageModel

TOKENS_CLIP = 49408
BUCKETS = 32
HEAD_CLIP = 64


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder (gated GELU, one relative position bias for all blocks)."""

    title: ClassVar[str] = "T5"

    num_layers: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    vocab_size: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Every linear that may be quantized, as (out_features, in_features), in the order of a forward."""
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
    """Sizes of a CLIP text encoder; heads are 64 wide, as in every published one. None of its linears is quantized."""

    title: ClassVar[str] = "CLIP-L"
    linears: ClassVar[Mapping[str, tuple[int, int]]] = {}

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int

    @property
    def num_attention_heads(self) -> int:
        """Heads of width 64, or one for a narrower model."""
        return max(1, self.hidden_size // HEAD_CLIP)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its Hugging Face name; without `text_projection`, which is optional."""
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
class LlmConfig:
    """Sizes of a decoder language model (SwiGLU, RMS norms, no biases), up to the last layer that is needed.

    Attributes:
        model: what it is; what is beyond the last of `model.taken` layers is left out, the last norm included.
    """

    model: LanguageModel
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.model.name

    @property
    def num_layers(self) -> int:
        """How many layers are needed."""
        return self.model.taken[-1]

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Every linear that may be quantized, as (out_features, in_features), in the order of a forward."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        of_layer = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        layers = range(self.num_layers)
        return {f"model.layers.{index}.{name}": shape for index in layers for name, shape in of_layer.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its Hugging Face name."""
        norms = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.model.qk_norm:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        shapes |= {f"{name}.weight": shape for name, shape in self.linears.items()}
        for index in range(self.num_layers):
            shapes |= {f"model.layers.{index}.{name}.weight": (size,) for name, size in norms.items()}
        return shapes
