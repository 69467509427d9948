"""What one forward of FLUX.1 needs of the device beside the weights.

Nothing outlives a block but the tokens, so the widest moment of one block decides: the single block's, which holds the
MLP beside q, k and v. Counted in tensors of one token, H wide:

- compiled, 3 + 2 · mlp / H: the MLP before its activation, its output joined with that of attention, and one H for
  each of attention's output and what is being computed. TorchInductor's own count of the code that it generates for an
  H100 is 11.0 H, of the CPU's 11.1 (torch 2.14, mlp = 4 H).
- eager, 10 + 2 · mlp / H: no operation is fused, so the rotation of q and k stands in float32. Measured: 18.0 H.

Beside them: the tokens that enter the block, and what a quantized linear makes of its input or weight. Attention takes
none: PyTorch's own kernels for it hold no scores.
"""

from __future__ import annotations

import torch

from .config import HEAD_DIM, Flux1Config

PIXELS_PER_TOKEN = 16
FLOAT32_BYTES = 4
# How each quantization computes; see accel/dynamic.py and accel/quantize.
DYNAMIC = ("fp8", "int8", "nvfp4", "mxfp8")
UNPACKING = ("fp8_weight_only", "int8_weight_only", "nf4")


def image_tokens(width: int, height: int) -> int:
    """Tokens of a picture of so many pixels."""
    return -(-width // PIXELS_PER_TOKEN) * -(-height // PIXELS_PER_TOKEN)


def activation_bytes(
    config: Flux1Config, tokens: int, dtype: torch.dtype, quantization: str = "none", compiled: bool = True
) -> int:
    """The most that a forward holds at once, without weights, LoRAs and what the sampler keeps.

    Args:
        config: sizes of the model.
        tokens: text and image tokens, references included, times the batch.
        dtype: what it computes in.
        quantization: one of `settings.QUANTIZATION_MODES`.
        compiled: whether the blocks are compiled.

    Returns:
        Bytes; the allocator's fragments and library workspaces are not in it.
    """
    hidden, mlp = config.hidden_size, config.mlp_dim
    widths = 1 + (3 if compiled else 10)
    per_token = (widths * hidden + 2 * mlp) * dtype.itemsize
    per_token += HEAD_DIM * FLOAT32_BYTES  # the rotary table: a cosine and a sine for each pair of channels
    fixed = 0
    if quantization in DYNAMIC and not compiled:
        per_token += 2 * FLOAT32_BYTES * (hidden + mlp)  # the widest input in float32, before and after its scaling
    elif quantization == "int8":
        per_token += FLOAT32_BYTES * mlp  # int32 products of the widest linear
    elif quantization in DYNAMIC:
        per_token += hidden + mlp  # the widest input in 8 bits
    elif quantization in UNPACKING:
        fixed = (hidden + mlp) * hidden * dtype.itemsize  # the widest weight, unpacked
    return tokens * per_token + fixed
