"""What a single block, the widest, needs of the device beside what its family counts of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base import Workspace
from .layout import HEAD_DIM

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class SingleBlock:
    """The widths of a single block.

    Attributes:
        hidden: of the model.
        mlp_in: rows of the MLP's first linear.
        mlp_out: columns of its last linear.
        columns: that a compiled block holds of each token at the most, with the tokens that were embedded.
    """

    hidden: int
    mlp_in: int
    mlp_out: int
    columns: int

    def activation_bytes(self, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool) -> int:
        """See `Family.activation_bytes`.

        An eager block holds four more tensors, and two in float32, in which q and k are rotated. Beside them stand the
        rotary table, and what a quantized linear makes of its input or weight. Attention takes none: the kernels that
        PyTorch chooses hold no scores.
        """
        per_token = self.columns * dtype.itemsize
        if not compiled:
            per_token += 4 * self.hidden * dtype.itemsize + 2 * self.hidden * FLOAT32_BYTES
        per_token += HEAD_DIM * FLOAT32_BYTES  # the rotary table: a cosine and a sine for each pair of channels
        widest_input = self.hidden + self.mlp_out
        if workspace.input_bytes and not compiled:
            per_token += 2 * FLOAT32_BYTES * widest_input  # before and after its scaling
        else:
            per_token += max(workspace.input_bytes * widest_input, workspace.product_bytes * self.mlp_in)
        unpacked = widest_input * self.hidden * dtype.itemsize if workspace.unpacks_weight else 0
        return tokens * per_token + unpacked
