"""What one forward of FLUX.1 needs of the device beside the weights.

Between blocks there are only tokens: those that were embedded, and those that enter the block. Within one, the single
block is the widest, where the MLP stands beside q, k and v. Counted in tensors of one token, H wide:

- the two sets of tokens, 2;
- compiled, 3 + 2 · mlp / H: the MLP before its activation (mlp), attention's output beside the activated MLP (H + mlp),
  q and k (2 H). TorchInductor's own count of the code that it generates for an H100 is 11.0 H for the block, the CPU's
  allocator counts 11.1 (torch 2.14, mlp = 4 H);
- eager, and beside them: see `streams.activations`.

tests/test_plan.py compares the sums with what forwards really allocate:
from 2 % below to 9 % above.
"""

from __future__ import annotations

import torch

from ..base import Workspace
from ..streams.activations import SingleBlock
from .config import Flux1Config


def activation_bytes(
    config: Flux1Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
) -> int:
    """See `Family.activation_bytes`."""
    hidden, mlp = config.hidden_size, config.mlp_dim
    return SingleBlock(hidden, mlp, mlp, 5 * hidden + 2 * mlp).activation_bytes(tokens, dtype, workspace, compiled)
