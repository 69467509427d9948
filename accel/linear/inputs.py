"""What a linear reads, described so that a LoRA beside it can do without the input written out.

A linear with float8 weights reads its input as float8, which is written by the kernel that computes the input. A LoRA
reads it unrounded; but to write it out for that costs as much again, LoRA or not. What the input was computed from is
in memory anyway, so the LoRA's first product starts from there, and nothing is written where no LoRA is bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels

PLAIN, GELU, MODULATED = "plain", "gelu", "modulated"


@dataclass(frozen=True)
class Columns:
    """Tensors side by side: (…, K₁), (…, K₂), … are one (…, K₁ + K₂ + …).

    Attributes:
        parts: one or more.
        gelu: the last part has yet to go through GELU (tanh).
    """

    parts: tuple[Tensor, ...]
    gelu: bool = False

    @property
    def recipe(self) -> str:
        """For `down`."""
        return GELU if self.gelu else PLAIN

    @property
    def sources(self) -> list[Tensor]:
        """For `down`."""
        return list(self.parts)

    def after(self, first: Tensor) -> Columns:
        """The same behind one more tensor."""
        return Columns((first, *self.parts), self.gelu)

    def value(self) -> Tensor:
        """The input itself."""
        last = F.gelu(self.parts[-1], approximate="tanh") if self.gelu else self.parts[-1]
        return torch.cat([*self.parts[:-1], last], dim=-1) if len(self.parts) > 1 else last


@dataclass(frozen=True)
class Modulated:
    """LayerNorm(hidden_states) · (1 + scale) + shift, the norm without weights of its own.

    Attributes:
        hidden_states: (B, N, H).
        mean: (B, N, 1) float32.
        rstd: (B, N, 1) float32, 1 over the standard deviation.
        shift: (B, 1, H).
        scale: (B, 1, H).
    """

    hidden_states: Tensor
    mean: Tensor
    rstd: Tensor
    shift: Tensor
    scale: Tensor

    @property
    def recipe(self) -> str:
        """For `down`."""
        return MODULATED

    @property
    def sources(self) -> list[Tensor]:
        """For `down`."""
        return [self.hidden_states, self.rstd, self.shift, self.scale]

    def value(self) -> Tensor:
        """The input itself."""
        normed = (self.hidden_states.float() - self.mean) * self.rstd
        return (normed * (1 + self.scale.float()) + self.shift.float()).to(self.hidden_states.dtype)


Input = Columns | Modulated


def modulated(hidden_states: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Modulated:
    """Take a layer norm's statistics over (B, N, H); see `Modulated`."""
    variance, mean = torch.var_mean(hidden_states.float(), dim=-1, correction=0, keepdim=True)
    return Modulated(hidden_states, mean, torch.rsqrt(variance + eps), shift, scale)


def as_input(x: Tensor | Input) -> Input:
    """A tensor is columns of one part."""
    return Columns((x,)) if isinstance(x, Tensor) else x


def down(recipe: str, sources: Sequence[Tensor], lora_A: Tensor) -> Tensor:
    """The product of an input with lora_A, from what the input is computed from.

    Args:
        recipe: of the input.
        sources: of the input.
        lora_A: (rank, K).

    Returns:
        (rows, rank), the dtype of lora_A.
    """
    if recipe == MODULATED:
        return _modulated_down(*sources, lora_A)
    *before, last = (part.flatten(0, -2) for part in sources)
    *matrices, matrix = lora_A.split([part.shape[-1] for part in sources], dim=1)

    def start() -> Tensor | None:
        product = None
        for part, columns in zip(before, matrices, strict=True):
            product = part @ columns.t() if product is None else product.addmm_(part, columns.t())
        return product

    def separate() -> Tensor:
        product, part = start(), F.gelu(last, approximate="tanh") if recipe == GELU else last
        return part @ matrix.t() if product is None else product.addmm_(part, matrix.t())

    if recipe == GELU and last.is_cuda and last.dtype != torch.float32:
        # The kernel reads rows that follow each other.
        rows, shape = last.contiguous(), (*lora_A.shape, GELU)
        return kernels.fastest(
            rows,
            shape,
            lambda config: kernels.gelu_product(rows, matrix, start(), config),
            separate,
            kernels.NARROW_CONFIGS,
        )
    return separate()


def written_out(recipe: str, sources: Sequence[Tensor]) -> Tensor:
    """An input itself, (rows, K), from what it is computed from; see `down`."""
    if recipe == MODULATED:
        hidden_states, *others = sources
        mean = hidden_states.float().mean(dim=-1, keepdim=True)
        value = Modulated(hidden_states, mean, *others).value()
    else:
        value = Columns(tuple(sources), gelu=recipe == GELU).value()
    return value.flatten(0, -2)


def _modulated_down(hidden_states: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor, lora_A: Tensor) -> Tensor:
    """The product without the norm written out: what it does to columns is done to those of lora_A.

    With C taking the mean from what it is multiplied by, and s = 1 + scale: (rstd · (h C) ∘ s + shift) Aᵀ
    = rstd · h (C (A ∘ s)ᵀ) + shift Aᵀ. The mean is taken from lora_A's side, where nothing cancels.
    """
    scaled = lora_A * (1 + scale.float())
    centered = (scaled - scaled.mean(dim=-1, keepdim=True)).to(lora_A.dtype)
    product = torch.matmul(hidden_states, centered.transpose(1, 2))
    constant = shift.float() @ lora_A.float().t()
    return torch.add(product * rstd, constant, out=product).flatten(0, 1)
