"""The source of the fused kernel, for `kernels`, which imports it where there is Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fused(
    x, weight, bias, hidden, lora_B, output, x_scale, weight_scale,  # pointers
    M, N, K, R,
    weight_stride, bias_stride, hidden_stride,
    SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION_X: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of activation((x · weightᵀ) ∘ scales + hidden · lora_Bᵀ + bias), float32 sums."""
    # Programs that share rows of x or of the weight run at about the same time, and find them in L2.
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * columns) * GROUP_M
    height = min(rows - first, GROUP_M)
    row = first + program % (GROUP_M * columns) % height
    column = program % (GROUP_M * columns) // height

    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = (m < M)[:, None], (n < N)[:, None]
    m64, n64 = m.to(tl.int64)[:, None], n.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        left = tl.load(x + m64 * K + k, mask=inside_m & (k < K), other=0.0)
        right = tl.load(weight + n64 * weight_stride + k, mask=inside_n & (k < K), other=0.0)
        if ACTIVATION_X == "gelu_tanh":
            left = gelu_tanh(left.to(tl.float32)).to(right.dtype)
        total = tl.dot(left, tl.trans(right), total)
    if SCALED:
        total *= tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
        total *= tl.load(weight_scale + n, mask=n < N, other=0.0)[None, :]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[None, :]
        left = tl.load(hidden + m64 * hidden_stride + r, mask=inside_m & (r < R), other=0.0)
        right = tl.load(lora_B + n64 * R + r, mask=inside_n & (r < R), other=0.0)
        total = tl.dot(left, tl.trans(right), total)
    inside = inside_m & (n < N)[None, :]
    if BIAS:
        total += tl.load(bias + m64 * bias_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu_tanh":
        total = gelu_tanh(total)
    tl.store(output + m64 * N + n[None, :], total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def gelu_tanh(x):
    """GELU by tanh: x / 2 · (1 + tanh(u)), which is x · sigmoid(2 u) with u = √(2 / π) · (x + 0.044715 x³)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
