"""All the padding behind a prompt, as one token.

FLUX's tokenizers fill prompts up with padding, and the transformers attend to it. Both text encoders here make one and
the same vector of each token of it. And a set of equal keys acts in an attention as one key whose score is raised by
the logarithm of their number. So training needs no more tokens than the prompt has, plus one; both are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_bias(tokens: int, length: int, image_tokens: int) -> Tensor:
    """What FLUX adds to its scores when the last of `length` text tokens stands for all the padding: (1, 1, 1, N).

    Args:
        tokens: of a padded prompt.
        length: of the prompt, with one token of padding.
        image_tokens: behind the text, references included.
    """
    bias = torch.zeros(length + image_tokens)
    bias[length - 1] = math.log(tokens - length + 1)
    return bias[None, None, None]


def padded(encoded: Tensor, tokens: int) -> Tensor:
    """All the tokens that FLUX gets: (B, S, width) -> (B, tokens, width), the last one repeated."""
    rest = encoded[:, -1:].expand(-1, tokens - encoded.shape[1], -1)
    return torch.cat([encoded, rest], dim=1)


def pad_rows(rows: list[list[int]], pad: int, length: int | None) -> Tensor:
    """Token ids (B, S), padded to `length` or to one more than the longest prompt has.

    Raises:
        ValueError: a prompt leaves no room for padding.
    """
    longest = max(map(len, rows))
    length = length or longest + 1
    if longest >= length:
        raise ValueError(f"A prompt has {longest} tokens, expected fewer than {length}.")
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])
