"""A matrix product that adds a LoRA before it writes its result, for GPUs: Triton.

A LoRA beside a linear is little arithmetic and much memory traffic: the linear's output is read and written once more.
Here the second product, hidden · Bᵀ, is accumulated in the registers that hold the first. Whether that is faster than
cuBLAS and a second product depends on the GPU, so `fastest` measures both, once per shape.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..hardware import dtype_name
from ..prove import Proof, Verdict, judge, proofs, random

log = logging.getLogger(__name__)

# How far the kernel's result may be from two separate products, relative L2: both round a bfloat16 sum differently.
TOLERANCE = 2e-2
# Of one measurement; the fastest of them counts.
REPEATS = 5


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
NARROW_CONFIGS = (Config(32, 64, 128, 4, 3), Config(64, 64, 64, 4, 4), Config(16, 128, 128, 4, 3))


@functools.cache
def kernel():
    """The Triton kernel. Made on first use: Triton is not installed everywhere.

    Raises:
        ImportError: there is no Triton.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def fused(
        x, weight, bias, hidden, lora_B, output, x_scale, weight_scale,  # pointers
        M, N, K, R,
        weight_stride, bias_stride, hidden_stride,
        SCALED: tl.constexpr, BIAS: tl.constexpr, GELU_X: tl.constexpr, GELU: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    ):  # fmt: skip
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
            if GELU_X:  # x · sigmoid(2 u) is x / 2 · (1 + tanh(u))
                wide = left.to(tl.float32)
                left = (wide * tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))).to(right.dtype)
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
        if GELU:
            total *= tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
        tl.store(output + m64 * N + n[None, :], total.to(output.dtype.element_ty), mask=inside)

    return fused


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden: Tensor,
    lora_B: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    config: Config,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Compute x · Wᵀ (· scales) + hidden · Bᵀ + bias, each read once, the result written once.

    Args:
        x: (M, K), bfloat16, float16 or, with scales, float8_e4m3fn.
        weight: (N, K), of x's dtype; its rows contiguous.
        bias: (N,), or (M, N) of what is added to each row; it may be `out`.
        hidden: (M, rank), its columns contiguous; the product with lora_A.
        lora_B: (N, rank).
        scales: of x's rows (M,) and the weight's rows (N,), float32; None for unscaled.
        config: tile sizes.
        gelu: the result goes through GELU (tanh).
        out: contiguous (M, N) to write to; None for a new one.

    Returns:
        (M, N) of `hidden`'s dtype.
    """
    output = x.new_empty((x.shape[0], weight.shape[0]), dtype=hidden.dtype) if out is None else out
    _launch(x, weight, bias, hidden, lora_B, output, scales, config, gelu_x=False, gelu=gelu)
    return output


def gelu_product(x: Tensor, matrix: Tensor, added: Tensor | None, config: Config) -> Tensor:
    """Compute gelu(x) · Aᵀ + added, without the activated input written out.

    Args:
        x: (M, K), bfloat16 or float16.
        matrix: A, (N, K), of x's dtype; its rows contiguous.
        added: (M, N), which is written to and returned; None for a new one and nothing to add.
        config: tile sizes.
    """
    output = x.new_empty((x.shape[0], matrix.shape[0])) if added is None else added
    nothing = matrix[:, :0]
    _launch(x, matrix, added, output, nothing, output, None, config, gelu_x=True, gelu=False)
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
    gelu_x: bool,
    gelu: bool,
) -> None:
    import triton

    (m, k), n, rank = x.shape, weight.shape[0], lora_B.shape[1]
    x_scale, weight_scale = scales or (output, output)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    kernel()[grid](
        x, weight, output if bias is None else bias, hidden, lora_B, output, x_scale, weight_scale,
        m, n, k, rank,
        weight.stride(0), bias.stride(0) if bias is not None and bias.ndim == 2 else 0, hidden.stride(0),
        SCALED=scales is not None, BIAS=bias is not None, GELU_X=gelu_x, GELU=gelu,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=16 if rank <= 16 else 64, GROUP_M=8, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


# Device, dtype, size and shapes -> the tile sizes that won there, or None where separate products did.
_FASTEST: dict[tuple, Config | None] = {}


def fastest(
    x: Tensor,
    shape: tuple,
    fused: Callable[[Config], Tensor],
    separate: Callable[[], Tensor],
    configs: tuple[Config, ...] = CONFIGS,
) -> Tensor:
    """Compute by whatever is fastest on this GPU: the kernel with some tile sizes, or `separate`.

    The first call with a shape measures, takes milliseconds, and waits for the GPU; a kernel that does not compile, or
    whose result is not that of `separate`, is never used.

    Args:
        x: what is read, for its rows, dtype and device.
        shape: what else the fastest way depends on.
        fused: runs the kernel; as often as one likes, with the same result.
        separate: likewise, without it.
        configs: tile sizes to try.
    """
    # Token counts of one resolution differ by the prompt's length; the winner changes slowly with them.
    key = (x.device, x.dtype, round(2 * math.log2(max(x.shape[0], 1))), *shape)
    if key not in _FASTEST:
        _FASTEST[key] = choose({config: functools.partial(fused, config) for config in configs}, separate, _seconds)
    config = _FASTEST[key]
    return separate() if config is None else fused(config)


def choose(
    candidates: dict[Config, Callable[[], Tensor]],
    separate: Callable[[], Tensor],
    seconds: Callable[[Callable[[], Tensor]], float],
) -> Config | None:
    """The candidate that takes the fewest seconds and agrees with `separate`; None where `separate` is faster."""
    expected = separate().float()
    best, least = None, seconds(separate)
    for config, run in candidates.items():
        try:
            # Of a LoRA of zeros, 0 / 0 would be no distance.
            length = torch.linalg.vector_norm(expected).clamp(min=torch.finfo(torch.float32).tiny)
            distance = torch.linalg.vector_norm(run().float() - expected) / length
            if not distance <= TOLERANCE:  # NaN is too far, too
                log.warning("Flux Hotswap: a fused LoRA kernel is wrong on this GPU (%.3g) and is not used.", distance)
                continue
            took = seconds(run)
        except Exception as exc:  # Triton raises many kinds: no compiler, too little shared memory, an old GPU
            log.info("Flux Hotswap: a fused LoRA kernel does not run on this GPU (%s) and is not used.", exc)
            continue
        if took < least:
            best, least = config, took
    return best


def prove(device: torch.device, dtype: torch.dtype) -> Proof:
    """Run the kernel once on a device, for a table of what works there; `fastest` compares it at each shape anyway."""
    subject = f"fused LoRA kernel, {dtype_name(dtype)}"
    return proofs().of(subject, device, functools.partial(_compare, device, dtype))


def _compare(device: torch.device, dtype: torch.dtype) -> Verdict:
    x, weight, bias, hidden, lora_B = (
        random(shape, device, seed, 0.1).to(dtype)
        for seed, shape in enumerate(((134, 512), (384, 512), (384,), (134, 16), (384, 16)))
    )
    reference = torch.addmm(bias.float(), x.float(), weight.float().t()) + hidden.float() @ lora_B.float().t()
    return judge(fused_linear(x, weight, bias, hidden, lora_B, None, CONFIGS[0]), reference, TOLERANCE)


def _seconds(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return min(times)
