"""The toy family's module, which knows nothing of the pack, and its forward over it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32


class ToyBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.read = nn.Linear(hidden, 4 * hidden, bias=False)
        self.write = nn.Linear(2 * hidden, hidden, bias=False)


class ToyModel(nn.Module):
    def __init__(self, hidden: int, depth: int, channels: int, text_width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, hidden, bias=False)
        self.text_embed = nn.Linear(text_width, hidden, bias=False)
        self.layers = nn.ModuleList(ToyBlock(hidden) for _ in range(depth))
        self.head = nn.Linear(hidden, channels, bias=False)


def toy_block(block: nn.Module, hidden_states: Tensor, attention: Callable) -> Tensor:
    """(B, N, H) -> (B, N, H)."""
    query, key, value, gate = block.read(block.norm(hidden_states)).chunk(4, dim=-1)
    heads = (
        each.view(*each.shape[:-1], -1, HEAD_WIDTH).transpose(1, 2) for each in (query, key, value)
    )
    attended = attention(*heads, None).transpose(1, 2).flatten(2)
    return hidden_states + block.write(torch.cat([attended, F.silu(gate)], dim=-1))


def block_region(attention: Callable) -> Callable:
    def block(block, hidden_states):
        return toy_block(block, hidden_states, attention)

    return block


def whole_region(attention: Callable) -> Callable:
    def whole(model, hidden_states):
        for block in model.layers:
            hidden_states = toy_block(block, hidden_states, attention)
        return hidden_states

    return whole


@dataclass(frozen=True)
class ToyInputs:
    """Latents (B, C, h, w) and text (B, T, text width)."""

    latent: Tensor
    text: Tensor


class ToyForward:
    """Runs a `ToyModel` block by block."""

    def __init__(self, model, block, whole=None, weights=None) -> None:
        self._model, self._block, self._whole, self._weights = model, block, whole, weights

    def __call__(self, inputs: ToyInputs) -> Tensor:
        text = self._model.text_embed(inputs.text)
        image = self._model.embed(inputs.latent.flatten(2).transpose(1, 2))
        hidden_states = self._run(torch.cat([text, image], dim=1))
        tokens = self._model.head(hidden_states[:, text.shape[1] :])
        return tokens.transpose(1, 2).unflatten(2, inputs.latent.shape[2:])

    def _run(self, hidden_states: Tensor) -> Tensor:
        if self._whole is not None and self._weights is None:
            return self._whole(self._model, hidden_states)
        for number, block in enumerate(self._model.layers):
            if self._weights is not None:
                self._weights.enter(number)
            try:
                hidden_states = self._block(block, hidden_states)
            finally:
                if self._weights is not None:
                    self._weights.leave(number)
        return hidden_states
