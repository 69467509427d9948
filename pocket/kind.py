"""What a pocket model is: all that its training, its files and its evaluation differ in, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from . import model, padding
from .autoencoder import Latents
from .draw import SIZE_PX
from .loras import Recipe
from .model import Transformer


class Tokenizer(Protocol):
    """Prompts as tokens."""

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Token ids (B, S), padded to `length` or to one more than the longest prompt has."""


class Encoder(Protocol):
    """A text encoder while it is trained; a module."""

    @property
    def embedding(self) -> nn.Parameter:
        """What is stored in float8."""

    def after_step(self) -> None:
        """Undo what an optimizer step must not do."""


@dataclass(frozen=True)
class Text:
    """A text encoder.

    Attributes:
        folder: of its tokenizer in ComfyUI's `comfy/text_encoders`.
        tokenizer: read from that folder.
        new: an encoder for prompts like these, given as tokens.
        checkpoint: its file.
        load: undoes `checkpoint`.
        tokens: of a prompt with all its padding.
        length: of a prompt in training, the last token for all the padding.
    """

    folder: str
    tokenizer: Callable[[Path], Tokenizer]
    new: Callable[[Tokenizer, Tensor], nn.Module]
    checkpoint: Callable[[nn.Module], dict[str, Tensor]]
    load: Callable[[Mapping[str, Tensor]], nn.Module]
    tokens: int
    length: int


@dataclass(frozen=True)
class Kind:
    """A pocket model.

    Attributes:
        title: for people.
        files: of the transformer (model), the text encoder (text) and the autoencoder (vae), in a folder of models.
        transformer: the transformer.
        text: the text encoder.
        latents: the autoencoder.
        recipes: the LoRAs.
        sigmas: of a number of steps, as the sampler takes them: from 1 to 0.
        times: mean and spread of the logits of the times that training draws; 1 is noise.
        styles: of pictures that the decoder is trained on, beside flat ones.
        edits: one training step in so many is an edit of a picture; 0: none.
    """

    title: str
    files: Mapping[str, str]
    transformer: Transformer
    text: Text
    latents: Latents
    recipes: tuple[Recipe, ...]
    sigmas: Callable[[int], Tensor]
    times: tuple[float, float]
    styles: tuple[str, ...]
    edits: int = 0

    @property
    def side(self) -> int:
        """Of a picture, in latents."""
        return SIZE_PX // self.latents.pixels

    @property
    def image_tokens(self) -> int:
        """Of a picture."""
        return (SIZE_PX // 16) ** 2

    def bias(self, length: int, pictures: int = 1) -> Tensor:
        """See `padding.attention_bias`; `pictures` counts references too."""
        return padding.attention_bias(self.text.tokens, length, pictures * self.image_tokens)

    def noise(self, seed: int, count: int = 1) -> Tensor:
        """Latents to begin with."""
        shape = (count, self.latents.channels, self.side, self.side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def sample(
        self, transformer: nn.Module, noise: Tensor, encoded: Tensor, steps: int, references: Sequence[Tensor] = ()
    ) -> Tensor:
        """Latents for encoded prompts whose last token stands for all the padding."""
        bias = self.bias(encoded.shape[1], 1 + len(references))
        return model.sample(self.transformer, transformer, noise, encoded, bias, self.sigmas(steps), references)

    def flow_loss(
        self,
        transformer: nn.Module,
        latents: Tensor,
        encoded: Tensor,
        random: torch.Generator,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """Rectified flow: the velocity from pictures to noise, at times that prefer the middle and the noisy end.

        Source: Esser et al., Scaling Rectified Flow Transformers, 2024, https://arxiv.org/abs/2403.03206.
        """
        noise = torch.randn(latents.shape, generator=random)
        mean, spread = self.times
        times = torch.sigmoid(mean + spread * torch.randn(len(latents), generator=random))
        at = times[:, None, None, None]
        noisy, bias = (1 - at) * latents + at * noise, self.bias(encoded.shape[1], 1 + len(references))
        velocity = model.forward(self.transformer, transformer, noisy, times, encoded, bias, references)
        return (velocity.float() - (noise - latents)).square().mean()
