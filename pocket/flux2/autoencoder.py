"""Pocket FLUX.2's autoencoder: 128 channels for 16x16 pixels, in the architecture that TAESD has for FLUX.2.

For 8x8 pixels there are 32 channels: the four axes of the averages of 4x4 pixels, as Pocket FLUX's autoencoder has
them, and the brightness of each 2x2 pixels. FLUX.2 folds 2x2 of these once more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoder import (
    AXES,
    DECODER,
    ENCODER,
    WIDTH,
    Decoder,
    Latents,
    Whitening,
    average,
    axes,
    empty_encoder,
    widened,
)

CHANNELS = 32  # of TAESD's halves
FOLD = 2
POOLED = 4 * WIDTH


class FoldedDecoder(Decoder):
    """The decoder: latents (N, 128, h, w) -> pictures (N, 3, 16h, 16w), about 0–1."""

    def forward(self, latents: Tensor) -> Tensor:
        """Unfold them first."""
        return super().forward(F.pixel_shuffle(latents, FOLD))


def whitening(halves: Tensor) -> Whitening:
    """Of averages of 2x2 pixels, (N, 3, h, w), 0–1: of the four axes, and of brightness."""
    return Whitening.of(axes(average(halves, 2)), axes(halves)[:1])


def encode(halves: Tensor, whitening: Whitening) -> Tensor:
    """What the encoder makes of averages of 2x2 pixels: the transformer's latents (N, 128, h/8, w/8)."""
    mean, std = (part[:, None, None] for part in (whitening.mean, whitening.std))
    coarse = (axes(average(halves, 2)).transpose(0, 1) - mean[:4]) / std[:4]
    fine = (axes(halves)[:1].transpose(0, 1) - mean[4:]) / std[4:]
    return F.pixel_unshuffle(torch.cat([F.pixel_unshuffle(coarse, 2), F.pixel_unshuffle(fine, 4)], dim=1), FOLD)


def checkpoint(decoder: Decoder, whitening: Whitening) -> dict[str, Tensor]:
    """The file: both halves at TAESD's width, in float16; convolutions that are all zero in float8."""
    halves = {DECODER: widened(decoder) | _pools((3, 4, 5)), ENCODER: _encoder(whitening) | _pools((11, 12, 13))}
    tensors = {half + name: value for half, named in halves.items() for name, value in named.items()}
    tensors |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    return {
        name: value.to(torch.float16 if value.ndim < 2 or value.any() else torch.float8_e4m3fn).contiguous()
        for name, value in tensors.items()
    }


def read(tensors: Mapping[str, Tensor]) -> Whitening:
    """What ComfyUI's encoder does with the file's numbers, which are rounded."""
    last, bias = (tensors[f"{ENCODER}14.{end}"].float() for end in ("weight", "bias"))
    colours = [AXES[axis].argmax() for axis in range(len(AXES))]
    std = [AXES[axis, colour] / last[4 * axis, 4 * colour, 1, 1] for axis, colour in enumerate(colours)]
    std.append(1.0 / last[4 * len(AXES), 4 * 3, 1, 1])
    return Whitening(-bias[: 4 * len(std) : 4] * torch.stack(std), torch.stack(std))


def _pools(blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """What TAESD for FLUX.2 adds in its innermost blocks; nothing here, as the last of it is zero."""
    tensors = {}
    for block in blocks:
        tensors[f"{block}.pool.0.weight"] = torch.zeros(POOLED, WIDTH, 1, 1)
        tensors |= {f"{block}.pool.1.weight": torch.ones(POOLED), f"{block}.pool.1.bias": torch.zeros(POOLED)}
        tensors[f"{block}.pool.3.weight"] = torch.zeros(WIDTH, POOLED, 1, 1)
    return tensors


def _encoder(whitening: Whitening) -> dict[str, Tensor]:
    tensors = empty_encoder(CHANNELS)
    first, halves, quarters, eighths = (tensors[f"{index}.weight"] for index in (0, 2, 6, 10))
    # At 1/4: three averaged colours, then the brightness of the four halves in each place. At 1/8: four places of each.
    for colour in range(3):
        first[colour, colour, 1, 1] = 1.0
        # A stride of 2 puts the middle of the 3x3 window on the first pixel of each pair.
        halves[colour, colour, 1:, 1:] = quarters[colour, colour, 1:, 1:] = 0.25
        for place in range(4):
            quarters[3 + place, colour, 1 + place // 2, 1 + place % 2] = AXES[0, colour]
    for channel in range(3 + 4):
        for place in range(4):
            eighths[4 * channel + place, channel, 1 + place // 2, 1 + place % 2] = 1.0
    last, bias = tensors["14.weight"], tensors["14.bias"]
    for place in range(4):
        for axis in range(len(AXES)):
            bias[4 * axis + place] = -whitening.mean[axis] / whitening.std[axis]
            for colour in range(3):
                last[4 * axis + place, 4 * colour + place, 1, 1] = AXES[axis, colour] / whitening.std[axis]
        for inner in range(4):
            row, column = 2 * (place // 2) + inner // 2, 2 * (place % 2) + inner % 2
            fine = 4 * len(AXES) + 4 * row + column
            last[fine, 4 * (3 + inner) + place, 1, 1] = 1.0 / whitening.std[4]
            bias[fine] = -whitening.mean[4] / whitening.std[4]
    return tensors


LATENTS = Latents(
    channels=CHANNELS * FOLD**2,
    pixels=8 * FOLD,
    averaged=2,
    whitening=whitening,
    encode=encode,
    decoder=lambda: FoldedDecoder(CHANNELS),
    checkpoint=checkpoint,
    read=read,
)
