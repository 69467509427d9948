"""Weights on a CPU in the order in which oneDNN multiplies them.

oneDNN reorders a weight at every product unless it is given one that is in its order already. A packed weight takes as
much memory, gives the same product bit for bit (but see `one_row_differs`), and takes 10 to 17 % less time: linears of
3,072 to 15,360 columns in bfloat16 on 592 and 4,608 tokens, AMD EPYC with AVX512-BF16, 2 cores, torch 2.14.1,
2026-11-25.

A tensor in that order has no strides and no address, so torch cannot store what it compiled for one. A linear's weight
becomes a placeholder instead, of the same shape and dtype, whose attribute is the tensor; PyTorch hands the operators
of `operators` the very object that the model has, compiled or not. The placeholder's one element is NaN: what
reads it all the same shows at once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

# What the order is chosen for; it then holds for any number of rows.
ROWS = 512
_PACKED = "packed_for_onednn"
# Of ten products of one row one to three differed under torch 2.15.0.
ONE_ROW_TRIALS = 64


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 products (AVX512-BF16, AMX, ARM's BF16), and this PyTorch oneDNN to use them."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linears of a dtype should be packed on a device."""
    return device.type == "cpu" and dtype == torch.bfloat16 and _works()


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is the placeholder of a packed one."""
    return hasattr(weight, _PACKED)


def pack(linear: nn.Linear) -> None:
    """Replace a linear's weight, (out_features, in_features) bfloat16 on the CPU, by a packed one."""
    weight = linear.weight.detach()
    placeholder = _replace(linear, weight.new_full((1,), torch.nan).expand(weight.shape))
    setattr(placeholder, _PACKED, torch.ops.mkldnn._reorder_linear_weight(weight, ROWS))


def unpack(linear: nn.Linear) -> None:
    """Replace a packed weight by a plain one."""
    _replace(linear, unpacked(linear.weight))


def unpacked(weight: Tensor) -> Tensor:
    """The tensor that was packed, bit for bit."""
    return getattr(weight, _PACKED).to_dense()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x · Wᵀ + bias: ``m k`` with a packed ``o k`` and ``o`` or None -> ``m o``."""
    return torch.ops.mkldnn._linear_pointwise(x, getattr(weight, _PACKED), bias, "none", [], "")


def _replace(linear: nn.Linear, weight: Tensor) -> nn.Parameter:
    parameter = linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return parameter


@functools.cache
def one_row_differs() -> bool:
    """Whether this torch rounds a product of one row otherwise when the weight is packed. Of two rows none does.

    Where it does not, one row stays one: two threads that share two rows wait for each other on a busy machine.
    """
    if not _works():
        return False
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weight, *vectors = (
            torch.randn(shape, generator=generator).to(torch.bfloat16)
            for shape in ((1536, 256), *((1, 256), (1536,)) * ONE_ROW_TRIALS)
        )
        linear = nn.Linear(256, 1536, dtype=torch.bfloat16)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        pack(linear)
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        return any(
            not torch.equal(multiply(x, linear.weight, bias), torch.addmm(bias, x, weight.t())) for x, bias in pairs
        )


@functools.cache
def _works() -> bool:
    """Whether this CPU multiplies bfloat16, and this torch has the operators, which are not public, as used here."""
    if not cpu_multiplies_bf16():
        return False
    with torch.inference_mode(False), torch.no_grad():
        linear = nn.Linear(64, 96, dtype=torch.bfloat16)
        x = torch.linspace(-1, 1, 5 * 64).view(5, 64).to(torch.bfloat16)
        expected, weight = linear(x), linear.weight.detach().clone()
        try:
            pack(linear)
            product = multiply(x, linear.weight, linear.bias)
            unpack(linear)
        except (AttributeError, RuntimeError):
            return False
        return torch.allclose(product, expected, rtol=0.02, atol=0.02) and torch.equal(linear.weight, weight)
