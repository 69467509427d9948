"""A linear with a place for a LoRA beside it, and the operators that compute several of them over one input.

The arithmetic is a custom operator, opaque to torch.compile, for three reasons: it looks at the bound tensors when it
runs, so a linear that no LoRA touches costs nothing; lora_A products of linears that read the same input become one;
and the LoRA is accumulated into the linear's output, where separate layers write it out and read it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dynamic import int8_linears, quantize_rows, quantized_dtype
from . import kernels

# The Parameters of a `LoraLinear` that a LoRA binds.
SLOTS = ("lora_A", "lora_B", "mixing")


class LoraLinear(nn.Module):
    """y = M (x Wᵀ) + bias + (x Aᵀ) Bᵀ.

    Each slot is a Parameter; one without elements takes no part. Parameters are replaced, never written.

    Attributes:
        base: the linear: a `torch.nn.Linear`, plain or with a quantized weight, or any module with its interface.
        lora_A: (rank, in_features).
        lora_B: (out_features · rank,), the rows of an (out_features, rank) matrix. One-dimensional, because the strides
            of a matrix of 0 or 1 columns differ from those of wider ones, and compiled code is bound to strides.
        mixing: (blocks · b · b,), the blocks of a block-diagonal M, or empty for the identity.
    """

    def __init__(self, base: nn.Module) -> None:
        """Wrap a linear. It runs after tensors were bound, see `slots.LoraSlots`."""
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        for slot in SLOTS:
            self.register_parameter(slot, None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return linears(x, self)[0]


def linears(x: Tensor, *layers: LoraLinear) -> list[Tensor]:
    """Run linears that read the same input.

    Args:
        x: (…, in_features).
        layers: one or more, with biases.

    Returns:
        One (…, out_features) per layer.
    """
    bases = [layer.base for layer in layers]
    biases = [base.bias for base in bases]
    slots = [[getattr(layer, slot) for layer in layers] for slot in SLOTS]
    if all(is_plain(base) for base in bases):
        return torch.ops.flux_hotswap.linears(x, [base.weight for base in bases], biases, *slots)
    dtypes = {quantized_dtype(base) for base in bases}
    if dtypes == {torch.float8_e4m3fn}:
        rows, scale = quantize_rows(x, torch.float8_e4m3fn)
        weights, scales = [base.weight.qdata for base in bases], [base.weight.scale for base in bases]
        return torch.ops.flux_hotswap.scaled_linears(x, rows, scale, weights, scales, biases, *slots)
    outputs = int8_linears(x, bases) if dtypes == {torch.int8} else [base(x) for base in bases]
    torch.ops.flux_hotswap.add_loras_(outputs, x, biases, *slots)
    return outputs


def is_plain(base: nn.Module) -> bool:
    """Whether a linear holds an ordinary weight, which the operator may multiply by itself."""
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter


@dataclass(frozen=True)
class _Product:
    """x · Wᵀ, of plain matrices or of float8 ones with a scale for each row.

    Attributes:
        rows: (N, in_features).
        weight: (out_features, in_features).
        scales: of the rows, (N, 1), and of the weight's rows, (out_features, 1); or None.
        dtype: of the result.
    """

    rows: Tensor
    weight: Tensor
    scales: tuple[Tensor, Tensor] | None
    dtype: torch.dtype

    def __call__(self, bias: Tensor | None) -> Tensor:
        if self.scales is None:
            return F.linear(self.rows, self.weight, bias)
        rows, columns = self.scales
        options = {"scale_a": rows, "scale_b": columns.t(), "out_dtype": self.dtype, "use_fast_accum": True}
        return torch._scaled_mm(self.rows, self.weight.t(), bias=bias, **options)

    def with_lora(self, bias: Tensor, hidden: Tensor, lora_B: Tensor) -> Tensor:
        def separate() -> Tensor:
            return self(bias).addmm_(hidden, lora_B.t())

        if self.rows.is_cuda and self.dtype != torch.float32:
            return kernels.fastest(self.rows, self.weight, bias, hidden, lora_B, self.scales, separate)
        return separate()


def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    mixing: Sequence[Tensor],
) -> list[Tensor]:
    # The kernel reads rows that follow each other.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _run(x, [_Product(rows, weight, None, x.dtype) for weight in weights], biases, lora_A, lora_B, mixing)


def _scaled_linears(
    x: Tensor,
    rows: Tensor,
    row_scale: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    mixing: Sequence[Tensor],
) -> list[Tensor]:
    products = [
        _Product(rows, weight, (row_scale, scale), x.dtype)
        for weight, scale in zip(weights, weight_scales, strict=True)
    ]
    return _run(x, products, biases, lora_A, lora_B, mixing)


def _run(
    x: Tensor,
    products: Sequence[_Product],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    mixing: Sequence[Tensor],
) -> list[Tensor]:
    hidden = _down(x.reshape(-1, x.shape[-1]), lora_A)
    outputs = []
    for product, bias, up, mix, low in zip(products, biases, lora_B, mixing, hidden, strict=True):
        out_features = product.weight.shape[0]
        if mix.numel():
            output = _mix(product(None), mix).add_(bias)
            if low is not None:
                output.addmm_(low, up.view(out_features, -1).t())
        elif low is not None:
            output = product.with_lora(bias, low, up.view(out_features, -1))
        else:
            output = product(bias)
        outputs.append(output.view(*x.shape[:-1], out_features))
    return outputs


def _add_loras_(
    outputs: Sequence[Tensor],
    x: Tensor,
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    mixing: Sequence[Tensor],
) -> None:
    hidden = _down(x.reshape(-1, x.shape[-1]), lora_A)
    for output, bias, up, mix, low in zip(outputs, biases, lora_B, mixing, hidden, strict=True):
        out_features = output.shape[-1]
        if mix.numel():
            mixed = _mix((output.float() - bias).view(-1, out_features), mix.float()).add_(bias)
            output.copy_(mixed.view(output.shape))
        if low is not None:
            output.view(-1, out_features).addmm_(low, up.view(out_features, -1).t())


def _down(rows: Tensor, lora_A: Sequence[Tensor]) -> list[Tensor | None]:
    """The products with each lora_A, None where it is empty; one product for matrices that are the same or adjoin."""
    hidden: list[Tensor | None] = [None] * len(lora_A)
    start = 0
    while start < len(lora_A):
        first = lora_A[start]
        rank, end = first.shape[0], first.data_ptr() + first.nbytes
        columns = [(0, rank)]
        for matrix in lora_A[start + 1 :] if rank else ():
            size = matrix.shape[0]
            if matrix.data_ptr() == first.data_ptr() and size == first.shape[0]:
                columns.append((0, size))
            elif matrix.data_ptr() == end and size:
                columns.append((rank, size))
                rank, end = rank + size, end + matrix.nbytes
            else:
                break
        if rank:
            whole = first if rank == first.shape[0] else first.as_strided((rank, first.shape[1]), (first.shape[1], 1))
            product = rows @ whole.t()
            for index, (column, size) in enumerate(columns, start):
                hidden[index] = product[:, column : column + size]
        start += len(columns)
    return hidden


def _mix(rows: Tensor, mixing: Tensor) -> Tensor:
    """Multiply (N, out_features) by a block-diagonal matrix on its columns: each block of b outputs by its (b, b)."""
    width = mixing.numel() // rows.shape[1]
    if width == 1:
        return rows * mixing
    blocks = mixing.view(-1, width, width)
    return torch.einsum("nkj,kij->nki", rows.view(rows.shape[0], -1, width), blocks).reshape(rows.shape)


def _like_linears(x: Tensor, weights: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _register() -> torch.library.Library | None:
    namespace = "flux_hotswap"
    if hasattr(getattr(torch.ops, namespace), "linears"):
        return None  # this file was imported under another package name before: the operators are the same
    library = torch.library.Library(namespace, "FRAGMENT")
    slots = "Tensor[] biases, Tensor[] lora_A, Tensor[] lora_B, Tensor[] mixing"
    scaled = "Tensor x, Tensor rows, Tensor row_scale, Tensor[] weights, Tensor[] weight_scales"
    for name, schema, function, fake in (
        ("linears", f"(Tensor x, Tensor[] weights, {slots}) -> Tensor[]", _linears, _like_linears),
        (
            "scaled_linears",
            f"({scaled}, {slots}) -> Tensor[]",
            _scaled_linears,
            lambda x, rows, row_scale, weights, *_: _like_linears(x, weights),
        ),
        ("add_loras_", f"(Tensor(a!)[] outputs, Tensor x, {slots}) -> ()", _add_loras_, lambda *_: None),
    ):
        library.define(name + schema)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


# The registration lives as long as this object.
_LIBRARY = _register()
