"""A T5 encoder for a few dozen words, trained along with the transformer.

Its relative position bias lets a token attend only to itself and to what follows, so that all the padding behind a
prompt, which FLUX's tokenizer fills up to 256 tokens, comes out as one and the same vector, see `padding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..padding import pad_rows

TOKENS = 256
PAD = 0
BUCKETS, MAX_DISTANCE = 32, 128
BACKWARD = -10000.0  # the score of what lies behind: never attended to


class Attention(nn.Module):
    """T5's attention: scores are not divided by the width of a head."""

    def __init__(self, width: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        if first:
            self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, S, width), bias (1, heads, S, S) -> (B, S, width)."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))


class GatedDense(nn.Module):
    """T5 v1.1's feed-forward layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5(nn.Module):
    """A T5 v1.1 encoder with the parameters of Hugging Face's, by name."""

    def __init__(self, width: int = 32, inner: int = 96, heads: int = 2, layers: int = 2, words: int = 32128) -> None:
        super().__init__()
        self.shared = nn.Embedding(words, width)
        self.encoder = nn.ModuleDict({"block": nn.ModuleList(), "final_layer_norm": nn.RMSNorm(width, eps=1e-6)})
        for index in range(layers):
            attention = {"SelfAttention": Attention(width, heads, not index), "layer_norm": nn.RMSNorm(width, eps=1e-6)}
            dense = {"DenseReluDense": GatedDense(width, inner), "layer_norm": nn.RMSNorm(width, eps=1e-6)}
            block = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict(attention), nn.ModuleDict(dense)])})
            self.encoder["block"].append(block)
        self.register_buffer("buckets", _buckets(), persistent=False)
        with torch.no_grad():
            self._position_bias.weight.zero_()[1 : BUCKETS // 2] = BACKWARD
            self._position_bias.weight[0] = 1.0

    @property
    def _position_bias(self) -> nn.Embedding:
        return self.encoder["block"][0]["layer"][0]["SelfAttention"].relative_attention_bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode prompts whose last token stands for all the padding up to `TOKENS`.

        Args:
            tokens: (B, S), with at least one `PAD` at the end of each row.
        Returns:
            (B, S, width); the last is what each further token of padding would be.
        """
        length = tokens.shape[1]
        x = self.shared(tokens)
        bias = self._position_bias(self.buckets).permute(2, 0, 1)[:, :length]
        rest = torch.logsumexp(bias[:, :, length - 1 :], dim=2, keepdim=True)
        # The last token attends to all the padding: whatever their scores, the values are equal.
        bias = torch.cat([bias[:, :, : length - 1], rest], dim=2)[None]
        for block in self.encoder["block"]:
            attention, dense = block["layer"]
            x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
            x = x + dense["DenseReluDense"](dense["layer_norm"](x))
        return self.encoder["final_layer_norm"](x)

    @property
    def embedding(self) -> nn.Parameter:
        """What is stored in float8."""
        return self.shared.weight

    def after_step(self) -> None:
        """Undo what an optimizer step did to the scores of what lies behind."""
        with torch.no_grad():
            self._position_bias.weight[1 : BUCKETS // 2] = BACKWARD


def checkpoint(encoder: T5) -> dict[str, Tensor]:
    """The file: embeddings in float8, which are nearly all of it, everything else in bfloat16."""
    return {
        name: value.to(torch.float8_e4m3fn if name.startswith("shared") else torch.bfloat16).contiguous()
        for name, value in encoder.state_dict().items()
    }


class Tokenizer:
    """T5's own, as ComfyUI brings it."""

    def __init__(self, folder: Path) -> None:
        """Read it from ComfyUI's `comfy/text_encoders/t5_tokenizer`."""
        from transformers import T5TokenizerFast

        self._tokenizer = T5TokenizerFast.from_pretrained(str(folder))

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Token ids (B, S), padded to `length` or to one more than the longest prompt has."""
        rows = [self._tokenizer(text)["input_ids"] for text in prompts]
        return pad_rows(rows, PAD, length)


def _buckets() -> Tensor:
    """The bucket of each pair of positions, (TOKENS, TOKENS).

    Source: transformers' T5Attention._relative_position_bucket(), bidirectional.
    """
    position = torch.arange(TOKENS)
    distance = position[None, :] - position[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = exact + (
        torch.log(distance.abs().clamp_min(1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    ).long()
    near = torch.where(distance.abs() < exact, distance.abs(), far.clamp_max(half - 1))
    return near + half * (distance > 0).long()


def load(tensors: Mapping[str, Tensor]) -> T5:
    """Undo `checkpoint`."""
    encoder = T5()
    encoder.load_state_dict({name: value.float() for name, value in tensors.items()})
    return encoder
