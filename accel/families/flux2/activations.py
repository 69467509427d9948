"""What one forward of FLUX.2 needs of the device beside the weights.

As in FLUX.1 the single block is the widest, where the MLP stands beside q, k and v; a gated MLP is twice as wide before
its activation. Counted in tensors of one token, H wide:

- the tokens that were embedded and those that enter the block, 2;
- compiled, 2 + 3 · mlp / H: the gate and its value (2 mlp), attention's output (H), and it again beside the activated
  MLP (H + mlp), which the last linear reads. No q and k are left by then, as they are in FLUX.1; where they are
  rotated, q, k and v stand beside the MLP before its activation (5 H + 2 mlp), which is as much in every published
  model, where mlp = 3 H;
- eager, 6 + 3 · mlp / H, and 2 in float32, in which q and k are rotated.

Beside them: the rotary table, and what a quantized linear makes of its input or weight.

The allocations and releases in the code that TorchInductor generates for an H100 are 11.0 H for the block, in bf16 and
in fp8, and the CPU's allocator counts 11.0 (torch 2.14, mlp = 3 H). tests/test_plan.py compares the sums with what
forwards really allocate: as much, but 8 % more for int8 that is not compiled.
"""

from __future__ import annotations

import torch

from ..base import Workspace
from ..streams.layout import HEAD_DIM
from .config import Flux2Config

FLOAT32_BYTES = 4


def activation_bytes(
    config: Flux2Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
) -> int:
    """See `Family.activation_bytes`."""
    hidden, mlp = config.hidden_size, config.mlp_dim
    per_token = (4 * hidden + 3 * mlp) * dtype.itemsize
    if not compiled:
        per_token += 4 * hidden * dtype.itemsize + 2 * hidden * FLOAT32_BYTES
    per_token += HEAD_DIM * FLOAT32_BYTES  # the rotary table: a cosine and a sine for each pair of channels
    widest_input = hidden + mlp
    if workspace.input_bytes and not compiled:
        per_token += 2 * FLOAT32_BYTES * widest_input  # before and after its scaling
    else:
        per_token += max(workspace.input_bytes * widest_input, workspace.product_bytes * 2 * mlp)
    unpacked = widest_input * hidden * dtype.itemsize if workspace.unpacks_weight else 0
    return tokens * per_token + unpacked
