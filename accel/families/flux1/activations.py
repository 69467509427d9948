"""What one forward of FLUX.1 needs of the device beside the weights.

Between blocks there are only tokens: those that were embedded, the text and image tokens joined, and those that enter
the block. Within one, the single block is the widest, where the MLP stands beside q, k and v. Counted in tensors of one
token, H wide:

- the three sets of tokens, 3;
- compiled, 3 + 2 · mlp / H: the MLP before its activation, its output joined with that of attention, and one H for
  each of attention's output, q and k. TorchInductor's own count of the code that it generates for an H100 is 11.0 H for
  the block, the CPU's allocator counts 11.1 (torch 2.14, mlp = 4 H);
- eager, 7 + 2 · mlp / H, and 2 in float32, in which q and k are rotated.

Beside them: the rotary table, and what a quantized linear makes of its input or weight. Attention takes none: the
kernels that PyTorch chooses hold no scores. tests/test_plan.py compares the sums with what forwards really allocate:
from 2 % below to 9 % above.
"""

from __future__ import annotations

import torch

from .config import HEAD_DIM, Flux1Config

PIXELS_PER_TOKEN = 16
FLOAT32_BYTES = 4
# How each quantization computes; see accel/linear/dynamic.py and accel/quantize.
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
    per_token = (6 * hidden + 2 * mlp) * dtype.itemsize
    if not compiled:
        per_token += 4 * hidden * dtype.itemsize + 2 * hidden * FLOAT32_BYTES
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
