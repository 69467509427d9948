"""One matrix product of a linear, and what comes right after it: bias, LoRA, activation.

Shapes: m rows, of all tokens; k in_features, o out_features, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hardware import dtype_name
from ..prove import Verdict, judge, proofs, random
from . import float8, kernels, packed
from .autotune import autotuner
from .inputs import GELU_TANH, NONE, Activation

# Rounding to bfloat16 leaves 0.002. The GELU with erf instead of tanh is 0.0003 away, which would do no harm.
GELU_ERROR = 5e-3
# The activations that a product takes along, in place; all others are part of what the next linear reads. GELU alone
# can be had in the same call from cuBLASLt and from our kernel.
IN_PLACE: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    NONE: lambda output: output,
    GELU_TANH: lambda output: torch.ops.aten.gelu_(output, approximate="tanh"),
}
# Their names, for code that is compiled: its guards are stored, and functions are not.
IN_PRODUCT: tuple[Activation, ...] = tuple(IN_PLACE)


@dataclass(frozen=True)
class Product:
    """x · Wᵀ, of plain matrices or of float8 ones with a scale for each row, and what comes right after it.

    Attributes:
        parts: ``m k1``, ``m k2``, …: x, its columns in one or more tensors.
        weight: ``o k``, packed or not.
        scales: of x's rows, ``m 1``, and of the weight's, ``o 1``, float32; or None. With them x has one part.
        dtype: of the result.
        activation: what the result goes through: a key of `IN_PLACE`.
        out: where it is written, ``m o``; None for a tensor of its own.
    """

    parts: Sequence[Tensor]
    weight: Tensor
    scales: tuple[Tensor, Tensor] | None
    dtype: torch.dtype
    activation: Activation = NONE
    out: Tensor | None = None

    def linear(self, bias: Tensor | None, parts: int | None = None) -> Tensor:
        """The product with the bias added, ``m o``.

        Args:
            bias: ``o``; None for nothing.
            parts: how many of x's parts are multiplied, from the first on; None for all.
        """
        if self.scales is not None:
            operands = float8.Operands(self.parts[0], self.weight, *self.scales, bias, self.dtype, self.out)
            return float8.multiply(operands)
        if self._is_one_row_on_a_cpu():
            twice = replace(self, parts=[part.repeat(2, 1) for part in self.parts], out=None)
            output = twice.linear(bias, parts)[:1]
            return output if self.out is None else self.out.copy_(output)
        if packed.is_packed(self.weight):
            output = packed.multiply(self.parts[0], self.weight, bias)
            return output if self.out is None else self.out.copy_(output)
        (first, weight), *others = list(zip(self.parts, self._weights(), strict=True))[:parts]
        if bias is None:
            output = torch.mm(first, weight.t(), out=self.out)
        else:
            output = torch.addmm(bias, first, weight.t(), out=self.out)
        for part, weight in others:
            output.addmm_(part, weight.t())
        return output

    def activate_(self, output: Tensor) -> Tensor:
        """Apply the activation in place."""
        return IN_PLACE[self.activation](output)

    def without_lora(self, bias: Tensor | None) -> Tensor:
        """The result, ``m o``, where no LoRA is bound."""
        if bias is not None and self._gelu_fuses():
            return _product_with_gelu(bias, self.parts[0], self.weight)
        return self.activate_(self.linear(bias))

    def with_lora(self, bias: Tensor | None, hidden: Tensor, lora_B: Tensor) -> Tensor:
        """The result, ``m o``, with a LoRA: hidden, ``m r``, is the product of x with its lora_A, lora_B is ``o r``."""

        def separate() -> Tensor:
            return self.activate_(self.linear(bias).addmm_(hidden, lora_B.t()))

        def fused(config: kernels.Config) -> Tensor:
            added, out = bias, self.out
            if len(self.parts) > 1:
                added = out = self.linear(bias, len(self.parts) - 1)
            part, weight = self.parts[-1], self._weights()[-1]
            return kernels.fused_linear(part, weight, added, hidden, lora_B, self.scales, config, self.activation, out)

        if not self.parts[0].is_cuda or self.dtype == torch.float32:
            return separate()
        shape = (*(part.shape[1] for part in self.parts), *lora_B.shape, self.activation, bias is None)
        return autotuner().fastest(self.parts[0], shape, fused, separate)

    def _is_one_row_on_a_cpu(self) -> bool:
        """Whether it is multiplied as two rows: one of bfloat16, as a picture's modulations are, see `packed`."""
        x = self.parts[0]
        one = len(x) == 1 and x.device.type == "cpu" and x.dtype == torch.bfloat16
        return one and packed.one_row_differs()

    def _gelu_fuses(self) -> bool:
        """Whether GELU is to be applied by the call that multiplies and adds the bias."""
        x = self.parts[0]
        plain = self.scales is None and len(self.parts) == 1 and self.out is None
        return plain and self.activation == GELU_TANH and x.is_cuda and gelu_fuses(x.device, x.dtype)

    def _weights(self) -> Sequence[Tensor]:
        if len(self.parts) == 1:
            return [self.weight]
        return self.weight.split([part.shape[1] for part in self.parts], dim=1)


@functools.cache
def gelu_fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product with bias and GELU (tanh) in one call proved itself on a device."""
    subject = f"product with GELU, {dtype_name(dtype)}"
    return proofs().of(subject, device, functools.partial(_compare_gelu, device, dtype)).refusal is None


def _product_with_gelu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    # cuBLASLt applies it before it writes. On CUDA this operator's GELU is that of tanh, elsewhere it is not:
    # torch/_decomp/decompositions.py, _addmm_activation().
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _compare_gelu(device: torch.device, dtype: torch.dtype) -> Verdict:
    x, weight, bias = (
        random(shape, device, seed, scale).to(dtype)
        for seed, (shape, scale) in enumerate((((134, 512), 1.0), ((384, 512), 512**-0.5), ((384,), 1.0)))
    )
    product = torch.addmm(bias.float(), x.float(), weight.float().t())
    return judge(_product_with_gelu(bias, x, weight), F.gelu(product, approximate="tanh"), GELU_ERROR)
