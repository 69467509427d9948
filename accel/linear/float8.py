"""Products of float8 matrices whose rows have a scale each, in whichever way this device computes them best.

`torch._scaled_mm` with a scale for each row is the shortest way, but not everywhere: its CUTLASS kernels are not built
on Windows (pytorch aten/src/ATen/native/cuda/RowwiseScaledMM.cu: not for _WIN32; pytorch PR #194606), cuBLAS refused it
on compute capability 12.0 (pytorch issue #192707), and PyTorch 2.11 lacks it on a CPU, where 2.14 has it. With one
scale for each whole matrix the same function runs wherever there is float8 at all. So the second way multiplies with
scales of one, then scales rows and columns, which is the same arithmetic in another order; on a GPU with Triton our own
kernel takes its place where that is faster: it scales before it writes.

Which way a device takes is decided once: by what proved itself there, and among those by time.

Shapes: m rows, k in_features, o out_features.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import SettingsError
from ..hardware import dtype_name
from ..prove import Verdict, judge, proofs, random
from . import kernels
from .autotune import autotuner

# What the result's rounding to bfloat16 leaves is 0.0017; the float8 values themselves are given.
ERROR = 5e-3
# An unscaled product reaches 448 · 448 · in_features, beyond float16, and bfloat16 would round it twice. So it is
# float32, for that many elements at a time: 64 MB.
RUN_ELEMENTS = 2**24
# (m, k, o): small, with no multiple of any kernel's tile among the rows; and a large transformer's to take the time.
PROOF_SHAPE = (134, 512, 384)
TIMED_SHAPE = (4_096, 3_072, 3_072)
REPEATS = 5
# The shortest way is taken unless another is that much faster: it needs no memory beside its result.
MARGIN = 0.05


@dataclass(frozen=True)
class Operands:
    """What is multiplied: (rows ∘ row_scales) · (weight ∘ weight_scales)ᵀ + bias.

    Attributes:
        rows: ``m k`` float8_e4m3fn, contiguous.
        weight: ``o k`` float8_e4m3fn, contiguous.
        row_scales: ``m 1`` float32.
        weight_scales: ``o 1`` float32.
        bias: ``o`` of `dtype`, or None.
        dtype: of the result, bfloat16, float16 or float32.
        out: contiguous ``m o`` to write to; None for a new one.
    """

    rows: Tensor
    weight: Tensor
    row_scales: Tensor
    weight_scales: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    out: Tensor | None = None


Multiply = Callable[[Operands], Tensor]


def scaled_by_row(x: Operands) -> Tensor:
    """Let PyTorch scale while it multiplies."""
    scales = {"scale_a": x.row_scales, "scale_b": x.weight_scales.t()}
    return torch._scaled_mm(
        x.rows, x.weight.t(), bias=x.bias, out=x.out, out_dtype=x.dtype, use_fast_accum=True, **scales
    )


def scaled_afterwards(x: Operands) -> Tensor:
    """Multiply with scales of one, then scale rows and columns."""
    output = x.rows.new_empty((len(x.rows), len(x.weight)), dtype=x.dtype) if x.out is None else x.out
    one, columns = _one(x.rows.device), x.weight_scales.t()
    added = None if x.bias is None else x.bias.float()
    at_a_time = max(1, RUN_ELEMENTS // len(x.weight))
    for start in range(0, len(x.rows), at_a_time):
        run = slice(start, start + at_a_time)
        product = torch._scaled_mm(
            x.rows[run], x.weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
        ).mul_(x.row_scales[run])
        output[run] = product.mul_(columns) if added is None else torch.addcmul(added, product, columns)
    return output


WAYS: Mapping[str, Multiply] = {"scaled by row": scaled_by_row, "scaled afterwards": scaled_afterwards}


@dataclass(frozen=True)
class Way:
    """How a device multiplies float8 rows.

    Attributes:
        name: a key of `WAYS`.
        multiply: its function.
        refusals: name -> why other ways are not taken, for those that failed.
    """

    name: str
    multiply: Multiply
    refusals: Mapping[str, str]


@functools.cache
def way_on(device: torch.device, dtype: torch.dtype) -> Way:
    """Decide how a device multiplies float8 rows into a dtype, once per process.

    Raises:
        SettingsError: in no way; it has PyTorch's own words.
    """
    refusals, proven = {}, {}
    for name, multiply in WAYS.items():
        subject = f"float8 product {name}, {dtype_name(dtype)}"
        refusal = proofs().of(subject, device, functools.partial(_compare, multiply, device, dtype)).refusal
        if refusal is None:
            proven[name] = multiply
        else:
            refusals[name] = refusal
    if not proven:
        failed = "; ".join(f"{name}, it {refusal}" for name, refusal in refusals.items())
        raise SettingsError(f"{device} has no float8 product that works: {failed}.")
    subject = f"seconds of a float8 product, {dtype_name(dtype)}: {', '.join(proven)}"
    name = fastest(proofs().seconds(subject, device, lambda: _measure(proven, device, dtype)))
    return Way(name, proven[name], refusals)


def multiply(x: Operands) -> Tensor:
    """The product, ``m o``, as this device computes it best.

    Raises:
        SettingsError: the device cannot; `way_on` says so before anything is loaded.
    """
    way = way_on(x.rows.device, x.dtype)
    if way.multiply is not scaled_afterwards or not x.rows.is_cuda or x.dtype == torch.float32:
        return way.multiply(x)
    # The kernel without a LoRA: of rank 0, at an address all the same.
    hidden, lora_B = (matrix.new_empty((len(matrix), 1), dtype=x.dtype)[:, :0] for matrix in (x.rows, x.weight))
    scales = x.row_scales, x.weight_scales

    def fused(config: kernels.Config) -> Tensor:
        return kernels.fused_linear(x.rows, x.weight, x.bias, hidden, lora_B, scales, config, out=x.out)

    shape = (x.rows.shape[1], *lora_B.shape, x.bias is None)
    return autotuner().fastest(x.rows, shape, fused, lambda: scaled_afterwards(x))


def _compare(multiply: Multiply, device: torch.device, dtype: torch.dtype) -> Verdict:
    rows, columns, outputs = PROOF_SHAPE
    matrices, scales = [], []
    for seed, size in enumerate((rows, outputs)):
        matrices.append(random((size, columns), device, seed, 100.0).clamp(-448, 448).to(torch.float8_e4m3fn))
        scales.append(random((size, 1), device, seed + 2).abs() * 1e-3 + 1e-4)
    bias = random((outputs,), device, 4).to(dtype)
    exact = [matrix.float() * scale for matrix, scale in zip(matrices, scales, strict=True)]
    reference = torch.addmm(bias.float(), exact[0], exact[1].t())
    target = torch.empty((rows, outputs), dtype=dtype, device=device)
    operands = Operands(*matrices, *scales, bias, dtype, target)
    written = multiply(operands)
    if written.data_ptr() != target.data_ptr():
        return Verdict("does not write where it is told to")
    verdict = judge(target, reference, ERROR)
    if verdict.refusal is not None:
        return verdict
    return judge(multiply(replace(operands, bias=None, out=None)), reference - bias.float(), ERROR)


def fastest(seconds: Mapping[str, float]) -> str:
    """The first way that is within `MARGIN` of the fastest."""
    least = min(seconds.values())
    return next(name for name in WAYS if name in seconds and seconds[name] <= least * (1 + MARGIN))


def _measure(proven: Mapping[str, Multiply], device: torch.device, dtype: torch.dtype) -> Mapping[str, float]:
    """Seconds of one large product; where there is no choice, or no GPU to do it in a moment, 0 of the first."""
    if len(proven) == 1 or device.type != "cuda":
        return dict.fromkeys(list(proven)[:1], 0.0)
    rows, columns, outputs = TIMED_SHAPE
    left, right = (
        random((size, columns), device, seed).to(torch.float8_e4m3fn) for seed, size in enumerate((rows, outputs))
    )
    scales = [torch.ones((size, 1), device=device) for size in (rows, outputs)]
    operands = Operands(left, right, *scales, torch.zeros(outputs, dtype=dtype, device=device), dtype)
    return {name: _seconds(functools.partial(way, operands), device) for name, way in proven.items()}


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
