"""What one forward of FLUX.1 needs of the device beside the weights.

Between blocks there are only tokens: those that were embedded, and those that enter the block. Within one, the single
block is the widest, where the MLP stands beside q, k and v. Counted in tensors of one token, H wide:

- the two sets of tokens, 2;
- compiled, 3 + 2 · mlp / H: the MLP before its activation (mlp), attention's output beside the activated MLP (H + mlp),
  q and k (2 H). TorchInductor's own count of the code that it generates for an H100 is 11.0 H for the block, the CPU's
  allocator counts 11.1 (torch 2.14, mlp = 4 H);
- eager, 7 + 2 · mlp / H, and 2 in float32, in which q and k are rotated.

Beside them: the rotary table, and what a quantized linear makes of its input or weight. Attention takes none: the
kernels that PyTorch chooses hold no scores. tests/test_plan.py compares the sums with what forwards really allocate:
from 2 % below to 9 % above.
"""

from __future__ import annotations

import torch

from ..base import Workspace
from ..streams.layout import HEAD_DIM
from .config import Flux1Config

FLOAT32_BYTES = 4


def activation_bytes(
    config: Flux1Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
) -> int:
    """See `Family.activation_bytes`."""
    hidden, mlp = config.hidden_size, config.mlp_dim
    per_token = (5 * hidden + 2 * mlp) * dtype.itemsize
    if not compiled:
        per_token += 4 * hidden * dtype.itemsize + 2 * hidden * FLOAT32_BYTES
    per_token += HEAD_DIM * FLOAT32_BYTES  # the rotary table: a cosine and a sine for each pair of channels
    widest_input = hidden + mlp
    if workspace.input_bytes and not compiled:
        per_token += 2 * FLOAT32_BYTES * widest_input  # before and after its scaling
    else:
        per_token += max(workspace.input_bytes * widest_input, workspace.product_bytes * mlp)
    unpacked = widest_input * hidden * dtype.itemsize if workspace.unpacks_weight else 0
    return tokens * per_token + unpacked
