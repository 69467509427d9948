"""The attention that PyTorch has itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import EXACT, HALF, Backend, Target, installed_with_torch, nvidia


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled dot product attention, which picks its own kernel.

    Args:
        query: (B, heads, N, head_dim), a view of (B, N, heads, head_dim); `key` and `value` likewise.
        key: see `query`.
        value: see `query`.
        mask: broadcastable to (B, heads, N, N): bool (True attends) or added to the scores; or None.

    Returns:
        (B, heads, N, head_dim), the dtype of `query`; where the kernel allows it, again a view of (B, N, heads,
        head_dim), so that joining the heads copies nothing.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Run cuDNN's kernel; see `sdpa`, which takes the masks.

    By the operator: `torch.nn.attention.sdpa_kernel` would change flags of the whole process meanwhile.
    """
    if mask is not None:
        return sdpa(query, key, value, mask)
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default(query, key, value, None, False)[0]


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlexAttention, which TorchInductor writes for the shapes at hand; see `sdpa`, which takes the masks."""
    # Uncompiled it writes out all scores, gigabytes of them; it gets there only when a region failed to compile.
    if mask is not None or not torch.compiler.is_compiling():
        return sdpa(query, key, value, mask)
    from torch.nn.attention.flex_attention import flex_attention  # takes a second to import

    return flex_attention(query, key, value)


def _cudnn_hardware(target: Target) -> str | None:
    reason = nvidia(8, 9, 10, 11, 12, max_head_dim=128)(target)
    if reason is None and target.assumed is None and not torch.backends.cudnn.is_available():
        return "needs cuDNN, which this build of PyTorch lacks: install PyTorch from pytorch.org"
    return reason


def _flex_hardware(target: Target) -> str | None:
    if target.hardware.kind not in ("cpu", "cuda", "rocm", "xpu"):
        return f"has no kernels for the device {target.hardware.name}"
    if not target.compiled:
        return "runs compiled only: set 'compile' to 'regional'"
    return None


SDPA = Backend(
    name="sdpa",
    hardware=lambda target: None,
    library=installed_with_torch,
    make=lambda: sdpa,
    instead=(),
    max_deviation=EXACT,
)

CUDNN = Backend(
    name="cudnn",
    hardware=_cudnn_hardware,
    library=installed_with_torch,
    make=lambda: cudnn,
    instead=("flash_3", "flash_2"),
    max_deviation={dtype: EXACT[dtype] for dtype in HALF},
)

FLEX = Backend(
    name="flex",
    hardware=_flex_hardware,
    library=installed_with_torch,
    make=lambda: flex,
    instead=(),
    max_deviation=EXACT,
)
