"""Autoencoders in TAESD's architecture: an encoder that is written down, and a decoder that is trained.

The encoder averages pixels, turns red, green and blue into other axes, and folds the averages into channels. TAESD's
convolutions can do exactly that, so its latents cost nothing while the transformer is trained, and ComfyUI's own
VAEEncode computes the same. The decoder learns to draw sharp edges again, from latents with noise on them: what a small
transformer gets slightly wrong, it repairs.

Source of the architecture: ComfyUI's comfy/taesd/taesd.py, after madebyollin/taesd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
# Channels that the decoder uses of its 64, at 1/8, 1/4, 1/2 and full size; the others stay zero.
WIDTHS = (64, 48, 24, 16)
# Brightness, and how far red, green and blue lie from it.
AXES = torch.tensor([[1, 1, 1], [2, -1, -1], [-1, 2, -1], [-1, -1, 2]], dtype=torch.float32) / 3.0


@dataclass(frozen=True)
class Whitening:
    """What makes the channels of latents zero in the mean and one in size: (n,) each, for n kinds of channel."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, *values: Tensor) -> Whitening:
        """Measure it on values, each (kinds, …)."""
        flat = [value.flatten(1) for value in values]
        return cls(torch.cat([v.mean(dim=1) for v in flat]), torch.cat([v.std(dim=1) for v in flat]))


@dataclass(frozen=True)
class Latents:
    """How pictures become a transformer's latents, and latents pictures.

    Attributes:
        channels: of the latents.
        pixels: side of the square that one of them stands for.
        averaged: side of the squares whose averages are all that the encoder reads.
        whitening: of pictures' averages (N, 3, h, w), 0–1.
        encode: averages (N, 3, h, w), 0–1, -> latents.
        decoder: a new one: latents -> pictures, about 0–1.
        checkpoint: the file.
        read: the whitening that a file was made with; None: nothing encodes pictures with it.
    """

    channels: int
    pixels: int
    averaged: int
    whitening: Callable[[Tensor], Whitening]
    encode: Callable[[Tensor, Whitening], Tensor]
    decoder: Callable[[], nn.Module]
    checkpoint: Callable[[nn.Module, Whitening], dict[str, Tensor]]
    read: Callable[[Mapping[str, Tensor]], Whitening] | None = None


DECODER, ENCODER = "taesd_decoder.", "taesd_encoder."  # before the names of tensors in a file


def average(pictures: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3, H / side, W / side)."""
    return F.avg_pool2d(pictures, side)


def axes(averages: Tensor) -> Tensor:
    """Red, green and blue (N, 3, h, w) as `AXES`, (4, N, h, w)."""
    return torch.einsum("ac,nchw->anhw", AXES, averages.float())


class Block(nn.Module):
    """Three convolutions beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) -> the same."""
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """Keep latents within ±3, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


class Decoder(nn.Sequential):
    """TAESD's decoder with fewer channels: latents (N, channels, h, w) -> pictures (N, 3, 8h, 8w), about 0–1."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, smaller in pairwise(widths):
            layers += [Block(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, smaller, 3, padding=1, bias=False)]
        super().__init__(*layers, Block(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1))
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Block):
                    module.conv[-1].weight.mul_(0.3)


def decoder_loss(decoder: nn.Module, pictures: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean distance between pictures and what is decoded from noisy latents."""
    decoded = decoder(latents + noise)
    return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)


def widened(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's tensors, filled with zeros up to TAESD's width."""
    state = decoder.state_dict()
    channels = state["1.weight"].shape[1]
    return {name: _widened(name, value, channels) for name, value in state.items()}


def empty_encoder(channels: int) -> dict[str, Tensor]:
    """The tensors of TAESD's encoder, all of them zero: its blocks leave what they read."""
    tensors = {"0.weight": torch.zeros(WIDTH, 3, 3, 3), "0.bias": torch.zeros(WIDTH)}
    for block in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        for conv in (0, 2, 4):
            tensors[f"{block}.conv.{conv}.weight"] = torch.zeros(WIDTH, WIDTH, 3, 3)
            tensors[f"{block}.conv.{conv}.bias"] = torch.zeros(WIDTH)
    tensors |= {f"{strided}.weight": torch.zeros(WIDTH, WIDTH, 3, 3) for strided in (2, 6, 10)}
    return {**tensors, "14.weight": torch.zeros(channels, WIDTH, 3, 3), "14.bias": torch.zeros(channels)}


def _widened(name: str, value: Tensor, channels: int) -> Tensor:
    outer = 3 if name.startswith("19.") else WIDTH
    if value.ndim == 1:
        return F.pad(value, (0, outer - len(value)))
    inner = channels if name == "1.weight" else WIDTH
    return F.pad(value, (0, 0, 0, 0, 0, inner - value.shape[1], 0, outer - value.shape[0]))
