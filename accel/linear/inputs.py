"""What a linear reads, described so that a LoRA beside it can do without the input written out.

A linear with float8 weights reads its input as float8, which is written by the kernel that computes the input. A LoRA
reads it unrounded; but to write it out for that costs as much again, LoRA or not. What the input was computed from is
in memory anyway, so the LoRA's first product starts from there, and nothing is written where no LoRA is bound.

Shapes: b batch, n tokens, k columns of the input (in_features of the linear), r rank of a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .autotune import autotuner

Activation = Literal["none", "gelu_tanh", "silu_gate"]
NONE: Activation = "none"
# GELU in its approximation by tanh, (…, k) -> (…, k).
GELU_TANH: Activation = "gelu_tanh"
# The gate of SwiGLU, silu(x[…, :k]) · x[…, k:], (…, 2 k) -> (…, k). Source: Shazeer, https://arxiv.org/abs/2002.05202.
SILU_GATE: Activation = "silu_gate"

# How an input is computed from its sources: `Columns` by their activation, `Modulated` by this.
Recipe = Literal["none", "gelu_tanh", "silu_gate", "modulated"]
MODULATED: Recipe = "modulated"


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to (…, k), or to the (…, 2 k) of a gate: (…, k), x's dtype; x itself for `NONE`."""
    if activation == GELU_TANH:
        return F.gelu(x, approximate="tanh")
    if activation == SILU_GATE:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    return x


@dataclass(frozen=True)
class Columns:
    """Tensors side by side: ``b n k1``, ``b n k2``, … are one ``b n (k1 + k2 + …)``.

    Attributes:
        parts: one or more, of one dtype.
        activation: still to be applied to the last part; k counts that part as `activate` leaves it.
    """

    parts: tuple[Tensor, ...]
    activation: Activation = NONE

    @property
    def recipe(self) -> Recipe:
        """For `times_lora_A`."""
        return self.activation

    @property
    def sources(self) -> list[Tensor]:
        """For `times_lora_A`."""
        return list(self.parts)

    def after(self, first: Tensor) -> Columns:
        """The same behind one more tensor, ``b n k0``."""
        return Columns((first, *self.parts), self.activation)

    def value(self) -> Tensor:
        """The input itself, ``b n k``."""
        last = activate(self.parts[-1], self.activation)
        return torch.cat([*self.parts[:-1], last], dim=-1) if len(self.parts) > 1 else last


@dataclass(frozen=True)
class Modulated:
    """LayerNorm(hidden_states) · (1 + scale) + shift, the norm without weights of its own.

    Source: adaptive layer norm, Peebles and Xie, https://arxiv.org/abs/2212.09748.

    Attributes:
        hidden_states: ``b n k``.
        mean: ``b n 1`` float32.
        rstd: ``b n 1`` float32, 1 over the standard deviation.
        shift: ``b 1 k``.
        scale: ``b 1 k``.
    """

    hidden_states: Tensor
    mean: Tensor
    rstd: Tensor
    shift: Tensor
    scale: Tensor

    @property
    def recipe(self) -> Recipe:
        """For `times_lora_A`."""
        return MODULATED

    @property
    def sources(self) -> list[Tensor]:
        """For `times_lora_A`."""
        return [self.hidden_states, self.rstd, self.shift, self.scale]

    def value(self) -> Tensor:
        """The input itself, ``b n k``, the dtype of hidden_states; computed in float32."""
        normed = (self.hidden_states.float() - self.mean) * self.rstd
        return (normed * (1 + self.scale.float()) + self.shift.float()).to(self.hidden_states.dtype)


Input = Columns | Modulated


def modulated(hidden_states: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Input:
    """Take a layer norm's statistics in float32.

    Args:
        hidden_states: ``b n k``.
        shift: ``b 1 k``, or ``b n k`` where each token has its own; then the input is written out: what a LoRA's
            first product would have to do to its columns differs from row to row.
        scale: likewise.
        eps: added to the variance.
    """
    variance, mean = torch.var_mean(hidden_states.float(), dim=-1, correction=0, keepdim=True)
    described = Modulated(hidden_states, mean, torch.rsqrt(variance + eps), shift, scale)
    return described if shift.shape[1] == 1 else Columns((described.value(),))


def as_input(x: Tensor | Input) -> Input:
    """A tensor, ``b n k``, is columns of one part."""
    return Columns((x,)) if isinstance(x, Tensor) else x


def times_lora_A(recipe: Recipe, sources: Sequence[Tensor], lora_A: Tensor) -> Tensor:
    """The product of an input with lora_A, from what the input is computed from.

    Args:
        recipe: of the input.
        sources: of the input.
        lora_A: ``r k``, its rows contiguous; the dtype of the input.

    Returns:
        ``(b n) r``, the dtype of lora_A.
    """
    if recipe == MODULATED:
        return _modulated_times_lora_A(*sources, lora_A)
    *before, last = (part.flatten(0, -2) for part in sources)
    widths = [part.shape[1] for part in before]
    *matrices, matrix = lora_A.split([*widths, lora_A.shape[1] - sum(widths)], dim=1)

    def of_the_parts_before() -> Tensor | None:
        product = None
        for part, columns in zip(before, matrices, strict=True):
            product = part @ columns.t() if product is None else product.addmm_(part, columns.t())
        return product

    def separate() -> Tensor:
        product, part = of_the_parts_before(), activate(last, recipe)
        return part @ matrix.t() if product is None else product.addmm_(part, matrix.t())

    if recipe == GELU_TANH and last.is_cuda and last.dtype != torch.float32:
        # The kernel reads rows that follow each other.
        rows, shape = last.contiguous(), (*lora_A.shape, recipe)
        return autotuner().fastest(
            rows,
            shape,
            lambda config: kernels.activated_product(rows, matrix, of_the_parts_before(), recipe, config),
            separate,
            kernels.LORA_A_CONFIGS,
        )
    return separate()


def written_out(recipe: Recipe, sources: Sequence[Tensor]) -> Tensor:
    """An input itself, ``(b n) k``, from what it is computed from; see `times_lora_A`."""
    if recipe == MODULATED:
        hidden_states, *others = sources
        mean = hidden_states.float().mean(dim=-1, keepdim=True)
        value = Modulated(hidden_states, mean, *others).value()
    else:
        value = Columns(tuple(sources), recipe).value()
    return value.flatten(0, -2)


def _modulated_times_lora_A(
    hidden_states: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor, lora_A: Tensor
) -> Tensor:
    """The product without the norm written out: what it does to columns is done to those of lora_A.

    With C taking the mean from what it is multiplied by, and s = 1 + scale: (rstd · (h C) ∘ s + shift) Aᵀ
    = rstd · h (C (A ∘ s)ᵀ) + shift Aᵀ. The mean is taken from lora_A's side, where nothing cancels.
    """
    scaled = lora_A * (1 + scale.float())
    centered = (scaled - scaled.mean(dim=-1, keepdim=True)).to(lora_A.dtype)
    product = torch.matmul(hidden_states, centered.transpose(1, 2))
    constant = shift.float() @ lora_A.float().t()
    return torch.add(product * rstd, constant, out=product).flatten(0, 1)
