"""Pocket FLUX's autoencoder: 16 channels, the averages of 4x4 pixels folded by 2x2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoder import AXES, DECODER, ENCODER, Decoder, Latents, Whitening, axes, empty_encoder, widened

CHANNELS = 16
SCALE, SHIFT = 0.3611, 0.1159  # of FLUX.1's latents; the file says so to ComfyUI


def whitening(quarters: Tensor) -> Whitening:
    """Of averages (N, 3, h, w), 0–1."""
    return Whitening.of(axes(quarters))


def encode(quarters: Tensor, whitening: Whitening) -> Tensor:
    """What the encoder makes of averages (N, 3, h, w), 0–1: the transformer's latents (N, 16, h/2, w/2)."""
    values = axes(quarters).transpose(0, 1)
    values = (values - whitening.mean[:, None, None]) / whitening.std[:, None, None]
    return F.pixel_unshuffle(values, 2)


def checkpoint(decoder: Decoder, whitening: Whitening) -> dict[str, Tensor]:
    """The file: both halves at TAESD's width, in float16, with the scale and shift of FLUX.1's latents."""
    tensors = {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
    tensors |= {f"{DECODER}{name}": value for name, value in widened(decoder).items()}
    tensors |= {f"{ENCODER}{name}": value for name, value in _encoder(whitening).items()}
    return {name: tensor.half().contiguous() for name, tensor in tensors.items()}


def _encoder(whitening: Whitening) -> dict[str, Tensor]:
    tensors = empty_encoder(CHANNELS)
    for colour in range(3):
        tensors["0.weight"][colour, colour, 1, 1] = 1.0
        # A stride of 2 puts the middle of the 3x3 window on the first pixel of each pair.
        for half in ("2.weight", "6.weight"):
            tensors[half][colour, colour, 1:, 1:] = 0.25
        for place in range(4):
            tensors["10.weight"][4 * colour + place, colour, 1 + place // 2, 1 + place % 2] = 1.0
    for axis in range(len(AXES)):
        for place in range(4):
            tensors["14.bias"][4 * axis + place] = -whitening.mean[axis] / whitening.std[axis]
            for colour in range(3):
                value = AXES[axis, colour] / whitening.std[axis]
                tensors["14.weight"][4 * axis + place, 4 * colour + place, 1, 1] = value
    return tensors


LATENTS = Latents(
    channels=CHANNELS,
    pixels=8,
    averaged=4,
    whitening=whitening,
    encode=encode,
    decoder=lambda: Decoder(CHANNELS),
    checkpoint=checkpoint,
)
