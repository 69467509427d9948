"""A 16-channel autoencoder in TAESD's architecture: an encoder that is written down, and a decoder that is trained.

The encoder averages 4x4 pixels, turns red, green and blue into four channels, and folds 2x2 of the averages into 16.
TAESD's convolutions can do exactly that, so its latents cost nothing while the transformer is trained, and ComfyUI's
own VAEEncode computes the same. The decoder learns to draw sharp edges again, from latents with noise on them: what a
small transformer gets slightly wrong, it repairs.

Source of the architecture: ComfyUI's comfy/taesd/taesd.py, after madebyollin/taesd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16
WIDTH = 64
SCALE, SHIFT = 0.3611, 0.1159  # of FLUX.1's latents; the file says so to ComfyUI
# Channels that the decoder uses of its 64, at 1/8, 1/4, 1/2 and full size; the others stay zero.
WIDTHS = (64, 48, 24, 16)
# Brightness, and how far red, green and blue lie from it.
AXES = torch.tensor([[1, 1, 1], [2, -1, -1], [-1, 2, -1], [-1, -1, 2]], dtype=torch.float32) / 3.0


@dataclass(frozen=True)
class Whitening:
    """What makes the channels of latents zero in the mean and one in size: (4,) each, for the rows of `AXES`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, quarters: Tensor) -> Whitening:
        """Measure it on averaged pictures (N, 3, h, w) in 0–1."""
        values = torch.einsum("ac,nchw->anhw", AXES, quarters.float()).flatten(1)
        return cls(values.mean(dim=1), values.std(dim=1))


def average(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in 0–1 -> (N, 3, H/4, W/4)."""
    return F.avg_pool2d(pictures, 4)


def encode(quarters: Tensor, whitening: Whitening) -> Tensor:
    """What the encoder makes of averaged pictures (N, 3, h, w): the transformer's latents (N, 16, h/2, w/2)."""
    values = torch.einsum("ac,nchw->nahw", AXES, quarters.float())
    values = (values - whitening.mean[:, None, None]) / whitening.std[:, None, None]
    return F.pixel_unshuffle(values, 2)


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
    """TAESD's decoder with fewer channels: latents (N, 16, h, w) -> pictures (N, 3, 8h, 8w), about 0–1."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(CHANNELS, widths[0], 3, padding=1), nn.ReLU()]
        for width, smaller in pairwise(widths):
            layers += [Block(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, smaller, 3, padding=1, bias=False)]
        super().__init__(*layers, Block(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1))
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Block):
                    module.conv[-1].weight.mul_(0.3)


def decoder_loss(decoder: Decoder, pictures: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean distance between pictures and what is decoded from noisy latents."""
    decoded = decoder(latents + noise)
    return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)


def checkpoint(decoder: Decoder, whitening: Whitening) -> dict[str, Tensor]:
    """The file: both halves at TAESD's width, in float16, with the scale and shift of FLUX.1's latents."""
    tensors = {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
    tensors |= {f"taesd_decoder.{name}": _widened(name, value) for name, value in decoder.state_dict().items()}
    tensors |= {f"taesd_encoder.{name}": value for name, value in _encoder(whitening).items()}
    return {name: tensor.half().contiguous() for name, tensor in tensors.items()}


def _widened(name: str, value: Tensor) -> Tensor:
    """Fill a tensor of the narrow decoder with zeros up to TAESD's width."""
    outer = 3 if name.startswith("19.") else WIDTH
    if value.ndim == 1:
        return F.pad(value, (0, outer - len(value)))
    inner = CHANNELS if name == "1.weight" else WIDTH
    return F.pad(value, (0, 0, 0, 0, 0, inner - value.shape[1], 0, outer - value.shape[0]))


def _encoder(whitening: Whitening) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = {"0.weight": torch.zeros(WIDTH, 3, 3, 3), "0.bias": torch.zeros(WIDTH)}
    blocks = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
    for block in blocks:
        for conv in (0, 2, 4):
            tensors[f"{block}.conv.{conv}.weight"] = torch.zeros(WIDTH, WIDTH, 3, 3)
            tensors[f"{block}.conv.{conv}.bias"] = torch.zeros(WIDTH)
    halves, quarters, eighths = (torch.zeros(WIDTH, WIDTH, 3, 3) for _ in range(3))
    last, bias = torch.zeros(CHANNELS, WIDTH, 3, 3), torch.zeros(CHANNELS)
    for colour in range(3):
        tensors["0.weight"][colour, colour, 1, 1] = 1.0
        # A stride of 2 puts the middle of the 3x3 window on the first pixel of each pair.
        halves[colour, colour, 1:, 1:] = quarters[colour, colour, 1:, 1:] = 0.25
        for place in range(4):
            eighths[4 * colour + place, colour, 1 + place // 2, 1 + place % 2] = 1.0
    for axis in range(len(AXES)):
        for place in range(4):
            bias[4 * axis + place] = -whitening.mean[axis] / whitening.std[axis]
            for colour in range(3):
                last[4 * axis + place, 4 * colour + place, 1, 1] = AXES[axis, colour] / whitening.std[axis]
    strided = {"2.weight": halves, "6.weight": quarters, "10.weight": eighths}
    return {**tensors, **strided, "14.weight": last, "14.bias": bias}
