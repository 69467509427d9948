"""Attention as batched oneDNN products, for CPUs that multiply bfloat16.

PyTorch's own kernel multiplies its tiles by another library, which on CPUs without AMX may compute bfloat16 in float32:
on an AMD EPYC with AVX512-BF16 (2 cores, torch 2.14.1, 2026-11-25) the products here take half as long in all, 12.5
instead of 23 ms for 592 tokens of FLUX.1's 24 heads, 0.66 instead of 1.47 s for 4,608.

oneDNN rounds its results to bfloat16, scores too. Of a score s that is an error of s / 512, which the exponential turns
into a relative one: too much where s is 10. So the scores are computed twice: once for the largest of each row, m, and
once for s - m, subtracted before the rounding. The closer a score is to m, the more it counts and the less it is
rounded; m itself need not be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.packed import cpu_multiplies_bf16
from .backend import EXACT, Attention, Backend, Target, installed_with_torch
from .native import sdpa
from .operator import opaque, register

# Of one product: 8 MB, which stay in the cache and come from the heap; measured best of 2**19 to 2**23.
MAX_SCORES = 2**22


def onednn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Run the products; see `native.sdpa`, which takes the masks."""
    return opaque(query, key, value, "onednn") if mask is None else sdpa(query, key, value, mask)


def _make() -> Attention:
    register("onednn", _onednn)
    return onednn


def _onednn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, N, heads, head_dim) three times -> the same. Runs of heads, or of one head's queries, share a product."""
    batch, tokens, heads, head_dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    query, key, value = (each.transpose(1, 2).contiguous() for each in (query, key, value))
    keys = key.transpose(2, 3)
    scale = head_dim**-0.5
    together = max(1, min(heads, MAX_SCORES // tokens**2))
    rows = max(1, min(tokens, MAX_SCORES // (together * tokens)))
    for picture in range(batch):
        for head in range(0, heads, together):
            run = slice(head, head + together)
            for row in range(0, tokens, rows):
                queries = query[picture, run, row : row + rows]
                scores = torch.bmm(queries, keys[picture, run])
                largest = scores.amax(dim=-1, keepdim=True)
                torch.baddbmm(largest.mul_(-scale), queries, keys[picture, run], alpha=scale, out=scores)
                attended = torch.bmm(torch.softmax(scores, dim=-1), value[picture, run])
                output[picture, row : row + rows, run] = attended.transpose(0, 1)
    return output


def _hardware(target: Target) -> str | None:
    if target.hardware.kind != "cpu":
        return f"runs on CPUs; this is the device {target.device}"
    if target.assumed is None and not cpu_multiplies_bf16():
        return "needs a CPU that multiplies bfloat16 (AVX512-BF16, AMX or ARM's BF16) and a PyTorch with oneDNN"
    return None


ONEDNN = Backend(
    name="onednn",
    hardware=_hardware,
    library=installed_with_torch,
    make=_make,
    instead=(),
    max_deviation={torch.bfloat16: EXACT[torch.bfloat16]},
)
