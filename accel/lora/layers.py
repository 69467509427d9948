"""A linear with a place for a LoRA beside it, and the operators that compute several of them over one input.

The arithmetic is a custom operator, opaque to torch.compile, for three reasons: it looks at the bound tensors when it
runs, so a linear that no LoRA touches costs nothing; lora_A products of linears that read the same input become one;
and the LoRA is accumulated into the linear's output in place, where separate layers write it out and read it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The tensors that a LoRA binds to a linear, in the order of `LoraLinear.slots`.
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
        layers: one or more.

    Returns:
        One (…, out_features) per layer.
    """
    slots = [[getattr(layer, slot) for layer in layers] for slot in SLOTS]
    if all(is_plain(layer.base) for layer in layers):
        weights = [layer.base.weight for layer in layers]
        return torch.ops.flux_hotswap.linears(x, weights, [layer.base.bias for layer in layers], *slots)
    outputs = [layer.base(x) for layer in layers]
    torch.ops.flux_hotswap.add_loras_(outputs, x, [layer.base.bias for layer in layers], *slots)
    return outputs


def is_plain(base: nn.Module) -> bool:
    """Whether a linear holds an ordinary weight, which the operator may multiply by itself."""
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter


def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    mixing: Sequence[Tensor],
) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    hidden = _down(rows, lora_A)
    outputs = []
    for weight, bias, up, mix, low in zip(weights, biases, lora_B, mixing, hidden, strict=True):
        if mix.numel():
            output = _mix(F.linear(rows, weight), mix).add_(bias)
        else:
            output = F.linear(rows, weight, bias)
        if low is not None:
            output.addmm_(low, up.view(weight.shape[0], -1).t())
        outputs.append(output.view(*x.shape[:-1], weight.shape[0]))
    return outputs


def _linears_meta(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    mixing: Sequence[Tensor],
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


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
        rank, step = first.shape[0], first.nbytes
        stop, columns = start + 1, [(0, rank)]
        while stop < len(lora_A) and rank:
            offset, size = lora_A[stop].data_ptr() - first.data_ptr(), lora_A[stop].shape[0]
            if offset == 0 and size == columns[0][1]:
                columns.append((0, size))
            elif offset == step and size:
                columns.append((rank, size))
                rank, step = rank + size, step + lora_A[stop].nbytes
            else:
                break
            stop += 1
        if rank:
            whole = first if rank == first.shape[0] else first.as_strided((rank, first.shape[1]), (first.shape[1], 1))
            product = rows @ whole.t()
            for index, (column, size) in zip(range(start, stop), columns, strict=True):
                hidden[index] = product[:, column : column + size]
        start = stop
    return hidden


def _mix(rows: Tensor, mixing: Tensor) -> Tensor:
    """Multiply (N, out_features) by a block-diagonal matrix on its columns: each block of b outputs by its (b, b)."""
    width = mixing.numel() // rows.shape[1]
    if width == 1:
        return rows * mixing
    blocks = mixing.view(-1, width, width)
    return torch.einsum("nkj,kij->nki", rows.view(rows.shape[0], -1, width), blocks).reshape(rows.shape)


def _register() -> torch.library.Library | None:
    namespace = "flux_hotswap"
    if hasattr(getattr(torch.ops, namespace), "linears"):
        return None  # this file was imported under another package name before: the operators are the same
    library = torch.library.Library(namespace, "FRAGMENT")
    slots = "Tensor[] biases, Tensor[] lora_A, Tensor[] lora_B, Tensor[] mixing"
    library.define(f"linears(Tensor x, Tensor[] weights, {slots}) -> Tensor[]")
    library.define(f"add_loras_(Tensor(a!)[] outputs, Tensor x, {slots}) -> ()")
    library.impl("linears", _linears, "CompositeExplicitAutograd")
    library.impl("add_loras_", _add_loras_, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::linears", _linears_meta, lib=library)
    torch.library.register_fake(f"{namespace}::add_loras_", lambda *_: None, lib=library)
    return library


# The registration lives as long as this object.
_LIBRARY = _register()
