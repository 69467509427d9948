"""Mistral's tokenizer, from the vocabulary that comes with the weights: in its own form (tekken), or as GGUF has it.

transformers has a converter for the former whose signature changed with version 5: ComfyUI 0.30's call of it fails
there. So it is built here, by `tokenizers`, on which both stand.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.gguf_file import VOCABULARY_KIND, GgufCheckpoint, read_fields
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TENSOR = "tekken_model"
TEKKEN = "tekken"  # what llama.cpp calls it
CONTROL = 3  # llama.cpp's type of a special token
# How text is cut into words: `config.pattern` of every tekken file; GGUF files only name it.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_vocabulary(file: Checkpoint) -> bool:
    """Whether a file holds one that `read_vocabulary` reads."""
    return _key(file) is not None or file.metadata.get(VOCABULARY_KIND) == TEKKEN


def read_vocabulary(file: Checkpoint) -> Tensor:
    """A file's vocabulary in Mistral's form, a JSON text.

    Args:
        file: one that `has_vocabulary`.

    Returns:
        uint8: what ComfyUI's own files have as the tensor `tekken_model`.

    Raises:
        FileError: the file is gone, or was changed.
        CheckpointError: it is damaged.
    """
    key = _key(file)
    if key is not None:
        with file.open() as rows:
            return rows(key)[:].to(torch.uint8, copy=True)
    if not isinstance(file, GgufCheckpoint):
        raise CheckpointError(f"'{file.name}' holds no '{TENSOR}'. Choose a file that has it.")
    tokens, kinds = read_fields(file, "tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    return _from_gguf(file.name, tokens or [], kinds or [])


class TekkenTokenizer:
    """What ComfyUI asks of a tokenizer of transformers."""

    def __init__(self, name: str, vocabulary: Tensor) -> None:
        """Build it; a real vocabulary of 131,072 tokens takes about two seconds.

        Args:
            name: of the file, for messages.
            vocabulary: see `read_vocabulary`.

        Raises:
            CheckpointError: it is not what it should be.
        """
        try:
            self._tokenizer = _build(json.loads(vocabulary.numpy().tobytes()))
        except (ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(
                f"'{name}': its '{TENSOR}' is no vocabulary in Mistral's form ({type(exc).__name__}: {exc}). The file "
                "is damaged: get it again."
            ) from exc

    def __call__(self, text: str) -> dict[str, list[int]]:
        """The numbers of a text's tokens as `input_ids`, without a start token."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=False).ids}

    def get_vocab(self) -> dict[str, int]:
        """Every token and its number."""
        return self._tokenizer.get_vocab()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def _key(file: Checkpoint) -> str | None:
    return next((key for key in file.tensors if key == TENSOR or key.endswith(f".{TENSOR}")), None)


def _characters() -> dict[int, str]:
    """Byte -> the character that stands for it in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _from_gguf(name: str, tokens: Sequence[str], kinds: Sequence[int]) -> Tensor:
    """llama.cpp's list of tokens as a tekken vocabulary: special tokens come first in both."""
    special = next((place for place, kind in enumerate(kinds) if kind != CONTROL), len(kinds))
    byte_of = {character: byte for byte, character in _characters().items()}
    try:
        values = [bytes(byte_of[character] for character in token) for token in tokens[special:]]
    except KeyError as exc:
        raise CheckpointError(
            f"'{name}': a token of its vocabulary holds the character {exc}, which stands for no byte. The file is "
            "damaged, or converted in another way: get another one, or the safetensors file."
        ) from exc
    content = {
        "config": {"pattern": PATTERN, "default_vocab_size": len(tokens), "default_num_special_tokens": special},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(value).decode()} for rank, value in enumerate(values)],
        "special_tokens": [{"rank": rank, "token_str": token} for rank, token in enumerate(tokens[:special])],
    }
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _build(content: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE whose merges are all ways to make a token of two; the token's rank is the merge's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    config, special = content["config"], {_string(entry): entry["rank"] for entry in content["special_tokens"]}
    offset = config.get("default_num_special_tokens", len(special))
    kept = config["default_vocab_size"] - offset
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"]}
    ranks = {value: rank for value, rank in ranks.items() if rank < kept}
    character = _characters()
    spelled = {value: "".join(map(character.__getitem__, value)) for value in ranks}
    merges = []
    for value in sorted(ranks, key=ranks.__getitem__):
        cuts = ((value[:place], value[place:]) for place in range(1, len(value)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    vocabulary = special | {spelled[value]: rank + offset for value, rank in ranks.items()}
    pairs = [(spelled[left], spelled[right]) for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config.get("pattern", PATTERN)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _string(special: Mapping[str, Any]) -> str:
    return special["token_str"] if "token_str" in special else base64.b64decode(special["token_bytes"]).decode()
