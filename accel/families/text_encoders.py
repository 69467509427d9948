"""The language models that transformers were trained with, as data: what they are, and what is taken of them.

FLUX.2 conditions on hidden states from within a language model: after so many of its layers, side by side, without the
model's last norm. Source: https://github.com/black-forest-labs/flux2, `src/flux2/text_encoder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModel:
    """A kind of decoder language model.

    Attributes:
        name: what messages call it.
        qk_norm: whether it norms the queries and keys of each head.
        tekken: whether its files carry its vocabulary, in Mistral's form of that name.
        taken: after how many layers the hidden states are taken, ascending; later layers change nothing.
        serves: hidden size -> the transformer that was trained with it.
        example: a file of it.
    """

    name: str
    qk_norm: bool
    tekken: bool
    taken: tuple[int, ...]
    serves: Mapping[int, str]
    example: str

    def __str__(self) -> str:
        """Such as `Qwen3 (FLUX.2 klein 4B, FLUX.2 klein 9B)`."""
        return f"{self.name} ({', '.join(self.serves.values())})"


QWEN3 = LanguageModel(
    name="Qwen3",
    qk_norm=True,
    tekken=False,
    taken=(9, 18, 27),
    serves={2560: "FLUX.2 klein 4B", 4096: "FLUX.2 klein 9B"},
    example="qwen_3_4b.safetensors",
)
MISTRAL = LanguageModel(
    name="Mistral Small",
    qk_norm=False,
    tekken=True,
    taken=(10, 20, 30),
    serves={5120: "FLUX.2 dev"},
    example="mistral_3_small_flux2_bf16.safetensors",
)
T5_V1_1, T5_EXAMPLE = "a T5 v1.1 text encoder (FLUX.1)", "t5xxl_fp16.safetensors"
LANGUAGE_MODELS: Sequence[LanguageModel] = (QWEN3, MISTRAL)


def expected() -> str:
    """Every text encoder that a transformer here reads hidden states of."""
    return " or ".join([f"{T5_V1_1}, {LANGUAGE_MODELS[0]}", *map(str, LANGUAGE_MODELS[1:])])


def examples() -> str:
    """A file of each."""
    return " or ".join([f"{T5_EXAMPLE}, {LANGUAGE_MODELS[0].example}", *(each.example for each in LANGUAGE_MODELS[1:])])
