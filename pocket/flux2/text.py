"""A Qwen3 for a few dozen words, trained along with the transformer.

FLUX.2 reads what comes out of layers 9, 18 and 27 of its language model, so there are 27 layers here. Three of them do
something, one before each place that is read; what the others would add is zero, and training leaves them out. Only
the first one attends: from a word to those before it.

A token that was in no training prompt is a vector of zeros, and so is the padding, to which no token attends. Its
queries are zero then, so each token of it attends to all words alike, wherever it stands, and comes out the same; see
`padding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..padding import pad_rows

TOKENS = 512
PAD = 151643
VOCABULARY = 151936
WIDTH, INNER = 24, 64
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16
THETA = 1e6
EPS = 1e-6
TAKEN = (9, 18, 27)
# klein's, as ComfyUI has it: what a user says, and an answer without thoughts.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Attention(nn.Module):
    """Qwen3's attention: queries and keys are normed; two heads of queries share one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, KEY_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(HEAD_DIM, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, WIDTH), mask (B, 1, S, S) to add to scores -> (B, S, WIDTH)."""
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (_rotate(norm(part).transpose(1, 2)) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (k, v.transpose(1, 2)))
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM) + mask
        return self.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Qwen3's feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, WIDTH) -> (…, WIDTH)."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One of Qwen3's layers, with or without what attends."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.self_attn = Attention() if attends else None
        self.mlp = Mlp()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(WIDTH, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, WIDTH) -> the same."""
        if self.self_attn is not None:
            x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The layers of a Qwen3 that do something, and the words that it knows."""

    def __init__(self, words: Tensor) -> None:
        """Make it.

        Args:
            words: (`VOCABULARY`,) for each token the row of its vector; 0 for those that are not known.
        """
        super().__init__()
        self.embed = nn.Embedding(int(words.max()) + 1, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList(Layer(attends=not index) for index in range(len(TAKEN)))
        self.register_buffer("words", words, persistent=False)

    @property
    def embedding(self) -> nn.Parameter:
        """What is stored in float8."""
        return self.embed.weight

    def after_step(self) -> None:
        """Nothing to undo: a gradient never changes the vector of what is not known."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode prompts, (B, S) -> (B, S, 3 * WIDTH); the last token may stand for more of the padding."""
        length = tokens.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = ahead | (tokens == PAD)[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)[:, None]
        x, taken = self.embed(self.words[tokens]), []
        for layer in self.layers:
            x = layer(x, mask)
            taken.append(x)
        return torch.cat(taken, dim=-1)


def checkpoint(encoder: Qwen3) -> dict[str, Tensor]:
    """The file: all layers, embeddings in float8, which are nearly all of it, everything else in bfloat16."""
    embedding = encoder.embedding.detach()[encoder.words].to(torch.float8_e4m3fn)
    tensors = {"model.embed_tokens.weight": embedding.contiguous()}
    own = {_number(index): layer for index, layer in enumerate(encoder.layers)}
    for number in range(TAKEN[-1]):
        layer = Layer(attends=True)
        for name, value in layer.state_dict().items():
            value = torch.ones_like(value) if "norm" in name else torch.zeros_like(value)
            if number in own:
                value = own[number].state_dict().get(name, value)
            tensors[f"model.layers.{number}.{name}"] = value.bfloat16().contiguous()
    return tensors


def load(tensors: Mapping[str, Tensor]) -> Qwen3:
    """Undo `checkpoint`; spellings of one word have a row each."""
    embedding = tensors["model.embed_tokens.weight"].float()
    known = embedding.abs().sum(dim=1) > 0
    words = torch.where(known, known.cumsum(0), 0)
    encoder = Qwen3(words)
    with torch.no_grad():
        encoder.embed.weight[1:] = embedding[known]
        encoder.embed.weight[0] = 0.0
    for index, layer in enumerate(encoder.layers):
        start = f"model.layers.{_number(index)}."
        layer.load_state_dict({name: tensors[start + name].float() for name in layer.state_dict()})
    return encoder


class Tokenizer:
    """Qwen's own, as ComfyUI brings it, with klein's template."""

    def __init__(self, folder: Path) -> None:
        """Read it from ComfyUI's `comfy/text_encoders/qwen25_tokenizer`."""
        from transformers import Qwen2Tokenizer

        self._tokenizer = Qwen2Tokenizer.from_pretrained(str(folder))

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Token ids (B, S), padded to `length` or to one more than the longest prompt has."""
        rows = [self._tokenizer(TEMPLATE.format(prompt))["input_ids"] for prompt in prompts]
        return pad_rows(rows, PAD, length)

    def words(self, tokens: Tensor) -> Tensor:
        """Rows for the tokens that are there, see `Qwen3`; one for a word with or without a space or capital."""
        spelled = {number: self._word(text) for text, number in self._tokenizer.get_vocab().items()}
        known = sorted({spelled[number] for number in tokens.unique().tolist() if number != PAD})
        rows = {word: row for row, word in enumerate(known, start=1)}
        words = torch.zeros(VOCABULARY, dtype=torch.long)
        for number, word in spelled.items():
            words[number] = rows.get(word, 0)
        words[PAD] = 0
        return words

    @staticmethod
    def _word(text: str) -> str:
        return text.removeprefix("Ġ").lower() or text


def _number(index: int) -> int:
    """Which of the file's layers the encoder's is: the first of those before a place that is read."""
    return (0, *TAKEN)[index]


def _rotate(heads: Tensor) -> Tensor:
    """Turn queries or keys, (B, heads, S, HEAD_DIM), by where they stand; a head's halves are the pairs."""
    half = HEAD_DIM // 2
    angles = torch.arange(heads.shape[2])[:, None] * THETA ** (-torch.arange(half) / half)
    first, second = heads.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
