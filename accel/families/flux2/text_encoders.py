"""What the language models take that FLUX.2's prompts go through, from the shapes of their weights.

Only the layers up to the last one whose hidden states are read are there; no language model head, no last norm.
Embeddings and norms stay in 16 bits whatever the linears are stored in.

Source: config.json of Qwen/Qwen3-4B, Qwen/Qwen3-8B and mistralai/Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..base import TextEncoder
from ..text_encoders import MISTRAL, QWEN3, LanguageModel

HEAD_DIM = 128
HALF = 2  # bytes
FLOAT32 = 4
# Weights that share a scale in NF4.
NF4_BLOCK = 64

# How a linear (rows, columns) is kept -> its bytes. In 8 bits every row has a scale.
FORMS: Mapping[str, Callable[[int, int], int]] = {
    "none": lambda rows, columns: HALF * rows * columns,
    "int8": lambda rows, columns: rows * columns + FLOAT32 * rows,
    "nf4": lambda rows, columns: rows * columns // 2 + FLOAT32 * rows * columns // NF4_BLOCK,
}


@dataclass(frozen=True)
class Sizes:
    """A decoder with grouped queries and SwiGLU, without biases.

    Attributes:
        name: as a person knows it.
        model: its kind, and the layers that are read.
        hidden: width of a token.
        inner: of the MLP.
        heads: of queries; `groups` are those of keys and of values.
        vocabulary: tokens.
    """

    name: str
    model: LanguageModel
    hidden: int
    inner: int
    heads: int
    groups: int
    vocabulary: int

    def linears(self) -> Iterator[tuple[int, int]]:
        """(rows, columns) of a layer's linears."""
        queries, keys = self.heads * HEAD_DIM, self.groups * HEAD_DIM
        yield from ((queries, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, queries))
        yield from ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))

    def bytes(self, form: str) -> int:
        """With its linears in one of `FORMS`."""
        linears = sum(FORMS[form](*shape) for shape in self.linears())
        norms = 2 * self.hidden + 2 * HEAD_DIM * self.model.qk_norm
        return HALF * self.vocabulary * self.hidden + self.model.taken[-1] * (linears + HALF * norms)


# context_dim of each published model -> its language model, of which three hidden states are read.
LANGUAGE_MODEL_SIZES: Mapping[int, Sizes] = {
    7680: Sizes("Qwen3-4B", QWEN3, 2560, 9728, 32, 8, 151936),
    12288: Sizes("Qwen3-8B", QWEN3, 4096, 12288, 32, 8, 151936),
    15360: Sizes("Mistral Small 24B", MISTRAL, 5120, 32768, 32, 8, 131072),
}


def text_encoder(context_dim: int) -> TextEncoder:
    """What encodes the prompts of a model that reads this many columns; klein 4B's where none is published."""
    sizes = LANGUAGE_MODEL_SIZES.get(context_dim, LANGUAGE_MODEL_SIZES[7680])
    return TextEncoder(sizes.name, {form: sizes.bytes(form) for form in FORMS})
