"""What one forward of FLUX.2 needs of the device beside the weights.

As in FLUX.1 the single block is the widest, where the MLP stands beside q, k and v; a gated MLP is twice as wide before
its activation. Counted in tensors of one token, H wide:

- the tokens that were embedded and those that enter the block, 2;
- compiled, 2 + 3 · mlp / H: the gate and its value (2 mlp), attention's output (H), and it again beside the activated
  MLP (H + mlp), which the last linear reads. No q and k are left by then, as they are in FLUX.1; where they are
  rotated, q, k and v stand beside the MLP before its activation (5 H + 2 mlp), which is as much in every published
  model, where mlp = 3 H;
- eager, and beside them: see `streams.activations`.

The allocations and releases in the code that TorchInductor generates for an H100 are 11.0 H for the block, in bf16 and
in fp8, and the CPU's allocator counts 11.0 (torch 2.14, mlp = 3 H). tests/test_plan.py compares the sums with what
forwards really allocate: as much, but 8 % more for int8 that is not compiled.
"""

from __future__ import annotations

import torch

from ..base import Workspace
from ..streams.activations import SingleBlock
from .config import Flux2Config


def activation_bytes(
    config: Flux2Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
) -> int:
    """See `Family.activation_bytes`."""
    hidden, mlp = config.hidden_size, config.mlp_dim
    return SingleBlock(hidden, 2 * mlp, mlp, 4 * hidden + 3 * mlp).activation_bytes(tokens, dtype, workspace, compiled)
