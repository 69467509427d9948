"""A matrix product that adds a LoRA before it writes its result, for GPUs: Triton.

A LoRA beside a linear is little arithmetic and much memory traffic: the linear's output is read and written once more.
Here the second product, hidden · Bᵀ, is accumulated in the registers that hold the first. Whether that is faster than
cuBLAS and a second product `autotune` measures.

Shapes: m rows, k columns of what is read, o columns of the result, r rank of the LoRA; tensors are contiguous unless
said otherwise.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..hardware import dtype_name
from ..prove import Proof, Verdict, judge, proofs, random

# How far the kernel's result may be from two separate products, relative L2: both round a bfloat16 sum differently.
TOLERANCE = 2e-2


class Config(NamedTuple):
    """Tile sizes of the kernel, and how Triton schedules it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Each within 99 KiB of shared memory for ranks up to 16, as Ada has; a GPU without room for one does without it.
CONFIGS = (Config(128, 128, 64, 4, 3), Config(128, 256, 32, 8, 3), Config(64, 128, 64, 4, 3))
# For products with lora_A, few columns wide: many programs must read x.
LORA_A_CONFIGS = (Config(32, 64, 128, 4, 3), Config(64, 64, 64, 4, 4), Config(16, 128, 128, 4, 3))


@functools.cache
def kernel():
    """The Triton kernel. Imported on first use: Triton is not installed everywhere.

    Raises:
        ImportError: there is no Triton.
    """
    from .triton_kernel import fused

    return fused


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_B: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    config: Config,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """Compute activation((x · Wᵀ) ∘ scales + hidden · Bᵀ + bias), each read once, the result written once.

    Args:
        x: ``m k``, bfloat16, float16 or, with scales, float8_e4m3fn.
        weight: ``o k``, of x's dtype; its rows contiguous.
        bias: ``o``, or ``m o`` of what is added to each row, which may be `out`; None for nothing.
        hidden: ``m r``, its columns contiguous; the product with lora_A.
        lora_B: ``o r``.
        scales: of x's rows, ``m``, and of the weight's rows, ``o``, float32; None for unscaled.
        config: tile sizes.
        activation: "none" or "gelu_tanh", see `inputs`.
        out: ``m o`` to write to; None for a new one.

    Returns:
        ``m o`` of `hidden`'s dtype.
    """
    output = x.new_empty((x.shape[0], weight.shape[0]), dtype=hidden.dtype) if out is None else out
    _launch(x, weight, bias, hidden, lora_B, output, scales, config, activation=activation)
    return output


def activated_product(x: Tensor, matrix: Tensor, added: Tensor | None, activation: str, config: Config) -> Tensor:
    """Compute activation(x) · Aᵀ + added, without the activated input written out.

    Args:
        x: ``m k``, bfloat16 or float16.
        matrix: A, ``o k``, of x's dtype; its rows contiguous.
        added: ``m o``, which is written to and returned; None for a new one and nothing to add.
        activation: see `fused_linear`.
        config: tile sizes.
    """
    output = x.new_empty((x.shape[0], matrix.shape[0])) if added is None else added
    nothing = matrix[:, :0]
    _launch(x, matrix, added, output, nothing, output, None, config, activation_x=activation)
    return output


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    lora_B: Tensor,
    output: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    config: Config,
    *,
    activation_x: str = "none",
    activation: str = "none",
) -> None:
    import triton

    (m, k), o, rank = x.shape, weight.shape[0], lora_B.shape[1]
    x_scale, weight_scale = scales or (output, output)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(o, config.block_n),)
    kernel()[grid](
        x, weight, output if bias is None else bias, hidden, lora_B, output, x_scale, weight_scale,
        m, o, k, rank,
        weight.stride(0), bias.stride(0) if bias is not None and bias.ndim == 2 else 0, hidden.stride(0),
        SCALED=scales is not None, BIAS=bias is not None, ACTIVATION_X=activation_x, ACTIVATION=activation,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=16 if rank <= 16 else 64, GROUP_M=8, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def prove(device: torch.device, dtype: torch.dtype) -> Proof:
    """Run the kernel once on a device, for a table of what works there; `autotune` compares it at each shape anyway."""
    subject = f"fused LoRA kernel, {dtype_name(dtype)}"
    return proofs().of(subject, device, functools.partial(_compare, device, dtype))


def _compare(device: torch.device, dtype: torch.dtype) -> Verdict:
    x, weight, bias, hidden, lora_B = (
        random(shape, device, seed, 0.1).to(dtype)
        for seed, shape in enumerate(((134, 512), (384, 512), (384,), (134, 16), (384, 16)))
    )
    reference = torch.addmm(bias.float(), x.float(), weight.float().t()) + hidden.float() @ lora_B.float().t()
    return judge(fused_linear(x, weight, bias, hidden, lora_B, None, CONFIGS[0]), reference, TOLERANCE)
